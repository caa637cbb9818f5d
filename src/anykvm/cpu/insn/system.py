"""System instructions (SDM vol. 2 and vol. 3, chapters 2 to 6).

What the running kernel does thousands of times a second is native here. An instruction whose
general case is in Python (`assist.py`) may still have its usual case here; it leaves with
`Exit.ASSIST` before it changed anything.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, row
from anykvm.cpu.guest import GP, SOFTWARE, UD, Handler
from anykvm.cpu.insn.integer import RCX, write_gpr
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.state import STATUS_FLAGS, Exit, Flag, Seg

CS, SS = int(Seg.CS), int(Seg.SS)
USER_SS_ATTR, USER_CS_ATTR = 0xC0F3, 0xA0FB  # flat ring-3 segments as SYSRET sets them
KERNEL_SS_ATTR, KERNEL_CS_ATTR = 0xC093, 0xA09B
COMPAT_CS_ATTR = 0xC0FB
LIMIT = 0xFFFF_FFFF
DR6_BS = 1 << 14
RFLAGS_IRET = 0x3F7FD7  # what IRET at CPL 0 loads: all but the reserved bits (VM is checked apart)


@row("ud2", "ud1", "ud0", writes=())
def undefined(i: Insn, name: str) -> None:
    i.h.raise_(UD)


@row("hlt", writes=(), ends=True)
def hlt(i: Insn) -> None:
    i.h.require_cpl0()
    i.h.leave(Exit.HLT)


@row("cpuid", writes=(), ends=True)
def cpuid(i: Insn) -> None:
    i.h.leave(Exit.CPUID)


@row("rdmsr", "wrmsr", writes=(), ends=True)
def msr(i: Insn, name: str) -> None:
    i.h.require_cpl0()
    i.h.leave(Exit.RDMSR if name == "rdmsr" else Exit.WRMSR)


@row("vmcall", "vmmcall", writes=(), ends=True)
def hypercall(i: Insn, name: str) -> None:
    """At any privilege; which of the two this processor has is the caller's to say."""
    i.h.leave(Exit.VMCALL if name == "vmcall" else Exit.VMMCALL)


@row("rsm", writes=(), ends=True)
def rsm(i: Insn) -> None:
    """Whether the processor is in system management mode is the caller's to say."""
    i.h.leave(Exit.RSM)


@row("monitor", "mwait", writes=(), ends=True)
def monitor(i: Insn, name: str) -> None:
    h = i.h
    h.raise_if(h.cpl().ne(0), UD)
    h.leave(Exit.MONITOR if name == "monitor" else Exit.MWAIT)


