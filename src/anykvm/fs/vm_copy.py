"""Copies between our own memory and any process's, whose addresses may be bad.

process_vm_readv(2) and process_vm_writev(2) make them. A seccomp filter may forbid those, as the
one that Docker has by default does, for our own process, too. Then our own addresses are copied by
the kernel to and from a memfd, and another process's by /proc/PID/mem. That one knows no
protection, so what is to be written has to be writable according to /proc/PID/maps; memory without
PROT_READ is read there all the same.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from errno import EACCES, EFAULT, EIO, ENOSYS, EPERM, ESRCH

from anykvm.fs import libc
from anykvm.fs.mapping import PROT_WRITE
from anykvm.fs.vmas import areas

VmCopy = Callable[[int, int, int, int], int]
"""Takes process, our address, the process's address and length; returns the bytes that were copied
before a fault. ESRCH, EPERM.
"""

CHUNK = 1 << 20  # of the memfd
AREAS = 64  # known to be writable


def _is_allowed() -> bool:
    word = ctypes.c_uint64()
    address = ctypes.addressof(word)
    try:
        return libc.process_vm_readv(os.getpid(), address, address, 8) == 8
    except OSError as error:
        if error.errno not in (EPERM, EACCES, ENOSYS):
            raise
        return False


class _Memfd:
    """Closed with the thread whose it is."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("user-memory", os.MFD_CLOEXEC)

    def __del__(self) -> None:
        os.close(self.fd)


class _Thread(threading.local):
    def __init__(self) -> None:
        self.memfd = _Memfd()


_thread = _Thread()


def _forked() -> None:
    """The parent's memfd is the parent's."""
    global _thread
    _thread = _Thread()


os.register_at_fork(after_in_child=_forked)


def _through_memfd(source: int, target: int, length: int) -> int:
    """From one address of ours to the other."""
    fd = _thread.memfd.fd
    done = 0
    try:
        while done < length:
            count = libc.pwrite(fd, source + done, min(CHUNK, length - done), 0)
            copied = libc.pread(fd, target + done, count, 0)
            done += copied
            if not copied:
                break
    except OSError as error:
        if error.errno != EFAULT:
            raise
    return done


def _mem(pid: int, flags: int) -> int:
    try:
        return os.open(f"/proc/{pid}/mem", flags | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ProcessLookupError(ESRCH, os.strerror(ESRCH)) from None


def _with_mem(
    call: Callable[[int, int, int, int], int], fd: int, local: int, remote: int, length: int
) -> int:
    done = 0
    try:
        while done < length:
            copied = call(fd, local + done, length - done, remote + done)
            done += copied
            if not copied:
                break
    except OSError as error:
        if error.errno not in (EIO, EFAULT):
            raise
    finally:
        os.close(fd)
    return done


_writable: dict[tuple[int, int, int], None] = {}


def _writable_end(pid: int, start: int, end: int) -> int:
    """Up to where the process may write, from `start` on. What was writable is not asked for again:
    protection that has changed meanwhile makes a private page of the process's differ, no more.
    """
    for known, low, high in tuple(_writable):
        if known == pid and low <= start and end <= high:
            return end
    at = start
    for area in areas(pid):
        if area.end <= at:
            continue
        if area.start > at or not area.prot & PROT_WRITE:
            break
        if len(_writable) >= AREAS:
            _writable.clear()
        _writable[pid, area.start, area.end] = None
        at = area.end
        if at >= end:
            break
    return min(at, end)


def read_by_file(pid: int, local: int, remote: int, length: int) -> int:
    """`process_vm_readv` without that."""
    if pid == os.getpid():
        return _through_memfd(remote, local, length)
    return _with_mem(libc.pread, _mem(pid, os.O_RDONLY), local, remote, length)


def write_by_file(pid: int, local: int, remote: int, length: int) -> int:
    """`process_vm_writev` without that."""
    if pid == os.getpid():
        return _through_memfd(local, remote, length)
    fd = _mem(pid, os.O_WRONLY)
    writable = _writable_end(pid, remote, remote + length) - remote
    return _with_mem(libc.pwrite, fd, local, remote, writable)


read: VmCopy = libc.process_vm_readv if _is_allowed() else read_by_file
write: VmCopy = libc.process_vm_writev if read is libc.process_vm_readv else write_by_file
