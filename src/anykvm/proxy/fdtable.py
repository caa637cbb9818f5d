"""Which file is behind a client's descriptor.

To stat it through /proc/TID/fd takes longer than all else that a short call needs. So what was
found is kept together with the descriptor's fdinfo, which tells mount and inode (Linux 5.19): as
long as that reads the same it is the same file. A read walks no path.
"""

from __future__ import annotations

import os
from contextlib import suppress
from os import pread

O_PATH_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
FDINFO_SIZE = 256
MOST = 16  # that are kept: each takes a descriptor of ours
Key = tuple[int, int]
"""Of a file, as fstat gives it: device and inode."""


class Known:
    """What was found behind a descriptor: `fdinfo` is ours, of the file in /proc with that text."""

    __slots__ = ("fdinfo", "key", "text")

    def __init__(self, fdinfo: int, text: bytes, key: Key) -> None:
        self.fdinfo, self.text, self.key = fdinfo, text, key

    def holds(self) -> bool:
        """Whether it is the same file still."""
        try:
            return pread(self.fdinfo, FDINFO_SIZE, 0) == self.text
        except OSError:
            return False  # closed, or the thread has ended, or we have forgotten it

    def forget(self) -> None:
        fdinfo, self.fdinfo = self.fdinfo, -1
        os.close(fdinfo)


class FdTable:
    """The descriptors of one thread. OSError where it has ended."""

    def __init__(self, tid: int) -> None:
        self._tid = tid
        self._fds = os.open(f"/proc/{tid}/fd", O_PATH_DIRECTORY)
        self._known: dict[int, Known] = {}

    def find(self, fd: int) -> Key | None:
        """The file behind `fd`; None where there is none, or where the thread has ended."""
        known = self._known.get(fd)
        if known is not None:
            if known.holds():
                return known.key
            self._known.pop(fd).forget()
        try:
            file = os.stat(str(fd), dir_fd=self._fds)
        except OSError:
            return None
        key = file.st_dev, file.st_ino
        self._keep(fd, key)
        return key

    def known(self, fd: int) -> Known | None:
        """What is kept of a descriptor."""
        return self._known.get(fd)

    def _keep(self, fd: int, key: Key) -> None:
        if len(self._known) >= MOST:
            return
        with suppress(OSError):
            fdinfo = os.open(f"/proc/{self._tid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            text = b""
            with suppress(OSError):
                text = pread(fdinfo, FDINFO_SIZE, 0)
            if b"\nino:\t%d\n" % key[1] in text:
                self._known[fd] = Known(fdinfo, text, key)
            else:
                os.close(fdinfo)

    def close(self) -> None:
        fds, self._fds = self._fds, -1
        if fds >= 0:
            os.close(fds)
        while self._known:
            self._known.popitem()[1].forget()
