"""The native runtime's way from one block to the next: look-up, delivery of events, entry and exit.

Translations are found by (RIP, host page, mode): first in the vCPU's jump cache, which also knows
the privilege and is emptied by advancing `jump_key`, then in the engine's hash table, after the
fetch was translated and permitted.

Delivery here is the usual case of SDM vol. 3, chapter 6 in IA-32e mode: a present 64-bit gate to a
flat ring-0 code segment, and a frame that lies in one page. Anything else returns to Python with
`Exit.DELIVER`, where delivery is written out in full.
"""

from __future__ import annotations

from anykvm.cpu import fpu_image
from anykvm.cpu.guest import (
    CONVENTION,
    ENTRIES,
    FAULT,
    PF,
    SOFTWARE,
    TLB_ADDEND,
    TLB_EXEC,
    TLB_WRITE,
    Handler,
    Routine,
)
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.memory import CODE_MAP, MADE_FROM
from anykvm.cpu.mmu import I, W
from anykvm.cpu.state import (
    JUMP_ENTRIES,
    JUMP_ENTRY,
    STATUS_FLAGS,
    Exit,
    Flag,
    Mode,
    Seg,
)
from anykvm.cpu.watch import EXECUTE

BLOCK_ENTRY = 48  # rip, host page, mode, record, second host page, CodePage
MASKED = 0x1F80  # MXCSR's mask bits
EXCEPTIONS = 2  # the word of State.intercepts

CS, SS, TR = int(Seg.CS), int(Seg.SS), int(Seg.TR)
KERNEL_CODE = 0x209B  # P, S, L, code, accessed; D clear
CODE_MASK = 0x609F
HASH = 0x9E37_79B9_7F4A_7C15


def block_hash(rip: Value, host: Value) -> Value:
    return ((rip ^ (host << 1)) * HASH) >> 32


def block_slot(rip: int, host: int, mask: int) -> int:
    """Where the search for a block starts, as `block_hash` computes it."""
    return ((((rip ^ (host << 1)) & (2**64 - 1)) * HASH & (2**64 - 1)) >> 32) & mask


def find() -> Routine:
    """find(tlb, rip): the record of the translation at `rip`, or null: a fault is noted or
    `exit_kind` set.
    """
    f = Routine("find", PTR, ("tlb", PTR), ("rip", "i64"))
    f.add_to("count_lookup", 1)
    rip, mode = f["rip"], f.get("mode")
    flat = (mode & int(Mode.CODE64)).ne(0)
    linear = flat.select(rip, (rip + f.get(f"seg[{CS}].base")) & 0xFFFF_FFFF)
    with f.If((f.get("watch_kinds") & EXECUTE).ne(0)):
        stops = f.call("@breaks_in", "i1", f.cpu, linear)
        with f.If(stops):
            f.set("exit_kind", int(Exit.STEP_HERE))
            f.ret(f.null())
    host = _fetch_page(f, linear, f.null())
    slot = f.var(block_hash(rip, host) & f.get("blocks_mask"))
    table = f.get("blocks").to_ptr()
    with f.Loop() as loop:
        entry = table.offset(slot.get() * BLOCK_ENTRY)
        record = entry.offset(24).load(PTR, volatile=True, align=8)
        loop.break_if(record.eq(0))
        same = (
            entry.load("i64", volatile=True, align=8).eq(rip)
            & entry.offset(8).load("i64", volatile=True, align=8).eq(host)
            & entry.offset(16).load("i64", volatile=True, align=8).eq(mode)
            # An entry that another block takes over meanwhile is nobody's.
            & entry.offset(24).load(PTR, volatile=True, align=8).eq_ptr(record)
        )
        with f.If(same):
            second = entry.offset(32).load("i64", align=8)
            with f.If(second.ne(0)):
                loop.break_if(_fetch_page(f, (linear & ~0xFFF) + 4096, f.null()).ne(second))
            _compare_once(f, entry.offset(40).load(PTR, align=8), host)
            _remember(f, rip, record)
            f.ret(record)
        slot.set((slot.get() + 1) & f.get("blocks_mask"))
    f.set("link_from", 0)
    f.set("exit_kind", int(Exit.TRANSLATE))
    f.ret(f.null())
    return f


