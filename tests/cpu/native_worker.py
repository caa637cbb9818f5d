"""The process in which `native` lets the host's processor execute instructions: standard library
only, started as a script.

Reads batches of cases from standard input and writes the outcomes to standard output, both
marshalled behind a length. Faults do not end it: a signal handler in machine code stores what
the kernel says about the fault and returns to the caller of the trampoline.
"""

from __future__ import annotations

import ctypes
import marshal
import mmap
import struct
import sys
from typing import Any, BinaryIO

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
MAP_FIXED_NOREPLACE = 0x100000
SA_SIGINFO, SA_ONSTACK, SA_NODEFER = 4, 0x0800_0000, 0x4000_0000
SIGNALS = (4, 5, 7, 8, 11)  # ILL TRAP BUS FPE SEGV


def receive(stream: BinaryIO) -> object | None:
    head = stream.read(4)
    return marshal.loads(stream.read(struct.unpack("<I", head)[0])) if head else None


def send(stream: BinaryIO, message: Any) -> None:
    data = marshal.dumps(message)
    stream.write(struct.pack("<I", len(data)) + data)
    stream.flush()


def map_at(address: int, size: int, *, execute: bool) -> None:
    prot = mmap.PROT_READ | mmap.PROT_WRITE | (mmap.PROT_EXEC if execute else 0)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    if LIBC.mmap(address, size, prot, flags, -1, 0) != address:
        raise OSError(ctypes.get_errno(), f"cannot map {size:#x} bytes at {address:#x}")


class SigAction(ctypes.Structure):
    """glibc's struct sigaction."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


class Stack(ctypes.Structure):
    """stack_t."""

    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def catch_faults(handler: int) -> object:
    """Installs the handler; the alternate stack that it returns must live as long."""
    space = ctypes.create_string_buffer(1 << 17)
    stack = Stack(ctypes.addressof(space), 0, len(space))
    LIBC.sigaltstack(ctypes.byref(stack), None)
    action = SigAction(handler=handler, flags=SA_SIGINFO | SA_ONSTACK | SA_NODEFER)
    for signal in SIGNALS:
        LIBC.sigaction(signal, ctypes.byref(action), None)
    return space


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    setup = receive(stdin)
    assert isinstance(setup, dict)
    for address, size, execute in setup["maps"]:
        map_at(address, size, execute=execute)
    for address, data in setup["data"]:
        ctypes.memmove(address, data, len(data))
    keep = catch_faults(setup["handler"])
    enter = ctypes.CFUNCTYPE(None)(setup["enter"])
    given, taken, size = setup["given"], setup["taken"], setup["size"]
    while (batch := receive(stdin)) is not None:
        assert isinstance(batch, list)
        results = []
        for context, writes, reads in batch:
            for address, data in writes:
                ctypes.memmove(address, data, len(data))
            ctypes.memmove(given, context, len(context))
            enter()
            out = ctypes.string_at(taken, size)
            results.append((out, [ctypes.string_at(a, n) for a, n in reads]))
        send(stdout, results)
    del keep


if __name__ == "__main__":
    main()
