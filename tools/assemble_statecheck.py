"""Assemble the guest of the save and restore tests: tests/guests/statecheck.s to statecheck.elf.

    assemble_statecheck.py [--check]

LLVM assembles, as for the demo (assemble_demo.py); one segment that can be read, written and
executed makes a static ELF program of it. With `--check` nothing is written: the exit status is 1
when the committed file is not what the source gives.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path

from assemble_demo import assemble

FOLDER = Path(__file__).resolve().parent.parent / "tests/guests"
SOURCE, BINARY = FOLDER / "statecheck.s", FOLDER / "statecheck.elf"
ELF_HEADER, PROGRAM_HEADER = struct.Struct("<HHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ")
BASE, MEMORY_SIZE = 0x400000, 0x200000
IDENTITY = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64-bit, little endian, version 1
HEADERS_SIZE = 64 + PROGRAM_HEADER.size
EXECUTABLE, X86_64, LOAD, READ_WRITE_EXECUTE = 2, 62, 1, 7


def program(code: bytes) -> bytes:
    """A static program that begins at the first byte of `code`."""
    entry, size = BASE + HEADERS_SIZE, HEADERS_SIZE + len(code)
    header = ELF_HEADER.pack(EXECUTABLE, X86_64, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = PROGRAM_HEADER.pack(
        LOAD, READ_WRITE_EXECUTE, 0, BASE, BASE, size, MEMORY_SIZE, 0x1000
    )
    return IDENTITY + header + segment + code


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    made = program(assemble(SOURCE))
    if parser.parse_args().check:
        if BINARY.is_file() and BINARY.read_bytes() == made:
            return 0
        print(f"{BINARY.name} is not what {SOURCE.name} gives: run tools/assemble_statecheck.py")
        return 1
    BINARY.write_bytes(made)
    BINARY.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main())
