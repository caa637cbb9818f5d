"""Native memory management: page walk, soft-TLB, and the accesses that the inline TLB check does
not cover.

Paging after SDM vol. 3, chapter 4: none, 32-bit, PAE and 4-level, with accessed and dirty bits,
large pages, NX, SMEP and the reserved bits; nested.py has the second walk of a guest's guest. The
guest-physical map is memory.py's; a page that no slot covers is MMIO. A TLB entry holds a tag for
reads, one for writes and one for fetches, and what to add to a linear address to get the host's. A
tag that must not match is that of a page which never looks into this entry.
"""

from __future__ import annotations

from anykvm.cpu.dirty import WALK_SLACK, is_dirty, ring_full
from anykvm.cpu.guest import PF, TLB_ADDEND, TLB_EXEC, TLB_READ, TLB_WRITE, Routine
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.memory import (
    BEING_READ,
    CODE,
    CODE_MAP,
    E_CODE,
    E_PAGE,
    E_SLOT,
    LOG,
    PAGE_ENTRY,
    PHYSICAL_BITS,
    RAM,
    READONLY,
    SLOT_COUNT,
    SLOT_GPA,
    SLOT_HVA,
    SLOT_SIZE,
    SLOT_TABLE,
    SLOT_TABLE_ROW,
)
from anykvm.cpu.state import TLB_ENTRIES, TLB_ENTRY, TLB_LIST, Exit, offset_of

ADDRESS_MASK = ((1 << PHYSICAL_BITS) - 1) & ~0xFFF
RESERVED_HIGH = ((1 << 52) - 1) & ~((1 << PHYSICAL_BITS) - 1)

# Error code of a page fault, and what an access asks for
P, W, U, RSVD, I = 1, 2, 4, 8, 16  # noqa: E741
# A page table entry
PTE_P, PTE_W, PTE_U, PTE_A, PTE_D, PTE_PS = 1, 2, 4, 0x20, 0x40, 0x80
# What `walk` returns besides the page's address
OK, OK_WRITE, OK_EXEC, OK_LARGE, OK_GLOBAL = 1, 2, 4, 8, 16
PTE_G = 1 << 8
# Of a second walk, and of the exit that it may lead to: what the address is
OF_PAGE, IN_TABLE = 1 << 32, 1 << 33
LARGEST = 1 << 30  # a large page is at most that

CR0_WP, CR0_PG = 1 << 16, 1 << 31
CR4_PSE, CR4_PAE, CR4_SMEP = 1 << 4, 1 << 5, 1 << 20
EFER_LMA, EFER_NXE = 1 << 10, 1 << 11


def page_entry() -> Routine:
    """page_entry(gpa): pointer to the physical map's entry, null where nothing is mapped."""
    f = Routine("page_entry", PTR, ("gpa", "i64"))
    gib = f["gpa"] >> 30
    with f.If(gib.uge(f.get("physmap_top"))):
        f.ret(f.null())
    leaf = (f.get("physmap") + gib * 8).to_ptr().load(PTR, volatile=True, align=8)
    with f.If(leaf.eq(0)):
        f.ret(f.null())
    entry = leaf.offset(((f["gpa"] >> 12) & 0x3FFFF) * PAGE_ENTRY)
    with f.If(entry.load("i64", volatile=True, align=8).ne(0)):
        f.ret(entry)
    f.ret(f.call("@new_entry", PTR, f.cpu, f["gpa"], entry))
    return f


