"""Packed integers: arithmetic, comparison, shuffles, shifts (SDM vol. 1, 9.4, 11.4.2, 12.6, 12.8 to
12.12).

One function of two vectors tells what an instruction computes, whether its operands are MMX or XMM
registers.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.cpu.forms import Insn, Operand, row
from anykvm.cpu.insn.vector import (
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
    return intrinsic("abs", v, v.f.false())


def _psadbw(a: Value, b: Value) -> Value:
    """In each 64 bits, the sum of the differences of eight bytes."""
    difference = absolute(resize(a, "zext", 16) - resize(b, "zext", 16))
    f = a.f
    sums = [
        f.intrinsic(
            "llvm.vector.reduce.add.v8i16",
            "i16",
            shuffle(difference, None, range(first, first + 8)),
        ).zext(64)
        for first in range(0, count_of(a), 8)
    ]
    return gather(sums)


def _sign(a: Value, b: Value) -> Value:
    zero = a.f.zero(a.type)
    return b.slt(0).select(-a, b.eq(0).select(zero, a))


def _pack(bits: int, *, unsigned: bool) -> Binary:
    return lambda a, b: saturate(concat(a, b), bits, unsigned=unsigned)


def _interleave(a: Value, b: Value, *, high: bool) -> Value:
    n = count_of(a)
    first = n // 2 if high else 0
    return shuffle(a, b, (k for j in range(first, first + n // 2) for k in (j, n + j)))


def _low(a: Value, b: Value) -> Value:
    return _interleave(a, b, high=False)


def _high(a: Value, b: Value) -> Value:
    return _interleave(a, b, high=True)


def _pshufb(a: Value, b: Value) -> Value:
    """LLVM has no portable shuffle by a variable."""
    if count_of(a) == 8:
        return half(_pshufb(concat(a, a), concat(b & 0x87, b & 0x87)))
    return a.f.intrinsic("llvm.x86.ssse3.pshuf.b.128", a.type, a, b)


MMX_OR_SSE2: Table = {
    **_each("padd", "bwdq", lambda a, b: a + b),
    **_each("psub", "bwdq", lambda a, b: a - b),
    **_each("padds", "bw", _named("sadd.sat")),
    **_each("paddus", "bw", _named("uadd.sat")),
    **_each("psubs", "bw", _named("ssub.sat")),
    **_each("psubus", "bw", _named("usub.sat")),
    **_each("pavg", "bw", _average),
    **_each("pcmpeq", "bwd", _mask("eq")),
    **_each("pcmpgt", "bwd", _mask("sgt")),
    "pmullw": (16, lambda a, b: a * b),
    "pmulhw": (16, _high_product("sext")),
    "pmulhuw": (16, _high_product("zext")),
    "pmuludq": (64, _even_product("zext")),
    "pmaddwd": (16, _pmaddwd),
    "psadbw": (8, _psadbw),
    "pmaxub": (8, _named("umax")),
    "pminub": (8, _named("umin")),
    "pmaxsw": (16, _named("smax")),
    "pminsw": (16, _named("smin")),
    "packsswb": (16, _pack(8, unsigned=False)),
    "packssdw": (32, _pack(16, unsigned=False)),
    "packuswb": (16, _pack(8, unsigned=True)),
    "punpcklbw": (8, _low),
    "punpcklwd": (16, _low),
    "punpckldq": (32, _low),
    "punpckhbw": (8, _high),
    "punpckhwd": (16, _high),
    "punpckhdq": (32, _high),
    "pand": (64, lambda a, b: a & b),
    "pandn": (64, lambda a, b: ~a & b),
    "por": (64, lambda a, b: a | b),
    "pxor": (64, lambda a, b: a ^ b),
}
SSE: Table = {
    "andps": (64, lambda a, b: a & b),
    "andnps": (64, lambda a, b: ~a & b),
    "orps": (64, lambda a, b: a | b),
    "xorps": (64, lambda a, b: a ^ b),
    "unpcklps": (32, _low),
    "unpckhps": (32, _high),
}
SSE2: Table = {
    "andpd": (64, lambda a, b: a & b),
    "andnpd": (64, lambda a, b: ~a & b),
    "orpd": (64, lambda a, b: a | b),
    "xorpd": (64, lambda a, b: a ^ b),
    "unpcklpd": (64, _low),
    "unpckhpd": (64, _high),
    "punpcklqdq": (64, _low),
    "punpckhqdq": (64, _high),
}
SSSE3: Table = {
    **_each("psign", "bwd", _sign),
    **_each("phadd", "wd", _horizontal(lambda a, b: a + b)),
    **_each("phsub", "wd", _horizontal(lambda a, b: a - b)),
    "phaddsw": (16, _horizontal(_named("sadd.sat"))),
    "phsubsw": (16, _horizontal(_named("ssub.sat"))),
    "pmaddubsw": (8, _pmaddubsw),
    "pmulhrsw": (16, _pmulhrsw),
    "pshufb": (8, _pshufb),
}
SSE4_1: Table = {
    "pmaxsb": (8, _named("smax")),
    "pminsb": (8, _named("smin")),
    "pmaxuw": (16, _named("umax")),
    "pminuw": (16, _named("umin")),
    **_each("pmaxs", "d", _named("smax")),
    **_each("pmins", "d", _named("smin")),
    **_each("pmaxu", "d", _named("umax")),
    **_each("pminu", "d", _named("umin")),
    "pmulld": (32, lambda a, b: a * b),
    "pmuldq": (64, _even_product("sext")),
    "pcmpeqq": (64, _mask("eq")),
    "packusdw": (32, _pack(16, unsigned=True)),
}
SSE4_2: Table = {"pcmpgtq": (64, _mask("sgt"))}
TABLES = {
    "sse2/mmx": MMX_OR_SSE2,
    "sse": SSE,
    "sse2": SSE2,
    "ssse3/mmx": SSSE3,
    "sse4.1": SSE4_1,
    "sse4.2": SSE4_2,
}
BINARY: Table = {name: cell for table in TABLES.values() for name, cell in table.items()}


def binary(i: Insn, name: str) -> None:
    bits, meaning = BINARY[name]
    dst, src = i.ops
    a = dst.read(lanes(dst.bits, bits))
    dst.write(meaning(a, read(src, dst.bits, bits)))


for feature, table in TABLES.items():
    for only in table:
        row(only, feature=feature)(lambda i, name=only: binary(i, name))


# One source
@row("pabsb", "pabsw", "pabsd", feature="ssse3/mmx")
def pabs(i: Insn, name: str) -> None:
    dst, src = i.ops
    dst.write(absolute(src.read(lanes(dst.bits, BITS[name[-1]]))))


@row("phminposuw", feature="sse4.1")
def phminposuw(i: Insn) -> None:
    """The smallest of eight words, and where it stands first."""
    h = i.h
    numbers = Value(h, "<" + ", ".join(f"i32 {n}" for n in range(8)) + ">", "<8 x i32>")
    keyed = (resize(i.ops[1].read("<8 x i16>"), "zext", 32) << 16) | numbers
    least = h.intrinsic("llvm.vector.reduce.umin.v8i32", "i32", keyed)
    both = (least >> 16) | ((least & 7) << 16)
    i.ops[0].write(insert(h.zero("<4 x i32>"), 0, both))


@row("ptest", writes=(), feature="sse4.1")
def ptest(i: Insn) -> None:
    h, (a, b) = i.h, (op.read("i128") for op in i.ops)
    no = h.false()
    h.flags.pack((~a & b).eq(0), no, no, (a & b).eq(0), no, no)


# Shifts
SHIFTS = {"psll": "shl", "psrl": "lshr", "psra": "ashr"}


def _count(op: Operand) -> Value:
    if op.spec == "i":
        return op.read().resize(64)
    return extract(op.read(lanes(op.bits, 64)), 0)


@row(*(stem + b for stem in SHIFTS for b in "wdq" if stem + b != "psraq"), feature="sse2/mmx")
def shift(i: Insn, name: str) -> None:
    """All elements by one count, the low 64 bits of the source; from the element's width on, zeros
    or signs.
    """
    h, bits, op = i.h, BITS[name[-1]], SHIFTS[name[:4]]
    dst, src = i.ops
    count = _count(src)
    inside = count.ult(bits)
    amount = splat(inside.select(count, bits - 1).resize(bits), dst.bits // bits)
    moved = dst.read(lanes(dst.bits, bits))._binary(op, amount)
    dst.write(moved if op == "ashr" else inside.select(moved, h.zero(moved.type)))


# Of SSE4.2 too, but on general registers: CR0.TS and CR4.OSFXSR do not matter
@row("crc32")
def crc32(i: Insn) -> None:
    """CRC-32C. LLVM has no portable form of it that compiles to one instruction."""
    h, (dst, src) = i.h, i.ops
    crc, data = dst.read(), src.read()
    if src.bits == 64:
        dst.write(h.intrinsic("llvm.x86.sse42.crc32.64.64", "i64", crc, data))
        return
    name = f"llvm.x86.sse42.crc32.32.{src.bits}"
    dst.write(h.intrinsic(name, "i32", crc.trunc(32), data).zext(dst.bits))
