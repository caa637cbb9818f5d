"""QEMU's own translator (TCG), to compare with: where it is, and how it is started."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "qemu-system-x86_64"
ABSENT = (
    f"{PROGRAM} is not installed, so there is nothing to compare with "
    "(Debian: apt-get install qemu-system-x86)"
)


def command(
    *options: str | Path, machine: str = "pc", memory: int, accel: str = "tcg"
) -> list[str] | None:
    """A command line: one vCPU, `memory` MiB, no default device. None where there is no QEMU."""
    program = shutil.which(PROGRAM)
    if program is None:
        return None
    common = ("-accel", accel, "-M", machine, "-m", str(memory), "-smp", "1")
    quiet = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
    return [program, *common, *quiet, *(str(option) for option in options)]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns: the first to the left, the others to the right."""
    widths = [max(len(row[n]) for row in (heads, *rows)) for n in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (heads, *rows)
    )
