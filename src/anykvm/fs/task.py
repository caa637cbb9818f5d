"""The task on whose behalf a call runs (`current`).

Ordinarily that is ourselves. A supervisor that serves another process's calls runs them with
`as_current(Task(pid))`, so that file operations copy from and to that process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, TypeVarTuple

from anykvm.fs.uaccess import UserMemory

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


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


@dataclass(eq=False)
class Task:
    """A process that calls: `pid` None is ourselves.

    Who serves another process's threads derives from this, and says what differs for them.
    """

    pid: int | None = None
    cred: Cred = field(default_factory=current_cred)
    mm: UserMemory = field(init=False)

    def __post_init__(self) -> None:
        self.mm = UserMemory(self.pid)

    def dup_fd(self, fd: int) -> int:
        """A descriptor of ours for the caller's descriptor `fd`. EBADF."""
        return os.dup(fd)

    def fd_installed(self, fd: int) -> None:
        """A descriptor of a new file was made on the caller's behalf."""

    @property
    def remote(self) -> RemoteThread | None:
        """The calling thread, where it is another process's."""
        return None


class RemoteThread(Protocol):
    """A thread of another process that waits in a call of ours."""

    tid: int

    on_signal: Callable[[], None] | None
    """Called, by any thread, when the call is to end for a signal."""

    signal_mask: int | None
    """What is blocked during the call; None for the thread's own mask."""

    def signal_pending(self) -> bool:
        """Whether a signal ended its wait, or one is pending that is not blocked."""


class _Current(threading.local):
    task = Task()


_current = _Current()


def current() -> Task:
    """The task of the call that this thread is in."""
    return _current.task


@contextmanager
def as_current(task: Task) -> Iterator[Task]:
    """Run what is inside on behalf of `task`, in this thread."""
    before, _current.task = _current.task, task
    try:
        yield task
    finally:
        _current.task = before


def call_as(task: Task, function: Callable[[*Ts], R], *args: *Ts) -> R:
    """The same for one call, at less cost."""
    before, _current.task = _current.task, task
    try:
        return function(*args)
    finally:
        _current.task = before


def copy_from_user(address: int, length: int) -> bytes:
    """Bytes from the calling task's memory; EFAULT."""
    return _current.task.mm.read(address, length)


def copy_to_user(address: int, data: bytes | bytearray | memoryview) -> None:
    """Bytes to the calling task's memory; EFAULT."""
    _current.task.mm.write(address, data)