def new_entry() -> Routine:
    """new_entry(gpa, page): fills in a page entry that is used for the first time; null where no
    slot has the page.
    """
    f = Routine("new_entry", PTR, ("gpa", "i64"), ("page", PTR))
    table = (f.get("physmap") + SLOT_TABLE).to_ptr()
    # The first slot that begins above the address, by halving what is left.
    low = f.var(f.const(0, 64))
    high = f.var((f.get("physmap") + SLOT_COUNT).to_ptr().load("i64", volatile=True, align=8))
    with f.Loop() as loop:
        loop.break_if(low.get().eq(high.get()))
        middle = (low.get() + high.get()) >> 1
        begins = table.offset(middle * SLOT_TABLE_ROW).load("i64", align=8)
        with f.If(begins.ugt(f["gpa"])):
            high.set(middle)
            loop.continue_()
        low.set(middle + 1)
    with f.If(low.get().eq(0)):
        f.ret(f.null())
    slot = table.offset((low.get() - 1) * SLOT_TABLE_ROW + 8).load(PTR, align=8)
    inside = (f["gpa"] - slot.offset(SLOT_GPA).load("i64", align=8)) & ~0xFFF
    with f.If(inside.uge(slot.offset(SLOT_SIZE).load("i64", align=8))):
        f.ret(f.null())
    host = slot.offset(SLOT_HVA).load("i64", align=8) + inside
    with f.If((host & RAM).eq(0)):  # the slot is being removed
        f.ret(f.null())
    entry = f["page"]
    entry.offset(E_SLOT).store(slot, volatile=True, align=8)
    entry.offset(E_PAGE).store(inside >> 12, volatile=True, align=8)
    # Another thread may fill it in, or find code in the page, at the same time.
    f.line(f"cmpxchg ptr {entry.text}, i64 0, i64 {host.text} seq_cst seq_cst")
    f.ret(entry)
    return f


def host_pointer(f: Routine, gpa: Value) -> Value:
    """Host pointer to guest-physical `gpa`, null for MMIO."""
    entry = f.call("@page_entry", PTR, f.cpu, gpa)
    found = f.var(f.null())
    with f.If(entry.ne(0)):
        page = entry.load("i64", volatile=True, align=8) & ~0xFFF
        found.set((page + (gpa & 0xFFF)).to_ptr())
    return found.get()


def _page_fault(f: Routine, va: Value, error: Value) -> None:
    f.fault(PF, error)
    f.set("exc_cr2", va)
    f.ret(f.const(0, 64))


def _set_bits(f: Routine, gpa: Value, bits: int, width: int) -> None:
    """Sets accessed and dirty bits of a page table's entry, unless it is in a read-only slot."""
    f.call("@set_bits", "void", f.cpu, gpa, f.const(bits, 64), f.const(width, 64))


def set_bits() -> Routine:
    """set_bits(gpa, bits, width): sets bits of the page table entry of 32 or 64 bits at `gpa`."""
    f = Routine("set_bits", "void", ("gpa", "i64"), ("bits", "i64"), ("width", "i64"))
    entry = f.call("@page_entry", PTR, f.cpu, f["gpa"])
    flags = entry.load("i64", volatile=True, align=8)
    with f.If((flags & READONLY).ne(0)):
        f.ret()
    with f.If((flags & CODE).ne(0)), f.If(translated(f, entry, f["gpa"], f["width"] >> 3)):
        again = f.get("table_write").ne(0) & f.get("table_write_gpa").ne(f["gpa"])
        f.set("table_write", again.select(f.const(2, 32), f.const(1, 32)))
        f.set("table_write_gpa", f["gpa"])
        f.field("exit_request").store(f.const(1, 32), volatile=True)
    with f.If((flags & LOG).ne(0)):
        f.call("@mark_dirty", "void", f.cpu, entry)
    at = ((flags & ~0xFFF) + (f["gpa"] & 0xFFF)).to_ptr()
    with f.If(f["width"].eq(64)):
        f.line(f"atomicrmw or ptr {at.text}, i64 {f['bits'].text} seq_cst, align 8")
        f.ret()
    narrow = f["bits"].trunc(32)
    f.line(f"atomicrmw or ptr {at.text}, i32 {narrow.text} seq_cst, align 4")
    f.ret()
    return f


def translated(f: Routine, entry: Value, gpa: Value, size: Value) -> Value:
    """Whether any of `size` bytes in a page was translated, or may be just now."""
    bytes_ = entry.offset(E_CODE).load(PTR, align=8)
    at, last = f.var(gpa & 4095), (gpa & 4095) + size
    found = f.var(bytes_.offset(BEING_READ - CODE_MAP).load("i8", volatile=True), 8)
    with f.Loop() as loop:
        loop.break_if(at.get().uge(last))
        found.set(found.get() | bytes_.offset(at.get()).load("i8", volatile=True))
        at.set(at.get() + 1)
    return found.get().ne(0)


