"""User memory for hostile callers: pointers of every kind, and eventfds to put into structs."""

from __future__ import annotations

import ctypes
import os
import random

from anykvm import fs

from .guest import ALL, ANONYMOUS, GUEST_PAGES, PAGE, PROT_NONE, GuestPages

ARENA_PAGES = 24
KERNEL_ADDRESS = 0xFFFF_8880_0000_1000
NOBODYS_ADDRESS = 0x200_0000_0000  # far from all that is mapped
_libc = ctypes.CDLL(None, use_errno=True)


def _make_unreachable(page: int) -> None:
    if _libc.mprotect(ctypes.c_void_p(page), PAGE, PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")


class Arena:
    """Memory of one fuzzing thread."""

    def __init__(self, r: random.Random, guest: GuestPages) -> None:
        self.r = r
        self.guest = guest
        self._writable = fs.Mapping((ARENA_PAGES + 1) * PAGE, ALL, ANONYMOUS)
        self.start = self._writable.address
        self.end = self.start + ARENA_PAGES * PAGE
        _make_unreachable(self.end)
        self._readonly = fs.Mapping(4 * PAGE, fs.PROT_READ, ANONYMOUS)
        self.eventfds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(4)]

    def pointer(self, size: int) -> int:
        """Where an argument of `size` bytes may lie: mostly memory, sometimes not."""
        r = self.r
        kind = r.random()
        if kind < 0.8:
            return self.start + r.randrange(0, max(ARENA_PAGES * PAGE - size, 1)) & ~7
        choices = (
            lambda: self.end - r.randrange(0, size + 1),  # straddles the end
            lambda: self._readonly.address + r.randrange(PAGE),
            lambda: self.start + r.randrange(PAGE),  # any alignment
            lambda: 0,
            lambda: NOBODYS_ADDRESS,
            lambda: KERNEL_ADDRESS,
            lambda: r.getrandbits(64),
        )
        return r.choice(choices)()

    def fill(self, address: int, data: bytes) -> None:
        """Put `data` at a pointer, as far as that is memory of ours."""
        room = min(len(data), self.end - address)
        if self.start <= address and room > 0:
            ctypes.memmove(address, data, room)

    def guest_address(self) -> int:
        """What a slot may name as its memory: nothing that guests must not write to."""
        r, guest = self.r, self.guest
        if r.random() < 0.8:
            return guest.address + r.randrange(GUEST_PAGES) * PAGE
        return r.choice(
            (guest.file, guest.nothing, NOBODYS_ADDRESS, KERNEL_ADDRESS, guest.address + 1)
        )

    def close(self) -> None:
        for fd in self.eventfds:
            os.close(fd)
