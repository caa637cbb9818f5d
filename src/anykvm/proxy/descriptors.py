"""The client's descriptors of our files, and how long the files live.

A client gets an open file of its own for our memfd. So the kernel counts for us what it dups,
passes on, inherits or maps, and tells when the last is gone (inotify(7)): then no open file is left
but ours, which a write lease can be taken to ask (fcntl(2)).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import threading
from contextlib import suppress
from errno import EAGAIN, EINTR, EPERM
from functools import partial
from struct import Struct

from anykvm import fs
from anykvm.fs.ioctl import do_ioctl
from anykvm.fs.task import Task, call_as
from anykvm.proxy.fdtable import Key
from anykvm.proxy.listener import Listener
from anykvm.proxy.runs import Runs

IN_CLOSE_WRITE, IN_IGNORED = 0x8, 0x8000
EVENT = Struct("=iIII")
BUFFER = 1 << 14
LOOKS, LOOK_AGAIN_MS = 4, 5

_libc = ctypes.CDLL(None, use_errno=True)


class Handle:
    """A file of ours that clients hold: `fd` is our descriptor of it.

    When clients have closed it, the last call that is under way closes ours.
    """

    def __init__(self, fd: int, file: fs.File) -> None:
        self.fd = fd
        self.file = file
        self.runs = Runs(file.f_mapping) if file.f_mapping is not None else None
        self._calls: list[None] = []  # an entry for each, for its methods are atomic
        self.closed = False
        self._close = [partial(fs.close, fd)]  # who takes it closes

    @property
    def path(self) -> str:
        return f"/proc/self/fd/{self.fd}"

    def ioctl(self, task: Task, fd: int, command: int, argument: int) -> int:
        """On a client's behalf: the result, or a negative errno."""
        self._calls.append(None)
        try:
            if self.closed:
                return -EINTR  # just now, by another thread
            return call_as(task, do_ioctl, fd, self.file, command, argument)
        except OSError as error:
            return -(error.errno or EPERM)
        finally:
            self._calls.pop()
            if self.closed:
                self.close()

    def close(self) -> None:
        """Now, or when the last call has left."""
        self.closed = True
        if not self._calls:
            with suppress(IndexError):
                self._close.pop()()


class Descriptors:
    """The handles, by the inode behind them; a thread of ours hears of their ends."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._handles: dict[Key, Handle] = {}
        self.find = self._handles.get  # by what fstat gives; None where it is none of ours
        self._watches: dict[int, Handle] = {}
        self._lock = threading.Lock()
        self._doubtful: dict[int, int] = {}  # by watch: how often to look again
        self._inotify = _libc.inotify_init1(os.O_CLOEXEC)
        if self._inotify < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"inotify_init1: {os.strerror(number)}")

    def adopt(self, fd: int) -> Handle:
        """Take over a descriptor of a file of ours, to be given to a client."""
        file = fs.fget(fd)
        assert file is not None
        handle = Handle(fd, file)
        fs.fput(file)
        watch = _libc.inotify_add_watch(self._inotify, handle.path.encode(), IN_CLOSE_WRITE)
        if watch < 0:
            number = ctypes.get_errno()
            fs.close(fd)
            raise OSError(number, f"inotify_add_watch: {os.strerror(number)}")
        with self._lock:
            self._handles[_key(fd)] = handle
            self._watches[watch] = handle
        return handle

    def answer(self, notification: int, handle: Handle, cloexec: bool = True) -> bool:
        """A call returns a new descriptor of the file; False if its caller is gone."""
        theirs = os.open(handle.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return self._listener.answer_fd(notification, theirs, cloexec)
        finally:
            os.close(theirs)

    def give(self, notification: int, fd: int) -> None:
        """A call returns the descriptor that it has made here: of a file of ours, or of a plain one
        (statistics), which needs nothing of us once it is the client's.
        """
        file = fs.fget(fd)
        if file is not None:
            fs.fput(file)
            self.answer(notification, self.adopt(fd))
            return
        try:
            self._listener.answer_fd(notification, fd, True)
        finally:
            os.close(fd)

    def wait(self) -> bool:
        """Until files may have lost their last descriptor; close those that have. Whether any."""
        poll = select.poll()
        poll.register(self._inotify, select.POLLIN)
        if poll.poll(LOOK_AGAIN_MS if self._doubtful else None):
            raw = os.read(self._inotify, BUFFER)
            for at in range(0, len(raw), EVENT.size):
                # The kernel tells before it has closed entirely.
                self._doubtful[EVENT.unpack_from(raw, at)[0]] = LOOKS
        closed = [watch for watch in list(self._doubtful) if self._close_if_alone(watch)]
        return bool(closed)

    def _close_if_alone(self, watch: int) -> bool:
        with self._lock:
            handle = self._watches.get(watch)
            alone = handle is not None and _alone(handle)
            self._doubtful[watch] -= 1
            if handle is None or alone or not self._doubtful[watch]:
                del self._doubtful[watch]
            if handle is None or not alone:
                return False
            del self._watches[watch], self._handles[_key(handle.fd)]
        handle.close()
        return True

    def close_all(self) -> None:
        """No client is left."""
        with self._lock:
            handles = list(self._handles.values())
            self._handles.clear()
            self._watches.clear()
        for handle in handles:
            with suppress(OSError):
                handle.close()


def _key(fd: int) -> Key:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _alone(handle: Handle) -> bool:
    """Whether nobody else has the file open. Our own memfd counts as none: it was never opened."""
    fd = os.open(handle.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        if error.errno != EAGAIN:
            raise
        return False
    finally:
        os.close(fd)
    return True