def walk() -> Routine:
    """walk(va, access): the page's physical address with OK bits; 0 with the fault noted."""
    f = Routine("walk", "i64", ("va", "i64"), ("access", "i64"))
    with f.If(f.get("nested_paging").ne(0)):
        f.ret(f.call("@walk_twice", "i64", f.cpu, f["va"], f["access"]))
    return _walk(f, nested=False)


def walk_once() -> Routine:
    """walk_once(va, access): `walk` by the tables of a guest whose addresses are not physical."""
    return _walk(Routine("walk_once", "i64", ("va", "i64"), ("access", "i64")), nested=True)


def _physical(f: Routine, where: Value, *, nested: bool) -> Value:
    """Where an entry of a page table is; the function returns 0 where that faults."""
    if not nested:
        return where
    table = f.call("@nested", "i64", f.cpu, where, f.const(W | IN_TABLE, 64))
    with f.If(table.eq(0)):
        f.ret(f.const(0, 64))
    return (table & ~0xFFF) | (where & 0xFFF)


def _walk(f: Routine, *, nested: bool) -> Routine:
    va, access = f["va"], f["access"]
    cr0, cr4, efer = f.get("cr0"), f.get("cr4"), f.get("efer")
    narrow = "@walk32_once" if nested else "@walk32"
    with f.If((cr0 & CR0_PG).eq(0)):
        f.ret((va & 0xFFFF_F000) | (OK | OK_WRITE | OK_EXEC))
    with f.If((cr4 & CR4_PAE).eq(0)):
        f.ret(f.call(narrow, "i64", f.cpu, va, access))
    # An error code says I only where NX or SMEP exists.
    shows_fetch = ((efer & EFER_NXE) | (cr4 & CR4_SMEP)).ne(0)
    error = access & shows_fetch.select(f.const(~0, 64), f.const(~I, 64))
    table, shift, rights = f.var(f.get("cr3") & ADDRESS_MASK), f.var(39), f.var(PTE_W | PTE_U)
    nx = f.var(0)
    with f.If((efer & EFER_LMA).eq(0)):
        slot = f.cpu.offset(offset_of("pdpte[0]")).offset(((va >> 30) & 3) * 8)
        pdpte = slot.load("i64")
        with f.If((pdpte & PTE_P).eq(0)):
            _page_fault(f, va, error)
        table.set(pdpte & ADDRESS_MASK)
        shift.set(21)
    with f.If((efer & EFER_LMA).ne(0)):
        top = va.sar(47)
        with f.If(
            top.ne(0) & top.ne(-1)
        ):  # implicit accesses check for themselves that an address is canonical
            f.fault(13, 0)
            f.ret(f.const(0, 64))
    reserved = f.const(RESERVED_HIGH, 64) | (efer & EFER_NXE).eq(0).select(
        f.const(1 << 63, 64), f.const(0, 64)
    )
    with f.Loop() as loop:
        index = (va >> shift.get()) & 511
        where = _physical(f, table.get() + index * 8, nested=nested)
        entry = host_pointer(f, where)
        with f.If(entry.eq(0)):
            _page_fault(f, va, error)
        pte = entry.load("i64", volatile=True, align=8)
        with f.If((pte & PTE_P).eq(0)):
            _page_fault(f, va, error)
        large = (pte & PTE_PS).ne(0) & shift.get().ne(12)
        size = f.const(1, 64) << shift.get()
        low = large.select((size - 1) & ~0x1FFF, 0)
        too_large = large & shift.get().eq(39)
        with f.If((pte & (reserved | low)).ne(0) | too_large):
            _page_fault(f, va, error | (P | RSVD))
        rights.set(rights.get() & pte)
        nx.set(nx.get() | (pte >> 63))
        with f.If(large | shift.get().eq(12)):
            page = (pte & ADDRESS_MASK & ~(size - 1)) | (va & (size - 1) & ~0xFFF)
            kind = large.select(f.const(OK_LARGE, 64), f.const(0, 64))
            _finish_walk(f, va, access, error, where, pte, page, rights.get(), nx.get(), kind, 64)
        with f.If((pte & PTE_A).eq(0)):
            _set_bits(f, where, PTE_A, 64)
        table.set(pte & ADDRESS_MASK)
        shift.set(shift.get() - 9)
        loop.continue_()
    return f


