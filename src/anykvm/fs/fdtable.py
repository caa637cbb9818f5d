"""Descriptors and the files behind them (`fs/file.c`).

Descriptors are real ones, of memfds, and a file is found by the inode behind a descriptor. So
whatever the program does to duplicate or pass one (`os.dup`, `dup2`, SCM_RIGHTS, fork) resolves.

Each descriptor that we handed out holds a reference. One that was made behind our back is found
when the last known one is closed, by looking through /proc/self/fd, and takes its place. What
cannot be seen is `os.close` of a descriptor of ours: the file then lives until the next `close` of
another descriptor of it, or until `exit_files`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from anykvm.fs.file import File, fput, get_file, get_file_unless_zero
from anykvm.fs.mapping import Memfd, inode_key
from anykvm.fs.task import current

Key = tuple[int, int]


@dataclass
class _Entry:
    file: File
    fds: set[int] = field(default_factory=set)


class FdTable:
    """The files of this process by the inode of their memfd."""

    def __init__(self) -> None:
        self._entries: dict[Key, _Entry] = {}
        self._lock = threading.RLock()

    def install(self, memfd: Memfd, file: File) -> int:
        """Make `memfd`'s descriptor stand for `file` and take over the caller's reference."""
        file.f_memfd = memfd
        with self._lock:
            self._entries[memfd.key] = _Entry(file, {memfd.fd})
        return memfd.fd

    def fget(self, fd: int) -> File | None:
        """The file behind `fd` with a reference to it; None where it is none of ours. EBADF."""
        status = os.fstat(fd)
        entry = self._entries.get((status.st_dev, status.st_ino))
        if entry is None or not get_file_unless_zero(entry.file):
            return None
        return entry.file

    def dup(self, fd: int, inheritable: bool = False) -> int:
        """A second descriptor of the same file, counted where it is ours."""
        with self._lock:
            new = os.dup(fd)
            os.set_inheritable(new, inheritable)
            entry = self._entries.get(inode_key(new))
            if entry is not None:
                get_file(entry.file)
                entry.fds.add(new)
        return new

    def close(self, fd: int) -> list[File]:
        """Close `fd`: the references that the caller must now give back, one or more.

        A descriptor that is none of ours, or that we never counted, is closed and gives none.
        """
        with self._lock:
            key = inode_key(fd)
            entry = self._entries.get(key)
            known = set() if entry is None else set(entry.fds)
            os.close(fd)
            if entry is None or not (fd in known or self._open(entry.fds, key) == set()):
                return []
            return self._forget(key, entry, fd)

    def _forget(self, key: Key, entry: _Entry, fd: int) -> list[File]:
        before = len(entry.fds)
        entry.fds.discard(fd)
        entry.fds &= self._open(entry.fds, key)
        if not entry.fds:
            entry.fds |= set(_descriptors_of(key))
        if not entry.fds:
            del self._entries[key]
        gone = before - len(entry.fds)
        for _ in range(-gone):
            get_file(entry.file)
        return [entry.file] * gone

    @staticmethod
    def _open(fds: set[int], key: Key) -> set[int]:
        """Those of `fds` that are still descriptors of this file."""
        return {fd for fd in fds if _key_or_none(fd) == key}

    def close_all(self) -> list[tuple[int, File]]:
        """Close every descriptor that we count; the references to give back."""
        with self._lock:
            held = [(fd, e.file) for key, e in self._entries.items() for fd in e.fds]
            for key, entry in self._entries.items():
                for fd in self._open(entry.fds, key):
                    os.close(fd)
            self._entries.clear()
        return held

    def files(self) -> list[tuple[int, File]]:
        """Every counted descriptor with its file, in order."""
        with self._lock:
            return sorted(
                ((fd, e.file) for e in self._entries.values() for fd in e.fds), key=lambda i: i[0]
            )


def _key_or_none(fd: int) -> Key | None:
    try:
        return inode_key(fd)
    except OSError:
        return None


def _descriptors_of(key: Key) -> Iterator[int]:
    for name in os.listdir("/proc/self/fd"):
        if _key_or_none(int(name)) == key:
            yield int(name)


FILES = FdTable()


def fd_install(memfd: Memfd, file: File) -> int:
    """Publish `file` under the descriptor of `memfd`, which it takes over (`fd_install`)."""
    fd = FILES.install(memfd, file)
    current().fd_installed(fd)
    return fd


def fget(fd: int) -> File | None:
    """The file behind a descriptor, with a reference; None where it is none of ours. EBADF."""
    return FILES.fget(fd)


def exit_files() -> None:
    """Close all of ours, as the kernel does for a process that exits."""
    for _, file in FILES.close_all():
        fput(file)
