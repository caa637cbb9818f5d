"""Nested paging: the second walk that each physical address of a guest's guest goes through, by the
tables of nCR3 (AMD APM vol. 2, 15.25).

Both walks end in one entry of the soft-TLB, from the linear address to the host's. The tables are
those of long mode with four levels, of which every level must give user access; that of a page
table counts as a write.
"""

from __future__ import annotations

from anykvm.cpu.guest import Routine
from anykvm.cpu.ir import Value
from anykvm.cpu.mmu import (
    ADDRESS_MASK,
    OF_PAGE,
    OK,
    OK_EXEC,
    OK_GLOBAL,
    OK_LARGE,
    OK_WRITE,
    PTE_A,
    PTE_D,
    PTE_P,
    PTE_PS,
    PTE_U,
    PTE_W,
    RESERVED_HIGH,
    RSVD,
    I,
    P,
    U,
    W,
    host_pointer,
)
from anykvm.cpu.state import Exit

NX = 1 << 63


def walk_twice() -> Routine:
    """walk_twice(va, access): `walk` where a guest's physical addresses are not the processor's."""
    f = Routine("walk_twice", "i64", ("va", "i64"), ("access", "i64"))
    first = f.call("@walk_once", "i64", f.cpu, f["va"], f["access"])
    with f.If(first.eq(0)):
        f.ret(first)
    kind = (f["access"] & (W | I)) | OF_PAGE
    address = (first & ADDRESS_MASK) | (f["va"] & 0xFFF)
    second = f.call("@nested", "i64", f.cpu, address, kind)
    with f.If(second.eq(0)):
        f.ret(second)
    page = second & ADDRESS_MASK
    both = first & second & (OK | OK_WRITE | OK_EXEC)
    f.ret(page | both | (first & (OK_LARGE | OK_GLOBAL)))
    return f


def _fault(f: Routine, error: Value) -> None:
    f.set("nested_fault_gpa", f["gpa"])
    f.set("nested_fault_error", error)
    f.set("exit_kind", int(Exit.NESTED_FAULT))
    f.ret(f.const(0, 64))


def nested() -> Routine:
    """nested(gpa, access): the physical page behind a guest's guest's, with OK bits; 0 with
    `exit_kind` set. Besides W and I, `access` says whether the address is a page's or a table's.
    """
    f = Routine("nested", "i64", ("gpa", "i64"), ("access", "i64"))
    gpa, no_execute = f["gpa"], f.get("nested_nx").ne(0)
    error = f["access"] & no_execute.select(f.const(~0, 64), f.const(~I, 64)) | U
    write, fetch = ((f["access"] & bit).ne(0) for bit in (W, I))
    table, shift = f.var(f.get("nested_cr3") & ADDRESS_MASK), f.var(39)
    rights, nx = f.var(PTE_W | PTE_U), f.var(0)
    reserved = f.const(RESERVED_HIGH, 64) | no_execute.select(f.const(0, 64), f.const(NX, 64))
    with f.If((gpa >> 48).ne(0)):
        _fault(f, error)
    with f.Loop() as loop:
        where = table.get() + ((gpa >> shift.get()) & 511) * 8
        entry = host_pointer(f, where)
        with f.If(entry.eq(0)):
            _fault(f, error)
        pte = entry.load("i64", volatile=True, align=8)
        with f.If((pte & PTE_P).eq(0)):
            _fault(f, error)
        large = (pte & PTE_PS).ne(0) & shift.get().ne(12)
        size = f.const(1, 64) << shift.get()
        low = large.select((size - 1) & ~0x1FFF, 0)
        with f.If((pte & (reserved | low)).ne(0) | (large & shift.get().eq(39))):
            _fault(f, error | (P | RSVD))
        rights.set(rights.get() & pte)
        nx.set(nx.get() | (pte >> 63))
        with f.If(large | shift.get().eq(12)):
            writable, user = (rights.get() & PTE_W).ne(0), (rights.get() & PTE_U).ne(0)
            executable = nx.get().eq(0)
            denied = (user ^ 1) | (write & (writable ^ 1)) | (fetch & (executable ^ 1))
            with f.If(denied):
                _fault(f, error | P)
            wanted = write.select(f.const(PTE_A | PTE_D, 64), f.const(PTE_A, 64))
            _set_missing(f, where, pte, wanted)
            dirty = write | (pte & PTE_D).ne(0)
            page = (pte & ADDRESS_MASK & ~(size - 1)) | (gpa & (size - 1) & ~0xFFF)
            may_write = (writable & dirty).select(f.const(OK_WRITE, 64), f.const(0, 64))
            may_fetch = executable.select(f.const(OK_EXEC, 64), f.const(0, 64))
            f.ret(page | may_write | may_fetch | OK)
        _set_missing(f, where, pte, f.const(PTE_A, 64))
        table.set(pte & ADDRESS_MASK)
        shift.set(shift.get() - 9)
        loop.continue_()
    return f


def _set_missing(f: Routine, where: Value, pte: Value, wanted: Value) -> None:
    """Accessed and dirty bits."""
    with f.If((pte & wanted).ne(wanted)):
        f.call("@set_bits", "void", f.cpu, where, wanted, f.const(64, 64))


def nested_look() -> Routine:
    """nested_look(gpa): `nested` for a read of a page, from outside of native code."""
    f = Routine("nested_look", "i64", ("gpa", "i64"))
    f.resume_at(1, f.get("insn_count"))
    found = f.call("@nested", "i64", f.cpu, f["gpa"], f.const(OF_PAGE, 64))
    f.resumed()
    f.ret(found)
    return f


ROUTINES = (walk_twice, nested, nested_look)