def _compare_once(f: Routine, page: Value, host: Value) -> None:
    """The first time in a stay that a page is entered: is its code what was translated?

    Userspace may have changed it meanwhile, which no store of the guest's tells.
    """
    stay = f.get("stay")
    with f.If(page.load("i64", volatile=True, align=8).ne(stay)):
        at, differs = f.var(f.const(0, 64)), f.var(f.const(0, 64))
        with f.Loop() as loop:
            mask = page.offset(at.get() + CODE_MAP).load("i64", align=8)
            made_from = page.offset(at.get() + MADE_FROM).load("i64", align=8)
            now = (host + at.get()).to_ptr().load("i64", align=8)
            differs.set(differs.get() | ((made_from ^ now) & mask))
            at.set(at.get() + 8)
            loop.break_if(at.get().eq(4096))
        with f.If(differs.get().ne(0)):
            f.set("code_write_gpa", host)
            f.set("exit_kind", int(Exit.CODE_CHANGED))
            f.ret(f.null())
        page.store(stay, volatile=True, align=8)


def _jump_mode(f: Routine | Handler, tlb: Value) -> Value:
    """What a jump-cache entry carries besides RIP: mode, privilege, and the number of flushes."""
    user = tlb.eq_ptr(f.user_tlb()).zext(64) << 8
    return f.get("mode") | user | f.get("jump_key")


def _jump_entry(f: Routine | Handler, rip: Value) -> Value:
    index = (rip ^ (rip >> 12)) & (JUMP_ENTRIES - 1)
    return f.field("jump").offset(index * JUMP_ENTRY)


def _remember(f: Routine, rip: Value, record: Value) -> None:
    entry = _jump_entry(f, rip)
    entry.store(rip, align=8)
    entry.offset(8).store(_jump_mode(f, f["tlb"]), align=8)
    entry.offset(16).store(record, align=8)


def fetch_page() -> Routine:
    """fetch_page(tlb, va): host address of the page that code at `va` is in; 0 as `find`'s null."""
    f = Routine("fetch_page", "i64", ("tlb", PTR), ("va", "i64"))
    f.resume_at(1, f.get("insn_count"))
    host = _fetch_page(f, f["va"], f.const(0, 64))
    f.resumed()
    f.ret(host)
    return f


def _fetch_page(f: Routine, va: Value, failed: Value) -> Value:
    """Host address of the page that `va` is fetched from; the function returns null where that
    faults.
    """
    tag = f.tlb_entry(f["tlb"], va)
    found = f.var(f.const(0, 64))
    with f.If((va ^ tag.offset(TLB_EXEC).load("i64", align=8)).ult(4096)):
        found.set((va & ~0xFFF) + tag.offset(TLB_ADDEND).load("i64", align=8))
    with f.Else():
        gpa = f.call("@tlb_fill", "i64", f.cpu, f["tlb"], va, f.const(I, 64))
        with f.If(gpa.eq(0)):
            f.ret(failed)
        entry = f.call("@page_entry", PTR, f.cpu, gpa & ~0xFFF)
        with f.If(entry.eq(0)):  # code in MMIO space: nothing to fetch it from
            f.set("exit_kind", int(Exit.EMULATION))
            f.set("insn_len", 0)
            f.ret(failed)
        found.set(entry.load("i64", align=8) & ~0xFFF)
    return found.get()


def lookup() -> Handler:
    """The tail of every indirect jump: goes to `State.rip`."""
    h = Handler("lookup")
    request = h.field("exit_request").load("i32", volatile=True, align=4)
    with h.If(request.ne(0)):
        h.set("exit_kind", int(Exit.REQUEST))
        h.set("insn_count", h.icount)
        h.ret()
    rip = h.get("rip")
    entry = _jump_entry(h, rip)
    known = entry.load("i64", align=8).eq(rip) & entry.offset(8).load("i64", align=8).eq(
        _jump_mode(h, h.tlb)
    )
    with h.If(known):
        h.go(entry.offset(16).load(PTR, align=8))
    h.tail(_symbol(h, "@refind"), h.pc)
    return h


def refind() -> Handler:
    """Goes to `State.rip` by the engine's table: what the jump cache does not know, and the entry
    of `run`.
    """
    h = Handler("refind")
    h.resume_at(1, h.icount)
    record = h.call("@find", PTR, h.cpu, h.tlb, h.get("rip"))
    h.resumed()
    with h.If(record.ne(0)):
        h.go(record)
    h.tail(_symbol(h, "@trouble"), h.pc)
    return h


def _symbol(h: Handler, name: str) -> Value:
    return Value(h, name, PTR)


def abort() -> Handler:
    """An instruction gave up: RIP is that of its record."""
    h = Handler("abort")
    h.set("rip", h.rip())
    h.set("exit_record", h.pc.to_int())
    h.tail(_symbol(h, "@trouble"), h.pc)
    return h


