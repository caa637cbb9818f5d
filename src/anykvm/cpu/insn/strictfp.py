"""Floating point with exact exception flags, and what MXCSR has to do with it (SDM vol. 1, 10.2.3, 11.5).

Guest code runs with the guest's rounding, DAZ and FTZ in the host's MXCSR and all exceptions masked, so flags gather there by
themselves. LLVM's constrained intrinsics keep each operation as it is: not folded, not merged, not executed for nothing.

Where the guest unmasked an exception (`State.sse_unmasked`), an operation is done with the flags cleared and looked at afterwards.
Denormal results are then found with FTZ, which tells them even where they are exact, as an unmasked underflow does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anykvm.cpu.forms import Insn
from anykvm.cpu.guest import UD, XM, Handler
from anykvm.cpu.insn.vector import element_bits, parts, suffix, vector
from anykvm.cpu.ir import Value

STICKY = 0x3F
BEFORE = 7  # invalid, denormal, divide by zero: found before anything is computed
MASKS = 0x1F80
UNDERFLOW_MASK, FTZ = 1 << 11, 1 << 15
WRITABLE = 0xFFFF
OSXMMEXCPT = 1 << 10
ROUNDING = 'metadata !"round.dynamic", '
STRICT = 'metadata !"fpexcept.strict"'


def _call(h: Handler, name: str, result: str, arguments: str) -> Value:
    return h.emit(
        f"call {result} @llvm.experimental.constrained.{name}({arguments}) strictfp", result
    )


def arithmetic(name: str, *args: Value) -> Value:
    """`fadd`, `fsub`, `fmul`, `fdiv`, `sqrt`, `fma` of floats or of vectors of them."""
    first = args[0]
    texts = "".join(f"{a.type} {a.text}, " for a in args)
    assert isinstance(first.f, Handler)
    return _call(
        first.f, f"{name}.{suffix(first.type)}", first.type, f"{texts}{ROUNDING}{STRICT}"
    )


ROUNDED = ("fptrunc", "sitofp", "uitofp")


def convert(name: str, v: Value, type_: str) -> Value:
    """`fpext`, `fptrunc`, `sitofp`, `fptosi` to another type."""
    assert isinstance(v.f, Handler)
    rounding = ROUNDING if name in ROUNDED else ""
    return _call(
        v.f,
        f"{name}.{suffix(type_)}.{suffix(v.type)}",
        type_,
        f"{v.type} {v.text}, {rounding}{STRICT}",
    )


def compare(predicate: str, a: Value, b: Value, *, signaling: bool) -> Value:
    """An i1 or a vector of them; `signaling` makes any NaN an invalid operation."""
    assert isinstance(a.f, Handler)
    result = vector(parts(a.type)[0], "i1") if a.type[0] == "<" else "i1"
    return _call(
        a.f,
        f"fcmp{'s' if signaling else ''}.{suffix(a.type)}",
        result,
        f'{a.type} {a.text}, {b.type} {b.text}, metadata !"{predicate}", {STRICT}',
    )


# MXCSR
def _store_host(h: Handler) -> Value:
    at = h.field("scratch[0]")
    h.intrinsic("llvm.x86.sse.stmxcsr", "void", at)
    return at.load("i32", volatile=True)


def _load_host(h: Handler, value: Value) -> None:
    at = h.field("scratch[0]")
    at.store(value, volatile=True)
    h.intrinsic("llvm.x86.sse.ldmxcsr", "void", at)


def read_mxcsr(h: Handler) -> Value:
    """The guest's MXCSR (i32) while it runs: the sticky flags are the host's."""
    return (h.get("mxcsr") & ~STICKY) | (_store_host(h) & STICKY)


def write_mxcsr(h: Handler, value: Value) -> None:
    """Makes `value` (i32, no reserved bits) the guest's MXCSR."""
    h.set("mxcsr", value)
    h.set("sse_unmasked", (~value & MASKS).ne(0).zext(32))
    _load_host(h, value | MASKS)


# Unmasked exceptions
def operate(i: Insn, operands: Sequence[Value], compute: Callable[..., Value]) -> Value:
    """`compute(*operands)`; where it raises an exception that the guest unmasked, #XM (or #UD) and no result."""
    h = i.h
    with h.If(h.get("sse_unmasked").eq(0), likely=True):
        result = compute(*operands)
        found = h.var(result)
    with h.Else():
        _clear_flags(h)
        result = compute(*(_pinned(h, n, v) for n, v in enumerate(operands)))
        result = _pinned(h, 0, result)
        _report(h)
        found.set(result)
    return found.get()


def _pinned(h: Handler, n: int, v: Value) -> Value:
    """The same value, known only here: what is computed from it or for it stays on this side of MXCSR's change."""
    size = element_bits(v) * (parts(v.type)[0] if v.type[0] == "<" else 1) // 8
    assert n * 32 + size <= 128, "the bounce buffer holds four operands of 32 bytes"
    at = h.field("bounce").offset(n * 32)
    at.store(v, volatile=True)
    return at.load(v.type, volatile=True)


def _clear_flags(h: Handler) -> None:
    h.set("mxcsr", read_mxcsr(h))
    mxcsr = h.get("mxcsr")
    flush = (mxcsr & UNDERFLOW_MASK).eq(0).select(mxcsr | FTZ, mxcsr)
    _load_host(h, (flush & ~STICKY) | MASKS)


def _report(h: Handler) -> None:
    """Adds the new flags to MXCSR, and raises what is unmasked of them."""
    mxcsr, new = h.get("mxcsr"), _store_host(h) & STICKY
    unmasked = new & ~(mxcsr >> 7)
    early = (unmasked & BEFORE).ne(0)
    h.set("mxcsr", mxcsr | early.select(new & BEFORE, new))
    _load_host(h, h.get("mxcsr") | MASKS)
    with h.If(unmasked.ne(0)):
        h.raise_if((h.get("cr4") & OSXMMEXCPT).eq(0), UD)
        h.raise_(XM)
