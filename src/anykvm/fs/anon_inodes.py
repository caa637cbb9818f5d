"""Files without a name in any directory (`fs/anon_inodes.c`): what KVM_CREATE_VM hands out."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any

from anykvm.fs.fdtable import fd_install
from anykvm.fs.file import File, FileOperations, Inode, fops_get
from anykvm.fs.mapping import Memfd
from anykvm.fs.trace import call

# All anonymous files share one inode, as in the kernel.
anon_inode_inode = Inode(stat.S_IRUSR | stat.S_IWUSR, FileOperations())


def anon_inode_getfile(name: str, fops: FileOperations, priv: Any, flags: int) -> File:
    """A file with these operations, not yet behind a descriptor. ENOENT: the owner is going."""
    if not fops_get(fops):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    kept = flags & (os.O_ACCMODE | os.O_NONBLOCK)
    return File(f"anon_inode:{name}", anon_inode_inode, fops, kept, priv)


def anon_inode_getfd(
    name: str,
    fops: FileOperations,
    priv: Any,
    flags: int = os.O_RDWR | os.O_CLOEXEC,
    *,
    size: int = 0,
    memfd: Memfd | None = None,
) -> int:
    """A new descriptor, named `name` in /proc/PID/fd, for a file with these operations.

    With `size` the file has that many bytes of memory, which `file.f_mapping` shows and any mmap of
    the descriptor shares. An object that needs its memory before its descriptor makes the `Memfd`
    first and passes it instead; its descriptor is taken over on success and stays the caller's on
    an error.
    """
    with call("anon_inode_getfd", file=name) as this:
        backing = memfd or Memfd(name, size, cloexec=bool(flags & os.O_CLOEXEC))
        try:
            file = anon_inode_getfile(name, fops, priv, flags)
        except BaseException:
            if memfd is None:
                os.close(backing.fd)
            raise
        this.result = fd = fd_install(backing, file)
        return fd
