"""Moves between XMM and MMX registers, general registers and memory (SDM vol. 1, 10.4.1, 11.4.1,
12.3.3, 9.4.1).

A register is always read and written whole, even where half of it changes: the processor forwards a
store to a later load of the same size, so a narrow store before a wide load would stall.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, Operand, row
from anykvm.cpu.insn.sse_shuffle import control
from anykvm.cpu.insn.vector import extract, insert, lanes, resize, shuffle, sign_mask
from anykvm.cpu.ir import Value

WHOLE = "<2 x i64>"


def zero_extended(i: Insn, value: Value) -> Value:
    """A register's worth with this integer lowest and zeros above."""
    return insert(i.h.zero(lanes(128, value.bits)), 0, value)


def copy(i: Insn) -> None:
    dst, src = i.ops
    dst.write(src.read(WHOLE if src.bits == 128 else None))


ALIGNED = {"sse": ("movaps", "movntps"), "sse2": ("movapd", "movdqa", "movntpd", "movntdq")}
UNALIGNED = {"sse": "movups", "sse2": "movupd movdqu", "sse3": "lddqu"}
for feature, names in ALIGNED.items():
    row(*names, feature=feature)(lambda i, name: copy(i))
for feature, text in UNALIGNED.items():
    for only in text.split():
        row(only, feature=feature, unaligned=True)(copy)
row("movntdqa", feature="sse4.1")(copy)
row("movntq", feature="sse/mmx")(copy)
row("movnti")(copy)  # works on general registers: CR0.TS and CR4.OSFXSR do not matter


def _low(op: Operand, bits: int) -> Value:
    """The lowest `bits` of a source."""
    return op.read().resize(bits) if op.spec[0] == "r" else op.read(f"i{bits}")


@row("movd", "movq", feature="sse2/mmx")
def movd(i: Insn, name: str) -> None:
    """Into an XMM or MMX register zero-extended."""
    bits = 32 if name == "movd" else 64
    dst, src = i.ops
    value = _low(src, bits)
    if dst.spec == "x":
        dst.write(zero_extended(i, value))
    else:
        dst.write(value.resize(dst.bits))


@row("movdq2q", feature="sse2")
def movdq2q(i: Insn) -> None:
    i.ops[0].write(i.ops[1].read("i64"))


@row("movq2dq", feature="sse2")
def movq2dq(i: Insn) -> None:
    i.ops[0].write(zero_extended(i, i.ops[1].read("i64")))


def _scalar(i: Insn, bits: int) -> None:
    """Between registers the rest of the destination stays; from memory it is cleared."""
    dst, src = i.ops
    value = src.read(f"i{bits}")
    if dst.is_memory:
        dst.write(value)
    elif src.is_memory:
        dst.write(zero_extended(i, value))
    else:
        dst.write(insert(dst.read(lanes(128, bits)), 0, value))


@row("movss", feature="sse")
def movss(i: Insn) -> None:
    _scalar(i, 32)


@row("movsd", feature="sse2")
def movsd(i: Insn) -> None:
    _scalar(i, 64)


def move_half(i: Insn, name: str) -> None:
    """MOVLPx and MOVHPx: one half of a register, to or from memory."""
    dst, src = i.ops
    n = int(name[3] == "h")
    if dst.is_memory:
        dst.write(extract(src.read(WHOLE), n))
    else:
        dst.write(insert(dst.read(WHOLE), n, src.read("i64")))


row("movlps", "movhps", feature="sse")(move_half)
row("movlpd", "movhpd", feature="sse2")(move_half)


@row("movlhps", "movhlps", feature="sse")
def move_between_halves(i: Insn, name: str) -> None:
    dst, src = i.ops
    a, b = dst.read(WHOLE), src.read(WHOLE)
    dst.write(shuffle(a, b, (0, 2) if name == "movlhps" else (3, 1)))


DUPLICATES = {"movsldup": (0, 0, 2, 2), "movshdup": (1, 1, 3, 3)}


@row(*DUPLICATES, feature="sse3")
def move_duplicate(i: Insn, name: str) -> None:
    i.ops[0].write(shuffle(i.ops[1].read("<4 x i32>"), None, DUPLICATES[name]))