@row("in", "out", writes=(), ends=True)
def port(i: Insn, name: str) -> None:
    """Where CPL > IOPL the permission bitmap decides, in Python."""
    h = i.h
    data, where = (i.ops[0], i.ops[1]) if name == "in" else (i.ops[1], i.ops[0])
    with h.If(h.cpl().ugt((h.get("flags") >> 12) & 3)):
        h.leave(Exit.ASSIST)
    number = h.immediate(32) & 0xFF if where.spec == "i" else where.read().zext(32)
    h.set("io_port", number)
    h.set("io_size", data.bits // 8)
    h.set("io_in", int(name == "in"))
    h.set("io_count", 1)
    h.leave(Exit.IO)


@row("swapgs", writes=())
def swapgs(i: Insn) -> None:
    h = i.h
    h.require_cpl0()
    gs = "seg[5].base"
    old = h.get(gs)
    h.set(gs, h.get("kernel_gs_base"))
    h.set("kernel_gs_base", old)


def _canonical(value: Value) -> Value:
    top = value.sar(47)
    return top.eq(0) | top.eq(-1)


@row("rdfsbase", "rdgsbase", feature="fsgsbase")
def read_base(i: Insn, name: str) -> None:
    h = i.h
    h.raise_if(h.get("cr4").bit(16) ^ 1, UD)
    i.ops[0].write(h.get(f"seg[{4 if name == 'rdfsbase' else 5}].base").trunc(i.ops[0].bits))


@row("wrfsbase", "wrgsbase", writes=(), feature="fsgsbase")
def write_base(i: Insn, name: str) -> None:
    h = i.h
    h.raise_if(h.get("cr4").bit(16) ^ 1, UD)
    value = i.ops[0].read().zext(64)
    h.raise_if(_canonical(value) ^ 1, GP, 0)
    h.set(f"seg[{4 if name == 'wrfsbase' else 5}].base", value)


@row("stac", "clac", writes=(), feature="smap")
def access_check(i: Insn, name: str) -> None:
    h = i.h
    h.require_cpl0()
    flags, ac = h.get("flags"), int(Flag.AC)
    h.set("flags", flags | ac if name == "stac" else flags & ~ac)


def _set_segment(h: Handler, seg: int, selector: Value, attr: int) -> None:
    h.set(f"seg[{seg}].selector", selector.trunc(16))
    h.set(f"seg[{seg}].base", 0)
    h.set(f"seg[{seg}].limit", LIMIT)
    h.set(f"seg[{seg}].attr", attr)


def _set_rflags(i: Insn, image: Value) -> None:
    h = i.h
    h.set("flags", (image & ~int(STATUS_FLAGS)) | 2)
    h.flags.write_status(image)
    h.set("mode", h.get("mode") | (((image >> 8) & 1) << 7))


def _trace_after(h: Handler) -> None:
    """SYSCALL and SYSRET: a single step is due if RFLAGS.TF is set after them, so that FMASK can
    keep it out of the kernel.
    """
    h.set("untraced", 1)
    with h.If((h.get("flags") & int(Flag.TF)).ne(0)):
        h.set("debug_hit", h.get("debug_hit") | DR6_BS)
        h.field("exit_request").store(h.const(1, 32), volatile=True)


@row("syscall", writes=(), ends=True)
def syscall(i: Insn) -> None:
    """From 64-bit mode; compatibility mode on an Intel model raises #UD."""
    h = i.h
    h.raise_if(h.get("efer").bit(0) ^ 1, UD)
    if "legacy" in i.attrs:
        h.raise_(UD)
        return
    flags = h.flags.read()
    write_gpr(i, RCX, h.next_rip())
    h.set("gpr[11]", flags & ~int(Flag.RF))
    selector = (h.get("star") >> 32) & 0xFFFC
    _set_rflags(i, flags & ~(h.get("fmask") | int(Flag.RF)))
    _set_segment(h, CS, selector, KERNEL_CS_ATTR)
    _set_segment(h, SS, selector + 8, KERNEL_SS_ATTR)
    _trace_after(h)
    h.go_to_rip(h.get("lstar"), tlb=h.supervisor_tlb())


@row("sysret", writes=(), ends=True)
def sysret(i: Insn) -> None:
    """To 64-bit mode with a 64-bit operand, else to compatibility mode."""
    h = i.h
    h.raise_if(h.get("efer").bit(0) ^ 1, UD)
    h.require_cpl0()
    if "legacy" in i.attrs:
        h.raise_(UD)
        return
    wide = i.operand_size == 64
    target = h.get("gpr[1]") if wide else h.get("gpr[1]") & 0xFFFF_FFFF
    if wide:
        h.raise_if(_canonical(target) ^ 1, GP, 0)
    base = h.get("star") >> 48
    selector = (base + 16 if wide else base) | 3
    _set_rflags(i, (h.get("gpr[11]") & RFLAGS_IRET) & ~int(Flag.RF | Flag.VM))
    _set_segment(h, CS, selector, USER_CS_ATTR if wide else COMPAT_CS_ATTR)
    _set_segment(h, SS, (base + 8) | 3, USER_SS_ATTR)
    if not wide:
        h.set("mode", (h.get("mode") & ~2) | 1 | 4)
    _trace_after(h)
    h.enabling_interrupts()
    h.go_to_rip(target, tlb=h.user_tlb())


def _descriptor(h: Handler, selector: Value) -> Value:
    """The GDT descriptor of `selector`, read natively; anything unusual is Python's."""
    index = selector & ~7
    usual = (selector & 4).eq(0) & index.ne(0) & (index + 7).ule(h.get("gdt_limit").zext(64))
    with h.If(usual ^ 1):
        h.leave(Exit.ASSIST)
    found = h.entry("probe_read").call(
        PTR, h.cpu, h.supervisor_tlb(), h.get("gdt_base") + index, h.const(8, 64), h.pc, h.icount
    )
    with h.If(found.eq(0)):
        h.leave(Exit.ASSIST)
    with h.exposed():
        return found.load("i64", volatile=True)


def _attr(descriptor: Value) -> Value:
    """Access rights of a descriptor as `Segment.attr` has them."""
    return ((descriptor >> 40) & 0xF0FF).trunc(32)


def _assist_unless(h: Handler, cond: Value) -> None:
    with h.If(cond ^ 1):
        h.leave(Exit.ASSIST)


@row("verr", "verw", writes=())
def verify(i: Insn, name: str) -> None:
    """Of a data segment in the GDT; others are Python's. Linux has the processor clear buffers by
    VERW (MDS) on each way to user mode.
    """
    h = i.h
    legal = (h.get("cr0") & 1).ne(0) & (h.get("flags") & int(Flag.VM)).eq(0)
    _assist_unless(h, legal)
    selector = i.ops[0].read().resize(64) & 0xFFFF
    attr = _attr(_descriptor(h, selector)).zext(64)
    _assist_unless(h, (attr & 0x18).eq(0x10))
    level, writable = (attr >> 5) & 3, (attr & 2).ne(0)
    visible = level.uge(h.cpl()) & level.uge(selector & 3)
    h.flags.set_zf(visible & (writable if name == "verw" else h.true()))


@row("iret", writes=(), ends=True)
def iret(i: Insn) -> None:
    """IRETQ between flat 64-bit segments; any other return is Python's."""
    h = i.h
    if i.operand_size != 64 or "legacy" in i.attrs:
        h.leave(Exit.ASSIST)
        return
    _assist_unless(h, (h.get("flags") & int(Flag.NT)).eq(0) & h.cpl().eq(0))
    rip, cs, image, rsp, ss = (h.peek(64, 8 * n) for n in range(5))
    rpl = cs & 3
    code = _descriptor(h, cs & 0xFFFF)
    code_attr = _attr(code)
    _assist_unless(h, (code_attr & 0x609F).eq(0x209B) & ((code_attr >> 5) & 3).eq(rpl.trunc(32)))
    _assist_unless(h, _canonical(rip) & (image & int(Flag.VM | Flag.TF)).eq(0))
    stack_attr = h.var(h.const(0x10000, 32), 32)
    stack_null = (ss & 0xFFFC).eq(0)
    with h.If(stack_null):
        _assist_unless(h, rpl.eq(0) & (ss & 3).eq(0))
    with h.Else():
        stack = _descriptor(h, ss & 0xFFFF)
        attr = _attr(stack)
        _assist_unless(
            h, (attr & 0x9F).eq(0x93) & ((attr >> 5) & 3).eq(rpl.trunc(32)) & (ss & 3).eq(rpl)
        )
        stack_attr.set(attr)
    outward = rpl.ne(0)
    with h.If(outward):
        for seg in (Seg.ES, Seg.DS, Seg.FS, Seg.GS):
            attr = h.get(f"seg[{int(seg)}].attr")
            usable = (attr & 0x10000).ne(0) | ((attr >> 5) & 3).eq(3)
            _assist_unless(h, usable)
    # Nothing can fail from here on.
    _set_rflags(i, image & RFLAGS_IRET)
    h.set(f"seg[{CS}].selector", cs.trunc(16))
    h.set(f"seg[{CS}].attr", code_attr)
    h.set(f"seg[{CS}].base", 0)
    h.set(f"seg[{CS}].limit", LIMIT)
    h.set(f"seg[{SS}].selector", ss.trunc(16))
    # A null SS keeps the privilege level in its attributes (SDM vol. 3, 5.4.1.1; as VMX shows it).
    h.set(f"seg[{SS}].attr", stack_attr.get() | (rpl.trunc(32) << 5))
    h.set(f"seg[{SS}].base", 0)
    h.set(f"seg[{SS}].limit", LIMIT)
    h.set("gpr[4]", rsp)
    h.set("nmi_blocked", 0)
    h.set("resume_rip", rip)
    h.enabling_interrupts()
    tlb = outward.select(h.user_tlb(), h.supervisor_tlb())
    h.go_to_rip(rip, tlb=tlb)


@row("int", writes=(), ends=True)
def software_interrupt(i: Insn) -> None:
    """Where the gate's privilege allows and delivery is simple; else Python's."""
    h = i.h
    vector = h.immediate(64) & 0xFF
    h.set("exc_has_error", 0)
    h.set("rip", h.next_rip())
    h.resume_at(h.pc.to_int(), h.icount)
    done = h.entry("deliver").call("i1", h.cpu, vector, h.const(SOFTWARE, 64))
    h.resumed()
    with h.If(done ^ 1):
        h.leave(Exit.ASSIST)
    h.set("untraced", 1)
    h.tail(h.entry("lookup"), h.pc, h.icount + h.count(), h.supervisor_tlb())


@row("mov_from_cr", writes=(0,))
def mov_from_cr(i: Insn) -> None:
    """CR0, CR2, CR3 or CR4: slot B has the field's offset."""
    i.h.require_cpl0()
    value = i.h.register_field(10).load("i64")
    i.ops[0].write(value.trunc(i.ops[0].bits))


@row("mov_to_cr3", writes=(), ends=True)
def mov_to_cr3(i: Insn) -> None:
    """Flushes what is not global. PAE paging reloads the PDPTEs: Python's."""
    h = i.h
    h.require_cpl0()
    if "legacy" in i.attrs:
        h.leave(Exit.ASSIST)
        return
    value = i.ops[0].read()
    _assist_unless(h, (value >> 46).eq(0) & h.get("cr4").bit(17).__xor__(1))
    h.set("cr3", value)
    h.call_runtime("flush_tlb", (h.get("cr4") >> 7) & 1)
    h.go_to_rip(h.next_rip())


@row("invlpg", writes=(), ends=True)
def invlpg(i: Insn) -> None:
    h = i.h
    h.require_cpl0()
    op = i.ops[0]
    assert isinstance(op, Memory)
    address = h.segment(op.segment_index, "base") + op.offset if op.shape.strip("i") else op.offset
    if "a" in op.shape and "s" not in op.shape:
        address = op.offset
    h.call_runtime("flush_page", address)
    h.go_to_rip(h.next_rip())


@row("mov_to_seg", writes=(), ends=True)
def mov_to_seg(i: Insn) -> None:
    """A null selector into DS, ES, FS or GS in 64-bit mode; everything else is Python's."""
    h = i.h
    if "legacy" in i.attrs or "ss" in i.attrs:
        h.leave(Exit.ASSIST)
        return
    selector = i.ops[1].read().resize(16)
    _assist_unless(h, (selector & 0xFFFC).eq(0))
    index = i.ops[0].index  # type: ignore[attr-defined]
    base = h.field("seg[0].base").offset(index * 24)
    base.store(h.const(0, 64))
    base.offset(8).store(h.const(0, 32))
    base.offset(12).store(h.const(0x10000, 32))
    base.offset(16).store(selector)


@row("mov_from_seg")
def mov_from_seg(i: Insn) -> None:
    """Zero-extended into a register; 16 bits into memory."""
    dst, src = i.ops
    dst.write(src.read().zext(dst.bits))
