"""FXSAVE and FXRSTOR (SDM vol. 1, 10.5): the x87, MMX and SSE state as one image of 512 bytes."""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory
from anykvm.cpu.fpu_image import CR4_OSFXSR, MXCSR_VALID, X_MXCSR, X_XMM
from anykvm.cpu.guest import GP
from anykvm.cpu.insn.x87 import x87
from anykvm.cpu.ir import Value

SIZE, CHUNK = 512, 32
PIECE = f"<{CHUNK} x i8>"


def _operand(i: Insn, *, write: bool) -> Value:
    """Linear address of the image, aligned."""
    op = i.ops[0]
    assert isinstance(op, Memory)
    address = op.linear(op.offset, SIZE, write=write)
    i.h.raise_if((address & 15).ne(0), GP, 0)
    return address


def _xmms(i: Insn) -> Value:
    """How many XMM registers take part."""
    enabled = i.h.get("cr4").bit(CR4_OSFXSR)
    return enabled.select(i.h.const(8 if "legacy" in i.attrs else 16, 64), 0)


@x87("fxsave", "fxsave64")
def fxsave(i: Insn, name: str) -> None:
    """What lies behind the last register is not written."""
    h = i.h
    address = _operand(i, write=True)
    page = (address + (SIZE - 1)) & ~0xFFF
    for at in (address, page.ugt(address).select(page, address)):
        h.place(at, 8)  # a fault comes before anything is stored
    h.call_runtime("fx_pack", h.const(int(name == "fxsave64"), 1))
    end = (_xmms(i) << 4) + X_XMM
    offset = h.var(0)
    with h.Loop() as loop:
        loop.break_if(offset.get().uge(end))
        piece = h.field("fx_image").offset(offset.get()).load(PIECE)
        h.place(address + offset.get(), CHUNK).store(piece)
        offset.set(offset.get() + CHUNK)


@x87("fxrstor", "fxrstor64")
def fxrstor(i: Insn, name: str) -> None:
    h = i.h
    address = _operand(i, write=False)
    offset = h.var(0)
    with h.Loop() as loop:
        loop.break_if(offset.get().uge(SIZE))
        piece = h.load_type(address + offset.get(), PIECE, CHUNK)
        h.field("fx_image").offset(offset.get()).store(piece)
        offset.set(offset.get() + CHUNK)
    xmms = _xmms(i)
    reserved = (h.field("fx_image").offset(X_MXCSR).load("i32") & ~MXCSR_VALID).ne(0)
    h.raise_if(reserved & xmms.ne(0), GP, 0)
    h.call_runtime("fx_unpack", h.const(int(name == "fxrstor64"), 1), xmms)
