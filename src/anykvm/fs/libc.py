"""The system calls that Python's standard library does not offer, or narrows.

`fcntl.ioctl` refuses arguments above 2^31 and `mmap.mmap` keeps a duplicate of the descriptor and
refuses lengths beyond the file's end, so both are called in libc. Errors are OSError with errno.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)


class iovec(ctypes.Structure):
    _fields_ = [("iov_base", ctypes.c_uint64), ("iov_len", ctypes.c_uint64)]
    iov_base: int
    iov_len: int


def _function(name: str, result: Any, *arguments: Any) -> Any:
    function = getattr(_libc, name)
    function.restype = result
    function.argtypes = arguments
    return function


_vm_arguments = (
    ctypes.c_int,
    ctypes.POINTER(iovec),
    ctypes.c_ulong,
    ctypes.POINTER(iovec),
    ctypes.c_ulong,
    ctypes.c_ulong,
)
_ioctl = _function("ioctl", ctypes.c_int, ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong)
_readv = _function("process_vm_readv", ctypes.c_ssize_t, *_vm_arguments)
_writev = _function("process_vm_writev", ctypes.c_ssize_t, *_vm_arguments)
_file_arguments = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
_pread = _function("pread", ctypes.c_ssize_t, *_file_arguments)
_pwrite = _function("pwrite", ctypes.c_ssize_t, *_file_arguments)
_munmap = _function("munmap", ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
_mmap = _function(
    "mmap",
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


def ioctl(fd: int, cmd: int, arg: int) -> int:
    """ioctl(2) with a full 64-bit argument; the GIL is released meanwhile, EINTR is not retried."""
    result: int = _ioctl(fd, cmd, arg)
    if result == -1:
        raise _error()
    return result


def mmap(address: int, length: int, prot: int, flags: int, fd: int, offset: int) -> int:
    """mmap(2): the address of the new mapping."""
    result: int | None = _mmap(address, length, prot, flags, fd, offset)
    if result == _MAP_FAILED or result is None:
        raise _error()
    return result


def munmap(address: int, length: int) -> None:
    """munmap(2)."""
    if _munmap(address, length):
        raise _error()


def process_vm_readv(pid: int, local: int, remote: int, length: int) -> int:
    """Copy from `remote` in process `pid` to our `local`: bytes copied before a fault."""
    result: int = _readv(pid, iovec(local, length), 1, iovec(remote, length), 1, 0)
    if result < 0:
        raise _error()
    return result


def process_vm_writev(pid: int, local: int, remote: int, length: int) -> int:
    """Copy from our `local` to `remote` in process `pid`: bytes copied before a fault."""
    result: int = _writev(pid, iovec(local, length), 1, iovec(remote, length), 1, 0)
    if result < 0:
        raise _error()
    return result


def pread(fd: int, address: int, length: int, offset: int) -> int:
    """pread(2) to an address: the bytes that were read."""
    result: int = _pread(fd, address, length, offset)
    if result < 0:
        raise _error()
    return result


def pwrite(fd: int, address: int, length: int, offset: int) -> int:
    """pwrite(2) from an address: the bytes that were written."""
    result: int = _pwrite(fd, address, length, offset)
    if result < 0:
        raise _error()
    return result