def _finish_walk(
    f: Routine,
    va: Value,
    access: Value,
    error: Value,
    where: Value,
    pte: Value,
    page: Value,
    rights: Value,
    nx: Value,
    kind: Value,
    width: int,
) -> None:
    """Permissions of a translation (SDM vol. 3, 4.6), accessed and dirty bits, and the return."""
    user, write, fetch = ((access & bit).ne(0) for bit in (U, W, I))
    user_page, writable = (rights & PTE_U).ne(0), (rights & PTE_W).ne(0)
    may_write = writable | ((user ^ 1) & (f.get("cr0") & CR0_WP).eq(0))
    smep = (f.get("cr4") & CR4_SMEP).ne(0)
    may_fetch = nx.eq(0) & ~(smep & (user ^ 1) & user_page)
    denied = (user & (user_page ^ 1)) | (write & (may_write ^ 1)) | (fetch & (may_fetch ^ 1))
    with f.If(denied):
        _page_fault(f, va, error | P)
    wanted = write.select(f.const(PTE_A | PTE_D, 64), f.const(PTE_A, 64))
    with f.If((pte & wanted).ne(wanted)):
        with f.If(write):
            _set_bits(f, where, PTE_A | PTE_D, width)
        with f.Else():
            _set_bits(f, where, PTE_A, width)
    dirty = write | (pte & PTE_D).ne(0)
    result = page | kind | OK
    result = result | (may_write & dirty).select(f.const(OK_WRITE, 64), f.const(0, 64))
    result = result | (pte & PTE_G).ne(0).select(f.const(OK_GLOBAL, 64), f.const(0, 64))
    f.ret(result | may_fetch.select(f.const(OK_EXEC, 64), f.const(0, 64)))


def walk32() -> Routine:
    """The two levels of 32-bit paging, with 4 MiB pages (PSE-36)."""
    return _walk32(Routine("walk32", "i64", ("va", "i64"), ("access", "i64")), nested=False)


def walk32_once() -> Routine:
    """`walk32` by the tables of a guest whose addresses are not physical."""
    return _walk32(Routine("walk32_once", "i64", ("va", "i64"), ("access", "i64")), nested=True)


def _walk32(f: Routine, *, nested: bool) -> Routine:
    va, access = f["va"] & 0xFFFF_FFFF, f["access"]
    error = access & ((f.get("cr4") & CR4_SMEP).ne(0).select(f.const(~0, 64), f.const(~I, 64)))
    directory = _physical(f, (f.get("cr3") & 0xFFFF_F000) + ((va >> 22) * 4), nested=nested)
    top = host_pointer(f, directory)
    with f.If(top.eq(0)):
        _page_fault(f, va, error)
    pde = top.load("i32", volatile=True, align=4).zext(64)
    with f.If((pde & PTE_P).eq(0)):
        _page_fault(f, va, error)
    with f.If((pde & PTE_PS).ne(0) & (f.get("cr4") & CR4_PSE).ne(0)):
        with f.If((pde & (1 << 21)).ne(0)):
            _page_fault(f, va, error | (P | RSVD))
        page = (pde & 0xFFC0_0000) | (((pde >> 13) & 0xFF) << 32) | (va & 0x3F_F000)
        large, zero = f.const(OK_LARGE, 64), f.const(0, 64)
        _finish_walk(f, va, access, error, directory, pde, page, pde, zero, large, 32)
    with f.If((pde & PTE_A).eq(0)):
        _set_bits(f, directory, PTE_A, 32)
    where = _physical(f, (pde & 0xFFFF_F000) + (((va >> 12) & 1023) * 4), nested=nested)
    entry = host_pointer(f, where)
    with f.If(entry.eq(0)):
        _page_fault(f, va, error)
    pte = entry.load("i32", volatile=True, align=4).zext(64)
    with f.If((pte & PTE_P).eq(0)):
        _page_fault(f, va, error)
    zero = f.const(0, 64)
    page = pte & 0xFFFF_F000
    _finish_walk(f, va, access, error, where, pte, page, pte & pde, zero, zero, 32)
    return f


