"""The stack (SDM vol. 1, 6.2 and 7.3.1.4). RSP changes only after every access of the instruction
succeeded.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, SegmentRegister, row
from anykvm.cpu.guest import GP
from anykvm.cpu.insn.integer import RBP, RSP, read_gpr, write_gpr
from anykvm.cpu.ir import Value, Var
from anykvm.cpu.state import STATUS_FLAGS, Exit, Flag

VME_OR_PVI = 3  # of CR4


def _size(i: Insn) -> int:
    return i.operand_size or 64


@row("push", writes=())
def push(i: Insn) -> None:
    n = _size(i)
    op = i.ops[0]
    if isinstance(op, SegmentRegister):
        i.h.push(op.read().zext(n))
        return
    op_bits = op.bits
    if op.spec == "i":
        op.bits = n
    value = op.read()
    i.h.push(value if value.bits == n or op_bits == n else value.resize(n))


@row("pop")
def pop(i: Insn) -> None:
    """An address based on RSP counts from the incremented RSP; POP RSP keeps the popped value."""
    h, n = i.h, _size(i)
    dst = i.ops[0]
    value = h.peek(n)
    if not isinstance(dst, Memory):
        h.drop(n // 8)
        dst.write(value)
        return
    if "a" not in dst.shape:
        based_on_rsp = h.record(12, "i8").eq(RSP)
        dst.__dict__["offset"] = dst.offset + based_on_rsp.select(
            h.const(n // 8, 64), h.const(0, 64)
        )
    dst.write(value)
    h.drop(n // 8)


@row("pushf", writes=())
def pushf(i: Insn) -> None:
    """RF and VM are pushed as 0."""
    _vm86_is_pythons(i)
    n = _size(i)
    hidden = int(Flag.RF | Flag.VM)
    i.h.push((i.h.flags.read() & ~hidden).trunc(n))


def _vm86_is_pythons(i: Insn) -> None:
    """In virtual-8086 mode with IOPL below 3, which no 64-bit code is."""
    h = i.h
    if "legacy" in i.attrs:
        with h.If((h.get("flags") & int(Flag.VM)).ne(0) & ((h.get("flags") >> 12) & 3).ult(3)):
            h.leave(Exit.ASSIST)


@row("popf", writes=(), ends=True)
def popf(i: Insn) -> None:
    _vm86_is_pythons(i)
    h, n = i.h, _size(i)
    image = h.peek(n).zext(64)
    h.drop(n // 8)
    write_flags_by_privilege(i, image, n)
    h.enabling_interrupts()
    h.go_to_rip(h.next_rip())


def write_flags_by_privilege(i: Insn, image: Value, bits: int) -> None:
    """RFLAGS from `image` as POPF may change it: IOPL at CPL 0 only, IF where CPL <= IOPL; VM, RF,
    VIF, VIP not.
    """
    h = i.h
    old = h.get("flags")
    cpl = h.cpl()
    always = int(Flag.TF | Flag.DF | Flag.NT) | (int(Flag.AC | Flag.ID) if bits > 16 else 0)
    iopl = (old >> 12) & 3
    may_if = cpl.ule(iopl).select(h.const(int(Flag.IF), 64), h.const(0, 64))
    may_iopl = cpl.eq(0).select(h.const(int(Flag.IOPL), 64), h.const(0, 64))
    mask = may_if | may_iopl | always
    h.set("flags", (old & ~mask & ~int(Flag.RF)) | (image & mask) | 2)
    h.flags.write_status(image & int(STATUS_FLAGS))
    set_step_mode(i, image)


def set_step_mode(i: Insn, image: Value) -> None:
    """TF selects one-instruction blocks, from Python; the bit in `mode` stays set until that sees
    that nothing needs it.
    """
    step = (image >> 8) & 1
    i.h.set("mode", i.h.get("mode") | (step << 7))
    with i.h.If(step.ne(0)):
        i.h.field("exit_request").store(i.h.const(1, 32), volatile=True)


@row("leave")
def leave(i: Insn) -> None:
    h, n = i.h, _size(i)
    rbp = h.get("gpr[5]")
    value = _load_stack(i, rbp, n)
    h.set_rsp(rbp + n // 8)
    write_gpr(i, RBP, value)


@row("enter", writes=())
def enter(i: Insn) -> None:
    """Frame size in imm, nesting level in aux; levels are checked before anything is written."""
    h, n = i.h, _size(i)
    size = n // 8
    level = h.aux() & 31
    frame = (h.get("gpr[4]") - size) & ((1 << h._stack) - 1)
    with h.through_stack():
        h.store(h.stack_address(-size, size, write=True), read_gpr(i, RBP, n))
    depth = h.var(h.const(size, 64))
    with h.If(level.ne(0)):
        source = h.var(h.get("gpr[5]"))
        left = h.var(level)
        with h.Loop() as loop:
            left.set(left.get() - 1)
            loop.break_if(left.get().eq(0))
            source.set(source.get() - size)
            _push_at(i, depth, _load_stack(i, source.get(), n))
        _push_at(i, depth, frame.trunc(n))
    rsp = h.get("gpr[4]") - depth.get() - (h.immediate(64) & 0xFFFF)
    h.set_rsp(rsp)
    write_gpr(i, RBP, frame.trunc(n))


def _load_stack(i: Insn, offset: Value, bits: int) -> Value:
    h = i.h
    if h._stack != 64:
        offset = h.linear(2, offset & ((1 << h._stack) - 1), bits // 8, write=False)
    with h.through_stack():
        return h.load(offset, bits)


def _push_at(i: Insn, depth: Var, value: Value) -> None:
    h, size = i.h, value.bits // 8
    depth.set(depth.get() + size)
    offset = h.get("gpr[4]") - depth.get()
    if h._stack != 64:
        offset = h.linear(2, offset & ((1 << h._stack) - 1), size, write=True)
    with h.through_stack():
        h.store(offset, value)


@row("pusha", writes=())
def pusha(i: Insn) -> None:
    """AX, CX, DX, BX, the SP from before, BP, SI, DI; stored from the far end so that a fault comes
    first.
    """
    h, n = i.h, _size(i)
    size = n // 8
    for number in reversed(range(8)):
        where = h.stack_address(-size * (number + 1), size, write=True)
        h.store(where, read_gpr(i, number, n))
    h.drop(h.const(-8 * size, 64))


@row("popa", writes=())
def popa(i: Insn) -> None:
    h, n = i.h, _size(i)
    values = [(number, h.peek(n, (7 - number) * (n // 8))) for number in range(8) if number != RSP]
    h.drop(n)
    for number, value in values:
        write_gpr(i, number, value)


@row("cli", "sti")
def interrupt_flag(i: Insn, name: str) -> None:
    """STI holds interrupts off for one more instruction: the translator puts a `poll` behind that
    one.
    """
    h = i.h
    flags = h.get("flags")
    with h.If(h.cpl().ugt((flags >> 12) & 3)):
        h.raise_if((h.get("cr4") & VME_OR_PVI).eq(0), GP, 0)
        h.leave(Exit.ASSIST)
    if name == "cli":
        h.set("flags", flags & ~int(Flag.IF))
        return
    with h.If((flags & int(Flag.IF)).eq(0)):
        h.set("flags", flags | int(Flag.IF))
        h.set("shadow", 1)
        h.set("shadow_rip", h.next_rip())
        h.set("shadow_count", h.icount)
        h.enabling_interrupts()


@row("cld", "std")
def direction(i: Insn, name: str) -> None:
    flags = i.h.get("flags")
    df = int(Flag.DF)
    i.h.set("flags", flags | df if name == "std" else flags & ~df)
