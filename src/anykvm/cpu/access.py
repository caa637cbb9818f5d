"""Native accesses that the inline TLB check does not cover: what handlers call when it misses.

An access that is more than a host load or store goes through `State.bounce`: it crosses a page, or
it is MMIO. MMIO is done by Python, so the instruction is abandoned, the access made, and the
instruction executed again; `State.replay` remembers the accesses that are done, so each reaches the
device once. A store to translated code is abandoned too, until that code is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from anykvm.cpu.dirty import is_dirty, ring_full
from anykvm.cpu.guest import Routine, noting
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.memory import CODE, LOG, READONLY
from anykvm.cpu.mmu import W, host_pointer, translated
from anykvm.cpu.state import Exit, offset_of
from anykvm.cpu.watch import READ, WRITE, abandon_if_watched

ACCESS = (("tlb", PTR), ("va", "i64"), ("size", "i64"), ("pc", PTR), ("icount", "i64"))
REPLAY_DATA = offset_of("replay[0].data") - offset_of("replay[0].gpa")


def _parts(f: Routine) -> Iterator[tuple[Value, Value, Value]]:
    """(address, length, offset in the bounce buffer) of the parts of an access that lie in one page
    each.
    """
    va, size = f["va"], f["size"]
    room = f.const(4096, 64) - (va & 4095)
    first = room.ult(size).select(room, size)
    yield va, first, f.const(0, 64)
    # The second part is empty where nothing crosses; its address then is the first one's page.
    yield first.ult(size).select(va + first, va), size - first, first


def _access(f: Routine) -> tuple[Value, ...]:
    return f.cpu, f["tlb"], f["va"], f["size"], f["pc"], f["icount"]


def probe_read_inside() -> Routine:
    """probe_read_inside: pointer to `size` readable bytes at `va`, or null: a fault is noted, or
    `exit_kind` set.
    """
    f = Routine("probe_read_inside", PTR, *ACCESS)
    va = f["va"]
    abandon_if_watched(f, READ, f.null())
    with f.If(((va & 4095) + f["size"]).ule(4096)):
        found = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(0, 64))
        with f.If(found.eq(0)):
            f.ret(f.null())
        host = host_pointer(f, (found & ~0xFFF) | (va & 0xFFF))
        with f.If(host.ne(0)):
            f.ret(host)
    done = f.call("@fetch_inside", "i1", *_access(f))
    with f.If(done):
        f.ret(f.field("bounce"))
    f.ret(f.null())
    return f


def fetch_inside() -> Routine:
    """fetch_inside: reads `size` bytes at `va` into the bounce buffer, whatever they are; false as
    `probe_read`'s null.
    """
    f = Routine("fetch_inside", "i1", *ACCESS)
    abandon_if_watched(f, READ, f.false())
    for va, _, _ in _parts(f):
        found = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(0, 64))
        with f.If(found.eq(0)):
            f.ret(f.false())
    for va, length, offset in _parts(f):
        with f.If(length.ne(0)):
            found = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(0, 64))
            gpa = (found & ~0xFFF) | (va & 0xFFF)
            host = host_pointer(f, gpa)
            to = f.field("bounce").offset(offset)
            with f.If(host.ne(0)):
                f.intrinsic("llvm.memcpy.p0.p0.i64", "void", to, host, length, f.false())
            with f.Else():
                done = f.call(
                    "@mmio", "i1", f.cpu, gpa, length, f.false(), to, f["pc"], f["icount"]
                )
                with f.If(done ^ 1):
                    f.ret(f.false())
    f.ret(f.true())
    return f


def mmio() -> Routine:
    """mmio(gpa, size, write, data): an access in pieces of at most 8 bytes; false if Python must
    make one first.
    """
    f = Routine(
        "mmio",
        "i1",
        ("gpa", "i64"),
        ("size", "i64"),
        ("write", "i1"),
        ("data", PTR),
        ("pc", PTR),
        ("icount", "i64"),
    )
    # By RIP, not by record: executed again the instruction begins a unit of its own.
    index = (f["pc"].to_int() - f.get("records")) >> 2
    rip = (f.get("records_rip") + index).to_ptr().load("i64")
    here = rip.eq(f.get("replay_rip")) & f["icount"].eq(f.get("replay_insn"))
    with f.If(here ^ 1):
        f.set("replay_rip", rip)
        f.set("replay_insn", f["icount"])
        f.set("replay_count", 0)
        f.set("replay_next", 0)
    at = f.var(f.const(0, 64))
    with f.Loop() as loop:
        left = f["size"] - at.get()
        loop.break_if(left.eq(0))
        length = left.ult(8).select(left, f.const(8, 64))
        data = f["data"].offset(at.get())
        n = f.get("replay_next")
        with f.If(n.ult(f.get("replay_count"))):
            done = f.field("replay").offset(n.zext(64) * 24)
            with f.If(f["write"] ^ 1):
                from_ = done.offset(REPLAY_DATA)
                f.intrinsic("llvm.memcpy.p0.p0.i64", "void", data, from_, length, f.false())
            f.set("replay_next", n + 1)
        with f.Else():
            f.set("mmio_gpa", f["gpa"] + at.get())
            f.set("mmio_size", length.trunc(32))
            f.set("mmio_write", f["write"].zext(32))
            f.set("mmio_data", 0)
            with f.If(f["write"]):
                to = f.field("mmio_data")
                f.intrinsic("llvm.memcpy.p0.p0.i64", "void", to, data, length, f.false())
            f.set("exit_kind", int(Exit.MMIO))
            f.ret(f.false())
        at.set(at.get() + length)
    f.ret(f.true())
    return f


def probe_write_inside() -> Routine:
    """probe_write_inside: pointer to `size` writable bytes at `va`, or the bounce buffer, where
    `commit` must follow, or null.
    """
    f = Routine("probe_write_inside", PTR, *ACCESS)
    abandon_if_watched(f, WRITE, f.null())
    bounced = f.var(f.const(0, 1), 1)
    direct = f.var(f.null())
    for va, length, _ in _parts(f):
        found = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(W, 64))
        with f.If(found.eq(0)):
            f.ret(f.null())
        with f.If(length.ne(0)):
            gpa = (found & ~0xFFF) | (va & 0xFFF)
            state = f.call("@claim", "i64", f.cpu, gpa, length)
            with f.If(state.eq(0)):
                f.ret(f.null())
            with f.If(state.eq(1)):
                bounced.set(1)
            direct.set(state.to_ptr())
    crosses = ((f["va"] & 4095) + f["size"]).ugt(4096)
    with f.If(bounced.get() | crosses):
        f.ret(f.field("bounce"))
    f.ret(direct.get())
    return f


def claim() -> Routine:
    """claim(gpa, size): host address to store to; 1 for MMIO or ROM; 0 if translated code is in the
    way, or the dirty ring is full.
    """
    f = Routine("claim", "i64", ("gpa", "i64"), ("size", "i64"))
    gpa = f["gpa"]
    entry = f.call("@page_entry", PTR, f.cpu, gpa)
    with f.If(entry.eq(0)):
        f.ret(f.const(1, 64))
    host = entry.load("i64", volatile=True, align=8)
    with f.If((host & READONLY).ne(0)):
        f.ret(f.const(1, 64))
    with f.If((host & CODE).ne(0)), f.If(translated(f, entry, gpa, f["size"])):
        passes = f.get("code_write_pass")
        with f.If(passes.eq(0)):
            f.set("code_write_gpa", gpa)
            f.set("code_write_size", f["size"])
            f.set("exit_kind", int(Exit.CODE_WRITE))
            f.ret(f.const(0, 64))
    with f.If((host & LOG).ne(0)):
        with f.If(ring_full(f) & (is_dirty(entry) ^ 1)):
            f.set("exit_kind", int(Exit.DIRTY_RING_FULL))
            f.ret(f.const(0, 64))
        f.call("@mark_dirty", "void", f.cpu, entry)
    f.ret((host & ~0xFFF) + (gpa & 0xFFF))
    return f


def commit_inside() -> Routine:
    """commit_inside: stores `size` bytes from the bounce buffer to `va`, which `probe_write` found
    writable.
    """
    f = Routine("commit_inside", "i1", *ACCESS)
    for va, length, offset in _parts(f):
        with f.If(length.ne(0)):
            found = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(W, 64))
            with f.If(found.eq(0)):
                f.ret(f.false())
            gpa = (found & ~0xFFF) | (va & 0xFFF)
            data = f.field("bounce").offset(offset)
            state = f.call("@claim", "i64", f.cpu, gpa, length)
            with f.If(state.eq(0)):
                f.ret(f.false())
            with f.If(state.eq(1)):
                done = f.call(
                    "@mmio", "i1", f.cpu, gpa, length, f.true(), data, f["pc"], f["icount"]
                )
                with f.If(done ^ 1):
                    f.ret(f.false())
            with f.Else():
                f.intrinsic(
                    "llvm.memcpy.p0.p0.i64", "void", state.to_ptr(), data, length, f.false()
                )
    f.ret(f.true())
    return f


def exchange() -> Routine:
    """exchange(host, value): a byte of guest memory, in one step."""
    f = Routine("exchange", "i64", ("host", PTR), ("value", "i64"))
    f.resume_at(1, f.get("insn_count"))
    value = f["value"].trunc(8)
    found = f.emit(f"atomicrmw xchg ptr {f['host'].text}, i8 {value.text} seq_cst, align 1", "i8")
    f.resumed()
    f.ret(found.zext(64))
    return f


def segment_slow() -> Routine:
    """segment_slow(seg, ea, size, write): the checks on a segmented access that is not plain
    read-write data inside its limit.
    """
    f = Routine(
        "segment_slow", "i1", ("seg", "i64"), ("ea", "i64"), ("size", "i64"), ("write", "i1")
    )
    base = f.cpu.offset(offset_of("seg[0].base")).offset(f["seg"] * 24)
    attr = base.offset(12).load("i32")
    limit = base.offset(8).load("i32").zext(64)
    real = (f.get("cr0") & 1).eq(0)
    kind = attr & 15
    code = (kind & 8).ne(0)
    usable = (attr & 0x10000).eq(0)
    readable = (code ^ 1) | (kind & 2).ne(0)
    writable = (code ^ 1) & (kind & 2).ne(0)
    right = real | (usable & f["write"].select(writable, readable))
    last = f["ea"] + (f["size"] - 1)
    down = (kind & 12).eq(4)
    top = (attr & (1 << 14)).ne(0).select(f.const(0xFFFF_FFFF, 64), f.const(0xFFFF, 64))
    inside = down.select(f["ea"].ugt(limit) & last.ule(top), last.ule(limit))
    with f.If(right & inside):
        f.ret(f.true())
    vector = f["seg"].eq(2).select(f.const(12, 32), f.const(13, 32))
    f.set("exc_vector", vector)
    f.set("exc_has_error", 1)
    f.set("exc_error", 0)
    f.ret(f.false())
    return f


def udiv128() -> Routine:
    """udiv128(high, low, divisor): quotient of the 128-bit dividend, where it fits; the remainder
    in scratch[0].
    """
    f = Routine("udiv128", "i64", ("high", "i64"), ("low", "i64"), ("divisor", "i64"))
    high, low, left = f.var(f["high"]), f.var(f["low"]), f.var(f.const(64, 64))
    with f.Loop() as loop:
        out = high.get().slt(0)
        high.set((high.get() << 1) | (low.get() >> 63))
        low.set(low.get() << 1)
        with f.If(out | high.get().uge(f["divisor"])):
            high.set(high.get() - f["divisor"])
            low.set(low.get() | 1)
        left.set(left.get() - 1)
        loop.break_if(left.get().eq(0))
    f.set("scratch[0]", high.get())
    f.ret(low.get())
    return f


def probe_read() -> Routine:
    return noting("probe_read", ACCESS, PTR)


def probe_write() -> Routine:
    return noting("probe_write", ACCESS, PTR)


def fetch() -> Routine:
    return noting("fetch", ACCESS, "i1")


def commit() -> Routine:
    return noting("commit", ACCESS, "i1")


def copy_in() -> Routine:
    """copy_in(to, from, size): guest memory, by host addresses, into other memory of ours."""
    f = Routine("copy_in", "i1", ("to", PTR), ("from", PTR), ("size", "i64"))
    f.resume_at(1, f.get("insn_count"))
    f.intrinsic("llvm.memcpy.p0.p0.i64", "void", f["to"], f["from"], f["size"], f.false())
    f.resumed()
    f.ret(f.true())
    return f


def look() -> Routine:
    """look(va): `walk` for a read by a supervisor, from outside of native code."""
    f = Routine("look", "i64", ("va", "i64"))
    f.resume_at(1, f.get("insn_count"))
    found = f.call("@walk", "i64", f.cpu, f["va"], f.const(0, 64))
    f.resumed()
    f.ret(found)
    return f


ROUTINES = (
    look,
    probe_read,
    probe_read_inside,
    fetch,
    fetch_inside,
    mmio,
    probe_write,
    probe_write_inside,
    claim,
    commit,
    commit_inside,
    copy_in,
    exchange,
    segment_slow,
    udiv128,
)
