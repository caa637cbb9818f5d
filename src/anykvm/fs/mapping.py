"""Mapped memory, and the memfd behind a descriptor.

A `Mapping` is unmapped when nothing refers to it or to a ctypes object made with
`Type.from_buffer(mapping.buffer)` any more: a stale view keeps its pages and cannot crash.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import weakref
from typing import Any, TypeVar, cast

from anykvm.fs import libc

CData = TypeVar("CData", bound="ctypes.Structure | ctypes.Union | ctypes.Array[Any]")

PAGE_SIZE = 4096
PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x20, 0x4000


class Mapping:
    """`length` bytes at `address`; `buffer` is a writable ctypes array over them."""

    def __init__(self, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        self.length = length
        self.address = libc.mmap(0, length, prot, flags, fd, offset)
        self._buffer: ctypes.Array[ctypes.c_ubyte] | None
        self._buffer = (ctypes.c_ubyte * length).from_address(self.address)
        release = weakref.finalize(self._buffer, libc.munmap, self.address, length)
        release.atexit = False

    @property
    def buffer(self) -> ctypes.Array[ctypes.c_ubyte]:
        """The bytes; ValueError after `unmap`."""
        if self._buffer is None:
            raise ValueError(f"{self} is unmapped")
        return self._buffer

    def unmap(self) -> None:
        """Give up this view; the pages go when the last ctypes object over them does."""
        self._buffer = None

    def view(self, kind: type[CData], offset: int = 0) -> CData:
        """A ctypes object of type `kind` over the memory at `offset`."""
        return cast(CData, kind.from_buffer(self.buffer, offset))

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"<Mapping {self.address:#x}+{self.length:#x}>"


class Memfd:
    """The real file behind a descriptor of ours: named, sealed, `size` bytes, mapped if not empty.

    Sealing keeps its size as it is: a program that truncates the descriptor gets EPERM, where it
    would otherwise make the next access to `kvm_run` a SIGBUS.
    """

    def __init__(self, name: str, size: int = 0, *, cloexec: bool = True) -> None:
        flags = os.MFD_ALLOW_SEALING | (os.MFD_CLOEXEC if cloexec else 0)
        self.name = name
        self.size = size
        self.fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(self.fd, size)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
            self.key = inode_key(self.fd)
            self.mapping = self._map() if size else None
        except BaseException:
            os.close(self.fd)
            raise

    def _map(self) -> Mapping:
        return Mapping(self.size, PROT_READ | PROT_WRITE, MAP_SHARED, self.fd)

    def __repr__(self) -> str:
        return f"<Memfd {self.name} {self.size:#x} bytes>"


def inode_key(fd: int) -> tuple[int, int]:
    """What identifies the file behind a descriptor, through any dup: (st_dev, st_ino). EBADF."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
