"""The system calls, for descriptors of ours and of the system's alike.

Each takes a descriptor, finds the file behind it and calls its operation; a descriptor that is none
of ours goes to the real call. So one program drives this package's /dev/kvm and the host's. Errors
are OSError with Linux's errno.

A file's reference is held during a call, as the kernel holds it: closing a descriptor in one thread
while another is in an ioctl on it runs `release` only after that ioctl has returned.
"""

from __future__ import annotations

import errno
import fcntl as _fcntl
import os
import select
from pathlib import Path

from anykvm.fs.backend import HOST_KVM, choose
from anykvm.fs.char_dev import namei
from anykvm.fs.fdtable import FILES, fd_install, fget
from anykvm.fs.file import File, Inode, VmArea, fput
from anykvm.fs.ioctl import do_ioctl, vfs_compat_ioctl
from anykvm.fs.mapping import MAP_SHARED, PROT_READ, PROT_WRITE, Mapping, Memfd
from anykvm.fs.trace import call
from anykvm.fs.vfs import (
    do_dentry_open,
    filp_close,
    setfl,
    show_fdinfo,
    vfs_fsync,
    vfs_llseek,
    vfs_mmap,
    vfs_poll,
    vfs_read,
    vfs_write,
)


class _fdget:
    """The file behind a descriptor, or None, with its reference held inside a `with`."""

    __slots__ = ("file",)

    def __init__(self, fd: int) -> None:
        self.file = fget(fd)

    def __enter__(self) -> File | None:
        return self.file

    def __exit__(self, *error: object) -> None:
        if self.file is not None:
            fput(self.file)


def open(
    path: str,
    flags: int = os.O_RDWR | os.O_CLOEXEC,
    mode: int = 0o777,
    *,
    backend: str | None = None,
) -> int:
    """Open `path`. /dev/kvm is ours or the host's as `backend` says: see `fs.backend.choose`."""
    inode = namei(path)
    if inode is None or (inode is namei(HOST_KVM) and choose(backend).backend == "host"):
        with call("open", path=path, backend="host") as this:
            this.result = fd = os.open(path, flags, mode)
            return fd
    with call("open", path=path, backend="soft") as this:
        this.result = fd = _open_ours(path, inode, flags)
        return fd


def _open_ours(path: str, inode: Inode, flags: int) -> int:
    file = do_dentry_open(path, inode, flags)
    try:
        memfd = Memfd(os.path.basename(path), cloexec=bool(flags & os.O_CLOEXEC))
    except OSError:
        fput(file)
        raise
    return fd_install(memfd, file)


def close(fd: int) -> None:
    """Close a descriptor; the last one of a file runs its `release`. EBADF."""
    with call("close", fd=fd):
        for file in FILES.close(fd):
            try:
                filp_close(file)
            finally:
                fput(file)


def dup(fd: int) -> int:
    """A second descriptor of the same file, closed on exec; `os.dup` works too."""
    with call("dup", fd=fd) as this:
        this.result = new = FILES.dup(fd)
        return new


def ioctl(fd: int, cmd: int, arg: int = 0) -> int:
    """ioctl(2): `arg` is an address or a value, as the number says."""
    file = fget(fd)
    try:
        return do_ioctl(fd, file, cmd, arg)
    finally:
        if file is not None:
            fput(file)


def compat_ioctl(fd: int, cmd: int, arg: int = 0) -> int:
    """The ioctl of a 32-bit process. ENOSYS on the system's files: a 64-bit one cannot make it."""
    with _fdget(fd) as file, call("compat_ioctl", fd=fd, file=file, cmd=cmd, arg=arg) as this:
        if file is None:
            raise OSError(errno.ENOSYS, "no 32-bit ioctl on the host's descriptors from here")
        this.result = result = vfs_compat_ioctl(fd, file, cmd, arg)
        return result


def mmap(
    fd: int,
    length: int,
    prot: int = PROT_READ | PROT_WRITE,
    flags: int = MAP_SHARED,
    offset: int = 0,
) -> Mapping:
    """Map a descriptor's memory, if its driver allows it."""
    with _fdget(fd) as file, call("mmap", fd=fd, file=file, length=length, offset=offset) as this:
        if file is not None:
            vfs_mmap(file, VmArea(length, prot, flags, offset))
        this.result = mapping = Mapping(length, prot, flags, fd, offset)
        return mapping


def munmap(mapping: Mapping) -> None:
    """Let a mapping go; its pages stay for as long as ctypes views of them do."""
    with call("munmap", address=mapping.address, length=mapping.length):
        mapping.unmap()


def poll(fd: int, events: int, timeout: float | None = 0) -> int:
    """The `select.POLL*` bits that are ready. A file of ours answers at once."""
    with _fdget(fd) as file:
        if file is not None:
            return vfs_poll(file) & (events | select.POLLERR | select.POLLHUP)
        poller = select.poll()
        poller.register(fd, events)
        ready = poller.poll(None if timeout is None else timeout * 1000)
        return ready[0][1] if ready else 0


def read(fd: int, count: int) -> bytes:
    """Up to `count` bytes."""
    with _fdget(fd) as file:
        return os.read(fd, count) if file is None else vfs_read(file, count)


def write(fd: int, data: bytes) -> int:
    """The number of bytes taken."""
    with _fdget(fd) as file:
        return os.write(fd, data) if file is None else vfs_write(file, data)


def lseek(fd: int, offset: int, whence: int = os.SEEK_SET) -> int:
    """The new position."""
    with _fdget(fd) as file:
        return os.lseek(fd, offset, whence) if file is None else vfs_llseek(file, offset, whence)


def fsync(fd: int) -> None:
    """Flush a file."""
    with _fdget(fd) as file:
        return os.fsync(fd) if file is None else vfs_fsync(file)


def getfl(fd: int) -> int:
    """The file's status flags (`fcntl(F_GETFL)`)."""
    with _fdget(fd) as file:
        return _fcntl.fcntl(fd, _fcntl.F_GETFL) if file is None else file.f_flags


def set_flags(fd: int, flags: int) -> None:
    """Set the file's status flags (`fcntl(F_SETFL)`)."""
    with _fdget(fd) as file:
        if file is None:
            _fcntl.fcntl(fd, _fcntl.F_SETFL, flags)
        else:
            setfl(fd, file, flags)


def fdinfo(fd: int) -> str:
    """The text of /proc/self/fdinfo/FD, with the driver's own lines."""
    with _fdget(fd) as file:
        if file is not None:
            return show_fdinfo(file)
        return Path(f"/proc/self/fdinfo/{fd}").read_text()
