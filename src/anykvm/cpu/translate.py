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
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import NamedTuple

from anykvm.cpu import insn
from anykvm.cpu.blocks import MAP_NORESERVE, Blocks, CodeFull
from anykvm.cpu.decode import FormDecoder
from anykvm.cpu.forms import ROWS, Form
from anykvm.cpu.guest import RECORD
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.memory import BEING_READ, CODE_MAP, MADE_FROM
from anykvm.cpu.state import Mode
from anykvm.cpu.templates import Template, TemplateDecoder
from anykvm.cpu.unit import STEP, UnitBuilder
from anykvm.cpu.unit_cache import UnitCache, UnitImage

PAGE = 4096
PAGE_MASK = ~(PAGE - 1)
MAX_RECORDS = 1 << 23
ONES = b"\xff" * PAGE

assert insn.__all__  # imported for the rows that it declares


class Unit(NamedTuple):
    """What was translated together: byte range in the page, the page of its heads, and these (RIP,
    record).
    """

    start: int
    end: int
    host: int
    mode: int
    heads: list[tuple[int, int]]


class Fetcher(NamedTuple):
    """How the translator reads the guest: bytes by host address, and the page after the first."""

    bytes_at: Callable[[int, int], bytes]
    second: Callable[[], int | None]


class CodePage:
    """A host page with translated code. Native code reads the memory behind it, in this order:

    the number of the last stay at which the page was compared, whether it is being translated, a
    map of translated bytes (FF each), and the bytes that were translated.
    """

    def __init__(self) -> None:
        self._memory = bytearray(MADE_FROM + PAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.map_address = self.address + CODE_MAP
        self.units: list[Unit] = []

    def __enter__(self) -> None:
        """From before its bytes are read until all of them are marked that count: meanwhile no
        other vCPU stores to the page without asking, or what is translated might be old.
        """
        self._memory[BEING_READ] = 1

    def __exit__(self, *error: object) -> None:
        self._memory[BEING_READ] = 0

    def mark(self, start: int, end: int, code: bytes) -> None:
        """Bytes `start` to `end` were translated from `code`."""
        self._memory[CODE_MAP + start : CODE_MAP + end] = ONES[: end - start]
        self._memory[MADE_FROM + start : MADE_FROM + end] = code

    def take_overlapping(self, start: int, end: int) -> list[Unit]:
        """Removes and returns the units over the bytes `start` to `end`."""
        if self._memory.find(b"\xff", CODE_MAP + start, CODE_MAP + end) < 0:
            return []
        hit: list[Unit] = []
        rest: list[Unit] = []
        for unit in self.units:
            (hit if unit.start < end and start < unit.end else rest).append(unit)
        self.units = rest
        first, last = min(u.start for u in hit), max(u.end for u in hit)
        left = bytearray(last - first)
        for unit in rest:
            if unit.start < last and first < unit.end:
                begin, stop = max(unit.start, first) - first, min(unit.end, last) - first
                left[begin:stop] = ONES[: stop - begin]
        # At once: what the others cover stays marked all the time.
        self._memory[CODE_MAP + first : CODE_MAP + last] = left
        return hit


class Translator:
    """The translations of one engine. Callers hold `lock`; native code reads the tables without."""

    def __init__(self, handlers: Handlers, cache: UnitCache, publish: Callable[..., int]) -> None:
        self.handlers, self.cache = handlers, cache
        self.lock = threading.RLock()
        flags = mmap.MAP_PRIVATE | MAP_NORESERVE
        self._records = mmap.mmap(-1, MAX_RECORDS * RECORD, flags=flags)
        self._rips = mmap.mmap(-1, MAX_RECORDS * 8, flags=flags)
        self.records, self.rips = (
            ctypes.addressof(ctypes.c_char.from_buffer(m)) for m in (self._records, self._rips)
        )
        # As in blocks.py: word by word, for native code reads them meanwhile.
        self._record_words = memoryview(self._records).cast("Q")
        self._rip_words = memoryview(self._rips).cast("Q")
        self.blocks = Blocks(publish)
        self.pages: dict[int, CodePage] = {}
        self.uncounted: dict[int, int] = {}  # by record that leaves: instructions up to it
        self._next = 1
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
    def _place(
        self, units: Sequence[tuple[int, UnitImage]], host: int, mode: int, base: int
    ) -> list[list[tuple[int, int]]]:
        """Writes the records of units of one page; gives the RIP and record of each one's heads."""
        images = [image for _, image in units]
        words = array("Q", b"".join([image.records for image in images]))
        numbers = list(chain.from_iterable([image.handlers for image in images]))
        words[::4] = array("Q", self.handlers.resolve(numbers))
        rips = array("Q", b"".join([image.rips for image in images]))
        heads, at = [], self.records + self._next * RECORD
        for image in images:
            for n, count in image.leaving:
                self.uncounted[at + n * RECORD] = count
            heads.append([(rip, at + n * RECORD) for rip, n in image.heads])
            at += len(image.handlers) * RECORD
        self._link(images, words, rips, dict(chain.from_iterable(heads)), host, mode, base)
        first, end = self._next, self._next + len(rips)
        if end >= MAX_RECORDS:
            raise CodeFull
        self._next = end
        self._record_words[first * 4 : end * 4] = memoryview(words)
        self._rip_words[first:end] = memoryview(rips)
        return heads

    def _link(
        self,
        images: Iterable[UnitImage],
        words: array[int],
        rips: array[int],
        own: dict[int, int],
        host: int,
        mode: int,
        base: int,
    ) -> None:
        """Gives every branch its target, or a record that goes on to it."""
        records, placed = self.blocks.records, self.records + self._next * RECORD
        page = (rips[0] + base) & PAGE_MASK
        at = 0
        for image in images:
            for index, target in image.branches:
                outside = (target + base) & PAGE_MASK != page
                known = own.get(target) or records.get((target, host, mode))
                if known is None or outside or mode & STEP:
                    known = placed + len(rips) * RECORD
                    branch = placed + (at + index) * RECORD
                    kind = self._poll if mode & STEP else self._seek if outside else self._missing
                    words.extend((kind, 0, 0, branch))
                    rips.append(target)
                words[(at + index) * 4 + 3] = known
            at += len(image.handlers)

    def set_aux(self, record: int, aux: int) -> None:
        self._record_words[(record - self.records) // 8 + 3] = aux

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
        known = self.blocks.records.get((rip, host, mode))
        if known is not None:
            return known
        with self.pages[host]:
            code = memory.bytes_at(host, PAGE)
            units = self._known_units(rip, mode, base, host, code)
            if units:
                return self._enter(units, host, mode, base)
            offset = (rip + base) & (PAGE - 1)
            builder = UnitBuilder(self, rip, mode, host, code[offset:])
            if builder.collect():
                image = builder.image()
                if not mode & STEP:
                    self.cache.add(rip, mode, image)
                return self._enter([(rip, image)], host, mode, base)
            # The first instruction crosses into the next page.
            second = memory.second()
            if second is None:
                return None
            with self.pages[second]:
                tail = memory.bytes_at(second, 16)
                builder.collect_one(code[offset:] + tail)
                tail = tail[: builder.length - (PAGE - offset)]
                return self._enter([(rip, builder.image())], host, mode, base, second, tail)

    def _enter(
        self,
        units: Sequence[tuple[int, UnitImage]],
        host: int,
        mode: int,
        base: int,
        second: int = 0,
        tail: bytes = b"",
    ) -> int:
        """Puts units of the page at `host` into the tables, the last of which may end with the
        bytes `tail` of a second page. Gives the first one's record.
        """
        placed = self._place(units, host, mode, base)
        page = self.pages[host]
        for (start, image), heads in zip(units, placed, strict=True):
            offset = (start + base) & (PAGE - 1)
            unit = Unit(offset, offset + len(image.code), host, mode, heads)
            page.units.append(unit)
            page.mark(offset, unit.end, image.code)
            self.insns += image.instructions
        if tail:
            self.pages[second].units.append(unit._replace(start=0, end=len(tail)))
            self.pages[second].mark(0, len(tail), tail)
        self.blocks.publish(chain.from_iterable(placed), host, mode, second, page.address)
        self.units += len(units)
        return placed[0][0][1]

    def _known_units(
        self, rip: int, mode: int, base: int, host: int, code: bytes
    ) -> list[tuple[int, UnitImage]]:
        """What the cache has for `rip`, and with that what else it has of this page, whose bytes
        are `code`: it will be wanted soon.
        """
        if mode & STEP:
            return []
        page = self.cache.page(rip, mode)
        image = _version(page.get(rip, ()), code, (rip + base) & (PAGE - 1))
        if image is None:
            return []
        units = [(rip, image)]
        if base & (PAGE - 1):
            return units  # with such a base, pages by RIP are not those of memory
        records = self.blocks.records
        for start, versions in list(page.items()):
            if (start, host, mode) not in records and start != rip:
                image = _version(versions, code, start & (PAGE - 1))
                if image is not None:
                    units.append((start, image))
        return units

    def drop(self, host: int, start: int, end: int) -> None:
        """Drops what was translated from bytes `start` to `end` of a host page."""
        page = self.pages.get(host)
        if page is None:
            return
        for unit in page.take_overlapping(start, end):
            for rip, record in unit.heads:
                self._record_words[(record - self.records) // 8] = self._dropped
                self.blocks.withdraw(rip, unit.host, unit.mode, record)

    def length_of(self, record: int) -> int:
        """How many bytes the instruction of a record has."""
        n = (record - self.records) // RECORD
        return (self._rip_words[n + 1] - self._rip_words[n]) & 0xFFFF

    def is_of(self, record: int, template: Template) -> bool:
        """Whether a record was made from such an instruction, and not dropped since."""
        if template.number < 0:
            template.number = self.handlers.number(template.form)
        handler = self._record_words[(record - self.records) // 8]
        return handler != 0 and handler == self.handlers.addresses[template.number]

    def rip_of(self, record: int) -> int:
        return self._rip_words[(record - self.records) // RECORD]

    def reset(self) -> None:
        """Forgets every translation. No vCPU may be in native code."""
        self.blocks.clear()
        self.pages.clear()
        self.uncounted.clear()
        self._next = 1
        self.resets += 1


def _version(versions: Iterable[UnitImage], code: bytes, offset: int) -> UnitImage | None:
    """The one that was made from what is at `offset` of `code`."""
    for image in versions:
        if code.startswith(image.code, offset):
            return image
    return None


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