def trouble() -> Handler:
    """Leaves if `exit_kind` says so, else delivers the noted exception at `State.rip`."""
    h = Handler("trouble")
    h.set("insn_count", h.icount)
    with h.If(h.get("exit_kind").ne(0)):
        h.ret()
    h.add_to("count_exception", 1)
    vector = h.get("exc_vector")
    intercepted = (h.get(f"intercepts[{EXCEPTIONS}]") >> (vector & 31)) & 1
    with h.If(intercepted.ne(0)):  # by SVM's L1
        h.set("exit_kind", int(Exit.DELIVER))
        h.ret()
    with h.If(vector.eq(PF)):
        h.add_to("count_page_fault", 1)
        h.set("cr2", h.get("exc_cr2"))
    h.resume_at(1, h.icount)
    done = h.call("@deliver", "i1", h.cpu, vector.zext(64), h.const(FAULT, 64))
    h.resumed()
    with h.If(done):
        h.tail(_symbol(h, "@lookup"), h.pc, tlb=h.supervisor_tlb())
    h.set("exit_kind", int(Exit.DELIVER))
    h.ret()
    return h


def _peek(f: Routine, va: Value, size: int, *, write: bool) -> Value:
    """Host pointer to `size` bytes at supervisor address `va` in one page of RAM; the function
    gives up otherwise.
    """
    tag = f.tlb_entry(f.supervisor_tlb(), va)
    offset = TLB_WRITE if write else 0

    def hit() -> Value:
        return (va ^ tag.offset(offset).load("i64", volatile=True, align=8)).ule(4096 - size)

    with f.If(hit() ^ 1):
        access = f.const(W if write else 0, 64)
        filled = f.call("@tlb_fill", "i64", f.cpu, f.supervisor_tlb(), va, access)
        with f.If(filled.eq(0) | (hit() ^ 1)):
            f.ret(f.false())
    return (va + tag.offset(TLB_ADDEND).load("i64", align=8)).to_ptr()


def deliver() -> Routine:
    """deliver(vector, kind): the usual case of delivering an event at `State.rip`; false with
    nothing changed otherwise.

    A noted error code is pushed. Of the kinds, a FAULT pushes RF, and of SOFTWARE the gate's
    privilege must allow it.
    """
    f = Routine("deliver", "i1", ("vector", "i64"), ("kind", "i64"))

    def give_up_unless(cond: Value) -> None:
        with f.If(cond ^ 1):
            f.ret(f.false())

    error, has_error = f.get("exc_error"), f.get("exc_has_error").ne(0)
    give_up_unless((f.get("mode") & int(Mode.LONG)).ne(0))
    offset = f["vector"] << 4
    give_up_unless((offset + 15).ule(f.get("idt_limit").zext(64)))
    gate = _peek(f, f.get("idt_base") + offset, 16, write=False)
    low, high = gate.load("i64"), gate.offset(8).load("i64")
    kind = (low >> 40) & 0x9E
    give_up_unless(kind.eq(0x8E) & ((low >> 44) & 1).eq(0))  # present, interrupt or trap gate
    give_up_unless(f["kind"].ne(SOFTWARE) | f.cpl().ule((low >> 45) & 3))
    selector = (low >> 16) & 0xFFFC
    give_up_unless(((low >> 18) & 1).eq(0) & (selector + 7).ule(f.get("gdt_limit").zext(64)))
    descriptor = _peek(f, f.get("gdt_base") + selector, 8, write=False).load("i64")
    attr = ((descriptor >> 40) & 0xF0FF).trunc(32)
    give_up_unless((attr & CODE_MASK).eq(KERNEL_CODE) & ((attr >> 5) & 3).eq(0) & selector.ne(0))
    cpl = f.cpl()
    ist = (low >> 32) & 7
    rsp = f.var(f.get("gpr[4]"))
    with f.If(cpl.ne(0) | ist.ne(0)):
        at = ist.eq(0).select(f.const(4, 64), ist * 8 + 28)
        give_up_unless((at + 7).ule(f.get(f"seg[{TR}].limit").zext(64)))
        rsp.set(_peek(f, f.get(f"seg[{TR}].base") + at, 8, write=False).load("i64"))
    top = (rsp.get() & ~15) - 40
    size = has_error.select(f.const(48, 64), f.const(40, 64))
    bottom = has_error.select(top - 8, top)
    give_up_unless(((bottom & 4095) + size).ule(4096))
    frame = _peek(f, bottom, 8, write=True)
    set_rf, keep = f.const(int(Flag.RF), 64), f.const(~int(Flag.RF), 64)
    flags = f.flags.read() & f["kind"].eq(SOFTWARE).select(keep, f.const(~0, 64))
    rf = f["kind"].eq(FAULT).select(set_rf, f.const(0, 64))
    with f.If(has_error):
        frame.store(error)
    words = frame.offset(has_error.select(f.const(8, 64), f.const(0, 64)))
    image = (
        f.get("rip"),
        f.get(f"seg[{CS}].selector").zext(64),
        flags | rf,
        f.get("gpr[4]"),
        f.get(f"seg[{SS}].selector").zext(64),
    )
    for n, word in enumerate(image):
        words.offset(8 * n).store(word)
    f.set("gpr[4]", bottom)
    f.set("rip", (low & 0xFFFF) | ((low >> 32) & 0xFFFF_0000) | (high << 32))
    cleared = int(Flag.TF | Flag.NT | Flag.RF | Flag.VM)
    keep_if = ((low >> 40) & 1).ne(0)
    clear = keep_if.select(f.const(cleared, 64), f.const(cleared | int(Flag.IF), 64))
    f.set("flags", (f.get("flags") & ~clear) & ~int(STATUS_FLAGS))
    with f.If(cpl.ne(0)):
        f.set(f"seg[{SS}].selector", 0)
        f.set(f"seg[{SS}].attr", 0x10000)
    f.set(f"seg[{CS}].selector", selector.trunc(16))
    f.set(f"seg[{CS}].attr", attr)
    f.set(f"seg[{CS}].base", 0)
    f.set(f"seg[{CS}].limit", 0xFFFF_FFFF)
    narrow = int(Mode.CODE32 | Mode.STACK32)
    f.set("mode", (f.get("mode") & ~narrow) | int(Mode.CODE64))
    f.set("shadow", 0)
    f.ret(f.true())
    return f


