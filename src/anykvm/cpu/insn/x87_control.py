"""x87 control (SDM vol. 1, 8.3.11): control and status words, environment, and the register stack
itself."""

from __future__ import annotations

from anykvm.cpu import fpu_image
from anykvm.cpu.forms import Insn, Memory, row
from anykvm.cpu.fpu_image import I_CS_OP, I_CW, I_DP, I_DS, I_IP, I_ST, I_SW, I_TAG, MASKS
from anykvm.cpu.guest import NM
from anykvm.cpu.insn.x87 import (
    C1,
    Stack,
    memory_operand,
    note_pointers,
    require_no_pending,
    stack_operand,
    x87,
)
from anykvm.cpu.ir import Value
from anykvm.cpu.state import Flag

CR0_PE, CR0_MP_TS = 1, 1 << 1 | 1 << 3
REGISTERS = 80  # bytes of the eight registers in an image


@x87("fninit")
def fninit(i: Insn, name: str) -> None:
    fpu_image.initialize(i.h)


@x87("fnclex")
def fnclex(i: Insn, name: str) -> None:
    h = i.h
    h.set("fpu_sw", h.get("fpu_sw") & 0x7F00)
    fpu_image.clear_flags(h)


@x87("fnstcw")
def fnstcw(i: Insn, name: str) -> None:
    i.ops[0].write(i.h.get("fpu_cw"))


@x87("fnstsw")
def fnstsw(i: Insn, name: str) -> None:
    i.ops[0].write(i.h.get("fpu_sw"))


@x87("fldcw")
def fldcw(i: Insn, name: str) -> None:
    require_no_pending(i)
    fpu_image.set_control(i.h, i.ops[0].read())


@row("fwait", writes=())
def fwait(i: Insn) -> None:
    """CR0.EM does not matter to it, and CR0.TS only together with MP."""
    i.h.raise_if((i.h.get("cr0") & CR0_MP_TS).eq(CR0_MP_TS), NM)
    require_no_pending(i)


@x87("fnop")
def fnop(i: Insn, name: str) -> None:
    require_no_pending(i)
    note_pointers(i)


@x87("fneni", "fndisi", "fnsetpm", "frstpm")
def nothing(i: Insn, name: str) -> None:
    """Meant something to the 8087 and the 80287."""


@x87("fincstp", "fdecstp")
def turn(i: Insn, name: str) -> None:
    require_no_pending(i)
    note_pointers(i)
    stack = Stack(i)
    stack.turn(stack.sw & ~C1, 1 if name == "fincstp" else -1)


@x87("ffree", "ffreep")
def ffree(i: Insn, name: str) -> None:
    require_no_pending(i)
    note_pointers(i)
    stack = Stack(i)
    pop = name == "ffreep"
    tags = stack.tags | stack.tag(stack_operand(i))
    i.h.set("fpu_tag", tags | stack.tag(0) if pop else tags)
    stack.turn(stack.sw & ~C1, int(pop))


# The environment: 14 or 28 bytes, otherwise laid out in real and virtual-8086 mode
def _real(i: Insn) -> Value:
    h = i.h
    virtual = (h.get("flags") & int(Flag.VM)).ne(0)
    return (h.get("cr0") & CR0_PE).eq(0) | virtual


def _split(offset: Value, opcode: Value, bits: int) -> tuple[Value, Value]:
    """A real-mode pointer of `bits`: its low word, and the rest from bit 12 on over the opcode."""
    low = offset & 0xFFFF
    high = ((offset >> 16) << 12) & ((1 << bits) - 1)
    return low, high | opcode


def _environment(i: Insn, wide: bool) -> Value:
    """Puts the environment (and the registers) into `State.x87_image` in the format of the
    present mode.
    """
    h = i.h
    h.call_runtime("x87_pack")
    image = h.field("x87_image")
    ip, dp = h.get("fpu_ip") & 0xFFFF_FFFF, h.get("fpu_dp") & 0xFFFF_FFFF
    opcode = (h.get("fpu_op") & 0x7FF).zext(64)
    no = h.const(0, 64)
    with h.If(_real(i)):
        bits = 28 if wide else 16
        words = (*_split(ip, opcode, bits), *_split(dp, no, bits))
        for at, word in zip((I_IP, I_CS_OP, I_DP, I_DS), words, strict=True):
            image.offset(at).store(word.trunc(32))
    if wide:
        return image
    for n in range(7):
        image.offset(2 * n).store(image.offset(4 * n).load("i16"))
    # The registers follow at once: bytes 28 to 107 move to 14.
    for n in range(REGISTERS // 16):
        piece = image.offset(I_ST + 16 * n).load("<2 x i64>")
        image.offset(I_ST // 2 + 16 * n).store(piece)
    return image


def _is_wide(op: Memory) -> bool:
    return op.bits // 8 in (28, 28 + REGISTERS)


@x87("fnstenv", "fnsave")
def store_environment(i: Insn, name: str) -> None:
    h, op = i.h, memory_operand(i)
    assert op is not None
    op.place()
    image = _environment(i, _is_wide(op))
    op.write(image.load(f"<{op.bits // 16} x i16>"))
    if name == "fnsave":
        fpu_image.initialize(h)
        return
    h.set("fpu_cw", h.get("fpu_cw") | MASKS)
    h.set("fpu_sw", fpu_image.summarize(h.get("fpu_sw"), h.get("fpu_cw")))


def _load_pointers(i: Insn, image: Value, wide: bool) -> None:
    h = i.h
    fpu_image.resolve_pointers(h)
    kind, step = ("i32", 4) if wide else ("i16", 2)
    ip, cs_op, dp, ds = (
        image.offset(at // 4 * step).load(kind).zext(64) for at in (I_IP, I_CS_OP, I_DP, I_DS)
    )
    with h.If(_real(i)):
        top = 0xFFFF_0000 if wide else 0xF_0000
        for field, low, high in (("fpu_ip", ip, cs_op), ("fpu_dp", dp, ds)):
            h.set(field, (low & 0xFFFF) | ((high << 4) & top))
        h.set("fpu_op", cs_op.trunc(16) & 0x7FF)
    with h.Else():
        h.set("fpu_ip", ip)
        h.set("fpu_dp", dp)
        if wide:
            h.set("fpu_op", (cs_op >> 16).trunc(16) & 0x7FF)


@x87("fldenv", "frstor")
def load_environment(i: Insn, name: str) -> None:
    h, op = i.h, memory_operand(i)
    assert op is not None
    require_no_pending(i)
    wide = _is_wide(op)
    image = h.field("x87_image")
    image.store(op.read(f"<{op.bits // 16} x i16>"))
    words = [image.offset(at if wide else at // 2).load("i16") for at in (I_CW, I_SW, I_TAG)]
    fpu_image.set_status(h, words[1])
    h.set("fpu_tag", words[2])
    _load_pointers(i, image, wide)
    if name == "frstor":
        fpu_image.copy_registers(h, image.offset(I_ST if wide else I_ST // 2), 10, out=False)
    fpu_image.clear_flags(h)
    fpu_image.set_control(h, words[0])
