"""The mappings of a process: /proc/PID/maps, see proc(5)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

PROT_BITS = {"r": 1, "w": 2, "x": 4}


class Vma(NamedTuple):
    """A line of /proc/PID/maps, or a part of it."""

    start: int
    end: int
    perms: str
    offset: int
    device: int
    inode: int
    path: str

    @property
    def prot(self) -> int:
        return sum(bit for letter, bit in PROT_BITS.items() if letter in self.perms)

    @property
    def shared(self) -> bool:
        return "s" in self.perms

    @property
    def key(self) -> tuple[int, int]:
        """Of the file behind it, as fstat gives it."""
        return self.device, self.inode

    def clipped(self, start: int, end: int) -> Vma:
        """The part inside a range."""
        first = max(self.start, start)
        offset = self.offset + first - self.start
        return self._replace(start=first, end=min(self.end, end), offset=offset)


def areas(pid: int) -> Iterator[Vma]:
    """The mappings of a process, in order."""
    with open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps.read().decode(errors="surrogateescape").splitlines():
            yield _vma(line)


def vmas(pid: int, start: int, end: int) -> list[Vma]:
    """The mappings of a range, clipped to it."""
    inside = (area for area in areas(pid) if area.start < end and start < area.end)
    return [area.clipped(start, end) for area in inside]


def _vma(line: str) -> Vma:
    addresses, perms, offset, device, inode, *path = line.split(maxsplit=5)
    low, high = addresses.split("-")
    major, minor = device.split(":")
    number = os.makedev(int(major, 16), int(minor, 16))
    return Vma(
        int(low, 16), int(high, 16), perms, int(offset, 16), number, int(inode), *path or [""]
    )
