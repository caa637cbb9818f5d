"""Assemble cpucheck: `tests/guests/cpucheck.asm` to `cpucheck.bin` beside it, with nasm.

    assemble_cpucheck.py [--check]

With `--check` nothing is written: the exit status is 1 when the committed image is not what the
source gives.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tests/guests"
SOURCE, IMAGE = FOLDER / "cpucheck.asm", FOLDER / "cpucheck.bin"
QUIET = "-w-number-overflow"  # 16-bit offsets are the image's, whose origin is 0xf0000


def assemble() -> bytes:
    """The image. SystemExit where there is no nasm."""
    nasm = shutil.which("nasm")
    if nasm is None:
        raise SystemExit("nasm is not installed (Debian: apt-get install nasm)")
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "cpucheck.bin"
        subprocess.run([nasm, "-f", "bin", QUIET, "-o", made, SOURCE], check=True, timeout=60)
        return made.read_bytes()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check = parser.parse_args().check
    made = assemble()
    if not check:
        IMAGE.write_bytes(made)
    elif IMAGE.read_bytes() != made:
        print(f"{IMAGE.name} is not what {SOURCE.name} gives: run tools/assemble_cpucheck.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
