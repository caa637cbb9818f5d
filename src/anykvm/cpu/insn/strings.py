"""String instructions (SDM vol. 1, 7.3.9). Under REP each turn is complete by itself: a fault or a
kick in the middle leaves the registers such that the instruction goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.guest import R_SEG, TLB_READ, TLB_WRITE
from anykvm.cpu.insn.integer import RAX, RCX, RDI, RSI, read_gpr, write_gpr
from anykvm.cpu.ir import LoopScope, Value
from anykvm.cpu.state import Exit, Mode, Seg

POLL_EVERY = 1024  # turns


class Strings:
    """The pieces of one string instruction: `i.bits` wide elements, pointers as wide as addresses
    are.
    """

    def __init__(self, i: Insn) -> None:
        self.i, self.h = i, i.h
        self.n = int(next(a[1:] for a in i.form.attrs if a[0] == "o"))
        self.size = self.n // 8
        self.address_bits = i.address_size
        self.segmented = "seg" in i.attrs
        self.legacy = "legacy" in i.attrs

    def pointer(self, number: int) -> Value:
        return read_gpr(self.i, number, self.address_bits).zext(64)

    def source(self) -> Value:
        ea, h = self.pointer(RSI), self.h
        seg = h.record(R_SEG, "i8").zext(64)
        if self.legacy:
            return h.linear(seg, ea, self.size, write=False)
        return h.segment(seg, "base") + ea if self.segmented else ea

    def destination(self, *, write: bool) -> Value:
        ea = self.pointer(RDI)
        return self.h.linear(int(Seg.ES), ea, self.size, write=write) if self.legacy else ea

    def step(self, *numbers: int) -> None:
        backward = (self.h.get("flags") & 1 << 10).ne(0)
        by = backward.select(self.h.const(-self.size, 64), self.h.const(self.size, 64))
        for number in numbers:
            moved = read_gpr(self.i, number, self.address_bits) + by.trunc(self.address_bits)
            write_gpr(self.i, number, moved)

    def cut_registers(self, *numbers: int) -> None:
        """With 32-bit addresses in 64-bit mode the upper halves go first, also where the count is
        0 or the first access faults, as processors do.
        """
        if self.address_bits != 32 or self.legacy:
            return
        for number in numbers:
            write_gpr(self.i, number, read_gpr(self.i, number, 32))

    def count_down(self) -> Value:
        left = read_gpr(self.i, RCX, self.address_bits) - 1
        write_gpr(self.i, RCX, left)
        return left


def repeat(
    i: Insn,
    body: Callable[[Strings], None],
    *,
    bulk: Callable[[Strings, LoopScope], None] | None = None,
    moving: tuple[int, ...] = (),
) -> None:
    """Runs `body` once, or under REP until the count is 0. `moving` pointers lose their upper
    halves where a count is 0.
    """
    s = Strings(i)
    h = i.h
    if not i.attrs & {"rep", "repne"}:
        body(s)
        return
    s.cut_registers(RCX, *moving)
    turns = h.var(_turns(s))
    with h.Loop() as loop:
        loop.break_if(read_gpr(i, RCX, s.address_bits).eq(0))
        if bulk:
            with h.If(turns.get().ne(1)):
                bulk(s, loop)
        body(s)
        left = s.count_down()
        h.set("replay_count", 0)
        turns.set(turns.get() - 1)
        with h.If(turns.get().eq(0) & left.ne(0)):
            _leave_if_asked(i)
            turns.set(POLL_EVERY)


def repeat_compare(i: Insn, pair: Callable[[Strings], tuple[Value, Value]]) -> None:
    """Compares the two values of `pair` once, or under REP until the count is 0 or ZF says stop.

    A fault in the middle leaves the flags as they were before the instruction (SDM vol. 2, REP).
    """
    s = Strings(i)
    h = i.h
    if not i.attrs & {"rep", "repne"}:
        a, b = pair(s)
        h.flags.sub(a, b, a - b)
        return
    s.cut_registers(RCX)
    turns = h.var(_turns(s))
    with h.If(read_gpr(i, RCX, s.address_bits).ne(0)):
        last = h.local(f"i{s.n}"), h.local(f"i{s.n}")
        with h.Loop() as loop:
            for var, value in zip(last, pair(s), strict=True):
                var.set(value)
            left = s.count_down()
            h.set("replay_count", 0)
            equal = last[0].get().eq(last[1].get())
            loop.break_if(left.eq(0) | (equal if "repne" in i.attrs else equal ^ 1))
            turns.set(turns.get() - 1)
            with h.If(turns.get().eq(0)):
                _leave_if_asked(i)
                turns.set(POLL_EVERY)
        a, b = (var.get() for var in last)
        h.flags.sub(a, b, a - b)


def _turns(s: Strings) -> Value:
    """How many turns until somebody may want to stop: one where instructions are executed alone."""
    alone = (s.h.get("mode") & int(Mode.STEP)).ne(0)
    return alone.select(s.h.const(1, 64), s.h.const(POLL_EVERY, 64))


def _leave_if_asked(i: Insn) -> None:
    """Between two turns, where what held interrupts off before the first is over."""
    request = i.h.field("exit_request").load("i32", volatile=True, align=4)
    with i.h.If(request.ne(0)):
        i.h.set("shadow", 0)
        i.h.leave(Exit.REQUEST)


def _bulk_length(s: Strings, addresses: list[Value]) -> Value:
    """Elements that lie forward within the pages of `addresses`, at most RCX."""
    h = s.h
    length = h.var(read_gpr(s.i, RCX, s.address_bits).zext(64))
    for address in addresses:
        room = (h.const(4096, 64) - (address & 4095)) >> (s.size.bit_length() - 1)
        with h.If(room.ult(length.get())):
            length.set(room)
    return length.get()


def _advance(s: Strings, elements: Value, *numbers: int) -> None:
    bits = s.address_bits
    for number in numbers:
        write_gpr(s.i, number, read_gpr(s.i, number, bits) + (elements * s.size).trunc(bits))
    write_gpr(s.i, RCX, read_gpr(s.i, RCX, bits) - elements.trunc(bits))


def _forward(s: Strings) -> Value:
    return (s.h.get("flags") & 1 << 10).eq(0)


def _move_bulk(s: Strings, loop: LoopScope) -> None:
    """As much as both pages hold at once, where both are in the TLB and the copy does not feed on
    itself.
    """
    h = s.h
    with h.If(_forward(s)):
        source, target = s.source(), s.destination(write=True)
        length = _bulk_length(s, [source, target])
        nbytes = length * s.size
        from_, to = h.cached(source, TLB_READ), h.cached(target, TLB_WRITE)
        apart = (to - from_).uge(nbytes)
        with h.If(length.ugt(1) & from_.ne(0) & to.ne(0) & apart):
            with h.exposed():
                h.intrinsic(
                    "llvm.memmove.p0.p0.i64", "void", to.to_ptr(), from_.to_ptr(), nbytes, h.true()
                )
            _advance(s, length, RSI, RDI)
            loop.continue_()


def _store_bulk(s: Strings, loop: LoopScope) -> None:
    h = s.h
    with h.If(_forward(s)):
        target = s.destination(write=True)
        length = _bulk_length(s, [target])
        to = h.cached(target, TLB_WRITE)
        with h.If(length.ugt(1) & to.ne(0)):
            value = read_gpr(s.i, RAX, s.n)
            at = h.var(to)
            end = to + length * s.size
            with h.Loop() as inner:
                with h.exposed():
                    at.get().to_ptr().store(value)
                at.set(at.get() + s.size)
                inner.break_if(at.get().eq(end))
            _advance(s, length, RDI)
            loop.continue_()


@row("movs", writes=())
def movs(i: Insn) -> None:
    def body(s: Strings) -> None:
        value = s.h.load(s.source(), s.n)
        s.h.store(s.destination(write=True), value)
        s.step(RSI, RDI)

    repeat(i, body, bulk=_move_bulk, moving=(RSI, RDI))


@row("stos", writes=())
def stos(i: Insn) -> None:
    def body(s: Strings) -> None:
        s.h.store(s.destination(write=True), read_gpr(i, RAX, s.n))
        s.step(RDI)

    repeat(i, body, bulk=_store_bulk, moving=(RDI,))


@row("lods", writes=())
def lods(i: Insn) -> None:
    def body(s: Strings) -> None:
        write_gpr(i, RAX, s.h.load(s.source(), s.n))
        s.step(RSI)

    repeat(i, body)


@row("scas", writes=())
def scas(i: Insn) -> None:
    def pair(s: Strings) -> tuple[Value, Value]:
        a, b = read_gpr(i, RAX, s.n), s.h.load(s.destination(write=False), s.n)
        s.step(RDI)
        return a, b

    repeat_compare(i, pair)


@row("cmps", writes=())
def cmps(i: Insn) -> None:
    def pair(s: Strings) -> tuple[Value, Value]:
        a = s.h.load(s.source(), s.n)
        b = s.h.load(s.destination(write=False), s.n)
        s.step(RSI, RDI)
        return a, b

    repeat_compare(i, pair)
