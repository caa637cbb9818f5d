"""Floating-point arithmetic and comparison on XMM registers, and MXCSR (SDM vol. 1, 10.4.1, 10.4.6,
11.4.1, 12.3, 12.8).

RCPPS and RSQRTPS are approximations whose bits differ between processors; here they are the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.guest import GP
from anykvm.cpu.insn.sse_shuffle import control, fields
from anykvm.cpu.insn.strictfp import arithmetic, compare, operate
from anykvm.cpu.insn.vector import (
    FLOATS,
    blend,
    extract,
    gather,
    insert,
    read_float,
    shuffle,
    vector,
)
from anykvm.cpu.ir import Value
from anykvm.cpu.mxcsr import WRITABLE, read_mxcsr, write_mxcsr


@dataclass(frozen=True)
class Kind:
    """What the suffix of a mnemonic says: elements of which type, how many, and the feature that
    introduced it.
    """

    element: str
    count: int
    feature: str

    @property
    def whole(self) -> str:
        """The type of a register full of such elements."""
        return vector(128 // (32 if self.element == "float" else 64), self.element)


KINDS = {
    "ps": Kind("float", 4, "sse"),
    "ss": Kind("float", 1, "sse"),
    "pd": Kind("double", 2, "sse2"),
    "sd": Kind("double", 1, "sse2"),
}


def write_float(i: Insn, value: Value) -> None:
    """Writes the destination; the rest of it stays where `value` is a scalar."""
    dst = i.ops[0]
    if value.type[0] != "<":
        whole = vector(128 // (32 if value.type == "float" else 64), value.type)
        value = insert(dst.read(whole), 0, value)
    dst.write(value)


# Operations of one and of two sources
def _lesser(predicate: str) -> Callable[[Value, Value], Value]:
    """MIN and MAX: the second source unless the comparison holds, so where one is a NaN or both are
    zeros.
    """
    return lambda a, b: compare(predicate, a, b, signaling=True).select(a, b)


BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "add": lambda a, b: arithmetic("fadd", a, b),
    "sub": lambda a, b: arithmetic("fsub", a, b),
    "mul": lambda a, b: arithmetic("fmul", a, b),
    "div": lambda a, b: arithmetic("fdiv", a, b),
    "min": _lesser("olt"),
    "max": _lesser("ogt"),
}


def binary(i: Insn, name: str, kind: Kind) -> None:
    a, b = (read_float(op, kind.element, kind.count) for op in i.ops)
    write_float(i, operate(i, (a, b), BINARY[name]))


def square_root(i: Insn, kind: Kind) -> None:
    a = read_float(i.ops[1], kind.element, kind.count)
    write_float(i, operate(i, (a,), lambda a: arithmetic("sqrt", a)))


for ending, kind in KINDS.items():
    for name in BINARY:
        row(name + ending, feature=kind.feature)(
            lambda i, name=name, kind=kind: binary(i, name, kind)
        )
    row("sqrt" + ending, feature=kind.feature)(lambda i, kind=kind: square_root(i, kind))


@row("rcpps", "rsqrtps", feature="sse")
def approximate(i: Insn, name: str) -> None:
    """Raises no exception and knows no rounding, which no operation of LLVM's own does."""
    a = i.ops[1].read("<4 x float>")
    i.ops[0].write(i.h.intrinsic(f"llvm.x86.sse.{name[:-2]}.ps", a.type, a))


@row("rcpss", "rsqrtss", feature="sse")
def approximate_scalar(i: Insn, name: str) -> None:
    a = insert(i.h.zero("<4 x float>"), 0, i.ops[1].read("float"))
    write_float(i, extract(i.h.intrinsic(f"llvm.x86.sse.{name[:-2]}.ss", a.type, a), 0))


# Comparison
PREDICATES = (
    ("oeq", False),
    ("olt", True),
    ("ole", True),
    ("uno", False),
    ("une", False),
    ("uge", True),
    ("ugt", True),
    ("ord", False),
)


def compare_to_mask(i: Insn, kind: Kind) -> None:
    """All ones where it holds. Bits 2:0 of the immediate say what; above them there is nothing
    outside AVX.
    """
    predicate, signaling = PREDICATES[control(i) & 7]
    a, b = (read_float(op, kind.element, kind.count) for op in i.ops[:2])
    bits = 32 if kind.element == "float" else 64
    type_ = f"i{bits}" if kind.count == 1 else vector(kind.count, f"i{bits}")

    def compute(a: Value, b: Value) -> Value:
        return compare(predicate, a, b, signaling=signaling).cast("sext", type_)

    mask = operate(i, (a, b), compute)
    write_float(i, mask.bitcast(FLOATS[bits]) if kind.count == 1 else mask)


for ending, kind in KINDS.items():
    row("cmp" + ending, feature=kind.feature, constant=True)(
        lambda i, kind=kind: compare_to_mask(i, kind)
    )


