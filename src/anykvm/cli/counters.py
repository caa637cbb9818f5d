"""The counters of every VM of anykvm's on this machine, through /proc.

The statistics of a VM and of its vCPUs are memfds of the process that runs them (kvm/binary_stats),
which whoever may open that process's descriptors can read while it runs.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from anykvm.api.stats import Stats, StatsFd
from anykvm.cli.processes import PROC, command_line, process_folders

LINK = re.compile(r"/memfd:(kvm-vm-stats|kvm-vcpu-stats:\d+) \(deleted\)")
VM_ID = re.compile(r"kvm-(\d+)(-\d+)?")
Inode = tuple[int, int]


@dataclass
class StatsFile:
    """One object's statistics: where they can be opened, and which processes hold them."""

    path: Path
    holders: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class VmSample:
    """A VM's counters and those of its vCPUs in order, read at one moment."""

    id: str
    pid: int
    command: str
    stats: Stats
    vcpus: tuple[Stats, ...]


class Sample(NamedTuple):
    """All VMs found, when (time.monotonic), and how many processes could not be looked into."""

    moment: float
    vms: tuple[VmSample, ...]
    unreadable: int


def take_sample(pids: Collection[int] = (), proc: Path = PROC) -> Sample:
    """Read what there is, or only the VMs of these processes."""
    files, unreadable = _find(proc)
    found = [(file, stats) for file in files if (stats := _read(file.path)) is not None]
    vms = (_vm(file, stats, found, proc) for file, stats in found if VM_ID.fullmatch(stats.id))
    chosen = (vm for vm, holders in vms if not pids or {vm.pid, *holders} & set(pids))
    return Sample(time.monotonic(), tuple(sorted(chosen, key=lambda vm: vm.id)), unreadable)


def _find(proc: Path) -> tuple[list[StatsFile], int]:
    """Every statistics file once, though several descriptors and processes have it."""
    files: dict[Inode, StatsFile] = {}
    unreadable = 0
    for folder in process_folders(proc):
        try:
            for inode, path in _links(folder / "fd"):
                files.setdefault(inode, StatsFile(path)).holders.add(int(folder.name))
        except PermissionError:
            unreadable += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended while we were looking.
    return list(files.values()), unreadable


def _links(folder: Path) -> Iterator[tuple[Inode, Path]]:
    for path in folder.iterdir():
        try:
            if LINK.fullmatch(os.readlink(path)):
                status = path.stat()
                yield (status.st_dev, status.st_ino), path
        except FileNotFoundError:
            continue  # Closed while we were looking.


def _read(path: Path) -> Stats | None:
    """The values now; None where it has gone meanwhile, is not ours to open, or no statistics."""
    try:
        with StatsFd(os.open(path, os.O_RDONLY | os.O_CLOEXEC)) as descriptor:
            return descriptor.read()
    except (FileNotFoundError, ProcessLookupError, PermissionError, ValueError):
        return None


def _vm(
    file: StatsFile, stats: Stats, found: list[tuple[StatsFile, Stats]], proc: Path
) -> tuple[VmSample, set[int]]:
    """The VM of one file among all, and who holds it."""
    prefix = f"{stats.id}/vcpu-"
    vcpus = [s for f, s in found if s.id.startswith(prefix) and f.holders & file.holders]
    vcpus.sort(key=lambda s: int(s.id.removeprefix(prefix)))
    match = VM_ID.fullmatch(stats.id)
    assert match is not None
    pid = int(match[1])
    command = next((c for p in (pid, *file.holders) if (c := _command(proc / str(p)))), "")
    return VmSample(stats.id, pid, command, stats, tuple(vcpus)), file.holders


def _command(folder: Path) -> str:
    try:
        return command_line(folder)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""
