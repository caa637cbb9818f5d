"""User memory: reads and writes that fault with EFAULT (`linux/uaccess.h`).

A user address is never dereferenced. The kernel copies (vm_copy.py), for our own process as for any
other, and stops at the first page that is not there or does not permit the access.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, TypeVar

from anykvm.fs import vm_copy

if TYPE_CHECKING:
    from _ctypes import _CData

    CData = TypeVar("CData", bound=_CData)

TASK_SIZE_MAX = (1 << 47) - 4096


_our_pid = os.getpid()  # on the way of every call, so not asked for each time


def _forked() -> None:
    global _our_pid
    _our_pid = os.getpid()


os.register_at_fork(after_in_child=_forked)


class UserMemory:
    """The address space of a process; `pid` None is our own, whatever it is after a fork."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid

    @property
    def pid(self) -> int:
        return _our_pid if self._pid is None else self._pid

    def host_address(self, address: int, length: int) -> int:
        """Where this process can reach the range, for as long as the space lives: the address of
        our own memory itself; another process's is mapped here by who serves it.
        """
        return address

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from `address`; EFAULT where not all of them can be read."""
        buffer = ctypes.create_string_buffer(length) if length else b""
        if not isinstance(buffer, bytes):
            self._copy(vm_copy.read, ctypes.addressof(buffer), address, length)
            return buffer.raw
        return buffer

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at `address`; EFAULT where that is not possible."""
        data = bytes(data)
        if data:
            local = ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value
            assert local is not None
            self._copy(vm_copy.write, local, address, len(data))

    def read_object(self, address: int, kind: type[CData]) -> CData:
        """A ctypes object of type `kind`, copied from `address`."""
        result = kind()
        self.read_into(address, result)
        return result

    def read_into(self, address: int, target: _CData) -> None:
        """Fill the ctypes object `target` from `address`."""
        length = ctypes.sizeof(target)
        if length:
            self._copy(vm_copy.read, ctypes.addressof(target), address, length)

    def write_object(self, address: int, source: _CData) -> None:
        """Copy the ctypes object `source` to `address`."""
        length = ctypes.sizeof(source)
        if length:
            self._copy(vm_copy.write, ctypes.addressof(source), address, length)

    def _copy(self, call: vm_copy.VmCopy, local: int, remote: int, length: int) -> None:
        if not access_ok(remote, length) or call(self.pid, local, remote, length) != length:
            raise OSError(errno.EFAULT, f"bad user address {remote:#x}+{length:#x}")

    def __repr__(self) -> str:
        return f"<UserMemory of {'this process' if self._pid is None else self._pid}>"


def access_ok(address: int, length: int) -> bool:
    """Whether the range lies below the end of user space, whatever is mapped there."""
    return 0 <= address <= TASK_SIZE_MAX and address + length <= TASK_SIZE_MAX
