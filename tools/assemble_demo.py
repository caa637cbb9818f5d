"""Assemble the demo's guest: `src/anykvm/vmm/demo/guest.s` to `guest.bin` beside it.

    assemble_demo.py [--check]

LLVM assembles; the one section is put at the address that the source calls ORIGIN. With `--check`
nothing is written: the exit status is 1 when the committed file is not what the source gives.
"""

from __future__ import annotations

import argparse
import io
import sys
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import llvmlite.binding as llvm
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

FOLDER = Path(__file__).resolve().parent.parent / "src/anykvm/vmm/demo"
SOURCE, BINARY = FOLDER / "guest.s", FOLDER / "guest.bin"
TRIPLE = "x86_64-unknown-none-elf"
SYNTAX = ".intel_syntax noprefix"
ORIGIN = "ORIGIN"


@dataclass(frozen=True)
class Relocation:
    """A row: how wide the field is, in bytes, and whether it counts from its own place."""

    size: int
    relative: bool = False


# By number, as the System V ABI's x86-64 supplement has them.
RELOCATIONS = {
    1: Relocation(8),  # R_X86_64_64
    2: Relocation(4, relative=True),  # R_X86_64_PC32
    10: Relocation(4),  # R_X86_64_32
    11: Relocation(4),  # R_X86_64_32S
    12: Relocation(2),  # R_X86_64_16
}


def emit_object(source: str) -> bytes:
    """The object file. LLVM ends the process on a line that it does not understand."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.initialize_native_asmparser()
    machine = llvm.Target.from_triple(TRIPLE).create_target_machine()
    escaped = (line.replace("\\", "\\5C").replace('"', "\\22") for line in source.splitlines())
    module = "".join(f'module asm "{line}"\n' for line in (SYNTAX, *escaped))
    return bytes(machine.emit_object(llvm.parse_assembly(module)))


def link(content: bytes) -> bytes:
    """The section's bytes for its address. Raises ValueError for what has none."""
    elf = ELFFile(io.BytesIO(content))
    (text,) = (n for n, s in enumerate(elf.iter_sections()) if s.name == ".text")
    code = bytearray(elf.get_section(text).data())
    (symbols,) = (s for s in elf.iter_sections() if isinstance(s, SymbolTableSection))
    (origin,) = (s["st_value"] for s in symbols.iter_symbols() if s.name == ORIGIN)
    tables = (s for s in elf.iter_sections() if isinstance(s, RelocationSection))
    for entry in chain.from_iterable(table.iter_relocations() for table in tables):
        symbol = symbols.get_symbol(entry["r_info_sym"])
        if symbol["st_shndx"] != text:
            raise ValueError(f"{symbol.name} is not defined in the section")
        row = RELOCATIONS[entry["r_info_type"]]
        place = entry["r_offset"]
        value = symbol["st_value"] + entry["r_addend"] + (-place if row.relative else origin)
        code[place : place + row.size] = value.to_bytes(row.size, "little", signed=row.relative)
    return bytes(code)


def assemble(path: Path = SOURCE) -> bytes:
    """The guest's memory from ORIGIN on."""
    return link(emit_object(path.read_text()))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    made = assemble()
    if parser.parse_args().check:
        if BINARY.is_file() and BINARY.read_bytes() == made:
            return 0
        print(f"{BINARY.name} is not what {SOURCE.name} gives: run tools/assemble_demo.py")
        return 1
    BINARY.write_bytes(made)
    return 0


if __name__ == "__main__":
    sys.exit(main())
