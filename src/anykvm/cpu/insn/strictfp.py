"""Floating point with exact exception flags.

LLVM's constrained intrinsics keep each operation as it is: not folded, not merged, not executed for
nothing. What MXCSR has to do with it is told in cpu/mxcsr.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from anykvm.cpu.forms import Insn
from anykvm.cpu.guest import Handler
from anykvm.cpu.insn.vector import element_bits, parts, suffix, vector
from anykvm.cpu.ir import Function, Value

ROUNDING = 'metadata !"round.dynamic", '
STRICT = 'metadata !"fpexcept.strict"'


def _call(f: Function, name: str, result: str, arguments: str) -> Value:
    return f.emit(
        f"call {result} @llvm.experimental.constrained.{name}({arguments}) strictfp", result
    )


def arithmetic(name: str, *args: Value) -> Value:
    """`fadd`, `fsub`, `fmul`, `fdiv`, `sqrt`, `fma` of floats or of vectors of them."""
    first = args[0]
    texts = "".join(f"{a.type} {a.text}, " for a in args)
    return _call(first.f, f"{name}.{suffix(first.type)}", first.type, f"{texts}{ROUNDING}{STRICT}")


ROUNDED = ("fptrunc", "sitofp", "uitofp")


def convert(name: str, v: Value, type_: str) -> Value:
    """`fpext`, `fptrunc`, `sitofp`, `fptosi` to another type."""
    rounding = ROUNDING if name in ROUNDED else ""
    return _call(
        v.f,
        f"{name}.{suffix(type_)}.{suffix(v.type)}",
        type_,
        f"{v.type} {v.text}, {rounding}{STRICT}",
    )


def compare(predicate: str, a: Value, b: Value, *, signaling: bool) -> Value:
    """An i1 or a vector of them; `signaling` makes any NaN an invalid operation."""
    result = vector(parts(a.type)[0], "i1") if a.type[0] == "<" else "i1"
    return _call(
        a.f,
        f"fcmp{'s' if signaling else ''}.{suffix(a.type)}",
        result,
        f'{a.type} {a.text}, {b.type} {b.text}, metadata !"{predicate}", {STRICT}',
    )


# Unmasked exceptions
def operate(i: Insn, operands: Sequence[Value], compute: Callable[..., Value]) -> Value:
    """`compute(*operands)`; where it raises an exception that the guest unmasked, #XM (or #UD) and
    no result.
    """
    h = i.h
    with h.If(h.get("sse_unmasked").eq(0), likely=True):
        result = compute(*operands)
        found = h.var(result)
    with h.Else():
        h.call_runtime("sse_begin")
        result = compute(*(_pinned(h, n, v) for n, v in enumerate(operands)))
        result = _pinned(h, 0, result)
        h.abort_if(h.entry("sse_end").call("i1", h.cpu))
        found.set(result)
    return found.get()


def _pinned(h: Handler, n: int, v: Value) -> Value:
    """The same value, known only here: what is computed from it or for it stays on this side of
    MXCSR's change.
    """
    size = element_bits(v) * (parts(v.type)[0] if v.type[0] == "<" else 1) // 8
    assert n * 32 + size <= 128, "the bounce buffer holds four operands of 32 bytes"
    at = h.field("bounce").offset(n * 32)
    at.store(v, volatile=True)
    return at.load(v.type, volatile=True)
