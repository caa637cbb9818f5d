"""Guest memory: pages of ours that a memory slot shows the guest.

They belong to a memfd named `guest-memory`, so that /proc/PID/maps tells them from all else.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, TypeVar

from anykvm import fs

NAME = "guest-memory"
CData = TypeVar("CData", bound="ctypes.Structure | ctypes.Union | ctypes.Array[Any]")


class GuestMemory:
    """`size` bytes from guest-physical `addr` on, zero at first, committed when touched.

    The pages live for as long as this object, or a `view` of them, does. A `Vm` keeps the memory of
    its slots alive.
    """

    def __init__(self, size: int, addr: int = 0) -> None:
        if size <= 0 or size % fs.PAGE_SIZE or addr % fs.PAGE_SIZE:
            raise ValueError(f"guest memory is whole pages: not {size:#x} bytes at {addr:#x}")
        self.addr = addr
        self.size = size
        self._mapping = _pages(size)
        self._bytes = memoryview(self._mapping.buffer).cast("B")

    @property
    def userspace_addr(self) -> int:
        """Where the memory is in this process."""
        return self._mapping.address

    def _offset(self, addr: int, length: int) -> int:
        offset = addr - self.addr
        if offset < 0 or length < 0 or offset + length > self.size:
            raise IndexError(f"{addr:#x}+{length:#x} is outside of {self!r}")
        return offset

    def read(self, addr: int, length: int) -> bytes:
        """Bytes at a guest-physical address; IndexError outside."""
        return bytes(self.slice(addr, length))

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Store bytes at a guest-physical address; IndexError outside, and nothing is written."""
        offset = self._offset(addr, len(data))
        self._bytes[offset : offset + len(data)] = data

    def slice(self, addr: int, length: int) -> memoryview:
        """The memory itself, writable."""
        offset = self._offset(addr, length)
        return self._bytes[offset : offset + length]

    def view(self, kind: type[CData], addr: int) -> CData:
        """A ctypes object over the memory at a guest-physical address."""
        offset = self._offset(addr, ctypes.sizeof(kind))
        return self._mapping.view(kind, offset)

    def __len__(self) -> int:
        return self.size

    def __contains__(self, addr: int) -> bool:
        return self.addr <= addr < self.addr + self.size

    def __repr__(self) -> str:
        return f"<GuestMemory {self.addr:#x}+{self.size:#x} at {self.userspace_addr:#x}>"


def _pages(size: int) -> fs.Mapping:
    """Mapped, with no descriptor left open; OSError where there is no room for them."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    try:
        os.truncate(fd, size)
        return fs.Mapping(size, fs.PROT_READ | fs.PROT_WRITE, fs.MAP_SHARED | fs.MAP_NORESERVE, fd)
    finally:
        os.close(fd)
