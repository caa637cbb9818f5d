"""Blocks: from guest code to records of threaded code.

A unit is a run of instructions that was translated together: from where control arrived, past conditional branches that may fall
through, to an instruction that ends it or to the end of the page. Its beginning, and each place behind a conditional branch, is a
head: an entry of the block table. A branch inside the page goes to a head once one is there; until then it goes to a `missing`
record of its own, which returns to Python, where the link is made. What leads out of the page goes through a look-up, for there the
mapping may have changed.

A page that holds translated code knows which of its bytes were translated. A store to one of those drops the units over it: their
heads become `dropped` records, which look again.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from anykvm.cpu import insn
from anykvm.cpu.decode import Decoded, FormDecoder
from anykvm.cpu.dispatch import BLOCK_ENTRY, block_slot
from anykvm.cpu.forms import ROWS, Form, build
from anykvm.cpu.guest import RECORD
from anykvm.cpu.jit import Jit
from anykvm.cpu.state import Mode

PAGE = 4096
UNIT_INSNS = 64
UNIT_BRANCHES = 4
MAX_RECORDS = 1 << 23
MAX_BLOCKS = 1 << 20

HEAD = struct.Struct("<Q16sQ")
PAIR, WORD = struct.Struct("<QQ"), struct.Struct("<Q")
NO_MODE = 2**64 - 1
CODE_MODE = int(
    Mode.CODE32 | Mode.CODE64 | Mode.STACK32 | Mode.PROTECTED | Mode.NM | Mode.SSE_UD | Mode.SSE_NM
)
STEP, CODE64 = int(Mode.STEP), int(Mode.CODE64)
POLL, SEEK, LINK, MISSING = Form("poll"), Form("seek"), Form("link"), Form("missing")
NO_FIELDS = bytes(16)

assert insn.__all__  # imported for the rows that it declares


class Unit(NamedTuple):
    """What was translated together: byte range in the page and heads (RIP, host page, mode, record)."""

    start: int
    end: int
    heads: tuple[tuple[int, int, int, int], ...]


class CodePage:
    """A host page with translated code."""

    def __init__(self) -> None:
        self.bitmap = (ctypes.c_uint8 * (PAGE // 8))()
        self.units: list[Unit] = []
        self.content = b""

    def mark(self, start: int, end: int) -> None:
        for n in range(start, end):
            self.bitmap[n >> 3] |= 1 << (n & 7)

    def take_overlapping(self, start: int, end: int) -> list[Unit]:
        """Removes and returns the units over the bytes `start` to `end`."""
        hit = [u for u in self.units if u.start < end and start < u.end]
        self.units = [u for u in self.units if u not in hit]
        ctypes.memset(self.bitmap, 0, PAGE // 8)
        for unit in self.units:
            self.mark(unit.start, unit.end)
        return hit


class CodeFull(Exception):
    """No room for more records or blocks: everything must go."""


class Pending(NamedTuple):
    """A branch whose target record comes after the unit."""

    record: int
    target: int


class Translator:
    """The translations of one engine. Callers hold `lock`; native code reads the tables without."""

    def __init__(self, jit: Jit) -> None:
        self.jit = jit
        self.lock = threading.RLock()
        self._records = mmap.mmap(-1, MAX_RECORDS * RECORD, flags=mmap.MAP_PRIVATE | 0x4000)
        self._rips = mmap.mmap(-1, MAX_RECORDS * 8, flags=mmap.MAP_PRIVATE | 0x4000)
        self._table = mmap.mmap(-1, MAX_BLOCKS * BLOCK_ENTRY, flags=mmap.MAP_PRIVATE | 0x4000)
        self.records, self.rips, self.table = (
            ctypes.addressof(ctypes.c_char.from_buffer(m))
            for m in (self._records, self._rips, self._table)
        )
        self.blocks: dict[tuple[int, int, int], int] = {}
        self.pages: dict[int, CodePage] = {}
        self._next = 1
        self._used = 0
        self._handlers: dict[Form, int] = {}
        self._decoders: dict[int, FormDecoder] = {}
        self.units = self.insns = 0
        self.seconds = 0.0

    # Handlers
    def handler(self, form: Form) -> int:
        address = self._handlers.get(form)
        if address is None:
            (address,) = self.jit.addresses([form.symbol], lambda _: [build(form)])
            self._handlers[form] = address
        return address

    def decoder(self, mode: int) -> FormDecoder:
        decoder = self._decoders.get(mode)
        if decoder is None:
            decoder = self._decoders[mode] = FormDecoder(Mode(mode), special)
        return decoder

    # Records
    def _record(self, form: Form, fields: bytes, aux: int, rip: int) -> int:
        """Writes the next record; gives its address."""
        n = self._next
        if n + 1 >= MAX_RECORDS:
            raise CodeFull
        self._next = n + 1
        HEAD.pack_into(self._records, n * RECORD, self.handler(form), fields, aux & (2**64 - 1))
        WORD.pack_into(self._rips, n * 8, rip)
        return self.records + n * RECORD

    def set_aux(self, record: int, aux: int) -> None:
        WORD.pack_into(self._records, record - self.records + 24, aux)

    def _publish(self, rip: int, host: int, mode: int, record: int, second: int) -> None:
        """Enters a block. Readers take no lock: an entry matches nothing until its mode is written, last."""
        mask = MAX_BLOCKS - 1
        if self._used * 2 > MAX_BLOCKS:
            raise CodeFull
        at = block_slot(rip, host, mask) * BLOCK_ENTRY
        table = self._table
        while True:
            used_mode, used_record = PAIR.unpack_from(table, at + 16)
            if not used_record:
                self._used += 1
                break
            if used_mode == NO_MODE:
                break
            at = (at + BLOCK_ENTRY) % (MAX_BLOCKS * BLOCK_ENTRY)
        PAIR.pack_into(table, at + 16, NO_MODE, used_record)
        PAIR.pack_into(table, at, rip, host)
        PAIR.pack_into(table, at + 24, record, second)
        WORD.pack_into(table, at + 16, mode)
        self.blocks[rip, host, mode] = record

    def _withdraw(self, rip: int, host: int, mode: int, record: int) -> None:
        """The block's table entry stays in its chain but matches nothing any more."""
        if self.blocks.get((rip, host, mode)) != record:
            return
        del self.blocks[rip, host, mode]
        mask = MAX_BLOCKS - 1
        slot = block_slot(rip, host, mask)
        while WORD.unpack_from(self._table, slot * BLOCK_ENTRY + 24)[0] != record:
            slot = (slot + 1) & mask
        WORD.pack_into(self._table, slot * BLOCK_ENTRY + 16, NO_MODE)

    # Units
    def translate(
        self, rip: int, mode: int, base: int, host: int, second: Callable[[], int | None]
    ) -> int | None:
        """Translates at `rip` (linear address `base` further on), whose page stands at `host`; `second` gives the next page if an instruction needs it.

        Returns the record, or None where the second page could not be fetched (the fault is noted).
        """
        start = time.perf_counter()
        try:
            return self._translate(rip, mode, base, host, second)
        finally:
            self.seconds += time.perf_counter() - start

    def _translate(
        self, rip: int, mode: int, base: int, host: int, second: Callable[[], int | None]
    ) -> int | None:
        known = self.blocks.get((rip, host, mode))
        if known is not None:
            return known
        page = self.pages[host]
        offset = (rip + base) & (PAGE - 1)
        code = ctypes.string_at(host + offset, PAGE - offset)
        builder = UnitBuilder(self, rip, mode, base, host, code)
        second_host = 0
        if not builder.straight():
            # The first instruction crosses into the next page.
            found = second()
            if found is None:
                return None
            second_host = found
            builder.single(code + ctypes.string_at(second_host, 16))
            self.pages[second_host].mark(0, builder.length - len(code))
        builder.finish()
        for head_rip, record in builder.heads:
            self._publish(head_rip, host, mode, record, second_host)
        heads = tuple((r, host, mode, record) for r, record in builder.heads)
        end = min(offset + builder.length, PAGE)
        page.units.append(Unit(offset, end, heads))
        page.mark(offset, end)
        if second_host:
            tail = builder.length - len(code)
            self.pages[second_host].units.append(Unit(0, tail, heads))
        self.units += 1
        self.insns += builder.count
        return builder.heads[0][1]

    def drop(self, host: int, start: int, end: int) -> None:
        """Drops what was translated from bytes `start` to `end` of a host page."""
        page = self.pages.get(host)
        if page is None:
            return
        dead = self.handler(Form("dropped"))
        for unit in page.take_overlapping(start, end):
            for rip, home, mode, record in unit.heads:
                WORD.pack_into(self._records, record - self.records, dead)
                self._withdraw(rip, home, mode, record)

    def rip_of(self, record: int) -> int:
        return int(WORD.unpack_from(self._rips, (record - self.records) >> 2)[0])

    def reset(self) -> None:
        """Forgets every translation. No vCPU may be in native code."""
        self.blocks.clear()
        self.pages.clear()
        ctypes.memset(self.table, 0, MAX_BLOCKS * BLOCK_ENTRY)
        self._next, self._used = 1, 0