def tlb_fill() -> Routine:
    """tlb_fill(tlb, va, access): walks and fills the TLB. Gives the physical page | OK, or 0 with
    the fault noted.
    """
    f = Routine("tlb_fill", "i64", ("tlb", PTR), ("va", "i64"), ("access", "i64"))
    va = f["va"]
    user = f["tlb"].eq_ptr(f.user_tlb()).select(f.const(U, 64), f.const(0, 64))
    f.add_to("count_tlb_fill", 1)
    with f.If(ring_full(f, WALK_SLACK)):
        f.set("exit_kind", int(Exit.DIRTY_RING_FULL))
        f.ret(f.const(0, 64))
    found = f.call("@walk", "i64", f.cpu, va, f["access"] | user)
    with f.If(found.eq(0)):
        f.ret(found)
    gpa = found & ~0xFFF
    entry = f.call("@page_entry", PTR, f.cpu, gpa)
    with f.If(entry.ne(0)):
        f.add_to("count_tlb_filled", 1)
        slot = f.tlb_entry(f["tlb"], va)
        host = entry.load("i64", volatile=True, align=8)
        page = va & ~0xFFF
        never = _never_tag(f, va)
        plain = f.var((found & OK_WRITE).ne(0) & (host & (READONLY | CODE)).eq(0))
        with f.If((host & LOG).ne(0)):
            plain.set(plain.get() & is_dirty(entry))
        _list_entry(f, slot, va, found)
        slot.offset(TLB_WRITE).store(never, volatile=True, align=8)
        slot.offset(TLB_READ).store(never, volatile=True, align=8)
        slot.offset(TLB_ADDEND).store((host & ~0xFFF) - page, volatile=True, align=8)
        slot.offset(TLB_READ).store(page, volatile=True, align=8)
        slot.offset(TLB_EXEC).store(
            (found & OK_EXEC).ne(0).select(page, never), volatile=True, align=8
        )
        slot.offset(TLB_WRITE).store(plain.get().select(page, never), volatile=True, align=8)
        # A page that began to hold code, or to be logged, meanwhile: whoever marked it may not have
        # seen this entry.
        again = entry.load("i64", volatile=True, align=8)
        with f.If(again.ne(host)):
            slot.offset(TLB_WRITE).store(never, volatile=True, align=8)
        with f.If(f.get("watch_kinds").ne(0)):
            f.call("@keep_out", "void", f.cpu, slot, va, never)
    f.ret(gpa | OK)
    return f


def _never_tag(f: Routine, va: Value) -> Value:
    """A page that is looked up in another entry than `va` is."""
    return (va & ~0xFFF) ^ 0x1000


def flush_tlb() -> Routine:
    """flush_tlb(keep_global): forgets translations, and what the jump cache knows.

    The entries filled since the last flush are listed; only these are touched, unless the list ran
    over.
    """
    f = Routine("flush_tlb", "void", ("keep_global", "i64"))
    f.add_to("count_flush", 1)
    f.add_to("jump_key", 1 << 32)
    listed = f.get("tlb_listed")
    with f.If(listed.ugt(TLB_LIST)):
        _flush_all(f)
        f.ret()
    at, kept = f.var(f.const(0, 64)), f.var(f.const(0, 64))
    with f.Loop() as loop:
        loop.break_if(at.get().uge(listed))
        item = f.field("tlb_list").offset(at.get() * 4).load("i32", align=4)
        keep = (item >> 31).zext(64) & f["keep_global"]
        with f.If(keep.ne(0)):
            f.field("tlb_list").offset(kept.get() * 4).store(item, align=4)
            kept.set(kept.get() + 1)
        with f.Else():
            number = (item & (2 * TLB_ENTRIES - 1)).zext(64)
            entry = f.field("tlb").offset(number * TLB_ENTRY)
            _forget(f, entry, number & (TLB_ENTRIES - 1))
        at.set(at.get() + 1)
    f.set("tlb_listed", kept.get())
    f.ret()
    return f


