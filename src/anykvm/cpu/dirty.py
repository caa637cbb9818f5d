"""Which pages of logging slots were written: the bitmap of a slot, and a vCPU's dirty ring
(Documentation/virt/kvm/api.rst, 4.8 and 8.29).

The first store to a page is noted and goes the slow way; from then on the page is stored to through
the TLB, until whoever collects has stopped all vCPUs, cleared the bits and emptied the TLBs.
"""

from __future__ import annotations

from anykvm.cpu.guest import Routine
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.memory import E_PAGE, E_SLOT, SLOT_DIRTY, SLOT_NUMBER

# struct kvm_dirty_gfn: flags, slot, page in the slot
DIRTY_GFN, G_SLOT, G_OFFSET, DIRTY_GFN_F_DIRTY = 16, 4, 8, 1
WALK_SLACK = 32  # of the 64 entries held back: for accessed and dirty bits


def dirty_bit(entry: Value) -> tuple[Value, Value]:
    """The byte of the dirty bitmap that a page entry belongs to, and its mask (i8)."""
    page = entry.offset(E_PAGE).load("i64", align=8)
    bitmap = entry.offset(E_SLOT).load(PTR, align=8).offset(SLOT_DIRTY).load(PTR, align=8)
    f = page.f
    return bitmap.offset(page >> 3), (f.const(1, 64) << (page & 7)).trunc(8)


def is_dirty(entry: Value) -> Value:
    byte, mask = dirty_bit(entry)
    return (byte.load("i8", volatile=True) & mask).ne(0)


def ring_full(f: Routine, slack: int = 0) -> Value:
    """Whether pages are to be collected from the dirty ring before one more is noted; `slack` is
    how many may be noted even then.
    """
    used = f.get("ring_index") - f.field("ring_reset").load("i64", volatile=True, align=8)
    full = used.uge(f.get("ring_limit") + slack) & f.get("ring_reserve").eq(0)
    return f.get("ring_mask").ne(0) & full


def mark_dirty() -> Routine:
    """mark_dirty(page): the page of a logging slot is written: in the bitmap, and where there is
    a dirty ring, there too, the first time.

    Whoever collects stops all vCPUs meanwhile, so marking before the store loses nothing.
    """
    f = Routine("mark_dirty", "void", ("page", PTR))
    byte, mask = dirty_bit(f["page"])
    before = f.emit(f"atomicrmw or ptr {byte.text}, i8 {mask.text} seq_cst, align 1", "i8")
    with f.If((before & mask).ne(0) | f.get("ring_mask").eq(0)):
        f.ret()
    index = f.get("ring_index")
    gfn = f.get("ring").to_ptr().offset((index & f.get("ring_mask")) * DIRTY_GFN)
    slot = f["page"].offset(E_SLOT).load(PTR, align=8)
    gfn.offset(G_SLOT).store(slot.offset(SLOT_NUMBER).load("i32", align=4), align=4)
    gfn.offset(G_OFFSET).store(f["page"].offset(E_PAGE).load("i64", align=8), align=8)
    f.line(f"store atomic i32 {DIRTY_GFN_F_DIRTY}, ptr {gfn.text} release, align 4")
    f.set("ring_index", index + 1)
    with f.If(ring_full(f)):
        f.field("exit_request").store(f.const(1, 32), volatile=True)
    f.ret()
    return f


ROUTINES = (mark_dirty,)
