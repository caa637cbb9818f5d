"""Packed integers: arithmetic, comparison, shuffles, shifts (SDM vol. 1, 9.4, 11.4.2, 12.6, 12.8 to 12.12).

One function of two vectors tells what an instruction computes, whether its operands are MMX or XMM registers.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.insn.vector import (
    blend,
    concat,
    count_of,
    extract,
    gather,
    half,
    insert,
    intrinsic,
    lanes,
    read,
    resize,
    saturate,
    shuffle,
    splat,
)
from anykvm.cpu.ir import Value

Binary = Callable[[Value, Value], Value]
Table = dict[str, tuple[int, Binary]]  # mnemonic: bits of an element, meaning

BITS = {"b": 8, "w": 16, "d": 32, "q": 64}


def _each(stem: str, letters: str, meaning: Binary) -> Table:
    """`stem` with each of the letters for the size of an element."""
    return {stem + letter: (BITS[letter], meaning) for letter in letters}


def _named(name: str) -> Binary:
    """An LLVM intrinsic as a meaning."""
    return lambda a, b: intrinsic(name, a, b)


def _mask(predicate: str) -> Binary:
    return lambda a, b: a.cmp(predicate, b).cast("sext", a.type)


def _high_product(op: str) -> Binary:
    """The upper half of each product."""

    def product(a: Value, b: Value) -> Value:
        return resize((resize(a, op, 32) * resize(b, op, 32)) >> 16, "trunc", 16)

    return product


def _average(a: Value, b: Value) -> Value:
    bits = 16 if "i8" in a.type else 32
    total = resize(a, "zext", bits) + resize(b, "zext", bits) + 1
    return (total >> 1).cast("trunc", a.type)


def _even_product(op: str) -> Binary:
    """Products of the lower halves of 64-bit elements."""

    def low(v: Value) -> Value:
        return v & 0xFFFF_FFFF if op == "zext" else (v << 32).sar(32)

    return lambda a, b: low(a) * low(b)


def _pairs(a: Value, b: Value) -> tuple[Value, Value]:
    """The even and the odd elements of `a` followed by `b`."""
    n = 2 * count_of(a)
    return shuffle(a, b, range(0, n, 2)), shuffle(a, b, range(1, n, 2))


def _horizontal(meaning: Binary) -> Binary:
    return lambda a, b: meaning(*_pairs(a, b))


def _neighbours(v: Value) -> tuple[Value, Value]:
    n = count_of(v)
    return shuffle(v, None, range(0, n, 2)), shuffle(v, None, range(1, n, 2))


def _pmaddwd(a: Value, b: Value) -> Value:
    even, odd = _neighbours(resize(a, "sext", 32) * resize(b, "sext", 32))
    return even + odd


def _pmaddubsw(a: Value, b: Value) -> Value:
    even, odd = _neighbours(resize(a, "zext", 32) * resize(b, "sext", 32))
    return saturate(even + odd, 16, unsigned=False)


def _pmulhrsw(a: Value, b: Value) -> Value:
    product = resize(a, "sext", 32) * resize(b, "sext", 32)
    return resize(((product >> 14) + 1) >> 1, "trunc", 16)


def absolute(v: Value) -> Value:
    return v.f.intrinsic(_abs_name(v), v.type, v, v.f.false())


def _abs_name(v: Value) -> str:
    from anykvm.cpu.insn.vector import suffix

    return f"llvm.abs.{suffix(v.type)}"
