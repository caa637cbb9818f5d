"""Shuffles, blends and the like, most by an immediate that the handler is compiled for (SDM vol. 1,
9.4.4, 10.4.4, 11.4.2, 12.6, 12.8.3).
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.insn.sse_int import absolute
from anykvm.cpu.insn.vector import blend, concat, count_of, extract, lanes, resize, shuffle, splat


def control(i: Insn) -> int:
    """The immediate, which is known when the handler is compiled."""
    value = i.ops[-1].read().constant
    assert value is not None
    return value


def fields(immediate: int, count: int, bits: int) -> list[int]:
    """The first `count` fields of `bits` bits."""
    return [immediate >> (bits * n) & ((1 << bits) - 1) for n in range(count)]


def _shuffle_row(name: str, bits: int, feature: str, order: Callable[[int], list[int]]) -> None:
    """`order` gives from the immediate the numbers of the source's elements."""

    def semantics(i: Insn) -> None:
        dst, src = i.ops[:2]
        dst.write(shuffle(src.read(lanes(dst.bits, bits)), None, order(control(i))))

    row(name, feature=feature, constant=True)(semantics)


_shuffle_row("pshufd", 32, "sse2", lambda c: fields(c, 4, 2))
_shuffle_row("pshufw", 16, "sse/mmx", lambda c: fields(c, 4, 2))
_shuffle_row("pshuflw", 16, "sse2", lambda c: [*fields(c, 4, 2), 4, 5, 6, 7])
_shuffle_row("pshufhw", 16, "sse2", lambda c: [0, 1, 2, 3, *(4 + n for n in fields(c, 4, 2))])


@row("shufps", feature="sse", constant=True)
def shufps(i: Insn) -> None:
    a, b = (op.read("<4 x i32>") for op in i.ops[:2])
    first, second, third, fourth = fields(control(i), 4, 2)
    i.ops[0].write(shuffle(a, b, (first, second, 4 + third, 4 + fourth)))


@row("shufpd", feature="sse2", constant=True)
def shufpd(i: Insn) -> None:
    a, b = (op.read("<2 x i64>") for op in i.ops[:2])
    low, high = fields(control(i), 2, 1)
    i.ops[0].write(shuffle(a, b, (low, 2 + high)))


@row("palignr", feature="ssse3/mmx", constant=True)
def palignr(i: Insn) -> None:
    """Bytes from the immediate's on of source and destination one after the other, then zeros."""
    dst, src = i.ops[:2]
    type_ = lanes(dst.bits, 8)
    count = dst.bits // 8
    pair = concat(src.read(type_), dst.read(type_))
    zero = i.h.zero(pair.type)
    first = min(control(i), 2 * count)
    dst.write(shuffle(pair, zero, range(first, first + count)))


BLENDS = {"blendps": 32, "blendpd": 64, "pblendw": 16}


@row(*BLENDS, feature="sse4.1", constant=True)
def blend_by_immediate(i: Insn, name: str) -> None:
    type_ = lanes(128, BLENDS[name])
    a, b = (op.read(type_) for op in i.ops[:2])
    i.ops[0].write(blend(a, b, [bool(bit) for bit in fields(control(i), count_of(a), 1)]))


VARIABLE_BLENDS = {"pblendvb": 8, "blendvps": 32, "blendvpd": 64}


@row(*VARIABLE_BLENDS, feature="sse4.1")
def blend_by_register(i: Insn, name: str) -> None:
    """The signs of XMM0's elements choose."""
    type_ = lanes(128, VARIABLE_BLENDS[name])
    a, b = (op.read(type_) for op in i.ops)
    mask = i.h.field("xmm[0]").load(type_)
    i.ops[0].write(mask.slt(0).select(b, a))


@row("mpsadbw", feature="sse4.1", constant=True)
def mpsadbw(i: Insn) -> None:
    """Sums of differences between four bytes of the source and those at eight places of the
    destination.
    """
    c = control(i)
    a, b = (op.read("<16 x i8>") for op in i.ops[:2])
    total = i.h.zero("<8 x i16>")
    for j in range(4):
        first = 4 * (c >> 2 & 1) + j
        window = resize(shuffle(a, None, range(first, first + 8)), "zext", 16)
        byte = resize(splat(extract(b, 4 * (c & 3) + j), 8), "zext", 16)
        total = total + absolute(window - byte)
    i.ops[0].write(total)


@row("pslldq", "psrldq", feature="sse2", constant=True)
def shift_bytes(i: Insn, name: str) -> None:
    dst = i.ops[0]
    value = dst.read("<16 x i8>")
    n = min(control(i), 16)
    if name == "psrldq":
        moved = shuffle(value, i.h.zero(value.type), range(n, n + 16))
    else:
        moved = shuffle(i.h.zero(value.type), value, range(16 - n, 32 - n))
    dst.write(moved)