@row("movddup", feature="sse3")
def movddup(i: Insn) -> None:
    value = i.ops[1].read("i64")
    i.ops[0].write(shuffle(zero_extended(i, value), None, (0, 0)))


def move_mask(i: Insn, element: int) -> None:
    dst, src = i.ops
    dst.write(sign_mask(src.read(lanes(src.bits, element))).resize(dst.bits))


MASKS = {"movmskps": (32, "sse"), "movmskpd": (64, "sse2"), "pmovmskb": (8, "sse2/mmx")}
for only, (element, feature) in MASKS.items():
    row(only, feature=feature)(lambda i, element=element: move_mask(i, element))


ELEMENTS = {
    "w": (16, "sse2/mmx"),
    "b": (8, "sse4.1"),
    "d": (32, "sse4.1"),
    "q": (64, "sse4.1"),
}


def insert_element(i: Insn, bits: int) -> None:
    dst, src = i.ops[:2]
    whole = dst.read(lanes(dst.bits, bits))
    dst.write(insert(whole, control(i) % (dst.bits // bits), src.read().resize(bits)))


def extract_element(i: Insn, bits: int) -> None:
    """Into a general register zero-extended."""
    dst, src = i.ops[:2]
    element = extract(src.read(lanes(src.bits, bits)), control(i) % (src.bits // bits))
    dst.write(element.resize(dst.bits))


for letter, (bits, feature) in ELEMENTS.items():
    row("pinsr" + letter, feature=feature, constant=True)(
        lambda i, bits=bits: insert_element(i, bits)
    )
    row("pextr" + letter, feature=feature, constant=True)(
        lambda i, bits=bits: extract_element(i, bits)
    )
row("extractps", feature="sse4.1", constant=True)(lambda i: extract_element(i, 32))


@row("insertps", feature="sse4.1", constant=True)
def insertps(i: Insn) -> None:
    """Bits 7:6 of the immediate choose the source, 5:4 the destination, 3:0 what is cleared."""
    dst, src = i.ops[:2]
    c = control(i)
    memory = src.is_memory
    element = src.read("i32") if memory else extract(src.read("<4 x i32>"), c >> 6)
    value = insert(dst.read("<4 x i32>"), c >> 4 & 3, element)
    cleared = [n + 4 if c >> n & 1 else n for n in range(4)]
    dst.write(shuffle(value, i.h.zero("<4 x i32>"), cleared))


EXTENSIONS = {
    "bw": (8, 16),
    "bd": (8, 32),
    "bq": (8, 64),
    "wd": (16, 32),
    "wq": (16, 64),
    "dq": (32, 64),
}


@row(*(f"pmov{x}x{s}" for x in "sz" for s in EXTENSIONS), feature="sse4.1")
def move_extended(i: Insn, name: str) -> None:
    """PMOVSX and PMOVZX: elements from the low part of the source, which in memory is no longer
    than that.
    """
    narrow, wide = EXTENSIONS[name[6:]]
    dst, src = i.ops
    used = dst.bits * narrow // wide
    dst.write(resize(src.read(lanes(used, narrow)), name[4] + "ext", wide))


@row("maskmovdqu", feature="sse2", unaligned=True)
def maskmovdqu(i: Insn) -> None:
    masked_store(i)


@row("maskmovq", feature="sse/mmx")
def maskmovq(i: Insn) -> None:
    masked_store(i)


def masked_store(i: Insn) -> None:
    """Stores the bytes whose mask byte is negative, each alone: its neighbours may be changed by
    others meanwhile.
    """
    h, (target, source, mask) = i.h, i.ops
    assert isinstance(target, Memory)
    chosen = sign_mask(mask.read(lanes(mask.bits, 8))).zext(64)
    value, offset = source.read(), target.offset
    target.place()  # all bytes must be writable, even those that are not written
    left = h.var(chosen)
    with h.Loop() as loop:
        loop.break_if(left.get().eq(0))
        n = h.intrinsic("llvm.cttz.i64", "i64", left.get(), h.false())
        byte = (value >> (n << 3).resize(value.bits)).trunc(8)
        h.store(target.linear(offset + n, 1, write=True), byte)
        left.set(left.get() & (left.get() - 1))
