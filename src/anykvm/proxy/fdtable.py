"""Which file is behind a client's descriptor.

To stat it through /proc/TID/fd takes longer than all else that a short call needs. So what was
found is kept together with the descriptor's fdinfo, which tells mount and inode (Linux 5.19): as
long as that reads the same it is the same file. A read walks no path.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NamedTuple

O_PATH_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
FDINFO_SIZE = 256
MOST = 16  # that are kept: each takes a descriptor of ours
Key = tuple[int, int]
"""Of a file, as fstat gives it: device and inode."""


class Known(NamedTuple):
    """What was found behind a descriptor: `fdinfo` is ours, of the file in /proc with that text."""

    fdinfo: int
    text: bytes
    key: Key


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
            fdinfo, text, key = known
            try:
                if os.pread(fdinfo, FDINFO_SIZE, 0) == text:
                    return key
            except OSError:
                pass  # closed, or the thread has ended
            self._forget(fd)
        try:
            file = os.stat(str(fd), dir_fd=self._fds)
        except OSError:
            return None
        key = file.st_dev, file.st_ino
        self._keep(fd, key)
        return key

    def _keep(self, fd: int, key: Key) -> None:
        if len(self._known) >= MOST:
            return
        with suppress(OSError):
            fdinfo = os.open(f"/proc/{self._tid}/fdinfo/{fd}", os.O_RDONLY | os.O_CLOEXEC)
            text = b""
            with suppress(OSError):
                text = os.pread(fdinfo, FDINFO_SIZE, 0)
            if b"\nino:\t%d\n" % key[1] in text:
                self._known[fd] = Known(fdinfo, text, key)
            else:
                os.close(fdinfo)

    def _forget(self, fd: int) -> None:
        known = self._known.pop(fd, None)
        if known is not None:
            os.close(known.fdinfo)

    def close(self) -> None:
        fds, self._fds = self._fds, -1
        if fds >= 0:
            os.close(fds)
        for fd in list(self._known):
            self._forget(fd)