def _flush_all(f: Routine) -> None:
    at = f.var(f.const(0, 64))
    with f.Loop() as loop:
        index = at.get() & (TLB_ENTRIES - 1)
        _forget(f, f.field("tlb").offset(at.get() * TLB_ENTRY), index)
        at.set(at.get() + 1)
        loop.break_if(at.get().eq(2 * TLB_ENTRIES))
    f.set("tlb_listed", 0)
    f.set("large_low", ~0)
    f.set("large_high", 0)


def _list_entry(f: Routine, slot: Value, va: Value, found: Value) -> None:
    """Notes that a TLB entry was filled; one more than fits means: flush all."""
    n = f.get("tlb_listed")
    number = ((slot.to_int() - f.field("tlb").to_int()) >> 5).trunc(32)
    is_global = (found & OK_GLOBAL).ne(0).select(f.const(1 << 31, 32), f.const(0, 32))
    with f.If((found & OK_LARGE).ne(0)):
        low, high = f.get("large_low"), f.get("large_high")
        first, last = va & ~(LARGEST - 1), va | (LARGEST - 1)
        f.set("large_low", first.ult(low).select(first, low))
        f.set("large_high", last.ugt(high).select(last, high))
    with f.If(n.ult(TLB_LIST)):
        f.field("tlb_list").offset(n * 4).store(number | is_global, align=4)
    with f.If(n.ule(TLB_LIST)):
        f.set("tlb_listed", n + 1)


def _forget(f: Routine, entry: Value, index: Value) -> None:
    never = (index ^ 1) << 12
    for offset in (TLB_READ, TLB_WRITE, TLB_EXEC):
        entry.offset(offset).store(never, volatile=True, align=8)


def flush_page() -> Routine:
    """flush_page(va): INVLPG. Where large pages were seen, what may belong to the same one goes
    too.
    """
    f = Routine("flush_page", "void", ("va", "i64"))
    f.add_to("count_invlpg", 1)
    f.add_to("jump_key", 1 << 32)
    index = (f.tlb_entry(f.supervisor_tlb(), f["va"]).to_int() - f.field("tlb").to_int()) >> 5
    for tlb in (f.supervisor_tlb(), f.user_tlb()):
        _forget(f, f.tlb_entry(tlb, f["va"]), index)
    with f.If(f["va"].ult(f.get("large_low")) | f["va"].ugt(f.get("large_high"))):
        f.ret()
    at = f.var(f.const(0, 64))
    with f.Loop() as loop:
        entry = f.field("tlb").offset(at.get() * TLB_ENTRY)
        page = f["va"] >> 21
        same = f.false()
        for offset in (TLB_READ, TLB_WRITE, TLB_EXEC):
            same = same | (entry.offset(offset).load("i64", align=8) >> 21).eq(page)
        with f.If(same):
            _forget(f, entry, at.get() & (TLB_ENTRIES - 1))
        at.set(at.get() + 1)
        loop.break_if(at.get().eq(2 * TLB_ENTRIES))
    f.ret()
    return f


def protect_page() -> Routine:
    """protect_page(host): no direct stores any more to the page at this host address (any thread
    may call).
    """
    f = Routine("protect_page", "void", ("host", "i64"))
    at = f.var(f.const(0, 64))
    with f.Loop() as loop:
        entry = f.field("tlb").offset(at.get() * TLB_ENTRY)
        tag = entry.offset(TLB_WRITE).load("i64", volatile=True, align=8)
        addend = entry.offset(TLB_ADDEND).load("i64", volatile=True, align=8)
        with f.If((tag + addend).eq(f["host"])):
            never = ((at.get() & (TLB_ENTRIES - 1)) ^ 1) << 12
            entry.offset(TLB_WRITE).store(never, volatile=True, align=8)
        at.set(at.get() + 1)
        loop.break_if(at.get().eq(2 * TLB_ENTRIES))
    f.ret()
    return f


ROUTINES = (
    page_entry,
    new_entry,
    set_bits,
    walk,
    walk_once,
    walk32,
    walk32_once,
    tlb_fill,
    flush_tlb,
    flush_page,
    protect_page,
)
