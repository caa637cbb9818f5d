"""What a case is, and what cases make use of: a folder, Linux, the guest's shell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .disk import make_qcow2, make_raw
from .linux import COMMAND_LINE, PROMPT, Linux, obtain
from .process import CaseError, Console
from .qemu import Machine


@dataclass
class Workshop:
    """A folder for one run's files, and the accelerator; Linux, obtained when asked."""

    folder: Path
    accel: str = "kvm"
    limit: float = 240.0

    @functools.cached_property
    def linux(self) -> Linux:
        return obtain(self.folder)

    @functools.cached_property
    def disk(self) -> Path:
        return make_raw(self.folder / "disk.raw")

    def qcow2(self) -> Path:
        """The same disk, new, with room for snapshots."""
        return make_qcow2(self.folder / "disk.qcow2", self.disk)

    def socket(self, name: str) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path

    def start(self, machine: Machine, *options: str | Path) -> Console:
        return machine.start(options, self.limit, self.accel)

    def boot_linux(
        self, machine: Machine, *options: str | Path, line: str = COMMAND_LINE
    ) -> Console:
        files = ("-kernel", self.linux.kernel, "-initrd", self.linux.initrd)
        return self.start(machine, *files, "-append", line, *options)


@dataclass(frozen=True)
class Case:
    """A name and a function that raises CaseError, or OSError, where the VMM fails."""

    name: str
    run: Callable[[Workshop], None]


def check(holds: bool, complaint: str) -> None:
    if not holds:
        raise CaseError(complaint)


def say(console: Console, line: str) -> str:
    """A line for the guest's shell: what it prints. The shell's echo has the marks in quotes."""
    console.send(f"echo '<''<'; {line}; echo '>''>'\n")
    console.expect("<<")
    printed = console.expect(">>").removesuffix(">>").strip()
    console.expect(PROMPT)
    return printed


def load(console: Console, modules: str) -> None:
    """A group of linux.MODULES into the guest's kernel."""
    said = say(console, f"for m in $(cat /modules/{modules}); do insmod $m; done")
    check("insmod" not in said, said)


def count(console: Console, line: str) -> int:
    """A line for the guest's shell that prints a number."""
    said = say(console, line)
    check(said.isdigit(), f"{line}: {said!r} is not a number")
    return int(said)