class UnitBuilder:
    """One unit under construction."""

    def __init__(
        self, t: Translator, rip: int, mode: int, base: int, host: int, code: bytes
    ) -> None:
        self.t, self.rip, self.mode, self.host, self.code = t, rip, mode, host, code
        self.base = base
        self.mask = 2**64 - 1 if mode & CODE64 else 2**32 - 1
        self.decoder = t.decoder(mode & CODE_MODE)
        self.heads: list[tuple[int, int]] = []
        self.pending: list[Pending] = []
        self.length = 0  # bytes
        self.count = 0  # instructions
        self._uncounted = 0

    @property
    def at(self) -> int:
        return (self.rip + self.length) & self.mask

    def straight(self) -> bool:
        """Translates until something ends the unit; False if not even one instruction lies in the page."""
        branches, fresh, shadow = 0, True, False
        limit = 1 if self.mode & STEP else UNIT_INSNS
        while True:
            decoded = self.decoder.decode(self.code[self.length : self.length + 15], self.at)
            if decoded is None:
                if not self.count:
                    return False
                self._end()
                return True
            if fresh and self.count and (self.at, self.host, self.mode) in self.t.blocks:
                self._link()
                return True
            record = self._emit(decoded)
            if fresh:
                self.heads.append((self.at, record))
                fresh = False
            self._step(decoded)
            if decoded.ends:
                self._end()
                return True
            if shadow:
                self.t._record(POLL, NO_FIELDS, 0, self.at)
            shadow = decoded.shadow
            if decoded.falls_through:
                branches += 1
                fresh = True
            if self.count >= limit or branches > UNIT_BRANCHES or self.length >= len(self.code):
                self._end()
                return True

    def single(self, code: bytes) -> None:
        """Only one instruction, from bytes of two pages."""
        decoded = self.decoder.decode(code[:15], self.at)
        assert decoded is not None
        self.heads.append((self.at, self._emit(decoded)))
        self._step(decoded)
        self._end()

    def _step(self, decoded: Decoded) -> None:
        self.length += decoded.length
        self.count += 1

    def _emit(self, d: Decoded) -> int:
        self._uncounted += 1
        fields = d.fields
        if d.counted:
            fields = fields[:2] + self._uncounted.to_bytes(2, "little") + fields[4:]
            self._uncounted = 0
        record = self.t._record(d.form, fields, d.aux, self.at)
        if d.target is not None:
            self.pending.append(Pending(record, d.target & self.mask))
        return record

    def _end(self) -> None:
        """On to the next instruction by a look-up (a poll when stepping)."""
        self._count_rest()
        self.t._record(POLL if self.mode & STEP else SEEK, self._fields(), 0, self.at)

    def _count_rest(self) -> None:
        self._tail_count, self._uncounted = self._uncounted, 0

    def _fields(self) -> bytes:
        return b"\0\0" + self._tail_count.to_bytes(2, "little") + bytes(12)

    def _link(self) -> None:
        self._count_rest()
        target = self.t.blocks[self.at, self.host, self.mode]
        self.t._record(LINK, self._fields(), target, self.at)

    def finish(self) -> None:
        """Gives every branch its target, or a record that finds it."""
        t = self.t
        own = dict(self.heads)
        page = (self.rip + self.base) & ~(PAGE - 1)
        for record, target in self.pending:
            known = own.get(target) or t.blocks.get((target, self.host, self.mode))
            if self.mode & STEP:
                stub = t._record(POLL, NO_FIELDS, 0, target)
                t._record(SEEK, NO_FIELDS, 0, target)
            elif (target + self.base) & ~(PAGE - 1) != page:
                stub = t._record(SEEK, NO_FIELDS, 0, target)
            elif known is not None:
                stub = known
            else:
                stub = t._record(MISSING, NO_FIELDS, record, target)
            t.set_aux(record, stub)


def special(name: str, mode: Mode, mmx: bool = False) -> str | None:
    """What stands for an instruction, with MMX operands or without, that the mode does not allow."""
    row = ROWS.get(name)
    feature, _, with_mmx = row.feature.partition("/") if row else ("", "", "")
    if mmx and with_mmx:
        feature = with_mmx
    if feature == "mmx" and mode & Mode.NM and not mode & Mode.SSE_NM:
        return "ud2"  # CR0.EM
    if feature in ("x87", "mmx") and mode & Mode.NM:
        return "device_not_available"
    if feature.startswith("sse"):
        if mode & Mode.SSE_UD:
            return "ud2"
        if mode & Mode.SSE_NM:
            return "device_not_available"
    return None
