"""What /proc tells of a client: which of its pages exist, its threads (proc(5))."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator
from pathlib import Path

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
PRESENT_OR_SWAPPED = 3 << 62
ENTRIES = 1 << 16  # of pagemap, at a time
GROUP = 512 * 8  # bytes of pagemap for 2 MiB
NOTHING = bytes(GROUP)


def populated(pid: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Runs of pages in an anonymous range that have been touched: (first address, end)."""
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for at in range(start, end, ENTRIES << PAGE_SHIFT):
            count = min(ENTRIES, (end - at) >> PAGE_SHIFT)
            yield from _runs(at, os.pread(fd, count * 8, at >> PAGE_SHIFT << 3))
    finally:
        os.close(fd)


def _runs(at: int, raw: bytes) -> Iterator[tuple[int, int]]:
    for group in range(0, len(raw), GROUP):
        part = raw[group : group + GROUP]
        if part == NOTHING[: len(part)]:
            continue
        first = at + (group >> 3 << PAGE_SHIFT)
        start = None
        for index, entry in enumerate(array("Q", part)):
            there = entry & PRESENT_OR_SWAPPED
            if there and start is None:
                start = index
            elif not there and start is not None:
                yield first + (start << PAGE_SHIFT), first + (index << PAGE_SHIFT)
                start = None
        if start is not None:
            yield first + (start << PAGE_SHIFT), first + (len(part) >> 3 << PAGE_SHIFT)


def threads(pid: int) -> list[int]:
    """Of a process; none where it has ended."""
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except (FileNotFoundError, ProcessLookupError):
        return []


def state(tid: int) -> str:
    """R, S, D, T, …: proc(5). Empty where it has ended."""
    try:
        return Path(f"/proc/{tid}/stat").read_bytes().rpartition(b") ")[2][:1].decode()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def status(tid: int) -> dict[str, str]:
    """The lines of /proc/TID/status."""
    text = Path(f"/proc/{tid}/status").read_text(errors="replace")
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)
