"""Shifts and rotates (SDM vol. 1, 7.3.6). A count of zero changes no flag."""

from __future__ import annotations

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.insn.integer import RCX, read_gpr
from anykvm.cpu.ir import Value


def _count(i: Insn, position: int = -1) -> Value:
    """The masked count, as wide as the operand; without an operand for it, CL."""
    n = i.bits
    op = i.ops[position]
    if op.spec == "k":
        return i.h.const(1, n)
    raw = op.read().resize(n) if op.spec == "i" else read_gpr(i, RCX, 8).resize(n)
    return raw & (63 if n == 64 else 31)


def _top(value: Value) -> Value:
    return value.slt(0)


@row("shl", "shr", "sar", "sal")
def shift(i: Insn, name: str) -> None:
    h, n = i.h, i.bits
    count = _count(i)
    a = i.ops[0].read()
    wide = 64
    amount = count.zext(wide)
    x = a.sext(wide) if name == "sar" else a.zext(wide)
    if name in ("shl", "sal"):
        # Counts stay below 32 for operands narrower than 64 bits, so 64 bits hold the last bit
        # shifted out.
        moved = x << amount
        result = moved.trunc(n)
        cf = (x << (amount - 1)).bit(n - 1)
        of = cf ^ _top(result)
    else:
        moved = x.sar(amount) if name == "sar" else x >> amount
        result = moved.trunc(n)
        last = x.sar(amount - 1) if name == "sar" else x >> (amount - 1)
        cf = last.trunc(1)
        of = h.false() if name == "sar" else _top(a)
    i.ops[0].write(result)
    if i.ops[-1].spec == "k":
        h.flags.result(result, cf, of)
        return
    with h.If(count.ne(0)):
        h.flags.result(result, cf, of)


@row("rol", "ror")
def rotate(i: Insn, name: str) -> None:
    h, n = i.h, i.bits
    masked = _count(i)
    a = i.ops[0].read()
    fn = f"llvm.fsh{'l' if name == 'rol' else 'r'}.i{n}"
    result = h.intrinsic(fn, f"i{n}", a, a, masked)
    i.ops[0].write(result)
    if name == "rol":
        cf = result.trunc(1)
        of = cf ^ _top(result)
    else:
        cf = _top(result)
        of = cf ^ _top(result << 1)
    with h.If(masked.ne(0)):
        h.flags.carry_overflow(cf, of)


@row("rcl", "rcr")
def rotate_through_carry(i: Insn, name: str) -> None:
    """A rotation of n + 1 bits, the carry being the topmost."""
    h, n = i.h, i.bits
    masked = _count(i)
    w = 128 if n == 64 else 64
    count = masked.zext(w).urem(n + 1)
    a = i.ops[0].read()
    whole = a.zext(w) | (h.flags.cf().zext(w) << n)
    back = h.const(n + 1, w) - count
    left, right = (count, back) if name == "rcl" else (back, count)
    turned = (whole << left) | (whole >> right)
    result = turned.trunc(n)
    cf = (turned >> n).trunc(1)
    of = _top(result) ^ (cf if name == "rcl" else _top(result << 1))
    i.ops[0].write(result)
    with h.If(masked.ne(0)):
        h.flags.carry_overflow(cf, of)


@row("shld", "shrd")
def shift_double(i: Insn, name: str) -> None:
    """Counts beyond a 16-bit operand's width give an undefined result; here the double word shifts
    on.
    """
    h, n = i.h, i.bits
    count = _count(i)
    a, b = i.ops[0].read(), i.ops[1].read()
    w = 128 if n == 64 else 64
    amount = count.zext(w)
    if name == "shld":
        both = (a.zext(w) << n) | b.zext(w)
        if n == 16:
            both = (both << 16) | a.zext(w)
        top = 2 * n if n == 16 else n
        result = ((both << amount) >> top).trunc(n)
        cf = ((both << (amount - 1)) >> (top + n - 1)).trunc(1)
    else:
        both = (b.zext(w) << n) | a.zext(w)
        if n == 16:
            both = both | (a.zext(w) << 32)
        result = (both >> amount).trunc(n)
        cf = (both >> (amount - 1)).trunc(1)
    i.ops[0].write(result)
    with h.If(count.ne(0)):
        h.flags.result(result, cf, _top(a) ^ _top(result))
