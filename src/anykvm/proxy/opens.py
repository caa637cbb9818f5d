"""The client's opens of our device, and its looks at it where the host has none: stat, access.

Only a path that is one of our nodes is answered from here. All else the kernel carries out as the
client called it; it reads the path anew, which a client could change meanwhile to no one's harm.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from errno import EACCES, EINVAL
from struct import Struct

from anykvm import fs
from anykvm.fs.char_dev import namei
from anykvm.fs.file import Inode
from anykvm.fs.uaccess import UserMemory
from anykvm.proxy import abi
from anykvm.proxy.procfs import PAGE_SIZE

PATH_MAX = 4096
FIRST = 64  # bytes of a path that are read first: nearly all are shorter
AT_FDCWD = -100
DEVTMPFS = 6
OPEN_HOW = Struct("=QQQ")
STAT = Struct("=QQQIIIIQqqqQQQQQQ24x")
"""struct stat: dev, ino, nlink, mode, uid, gid, pad, rdev, size, blksize, blocks, three times."""
STATX = Struct("=IIQIIIHHQQQQ" + "qIi" * 4 + "IIIIQ104x")
"""struct statx up to stx_mnt_id and its spares."""
STATX_BASIC_STATS = 0x7FF
X_OK = 1


class Caller:
    """A thread that names a file. Most files are not ours, so nothing is kept of it."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.mm = UserMemory(tid)


def path_at(caller: Caller, address: int) -> str | None:
    """A path in the client's memory; None where it is none, or longer than Linux allows."""
    raw = b""
    for size in (FIRST, PATH_MAX):
        length = min(size, PAGE_SIZE - address % PAGE_SIZE) if size == FIRST else size
        with suppress(OSError):
            raw = _read(caller, address, length)
        if b"\0" in raw:
            return os.fsdecode(raw[: raw.index(b"\0")])
    return None


def _read(caller: Caller, address: int, length: int) -> bytes:
    """At most `length` bytes: what comes before the first page that is not there."""
    first = min(length, PAGE_SIZE - address % PAGE_SIZE)
    raw = caller.mm.read(address, first)
    if first < length and b"\0" not in raw:
        with suppress(OSError):
            raw += caller.mm.read(address + first, length - first)
    return raw


def node(caller: Caller, directory: int, address: int) -> tuple[str, Inode] | None:
    """Our node that a path names, relative to a directory descriptor; None for any other file."""
    path = path_at(caller, address)
    if not path:
        return None
    if not path.startswith("/"):
        path = _absolute(caller, directory, path)
    inode = namei(path)
    return None if inode is None else (os.path.abspath(path), inode)


def _absolute(caller: Caller, directory: int, path: str) -> str:
    number = directory - (1 << 32) if directory >> 31 & 1 else directory
    at = "cwd" if number == AT_FDCWD else f"fd/{number}"
    try:
        return os.path.join(os.readlink(f"/proc/{caller.tid}/{at}"), path)
    except OSError:
        return path


@dataclass(frozen=True)
class Path:
    """Where a call has its path: the argument's index, and that of its directory descriptor."""

    path: int
    directory: int | None = None

    def node(self, caller: Caller, args: tuple[int, ...]) -> tuple[str, Inode] | None:
        directory = AT_FDCWD if self.directory is None else args[self.directory] & 0xFFFFFFFF
        return node(caller, directory, args[self.path])


def _open_flags(caller: Caller, args: tuple[int, ...]) -> int:
    return args[1]


def _openat_flags(caller: Caller, args: tuple[int, ...]) -> int:
    return args[2]


def _openat2_flags(caller: Caller, args: tuple[int, ...]) -> int:
    flags: int = OPEN_HOW.unpack(caller.mm.read(args[2], OPEN_HOW.size))[0]
    return flags


OPENS: dict[int, tuple[Path, Callable[[Caller, tuple[int, ...]], int]]] = {
    abi.SYS_OPEN: (Path(0), _open_flags),
    abi.SYS_OPENAT: (Path(1, 0), _openat_flags),
    abi.SYS_OPENAT2: (Path(1, 0), _openat2_flags),
}
"""Calls that open a file: where the path is, and what the flags are."""


def stat_bytes(inode: Inode) -> bytes:
    """struct stat of a node."""
    rdev, mode = inode.i_rdev, inode.i_mode
    return STAT.pack(DEVTMPFS, inode.i_rdev, 1, mode, 0, 0, 0, rdev, 0, PAGE_SIZE, 0, *[0] * 6)


def statx_bytes(inode: Inode) -> bytes:
    """struct statx of a node."""
    major, minor = os.major(inode.i_rdev), os.minor(inode.i_rdev)
    head = (STATX_BASIC_STATS, PAGE_SIZE, 0, 1, 0, 0, inode.i_mode, 0, inode.i_rdev, 0, 0, 0)
    return STATX.pack(*head, *[0] * 12, major, minor, 0, DEVTMPFS, 0)


def _write_stat(index: int) -> Callable[[Caller, Inode, tuple[int, ...]], int]:
    def answer(caller: Caller, inode: Inode, args: tuple[int, ...]) -> int:
        caller.mm.write(args[index], stat_bytes(inode))
        return 0

    return answer


def _write_statx(caller: Caller, inode: Inode, args: tuple[int, ...]) -> int:
    caller.mm.write(args[4], statx_bytes(inode))
    return 0


def _access(index: int) -> Callable[[Caller, Inode, tuple[int, ...]], int]:
    """What the node's mode lets everyone do."""

    def answer(caller: Caller, inode: Inode, args: tuple[int, ...]) -> int:
        allowed = stat.S_IMODE(inode.i_mode) & 7
        return -EACCES if args[index] & 7 & ~allowed else 0

    return answer


def _no_link(caller: Caller, inode: Inode, args: tuple[int, ...]) -> int:
    return -EINVAL


LOOKS: dict[int, tuple[Path, Callable[[Caller, Inode, tuple[int, ...]], int]]] = {
    abi.SYS_STAT: (Path(0), _write_stat(1)),
    abi.SYS_LSTAT: (Path(0), _write_stat(1)),
    abi.SYS_NEWFSTATAT: (Path(1, 0), _write_stat(2)),
    abi.SYS_STATX: (Path(1, 0), _write_statx),
    abi.SYS_ACCESS: (Path(0), _access(1)),
    abi.SYS_FACCESSAT: (Path(1, 0), _access(2)),
    abi.SYS_FACCESSAT2: (Path(1, 0), _access(2)),
    abi.SYS_READLINK: (Path(0), _no_link),
    abi.SYS_READLINKAT: (Path(1, 0), _no_link),
}
"""Calls that ask about a file: where the path is, and the answer for a node of ours."""


def open_node(path: str, flags: int) -> int:
    """A descriptor of ours for the node, as anykvm's own."""
    return fs.open(path, flags | os.O_CLOEXEC, backend="soft")
