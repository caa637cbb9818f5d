"""Conversions between integers and floats of either size (SDM vol. 1, 10.4.3, 11.4.1.6, 11.4.4).

What does not fit becomes the integer indefinite and an invalid operation. Only the x86 intrinsics
promise that: LLVM's own conversions leave it undefined, and its rounding ones call a library.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.insn.sse_float import KINDS, write_float
from anykvm.cpu.insn.strictfp import convert, operate
from anykvm.cpu.insn.vector import (
    concat,
    half,
    insert,
    read_float,
)
from anykvm.cpu.ir import Value

HALF_INTS = "<2 x i32>"


# Scalars
@row("cvtsi2ss", feature="sse")
def cvtsi2ss(i: Insn) -> None:
    _integer_to_float(i, "float")


@row("cvtsi2sd", feature="sse2")
def cvtsi2sd(i: Insn) -> None:
    _integer_to_float(i, "double")


def _integer_to_float(i: Insn, element: str) -> None:
    a = i.ops[1].read()
    write_float(i, operate(i, (a,), lambda a: convert("sitofp", a, element)))


@row("cvtss2sd", feature="sse2")
def cvtss2sd(i: Insn) -> None:
    a = read_float(i.ops[1], "float", 1)
    write_float(i, operate(i, (a,), lambda a: convert("fpext", a, "double")))


@row("cvtsd2ss", feature="sse2")
def cvtsd2ss(i: Insn) -> None:
    a = read_float(i.ops[1], "double", 1)
    write_float(i, operate(i, (a,), lambda a: convert("fptrunc", a, "float")))


def float_to_integer(i: Insn, name: str) -> None:
    """CVTxx2SI rounds by MXCSR, CVTTxx2SI towards zero."""
    h, dst = i.h, i.ops[0]
    ending = "ss" if "ss2" in name else "sd"
    kind = KINDS[ending]
    a = read_float(i.ops[1], kind.element, 1)
    fn = f"llvm.x86.{kind.feature}.{name}{'64' if dst.bits == 64 else ''}"

    def compute(a: Value) -> Value:
        return h.intrinsic(fn, f"i{dst.bits}", insert(h.zero(kind.whole), 0, a))

    dst.write(operate(i, (a,), compute))


row("cvtss2si", "cvttss2si", feature="sse")(float_to_integer)
row("cvtsd2si", "cvttsd2si", feature="sse2")(float_to_integer)


# Vectors. What is half as long as a register lies in its low half; a destination's other half is
# cleared.
def _padded(i: Insn, value: Value) -> Value:
    """With as many zero elements above."""
    return concat(value, i.h.zero(value.type))


@row("cvtdq2ps", feature="sse2")
def cvtdq2ps(i: Insn) -> None:
    a = i.ops[1].read("<4 x i32>")
    write_float(i, operate(i, (a,), lambda a: convert("sitofp", a, "<4 x float>")))


@row("cvtdq2pd", feature="sse2")
def cvtdq2pd(i: Insn) -> None:
    """Exact: no exception to look for."""
    write_float(i, convert("sitofp", i.ops[1].read(HALF_INTS), "<2 x double>"))


@row("cvtps2pd", feature="sse2")
def cvtps2pd(i: Insn) -> None:
    a = read_float(i.ops[1], "float", 2)
    write_float(i, operate(i, (a,), lambda a: convert("fpext", a, "<2 x double>")))


@row("cvtpd2ps", feature="sse2")
def cvtpd2ps(i: Insn) -> None:
    a = read_float(i.ops[1], "double", 2)
    narrow = operate(i, (a,), lambda a: convert("fptrunc", a, "<2 x float>"))
    write_float(i, _padded(i, narrow))


@row("cvtps2dq", "cvttps2dq", feature="sse2")
def floats_to_integers(i: Insn, name: str) -> None:
    a = read_float(i.ops[1], "float", 4)
    i.ops[0].write(operate(i, (a,), lambda a: _intrinsic(name, a)))


@row("cvtpd2dq", "cvttpd2dq", feature="sse2")
def doubles_to_integers(i: Insn, name: str) -> None:
    """The intrinsic clears the high half itself."""
    a = read_float(i.ops[1], "double", 2)
    i.ops[0].write(operate(i, (a,), lambda a: _intrinsic(name, a)))


def _intrinsic(name: str, a: Value) -> Value:
    return a.f.intrinsic(f"llvm.x86.sse2.{name}", "<4 x i32>", a)


# With MMX registers, which the x87 loses even where the conversion then raises #XM
@row("cvtpi2ps", feature="sse")
def cvtpi2ps(i: Insn) -> None:
    """Into the low half; the high one stays."""
    dst, src = i.ops
    a = src.read(HALF_INTS)
    if not src.is_memory:
        i.take_x87_registers()
    narrow = operate(i, (a,), lambda a: convert("sitofp", a, "<2 x float>"))
    dst.write(insert(dst.read("<2 x i64>"), 0, narrow.bitcast("i64")))


@row("cvtpi2pd", feature="sse2")
def cvtpi2pd(i: Insn) -> None:
    write_float(i, convert("sitofp", i.ops[1].read(HALF_INTS), "<2 x double>"))


@row("cvtps2pi", "cvttps2pi", feature="sse")
def floats_to_mmx(i: Insn, name: str) -> None:
    a = read_float(i.ops[1], "float", 2)
    fn = name.replace("pi", "dq")
    i.take_x87_registers()
    i.ops[0].write(half(operate(i, (a,), lambda a: _intrinsic(fn, _padded(i, a)))))


@row("cvtpd2pi", "cvttpd2pi", feature="sse2")
def doubles_to_mmx(i: Insn, name: str) -> None:
    a = read_float(i.ops[1], "double", 2)
    fn = name.replace("pi", "dq")
    i.take_x87_registers()
    i.ops[0].write(half(operate(i, (a,), lambda a: _intrinsic(fn, a))))
