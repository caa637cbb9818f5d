"""Where translations are found: by (RIP, host page, mode), for Python in a dictionary, for native
code in a hash table (dispatch.py reads it).

Readers take no lock: an entry matches nothing until its mode is written, last.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Callable, Iterable

from anykvm.cpu.dispatch import BLOCK_ENTRY, block_hash, block_slot
from anykvm.cpu.ir import PTR, Function

MAX_BLOCKS = 1 << 20
MASK = MAX_BLOCKS - 1
ENTRY_WORDS = BLOCK_ENTRY // 8
NO_MODE = 2**64 - 1
MAP_NORESERVE = 0x4000


class CodeFull(Exception):
    """No room for more records or blocks: everything must go."""


def publish() -> Function:
    """publish(table, mask, heads, count, host, mode, second, page): enters blocks, given as pairs
    of RIP and record; how many of the entries had never been used.
    """
    numbers = ("mask", "count", "host", "mode", "second", "page")
    params = [("table", PTR), ("heads", PTR), *((name, "i64") for name in numbers)]
    f = Function("publish", "i64", params)
    table, heads, mask, count, host, mode, second, page = f.args
    done, used = f.var(f.const(0, 64)), f.var(f.const(0, 64))
    with f.Loop() as each:
        each.break_if(done.get().eq(count))
        head = heads.offset(done.get() << 4)
        rip, record = head.load("i64", align=8), head.offset(8).load("i64", align=8)
        slot = f.var(block_hash(rip, host) & mask)
        with f.Loop() as search:
            entry = table.offset(slot.get() * BLOCK_ENTRY)
            search.break_if(entry.offset(24).load("i64", align=8).eq(0))
            search.break_if(entry.offset(16).load("i64", align=8).eq(NO_MODE))
            slot.set((slot.get() + 1) & mask)
        entry = table.offset(slot.get() * BLOCK_ENTRY)
        used.set(used.get() + entry.offset(24).load("i64", align=8).eq(0).zext(64))
        words = (
            *((16, f.const(NO_MODE, 64)), (0, rip), (8, host), (24, record)),
            *((32, second), (40, page), (16, mode)),
        )
        for offset, word in words:
            entry.offset(offset).store(word, volatile=True, align=8)
        done.set(done.get() + 1)
    f.ret(used.get())
    return f


ROUTINES = (publish,)


class Blocks:
    """The blocks of one engine. Callers hold the translator's lock."""

    def __init__(self, native: Callable[..., int]) -> None:
        self.records: dict[tuple[int, int, int], int] = {}
        self._table = mmap.mmap(
            -1, MAX_BLOCKS * BLOCK_ENTRY, flags=mmap.MAP_PRIVATE | MAP_NORESERVE
        )
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._table))
        # Native code reads words while they are written: `struct` writes byte by byte, this does
        # not.
        self.words = memoryview(self._table).cast("Q")
        self._used = 0
        self._native = native

    def publish(
        self, heads: Iterable[tuple[int, int]], host: int, mode: int, second: int, page: int
    ) -> None:
        """Enters blocks, pairs of RIP and record: with the page that their only instruction goes on
        in, or 0, and the address of their CodePage.

        One that is a head of another unit too keeps its one entry, or dropping that would leave the
        other.
        """
        records = self.records
        fresh = array("Q")
        for rip, record in heads:
            if records.setdefault((rip, host, mode), record) == record:
                fresh.extend((rip, record))
        count = len(fresh) // 2
        if (self._used + count) * 2 > MAX_BLOCKS:
            raise CodeFull
        first, _ = fresh.buffer_info()
        self._used += self._native(self.address, first, MASK, count, host, mode, second, page)

    def withdraw(self, rip: int, host: int, mode: int, record: int) -> None:
        """The table's entry stays in its chain but matches nothing any more."""
        if self.records.get((rip, host, mode)) != record:
            return
        del self.records[rip, host, mode]
        slot, words = block_slot(rip, host, MASK), self.words
        while words[slot * ENTRY_WORDS + 3] != record:
            slot = (slot + 1) & MASK
        words[slot * ENTRY_WORDS + 2] = NO_MODE

    def clear(self) -> None:
        """No vCPU may be in native code."""
        self.records.clear()
        ctypes.memset(self.address, 0, MAX_BLOCKS * BLOCK_ENTRY)
        self._used = 0
