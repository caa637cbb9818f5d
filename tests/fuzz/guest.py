"""Memory for slots, which its owner damages while guests run in it: protected, taken away, cut off
with its file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import random

from anykvm import fs
from anykvm.fs.uaccess import UserMemory
from anykvm.vmm.long_mode import write_tables

PAGE = 4096
GUEST_PAGES = 512
FILE_PAGES = 16
PROT_NONE, READ, ALL = 0, fs.PROT_READ, fs.PROT_READ | fs.PROT_WRITE
MAP_FIXED, MADV_DONTNEED = 0x10, 4
ANONYMOUS = fs.MAP_PRIVATE | fs.MAP_ANONYMOUS
LOW_PAGES = 64  # vectors, stacks and page tables: damaged seldom, for little runs without them
CODE_PAGES = range(LOW_PAGES, GUEST_PAGES, 3)
RANDOM_CODE = random.Random("the same in every run: each new instruction is compiled")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p

# For every mode: accesses to ports and memory, CPUID, HLT, INT3, MSRs, and again
LOOP = bytes.fromhex("e680 e460 8a04 8804 40 90 90 6690 0fa2 fa fb eb ea".replace(" ", ""))
HALT = bytes.fromhex("fb f4 e680 8807 ebf8".replace(" ", ""))
STORES = bytes.fromhex("8807 81c7 0010 0000 ebf6".replace(" ", ""))  # to page after page
TRAPS = bytes.fromhex("cc cd80 0f32 0f30 0f0b 9c 9d ebf4".replace(" ", ""))
SPIN = bytes.fromhex("40 4b ebfc".replace(" ", ""))
PROGRAMS = (LOOP, HALT, STORES, TRAPS, SPIN, RANDOM_CODE.randbytes(64), RANDOM_CODE.randbytes(64))


def _check(result: int | None, what: str) -> None:
    if result in (-1, 2**64 - 1):  # int and MAP_FAILED
        raise OSError(ctypes.get_errno(), what)


class GuestPages:
    """GUEST_PAGES of memory with programs in it, FILE_PAGES of a file, and as many that are not
    there, in a row: no slot that begins in the first two reaches anything else of this process.
    """

    def __init__(self) -> None:
        self._fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
        self._all = fs.Mapping((2 * GUEST_PAGES + FILE_PAGES) * PAGE, PROT_NONE, ANONYMOUS)
        self.address = self._all.address
        self.file = self.address + GUEST_PAGES * PAGE
        self.nothing = self.file + FILE_PAGES * PAGE
        self.repair()

    def repair(self) -> None:
        """All of it there again, and as it was at first."""
        os.ftruncate(self._fd, FILE_PAGES * PAGE)
        self._map(self.address, GUEST_PAGES, ALL, ANONYMOUS)
        self._map(self.file, FILE_PAGES, ALL, fs.MAP_SHARED, self._fd)
        write_tables(self)
        for n, page in enumerate(CODE_PAGES):
            self.write(page * PAGE, PROGRAMS[n % len(PROGRAMS)])
        self.write(0x400, PROGRAMS[0])

    def write(self, addr: int, data: bytes | bytearray | memoryview) -> None:
        """Bytes at a guest-physical address, where the slot at 0 is this memory; unless another
        thread has taken it away.
        """
        with contextlib.suppress(OSError):
            UserMemory().write(self.address + addr, data)

    def _map(self, address: int, pages: int, prot: int, flags: int, fd: int = -1) -> None:
        where, size = ctypes.c_void_p(address), ctypes.c_size_t(pages * PAGE)
        _check(_libc.mmap(where, size, prot, flags | MAP_FIXED, fd, ctypes.c_long(0)), "mmap")

    def damage(self, r: random.Random) -> None:
        """Something that a process may do to its memory at any time."""
        low = LOW_PAGES if r.random() < 0.95 else 0
        page = self.address + r.randrange(low, GUEST_PAGES) * PAGE
        where, size = ctypes.c_void_p(page), ctypes.c_size_t(PAGE)
        choices = (
            lambda: _check(
                _libc.mprotect(where, size, r.choice((PROT_NONE, READ, ALL))), "mprotect"
            ),
            lambda: _check(_libc.madvise(where, size, MADV_DONTNEED), "madvise"),
            lambda: self._map(page, 1, PROT_NONE, ANONYMOUS),  # munmap, but that nobody moves in
            lambda: self._map(page, 1, ALL, ANONYMOUS),
            lambda: self._map(page, 1, ALL, fs.MAP_SHARED, self._fd),
            lambda: os.ftruncate(self._fd, r.randrange(FILE_PAGES + 1) * PAGE),
            self.repair,
        )
        r.choice(choices)()

    def close(self) -> None:
        os.close(self._fd)
        self._all.unmap()
