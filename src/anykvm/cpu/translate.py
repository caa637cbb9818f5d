"""Blocks: from guest code to records of threaded code.

A unit is a run of instructions that was translated together: from where control arrived, past
conditional branches that may fall through, to an instruction that ends it or to the end of the
page. Its beginning, and each place behind a conditional branch, is a head: an entry of the block
table. A branch inside the page goes to a head once one is there; until then it goes to a `missing`
record of its own, which returns to Python, where the link is made. What leads out of the page goes
through a look-up, for there the mapping may have changed.

A page that holds translated code knows which of its bytes were translated. A store to one of those
drops the units over it: their heads become `dropped` records, which look again.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from array import array
from collections.abc import Callable
from typing import NamedTuple

from anykvm.cpu import insn
from anykvm.cpu.decode import FormDecoder
from anykvm.cpu.dispatch import BLOCK_ENTRY, block_slot
from anykvm.cpu.forms import ROWS, Form
from anykvm.cpu.guest import RECORD
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.state import Mode
from anykvm.cpu.templates import TemplateDecoder
from anykvm.cpu.unit import STEP, UnitBuilder
from anykvm.cpu.unit_cache import UnitCache, UnitImage

PAGE = 4096
PAGE_MASK = ~(PAGE - 1)
MAX_RECORDS = 1 << 23
MAX_BLOCKS = 1 << 20

ENTRY_WORDS = BLOCK_ENTRY // 8
NO_MODE = 2**64 - 1
ONES = b"\xff" * PAGE

assert insn.__all__  # imported for the rows that it declares


class Unit(NamedTuple):
    """What was translated together: byte range in the page and heads (RIP, host page, mode,
    record).
    """

    start: int
    end: int
    heads: tuple[tuple[int, int, int, int], ...]


class Fetcher(NamedTuple):
    """How the translator reads the guest: bytes by host address, and the page after the first."""

    bytes_at: Callable[[int, int], bytes]
    second: Callable[[], int | None]


class CodePage:
    """A host page with translated code. Native code reads the memory behind it, in this order:

    the number of the last stay at which the page was compared, a map of translated bytes (FF each),
    and the bytes that were translated.
    """

    def __init__(self) -> None:
        self._memory = bytearray(8 + 2 * PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.map_address = self.address + 8
        self.units: list[Unit] = []

    def mark(self, start: int, end: int, code: bytes) -> None:
        """Bytes `start` to `end` were translated from `code`."""
        self._memory[8 + start : 8 + end] = ONES[: end - start]
        self._memory[8 + PAGE + start : 8 + PAGE + end] = code

    def take_overlapping(self, start: int, end: int) -> list[Unit]:
        """Removes and returns the units over the bytes `start` to `end`."""
        if self._memory.find(b"\xff", 8 + start, 8 + end) < 0:
            return []
        hit: list[Unit] = []
        rest: list[Unit] = []
        for unit in self.units:
            (hit if unit.start < end and start < unit.end else rest).append(unit)
        first, last = min(u.start for u in hit), max(u.end for u in hit)
        self.units = rest
        self._memory[8 + first : 8 + last] = bytes(last - first)
        for unit in rest:
            if unit.start < last and first < unit.end:
                self._memory[8 + unit.start : 8 + unit.end] = ONES[: unit.end - unit.start]
        return hit


class CodeFull(Exception):
    """No room for more records or blocks: everything must go."""


class Translator:
    """The translations of one engine. Callers hold `lock`; native code reads the tables without."""

    def __init__(self, handlers: Handlers, cache: UnitCache) -> None:
        self.handlers, self.cache = handlers, cache
        self.lock = threading.RLock()
        self._records = mmap.mmap(-1, MAX_RECORDS * RECORD, flags=mmap.MAP_PRIVATE | 0x4000)
        self._rips = mmap.mmap(-1, MAX_RECORDS * 8, flags=mmap.MAP_PRIVATE | 0x4000)
        self._table = mmap.mmap(-1, MAX_BLOCKS * BLOCK_ENTRY, flags=mmap.MAP_PRIVATE | 0x4000)
        self.records, self.rips, self.table = (
            ctypes.addressof(ctypes.c_char.from_buffer(m))
            for m in (self._records, self._rips, self._table)
        )
        # Native code reads words while they are written: `struct` writes byte by byte, this does
        # not.
        self._record_words = memoryview(self._records).cast("Q")
        self._rip_words = memoryview(self._rips).cast("Q")
        self._table_words = memoryview(self._table).cast("Q")
        self.blocks: dict[tuple[int, int, int], int] = {}
        self.pages: dict[int, CodePage] = {}
        self.uncounted: dict[int, int] = {}  # by record that leaves: instructions up to it
        self._next = 1
        self._used = 0
        self.resets = 0
        self._poll, self._seek, self._missing, self._dropped = (
            handlers.address(Form(name)) for name in ("poll", "seek", "missing", "dropped")
        )
        self._decoders: dict[int, TemplateDecoder] = {}
        self.units = self.insns = 0
        self.seconds = 0.0

    def decoder(self, mode: int) -> TemplateDecoder:
        decoder = self._decoders.get(mode)
        if decoder is None:
            decoder = self._decoders[mode] = TemplateDecoder(FormDecoder(mode, special))
        return decoder

    # Records
    def _place(self, image: UnitImage, host: int, mode: int, base: int) -> list[tuple[int, int]]:
        """Writes a unit's records; gives the RIP and record of each head."""
        words = array("Q", image.records)
        words[::4] = array("Q", self.handlers.resolve(image.handlers))
        rips = array("Q", image.rips)
        first = self._next
        for n, count in image.leaving:
            self.uncounted[self.records + (first + n) * RECORD] = count
        heads = [(rip, self.records + (first + n) * RECORD) for rip, n in image.heads]
        self._link(image, words, rips, dict(heads), host, mode, base)
        end = first + len(rips)
        if end >= MAX_RECORDS:
            raise CodeFull
        self._next = end
        self._record_words[first * 4 : end * 4] = memoryview(words)
        self._rip_words[first:end] = memoryview(rips)
        return heads

    def _link(
        self,
        image: UnitImage,
        words: array[int],
        rips: array[int],
        own: dict[int, int],
        host: int,
        mode: int,
        base: int,
    ) -> None:
        """Gives every branch its target, or a record that goes on to it."""
        page = (rips[0] + base) & PAGE_MASK
        for index, target in image.branches:
            outside = (target + base) & PAGE_MASK != page
            known = own.get(target) or self.blocks.get((target, host, mode))
            if known is None or outside or mode & STEP:
                known = self.records + (self._next + len(rips)) * RECORD
                branch = self.records + (self._next + index) * RECORD
                kind = self._poll if mode & STEP else self._seek if outside else self._missing
                words.extend((kind, 0, 0, branch))
                rips.append(target)
            words[index * 4 + 3] = known

    def set_aux(self, record: int, aux: int) -> None:
        self._record_words[(record - self.records) // 8 + 3] = aux

    def _publish(self, rip: int, host: int, mode: int, record: int, second: int) -> None:
        """Enters a block. Readers take no lock: an entry matches nothing until its mode is written,
        last.
        """
        if (rip, host, mode) in self.blocks:
            return  # a head of another unit too: one entry, or dropping would leave the other
        mask = MAX_BLOCKS - 1
        if self._used * 2 > MAX_BLOCKS:
            raise CodeFull
        slot, words = block_slot(rip, host, mask), self._table_words
        while words[slot * ENTRY_WORDS + 3] and words[slot * ENTRY_WORDS + 2] != NO_MODE:
            slot = (slot + 1) & mask
        at = slot * ENTRY_WORDS
        if not words[at + 3]:
            self._used += 1
        words[at + 2] = NO_MODE
        words[at], words[at + 1], words[at + 3], words[at + 4] = rip, host, record, second
        words[at + 5] = self.pages[host].address
        words[at + 2] = mode
        self.blocks[rip, host, mode] = record

    def _withdraw(self, rip: int, host: int, mode: int, record: int) -> None:
        """The block's table entry stays in its chain but matches nothing any more."""
        if self.blocks.get((rip, host, mode)) != record:
            return
        del self.blocks[rip, host, mode]
        mask = MAX_BLOCKS - 1
        slot, words = block_slot(rip, host, mask), self._table_words
        while words[slot * ENTRY_WORDS + 3] != record:
            slot = (slot + 1) & mask
        words[slot * ENTRY_WORDS + 2] = NO_MODE

    # Units
    def translate(self, rip: int, mode: int, base: int, host: int, memory: Fetcher) -> int | None:
        """Translates at `rip` (linear address `base` further on), whose page stands at `host`;
        `memory` gives the bytes there, and the next page if an instruction needs it.

        Returns the record, or None where the second page could not be fetched (the fault is noted).
        """
        start = time.perf_counter()
        try:
            return self._translate(rip, mode, base, host, memory)
        finally:
            self.seconds += time.perf_counter() - start

    def _translate(self, rip: int, mode: int, base: int, host: int, memory: Fetcher) -> int | None:
        known = self.blocks.get((rip, host, mode))
        if known is not None:
            return known
        page = self.pages[host]
        offset = (rip + base) & (PAGE - 1)
        code = memory.bytes_at(host + offset, PAGE - offset)
        second_host = 0
        image = self.cache.find(rip, mode, code)
        if image is None:
            builder = UnitBuilder(self, rip, mode, host, code)
            if builder.collect():
                image = builder.image()
                if not mode & STEP:
                    self.cache.add(rip, mode, image)
            else:  # the first instruction crosses into the next page
                found = memory.second()
                if found is None:
                    return None
                second_host = found
                more = memory.bytes_at(second_host, 16)
                builder.collect_one(code + more)
                image = builder.image()
        placed = self._place(image, host, mode, base)
        heads = tuple((r, host, mode, record) for r, record in placed)
        size = len(image.code)
        page.units.append(Unit(offset, offset + size, heads))
        page.mark(offset, offset + size, image.code)
        if second_host:
            tail = builder.length - len(code)
            self.pages[second_host].units.append(Unit(0, tail, heads))
            self.pages[second_host].mark(0, tail, more[:tail])
        for head_rip, record in placed:
            self._publish(head_rip, host, mode, record, second_host)
        self.units += 1
        self.insns += image.instructions
        return placed[0][1]

    def drop(self, host: int, start: int, end: int) -> None:
        """Drops what was translated from bytes `start` to `end` of a host page."""
        page = self.pages.get(host)
        if page is None:
            return
        for unit in page.take_overlapping(start, end):
            for rip, home, mode, record in unit.heads:
                self._record_words[(record - self.records) // 8] = self._dropped
                self._withdraw(rip, home, mode, record)

    def length_of(self, record: int) -> int:
        """How many bytes the instruction of a record has."""
        n = (record - self.records) // RECORD
        return (self._rip_words[n + 1] - self._rip_words[n]) & 0xFFFF

    def rip_of(self, record: int) -> int:
        return self._rip_words[(record - self.records) // RECORD]

    def reset(self) -> None:
        """Forgets every translation. No vCPU may be in native code."""
        self.blocks.clear()
        self.pages.clear()
        self.uncounted.clear()
        ctypes.memset(self.table, 0, MAX_BLOCKS * BLOCK_ENTRY)
        self._next, self._used = 1, 0
        self.resets += 1


def special(name: str, mode: int, mmx: bool = False) -> str | None:
    """What stands for an instruction, with MMX operands or without, that the mode forbids."""
    row = ROWS.get(name)
    feature, _, with_mmx = row.feature.partition("/") if row else ("", "", "")
    if mmx and with_mmx:
        feature = with_mmx
    if feature == "mmx" and mode & Mode.NM and not mode & Mode.SSE_NM:
        return "ud2"  # CR0.EM
    if feature in ("x87", "mmx") and mode & Mode.NM:
        return "device_not_available"
    if feature.startswith(("sse", "ssse")):
        if mode & Mode.SSE_UD:
            return "ud2"
        if mode & Mode.SSE_NM:
            return "device_not_available"
    return None
