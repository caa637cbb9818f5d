"""Calling file operations, with the kernel's meaning where one is absent (`fs/read_write.c`, …)."""

from __future__ import annotations

import errno
import os
import select
from io import StringIO

from anykvm.fs.file import (
    ABSENT,
    FMODE_LSEEK,
    FMODE_READ,
    FMODE_WRITE,
    File,
    FileOperations,
    Inode,
    VmArea,
)
from anykvm.fs.mapping import MAP_SHARED, PAGE_SIZE, PROT_WRITE

DEFAULT_POLLMASK = select.POLLIN | select.POLLOUT | select.POLLRDNORM | select.POLLWRNORM


def absent(member: str, file: File) -> OSError:
    """The error of a call whose operation the driver does not have."""
    number = ABSENT[member]
    assert number is not None
    return OSError(number, os.strerror(number), file.f_path)


def _require(file: File, mode: int) -> None:
    if not file.f_mode & mode:
        raise OSError(errno.EBADF, "file is not open for that", file.f_path)


def do_dentry_open(path: str, inode: Inode, flags: int) -> File:
    """Open `inode`: the file, with the driver's `open` run."""
    kept = flags & ~(os.O_CREAT | os.O_EXCL | os.O_NOCTTY | os.O_TRUNC | os.O_CLOEXEC)
    file = File(path, inode, inode.i_fop, kept)
    if file.f_op.open is not None:
        file.f_op.open(inode, file)
    return file


def vfs_read(file: File, count: int) -> bytes:
    """Up to `count` bytes from the file's position, which moves on."""
    _require(file, FMODE_READ)
    operation = file.f_op.read or file.f_op.read_iter
    if operation is None:
        raise absent("read", file)
    with file.f_pos_lock:
        data = operation(file, count, file.f_pos)
        file.f_pos += len(data)
    return data


def vfs_write(file: File, data: bytes) -> int:
    """Write at the file's position, which moves on: the number of bytes taken."""
    _require(file, FMODE_WRITE)
    operation = file.f_op.write or file.f_op.write_iter
    if operation is None:
        raise absent("write", file)
    with file.f_pos_lock:
        taken = operation(file, data, file.f_pos)
        file.f_pos += taken
    return taken


def vfs_llseek(file: File, offset: int, whence: int) -> int:
    """The new position; ESPIPE where the driver has no `llseek`."""
    if not file.f_mode & FMODE_LSEEK or file.f_op.llseek is None:
        raise absent("llseek", file)
    with file.f_pos_lock:
        return file.f_op.llseek(file, offset, whence)


def noop_llseek(file: File, offset: int, whence: int) -> int:
    """An `llseek` that succeeds and moves nothing, as KVM's descriptors have it."""
    return file.f_pos


def vfs_poll(file: File) -> int:
    """The events that are ready now."""
    return DEFAULT_POLLMASK if file.f_op.poll is None else file.f_op.poll(file)


def vfs_mmap(file: File, vma: VmArea) -> None:
    """Ask the driver whether it lets itself be mapped so. ENODEV, EINVAL, EACCES."""
    if vma.length <= 0 or vma.offset % PAGE_SIZE:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), file.f_path)
    writes = vma.flags & MAP_SHARED and vma.prot & PROT_WRITE
    if not file.f_mode & FMODE_READ or (writes and not file.f_mode & FMODE_WRITE):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), file.f_path)
    if file.f_op.mmap is None:
        raise absent("mmap", file)
    file.f_op.mmap(file, vma)


def vfs_fsync(file: File, datasync: bool = False) -> None:
    """Flush what the driver keeps back; EINVAL where it has no `fsync`."""
    if file.f_op.fsync is None:
        raise absent("fsync", file)
    file.f_op.fsync(file, 0, (1 << 63) - 1, datasync)


def vfs_fallocate(file: File, mode: int, offset: int, length: int) -> None:
    """EOPNOTSUPP where the driver has no `fallocate`."""
    if offset < 0 or length <= 0:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), file.f_path)
    _require(file, FMODE_WRITE)
    if file.f_op.fallocate is None:
        raise absent("fallocate", file)
    file.f_op.fallocate(file, mode, offset, length)


def iterate_dir(file: File) -> list[str]:
    """The entries of a directory; ENOTDIR where the driver has no `iterate`."""
    if file.f_op.iterate is None:
        raise absent("iterate", file)
    return file.f_op.iterate(file, file.f_pos)


def setfl(fd: int, file: File, flags: int) -> None:
    """Change O_APPEND, O_NONBLOCK, FASYNC and the like (`fcntl(F_SETFL)`)."""
    settable = os.O_APPEND | os.O_NONBLOCK | os.O_ASYNC | os.O_DIRECT | os.O_NOATIME
    if file.f_op.check_flags is not None:
        file.f_op.check_flags(flags)
    if (flags ^ file.f_flags) & os.O_ASYNC and file.f_op.fasync is not None:
        file.f_op.fasync(fd, file, bool(flags & os.O_ASYNC))
    file.f_flags = file.f_flags & ~settable | flags & settable


def filp_close(file: File) -> None:
    """What each closing descriptor does to its file before its reference goes."""
    if file.f_op.flush is not None:
        file.f_op.flush(file)


def show_fdinfo(file: File) -> str:
    """The text of /proc/PID/fdinfo/FD."""
    text = StringIO()
    ino = file.f_memfd.key[1] if file.f_memfd else 0
    text.write(f"pos:\t{file.f_pos}\nflags:\t0{file.f_flags:o}\nino:\t{ino}\n")
    if file.f_op.show_fdinfo is not None:
        file.f_op.show_fdinfo(text, file)
    return text.getvalue()


def members(fops: FileOperations) -> tuple[str, ...]:
    """The names of the operations that a driver has."""
    return tuple(name for name in ABSENT if getattr(fops, name) is not None)