def inject() -> Routine:
    """inject(vector, kind): `deliver` for Python, between two runs."""
    f = Routine("inject", "i1", ("vector", "i64"), ("kind", "i64"))
    f.resume_at(1, f.get("insn_count"))
    done = f.call("@deliver", "i1", f.cpu, f["vector"], f["kind"])
    f.resumed()
    f.ret(done)
    return f


def enter() -> Routine:
    """enter(): into the handlers, from C's calling convention."""
    f = Routine("enter", "i64")
    tlb = f.cpl().eq(3).select(f.user_tlb(), f.supervisor_tlb())
    f.line(
        f"call {CONVENTION} void @refind(ptr null, ptr {f.cpu.text},"
        f" i64 {f.get('insn_count').text}, ptr {tlb.text})"
    )
    f.ret(f.const(0, 64))
    return f


def _give_up(f: Routine) -> None:
    """Guest memory was not there: the vCPU stands before the instruction that wanted it."""
    record = f.get("fault_record")
    with f.If(record.ugt(1)):
        index = (record - f.get("records")) >> 2
        f.set("rip", (f.get("records_rip") + index).to_ptr().load("i64"))
        f.set("exit_record", record)
    f.set("insn_count", f.get("fault_count"))
    f.resumed()


def run() -> Routine:
    """run(): executes the guest from `State.rip` until something sets `exit_kind`; at least one
    instruction.
    """
    f = Routine("run", "void")
    f.set("exit_kind", 0)
    f.set("replay_next", 0)
    f.set("ring_reserve", 0)
    with f.If(f.get("table_write").ne(0)):
        f.field("exit_request").store(f.const(1, 32), volatile=True)
    host = f.local("i32")
    guest = f.local("i32")
    at = {v: Value(f, v.ptr, PTR) for v in (host, guest)}
    f.intrinsic("llvm.x86.sse.stmxcsr", "void", at[host])
    guest.set(f.get("mxcsr") | MASKED)
    f.intrinsic("llvm.x86.sse.ldmxcsr", "void", at[guest])
    host_cw = fpu_image.enter(f)
    none = f.const(0, 64)
    function = f.field(f"fn[{ENTRIES.index('enter')}]").load(PTR, align=8)
    f.call("@guard", "i64", f.cpu, none, none, none, none, none, function)
    with f.If(f.get("exit_kind").eq(int(Exit.MEMORY_FAULT))):
        _give_up(f)
    f.set("ring_reserve", 1)
    f.intrinsic("llvm.x86.sse.stmxcsr", "void", at[guest])
    f.set("mxcsr", (f.get("mxcsr") & ~0x3F) | (guest.get() & 0x3F))
    fpu_image.leave(f, host_cw)
    f.intrinsic("llvm.x86.sse.ldmxcsr", "void", at[host])
    f.ret()
    return f


ROUTINES = (fetch_page, find, deliver, lookup, refind, abort, trouble, inject, enter, run)