def compare_to_flags(i: Insn, element: str, *, signaling: bool) -> None:
    """ZF, PF and CF: all set where unordered; OF, SF and AF cleared."""
    h = i.h
    a, b = (read_float(op, element, 1) for op in i.ops)

    def compute(a: Value, b: Value) -> Value:
        unordered = compare("uno", a, b, signaling=signaling)
        equal, below = (
            h.emit(f"fcmp {p} {a.type} {a.text}, {b.text}", "i1") for p in ("ueq", "ult")
        )
        return below.zext(8) | (unordered.zext(8) << 1) | (equal.zext(8) << 2)

    seen = operate(i, (a, b), compute)
    no = h.false()
    h.flags.pack(seen.bit(0), seen.bit(1), no, seen.bit(2), no, no)


for ending in ("ss", "sd"):
    kind = KINDS[ending]
    for name, signaling in (("comi", True), ("ucomi", False)):
        row(name + ending, feature=kind.feature, writes=())(
            lambda i, kind=kind, signaling=signaling: compare_to_flags(
                i, kind.element, signaling=signaling
            )
        )


# SSE3 and SSE4.1
HORIZONTAL = {"haddps": "fadd", "hsubps": "fsub", "haddpd": "fadd", "hsubpd": "fsub"}


@row(*HORIZONTAL, feature="sse3")
def horizontal(i: Insn, name: str) -> None:
    kind = KINDS[name[-2:]]
    a, b = (read_float(op, kind.element, kind.count) for op in i.ops)
    n = 2 * kind.count
    even, odd = shuffle(a, b, range(0, n, 2)), shuffle(a, b, range(1, n, 2))
    write_float(i, operate(i, (even, odd), lambda a, b: arithmetic(HORIZONTAL[name], a, b)))


@row("addsubps", "addsubpd", feature="sse3")
def add_subtract(i: Insn, name: str) -> None:
    """Element by element, for an operation on one that is not used would raise its flags too."""
    kind = KINDS[name[-2:]]

    def compute(a: Value, b: Value) -> Value:
        ops = ("fsub", "fadd") * (kind.count // 2)
        return gather([arithmetic(op, extract(a, n), extract(b, n)) for n, op in enumerate(ops)])

    a, b = (read_float(op, kind.element, kind.count) for op in i.ops)
    write_float(i, operate(i, (a, b), compute))


@row("roundps", "roundpd", "roundss", "roundsd", feature="sse4.1", constant=True)
def round_(i: Insn, name: str) -> None:
    """The mode in bits 2:0 of the immediate (bit 2: MXCSR's), no inexact flag with bit 3: only the
    host's own has all four.
    """
    kind = KINDS[name[-2:]]
    h, mode = i.h, control(i) & 15
    a = read_float(i.ops[1], kind.element, kind.count)

    def compute(a: Value) -> Value:
        constant = h.const(mode, 32)
        if kind.count > 1:
            return h.intrinsic(f"llvm.x86.sse41.round.{name[-2:]}", a.type, a, constant)
        whole = insert(h.zero(kind.whole), 0, a)
        fn = f"llvm.x86.sse41.round.{name[-2:]}"
        return extract(h.intrinsic(fn, whole.type, whole, whole, constant), 0)

    write_float(i, operate(i, (a,), compute))


@row("dpps", "dppd", feature="sse4.1", constant=True)
def dot_product(i: Insn, name: str) -> None:
    """The immediate's high half chooses what is multiplied, its low half where the sum goes;
    elsewhere zeros.

    Each element adds up its own sum, in an order that matters where several terms are NaNs: that of
    Intel's processors.
    """
    kind, c = KINDS[name[-2:]], control(i)
    n, zeros = kind.count, i.h.zero(kind.whole)
    used, placed = fields(c >> 4, n, 1), fields(c, n, 1)

    def chosen(v: Value, bits: list[int]) -> Value:
        return blend(zeros, v, [bool(bit) for bit in bits])

    a, b = (chosen(read_float(op, kind.element, n), used) for op in i.ops[:2])
    total = operate(i, (a, b), BINARY["mul"])
    distance = 1
    while distance < n:
        other = shuffle(total, None, (k ^ distance for k in range(n)))
        swapped = name == "dpps" and distance == 1
        terms = (other, total) if swapped else (total, other)
        total = operate(i, terms, BINARY["add"])
        distance *= 2
    i.ops[0].write(chosen(total, placed))


# MXCSR
@row("ldmxcsr", writes=(), feature="sse")
def ldmxcsr(i: Insn) -> None:
    value = i.ops[0].read()
    i.h.raise_if((value & ~WRITABLE).ne(0), GP, 0)
    write_mxcsr(i.h, value)


@row("stmxcsr", feature="sse")
def stmxcsr(i: Insn) -> None:
    i.ops[0].write(read_mxcsr(i.h))
