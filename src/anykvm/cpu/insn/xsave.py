"""XSAVE and its kin (SDM vol. 1, chapter 13): x87 and SSE state in FXSAVE's image, with a header
behind it that says which of the two are there. Both always count as in use.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, row
from anykvm.cpu.fpu_image import CW_INIT, MXCSR_VALID, X_MXCSR, X_ST, X_XMM
from anykvm.cpu.guest import GP, NM, UD
from anykvm.cpu.insn.fxsave import CHUNK
from anykvm.cpu.ir import Value

CR4_OSXSAVE, CR0_TS = 18, 3
X87, SSE, SSE_OR_AVX = 0, 1, 6
SIZE, ALIGNMENT = 576, 64
XSTATE_BV, XCOMP_BV, RESERVED, HEADER_END = 512, 520, 528, 576
COMPACT = 1 << 63
MXCSR_INIT = 0x1F80


def _area(i: Insn, *, write: bool) -> Value:
    """Linear address of the area, where the instruction is allowed and the area aligned."""
    h, op = i.h, i.ops[0]
    h.raise_if(h.get("cr4").bit(CR4_OSXSAVE) ^ 1, UD)
    h.raise_if(h.get("cr0").bit(CR0_TS), NM)
    assert isinstance(op, Memory)
    address = op.linear(op.offset, SIZE, write=write)
    h.raise_if((address & (ALIGNMENT - 1)).ne(0), GP, 0)
    return address


def _requested(i: Insn) -> Value:
    """RFBM: what EDX:EAX asks for of what XCR0 has."""
    low, high = i.h.get("gpr[0]") & 0xFFFF_FFFF, i.h.get("gpr[2]") << 32
    return (high | low) & i.h.get("xcr0")


def _xmm_end(i: Insn) -> int:
    return X_XMM + 16 * (8 if "legacy" in i.attrs else 16)


def _store(i: Insn, address: Value, first: int, end: int, chunk: int) -> None:
    """A part of the image to the area."""
    h, offset = i.h, i.h.var(first)
    with h.Loop() as loop:
        loop.break_if(offset.get().uge(end))
        piece = h.field("fx_image").offset(offset.get()).load(f"<{chunk} x i8>")
        h.place(address + offset.get(), chunk).store(piece)
        offset.set(offset.get() + chunk)


def _load(i: Insn, address: Value, first: int, end: int, chunk: int, present: Value) -> None:
    """A part of the area to the image, or zeros where the area does not have it."""
    h, offset = i.h, i.h.var(first)
    with h.Loop() as loop:
        loop.break_if(offset.get().uge(end))
        target = h.field("fx_image").offset(offset.get())
        with h.If(present):
            target.store(h.load_type(address + offset.get(), f"<{chunk} x i8>", chunk))
        with h.Else():
            target.store(Value(h, "zeroinitializer", f"<{chunk} x i8>"))
        offset.set(offset.get() + chunk)


@row("xsave", "xsave64", "xsaveopt", "xsaveopt64", "xsavec", "xsavec64", "xsaves", "xsaves64")
def xsave(i: Insn, name: str) -> None:
    """The plain forms keep the header's bits of what they were not asked for."""
    h = i.h
    if name.startswith("xsaves"):
        h.require_cpl0()
    address, rfbm = _area(i, write=True), _requested(i)
    page = (address + (SIZE - 1)) & ~0xFFF
    for at in (address, page.ugt(address).select(page, address)):
        h.place(at, 8)  # a fault comes before anything is stored
    h.call_runtime("fx_pack", h.const(int(name.endswith("64")), 1))
    with h.If(rfbm.bit(X87)):
        _store(i, address, 0, X_MXCSR, 8)
        _store(i, address, X_ST, X_XMM, CHUNK)
    with h.If((rfbm & SSE_OR_AVX).ne(0)):
        _store(i, address, X_MXCSR, X_ST, 8)
    with h.If(rfbm.bit(SSE)):
        _store(i, address, X_XMM, _xmm_end(i), CHUNK)
    if name.startswith(("xsavec", "xsaves")):
        h.store(address + XSTATE_BV, rfbm)
        h.store(address + XCOMP_BV, rfbm | COMPACT)
    else:
        h.store(address + XSTATE_BV, h.load(address + XSTATE_BV, 64) | rfbm)


def _check_header(i: Insn, address: Value, present: Value, format_: Value, name: str) -> Value:
    """#GP for components that are not enabled; whether the format is the compact one."""
    h, xcr0 = i.h, i.h.get("xcr0")
    compact = format_.slt(0)
    listed = format_ & ~COMPACT
    bad = compact.select(present & ~listed | listed & ~xcr0, present & ~xcr0 | format_)
    reserved = h.var(h.load(address + RESERVED, 64))
    offset = h.var(RESERVED + 8)
    with h.If(compact), h.Loop() as loop:
        loop.break_if(offset.get().uge(HEADER_END))
        reserved.set(reserved.get() | h.load(address + offset.get(), 64))
        offset.set(offset.get() + 8)
    h.raise_if((bad | reserved.get()).ne(0), GP, 0)
    if name.startswith("xrstors"):
        h.raise_if(compact ^ 1, GP, 0)
    return compact


@row("xrstor", "xrstor64", "xrstors", "xrstors64", writes=())
def xrstor(i: Insn, name: str) -> None:
    """What is asked for and not in the area is initialised, but for MXCSR in the plain format."""
    h = i.h
    if name.startswith("xrstors"):
        h.require_cpl0()
    address, rfbm = _area(i, write=False), _requested(i)
    present = h.load(address + XSTATE_BV, 64)
    compact = _check_header(i, address, present, h.load(address + XCOMP_BV, 64), name)
    h.call_runtime("fx_pack", h.const(1, 1))
    image = h.field("fx_image")
    with h.If(rfbm.bit(X87)):
        _load(i, address, 0, X_MXCSR, 8, present.bit(X87))
        _load(i, address, X_ST, X_XMM, CHUNK, present.bit(X87))
        with h.If(present.bit(X87) ^ 1):
            image.store(h.const(CW_INIT, 16))
    with h.If((rfbm & SSE_OR_AVX).ne(0)):
        loaded = h.load(address + X_MXCSR, 32)
        initial = compact & (present.bit(SSE) ^ 1)
        mxcsr = initial.select(h.const(MXCSR_INIT, 32), loaded)
        h.raise_if((mxcsr & ~MXCSR_VALID).ne(0), GP, 0)
        image.offset(X_MXCSR).store(mxcsr)
    with h.If(rfbm.bit(SSE)):
        _load(i, address, X_XMM, _xmm_end(i), CHUNK, present.bit(SSE))
    kept = rfbm.bit(X87) ^ 1
    h.call_runtime("fx_unpack", kept | int(name.endswith("64")), h.const(16, 64))
