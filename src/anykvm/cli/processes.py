"""The processes of this machine that hold KVM descriptors, as /proc shows them (proc(5)).

Linux's KVM is /dev/kvm and anonymous inodes, ours is memfds of the same names. Linux's anonymous
inodes are all one inode, so its VMs are counted by descriptor; ours by inode.
"""

from __future__ import annotations

import os
import pwd
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
LINKS = (
    ("soft", re.compile(r"/memfd:(kvm|kvm-vm|kvm-vcpu:\d+) \(deleted\)")),
    ("host", re.compile(r"/dev/(kvm)")),
    ("host", re.compile(r"anon_inode:(kvm-vm|kvm-vcpu:\d+)")),
)
"""How the descriptors of each backend read in /proc/PID/fd."""

GUEST_MEMORY = re.compile(r"/memfd:(guest|pc\.|ram|mem).*")
NEVER_GUEST_MEMORY = re.compile(r"\[.*\]|/memfd:kvm.*|/dev/kvm|anon_inode:.*")


class Descriptor(NamedTuple):
    """One KVM descriptor: its number, backend, name (`kvm`, `kvm-vm`, `kvm-vcpu:N`), inode."""

    fd: int
    backend: str
    name: str
    inode: int


@dataclass(frozen=True)
class KvmProcess:
    """One process that holds KVM descriptors. `memory` is its guests', in bytes, at best effort."""

    pid: int
    user: str
    command: str
    backend: str
    vms: int
    vcpus: int
    threads: tuple[str, ...]
    memory: int
    descriptors: tuple[Descriptor, ...]


class Census(NamedTuple):
    """Who was found, and how many processes could not be looked into."""

    processes: list[KvmProcess]
    unreadable: int


def census(proc: Path = PROC) -> Census:
    """Look into every process that this user may see."""
    found: list[KvmProcess] = []
    unreadable = 0
    for folder in sorted(process_folders(proc), key=lambda path: int(path.name)):
        try:
            descriptors = tuple(_descriptors(folder / "fd"))
            if descriptors:
                found.append(_describe(folder, descriptors))
        except PermissionError:
            unreadable += 1
        except (FileNotFoundError, ProcessLookupError):
            continue  # It ended while we were looking.
    return Census(found, unreadable)


def process_folders(proc: Path) -> Iterator[Path]:
    return (path for path in proc.iterdir() if path.name.isdigit())


def _descriptors(folder: Path) -> Iterator[Descriptor]:
    for path in sorted(folder.iterdir(), key=lambda path: int(path.name)):
        try:
            target = os.readlink(path)
        except FileNotFoundError:
            continue  # Closed while we were looking.
        for backend, pattern in LINKS:
            match = pattern.fullmatch(target)
            if match:
                yield Descriptor(int(path.name), backend, match.group(1), _inode(path))


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return 0


def _describe(folder: Path, descriptors: tuple[Descriptor, ...]) -> KvmProcess:
    vms = _count(descriptors, "kvm-vm")
    return KvmProcess(
        pid=int(folder.name),
        user=_user(folder.stat().st_uid),
        command=command_line(folder),
        backend="+".join(sorted({d.backend for d in descriptors})),
        vms=vms,
        vcpus=_count(descriptors, "kvm-vcpu:"),
        threads=_threads(folder / "task"),
        memory=guest_memory((folder / "maps").read_text()) if vms else 0,
        descriptors=descriptors,
    )


def _count(descriptors: tuple[Descriptor, ...], prefix: str) -> int:
    chosen = [d for d in descriptors if d.name.startswith(prefix)]
    ours = {d.inode for d in chosen if d.backend == "soft"}
    return len(ours) + sum(d.backend == "host" for d in chosen)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def command_line(folder: Path) -> str:
    words = (folder / "cmdline").read_bytes().split(b"\0")
    text = b" ".join(words).decode(errors="replace").strip()
    return text or f"[{(folder / 'comm').read_text().strip()}]"


def _threads(folder: Path) -> tuple[str, ...]:
    tasks = sorted(folder.iterdir(), key=lambda path: int(path.name))
    names: list[str] = []
    for task in tasks:
        try:
            names.append((task / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):
            continue  # A thread that has just ended.
    return tuple(names)


def guest_memory(maps: str) -> int:
    """Bytes of guest memory by /proc/PID/maps: memfds named for it, else the largest mapping that
    is private or shared memory without a file. A guess: nothing tells which mapping a slot uses."""
    named: dict[str, int] = {}
    largest = 0
    for line in maps.splitlines():
        addresses, permissions, _, _, inode, *rest = line.split(maxsplit=5)
        path = rest[0] if rest else ""
        low, high = (int(address, 16) for address in addresses.split("-"))
        if "w" not in permissions or NEVER_GUEST_MEMORY.fullmatch(path):
            continue
        if GUEST_MEMORY.fullmatch(path):
            named[f"{path} {inode}"] = max(named.get(f"{path} {inode}", 0), high - low)
        elif not path or path.startswith(("/memfd:", "/dev/zero")):
            largest = max(largest, high - low)
    return sum(named.values()) or largest
