"""The task on whose behalf a call runs (`current`).

Ordinarily that is ourselves. A supervisor that serves another process's calls runs them with
`as_current(Task(pid))`, so that file operations copy from and to that process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anykvm.fs.uaccess import UserMemory


@dataclass(frozen=True)
class Cred:
    """Who opened a file."""

    uid: int
    gid: int
    euid: int
    egid: int


def current_cred() -> Cred:
    """The credentials of this process."""
    return Cred(os.getuid(), os.getgid(), os.geteuid(), os.getegid())


@dataclass(frozen=True)
class Task:
    """A process that calls: `pid` None is ourselves."""

    pid: int | None = None
    cred: Cred = field(default_factory=current_cred)
    mm: UserMemory = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "mm", UserMemory(self.pid))


class _Current(threading.local):
    task = Task()


_current = _Current()


def current() -> Task:
    """The task of the call that this thread is in."""
    return _current.task


@contextmanager
def as_current(task: Task) -> Iterator[Task]:
    """Run what is inside on behalf of `task`, in this thread."""
    before = _current.task
    _current.task = task
    try:
        yield task
    finally:
        _current.task = before


def copy_from_user(address: int, length: int) -> bytes:
    """Bytes from the calling task's memory; EFAULT."""
    return _current.task.mm.read(address, length)


def copy_to_user(address: int, data: bytes | bytearray | memoryview) -> None:
    """Bytes to the calling task's memory; EFAULT."""
    _current.task.mm.write(address, data)
