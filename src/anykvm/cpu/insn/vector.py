"""Vectors in the value algebra: their types, lanes, shuffles, and LLVM's vector intrinsics.

Nothing here knows how long a vector is, so one instruction's meaning serves MMX, XMM and wider
registers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from anykvm.cpu.forms import Operand, Register
from anykvm.cpu.ir import Value

FLOATS = {32: "float", 64: "double"}
ELEMENT_BITS = {"float": 32, "double": 64}


def vector(count: int, element: str) -> str:
    return f"<{count} x {element}>"


def lanes(bits: int, element: int) -> str:
    """The integer vector of `bits` in all with elements of `element` bits."""
    return vector(bits // element, f"i{element}")


def parts(type_: str) -> tuple[int, str]:
    """Count and element of a vector type."""
    count, element = type_[1:-1].split(" x ")
    return int(count), element


def count_of(v: Value) -> int:
    return parts(v.type)[0]


def element_bits(v: Value) -> int:
    """Width of an element of a vector, or of a scalar."""
    element = parts(v.type)[1] if v.type[0] == "<" else v.type
    return ELEMENT_BITS.get(element) or int(element[1:])


def suffix(type_: str) -> str:
    """As a type stands in the name of an overloaded intrinsic: v4i32, f64."""
    if type_[0] == "<":
        count, element = parts(type_)
        return f"v{count}{suffix(element)}"
    return {"float": "f32", "double": "f64"}.get(type_, type_)


def intrinsic(name: str, *args: Value) -> Value:
    """`llvm.<name>` overloaded on the type of its first argument, which is also its result's."""
    first = args[0]
    return first.f.intrinsic(f"llvm.{name}.{suffix(first.type)}", first.type, *args)


def resize(v: Value, op: str, bits: int) -> Value:
    """Each element extended (`zext`, `sext`) or cut (`trunc`) to `bits`."""
    return v.cast(op, vector(count_of(v), f"i{bits}"))


def shuffle(a: Value, b: Value | None, indices: Iterable[int]) -> Value:
    """Elements of `a`, then of `b`, by number."""
    chosen = list(indices)
    other = "poison" if b is None else b.text
    mask = ", ".join(f"i32 {n}" for n in chosen)
    return a.f.emit(
        f"shufflevector {a.type} {a.text}, {a.type} {other}, <{len(chosen)} x i32> <{mask}>",
        vector(len(chosen), parts(a.type)[1]),
    )


def half(v: Value, high: bool = False) -> Value:
    """The lower or upper half of the elements."""
    n = count_of(v) // 2
    return shuffle(v, None, range(n * high, n * high + n))


def concat(a: Value, b: Value) -> Value:
    return shuffle(a, b, range(2 * count_of(a)))


def extract(v: Value, n: int) -> Value:
    return v.f.emit(f"extractelement {v.type} {v.text}, i32 {n}", parts(v.type)[1])


def insert(v: Value, n: int, element: Value) -> Value:
    return v.f.emit(
        f"insertelement {v.type} {v.text}, {element.type} {element.text}, i32 {n}", v.type
    )


def gather(elements: Sequence[Value]) -> Value:
    """A vector of these scalars."""
    first = elements[0]
    v = Value(first.f, "poison", vector(len(elements), first.type))
    for n, element in enumerate(elements):
        v = insert(v, n, element)
    return v


def splat(v: Value, count: int) -> Value:
    """A vector of `count` times this scalar."""
    return shuffle(gather([v]), None, [0] * count)


def blend(a: Value, b: Value, take_b: Sequence[bool]) -> Value:
    """Elements of `a`, or of `b` where told."""
    n = count_of(a)
    return shuffle(a, b, (k + n if take else k for k, take in enumerate(take_b)))


def sign_mask(v: Value) -> Value:
    """One bit an element: its sign."""
    count = count_of(v)
    integers = v.bitcast(lanes(count * element_bits(v), element_bits(v)))
    return integers.slt(0).bitcast(f"i{count}")


def clamp(v: Value, low: int, high: int) -> Value:
    """Signed elements kept between `low` and `high`."""
    f = v.f
    return intrinsic("smin", intrinsic("smax", v, f.splat(v.type, low)), f.splat(v.type, high))


def saturate(v: Value, bits: int, *, unsigned: bool) -> Value:
    """Signed elements cut to `bits`, at the limits of a signed or an unsigned number."""
    low, high = (0, 2**bits - 1) if unsigned else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return resize(clamp(v, low, high), "trunc", bits)


def read(op: Operand, bits: int, element: int) -> Value:
    """An operand as an integer vector of `bits`; what a narrower operand in memory leaves open is
    zero.
    """
    type_ = lanes(bits, element)
    if op.bits >= bits:
        return op.read(type_)
    return op.read().zext(bits).bitcast(type_)


def read_float(op: Operand, element: str, count: int) -> Value:
    """An operand as `count` floats. Volatile, so that LLVM does not swap the operands of a sum to
    fold a load into it: of two NaNs the first one is the result.
    """
    type_ = element if count == 1 else vector(count, element)
    return op.ptr.load(type_, volatile=True) if isinstance(op, Register) else op.read(type_)
