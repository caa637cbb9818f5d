"""Inode, file and file operations (`include/linux/fs.h`).

A `File` is one open file description: any number of descriptors refer to it. An `Inode` is the
object behind any number of files. `FileOperations` is what a driver supplies; an absent member has
the kernel's meaning, which `ABSENT` states and `fs.vfs` carries out.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from anykvm.fs.mapping import Mapping, Memfd
from anykvm.fs.module import Module
from anykvm.fs.task import Cred, current

FMODE_READ = 0x1
FMODE_WRITE = 0x2
FMODE_LSEEK = 0x4


@dataclass(frozen=True)
class VmArea:
    """A mapping that a process asks for (`vm_area_struct`): bytes, PROT_*, MAP_*, byte offset."""

    length: int
    prot: int
    flags: int
    offset: int

    @property
    def vm_pgoff(self) -> int:
        return self.offset >> 12


@dataclass(frozen=True)
class FileOperations:
    """The kernel's struct, member for member.

    Errors are raised as OSError. `read` and its kin return the bytes and `write` the count taken;
    the position is passed in and advanced by the caller, and copying from and to user memory is the
    caller's too. An ioctl gets the raw argument.
    """

    owner: Module | None = None
    llseek: Callable[[File, int, int], int] | None = None
    read: Callable[[File, int, int], bytes] | None = None
    write: Callable[[File, bytes, int], int] | None = None
    read_iter: Callable[[File, int, int], bytes] | None = None
    write_iter: Callable[[File, bytes, int], int] | None = None
    iterate: Callable[[File, int], list[str]] | None = None
    poll: Callable[[File], int] | None = None
    unlocked_ioctl: Callable[[File, int, int], int] | None = None
    compat_ioctl: Callable[[File, int, int], int] | None = None
    mmap: Callable[[File, VmArea], None] | None = None
    mremap: Callable[[File, VmArea], None] | None = None
    open: Callable[[Inode, File], None] | None = None
    flush: Callable[[File], None] | None = None
    release: Callable[[Inode, File], None] | None = None
    fsync: Callable[[File, int, int, bool], None] | None = None
    fasync: Callable[[int, File, bool], None] | None = None
    lock: Callable[[File, int, Any], None] | None = None
    sendpage: Callable[[File, bytes, int, bool], int] | None = None
    get_unmapped_area: Callable[[File, VmArea], int] | None = None
    check_flags: Callable[[int], None] | None = None
    flock: Callable[[File, int], None] | None = None
    splice_write: Callable[[File, bytes, int], int] | None = None
    splice_read: Callable[[File, int, int], bytes] | None = None
    setlease: Callable[[File, int], None] | None = None
    fallocate: Callable[[File, int, int, int], None] | None = None
    show_fdinfo: Callable[[StringIO, File], None] | None = None


# What an absent member means: the error of the call that needs it, or None where it succeeds or
# the kernel has a generic way of its own.
ABSENT: dict[str, int | None] = {
    "owner": None,
    "llseek": errno.ESPIPE,
    "read": errno.EINVAL,
    "write": errno.EINVAL,
    "read_iter": errno.EINVAL,
    "write_iter": errno.EINVAL,
    "iterate": errno.ENOTDIR,
    "poll": None,
    "unlocked_ioctl": errno.ENOTTY,
    "compat_ioctl": errno.ENOTTY,
    "mmap": errno.ENODEV,
    "mremap": None,
    "open": None,
    "flush": None,
    "release": None,
    "fsync": errno.EINVAL,
    "fasync": None,
    "lock": None,
    "sendpage": errno.EINVAL,
    "get_unmapped_area": None,
    "check_flags": None,
    "flock": None,
    "splice_write": errno.EINVAL,
    "splice_read": errno.EINVAL,
    "setlease": None,
    "fallocate": errno.EOPNOTSUPP,
    "show_fdinfo": None,
}


@dataclass(eq=False)
class Inode:
    """The object behind files: mode and, for a device, its number."""

    i_mode: int
    i_fop: FileOperations
    i_rdev: int = 0
    i_private: Any = None

    def is_chrdev(self) -> bool:
        return stat.S_ISCHR(self.i_mode)


@dataclass
class Fown:
    """Whom SIGIO goes to."""

    pid: int = 0
    signum: int = 0


def open_fmode(flags: int) -> int:
    """O_RDONLY, O_WRONLY, O_RDWR as FMODE bits."""
    return (flags + 1) & os.O_ACCMODE


@dataclass(eq=False)
class File:
    """An open file description. `f_count` is what `get_file` and `fput` keep."""

    f_path: str
    f_inode: Inode
    f_op: FileOperations
    f_flags: int
    private_data: Any = None
    f_mode: int = 0
    f_pos: int = 0
    f_count: int = 1
    f_owner: Fown = field(default_factory=Fown)
    f_cred: Cred = field(default_factory=lambda: current().cred)
    f_memfd: Memfd | None = None
    f_pos_lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _count_lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self.f_mode |= open_fmode(self.f_flags)
        if self.f_op.llseek is not None:
            self.f_mode |= FMODE_LSEEK

    @property
    def f_mapping(self) -> Mapping | None:
        """The memory that an mmap of the file shows; None where it was made without a size."""
        return self.f_memfd.mapping if self.f_memfd else None

    def __repr__(self) -> str:
        return f"<File {self.f_path} count {self.f_count}>"


def get_file(file: File) -> File:
    """Take a reference to a file that the caller already holds one of."""
    if not get_file_unless_zero(file):
        raise RuntimeError(f"{file} has been released")
    return file


def get_file_unless_zero(file: File) -> bool:
    """Take a reference unless the last one is gone and `release` has begun."""
    with file._count_lock:
        if file.f_count == 0:
            return False
        file.f_count += 1
        return True


def fput(file: File) -> None:
    """Give a reference back; the last one runs `release` and lets the owner's use go."""
    with file._count_lock:
        if file.f_count == 0:
            raise RuntimeError(f"{file}: more references given back than taken")
        file.f_count -= 1
        last = file.f_count == 0
    if last:
        _release(file)


def _release(file: File) -> None:
    try:
        if file.f_op.release is not None:
            file.f_op.release(file.f_inode, file)
    finally:
        fops_put(file.f_op)


def fops_get(fops: FileOperations) -> bool:
    """Pin the operations' owner; False where it is being unloaded."""
    return fops.owner is None or fops.owner.try_get()


def fops_put(fops: FileOperations) -> None:
    """Unpin the operations' owner."""
    if fops.owner is not None:
        fops.owner.put()
