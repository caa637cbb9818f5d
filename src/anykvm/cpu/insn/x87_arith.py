"""x87 arithmetic and comparison (SDM vol. 1, 8.3.5 to 8.3.8): add, subtract, multiply, divide,
compare, remainder, rounding."""

from __future__ import annotations

from anykvm.cpu.forms import Insn
from anykvm.cpu.insn.x87 import (
    C1,
    C_ALL,
    Operation,
    Shortcut,
    Stack,
    memory_operand,
    operate,
    operations,
    stack_operand,
    x87,
)

ARITHMETIC = ("add", "mul", "sub", "subr", "div", "divr")
COMPARISONS = ("fcom", "fcomp", "fucom", "fucomp")


EXPONENT = 0x7FFF


def _infinity(i: Insn, op: Operation, stack: Stack) -> None:
    """What has an infinity in it takes processors a hundred times longer than a number does, so
    sums and products with one do not go to the x87 unit.
    """
    h = i.h
    registers = [stack.at(n) for n in (0, op.reads[-1])]
    below = [~r.offset(8).load("i16").zext(32) & EXPONENT for r in registers]
    with h.If(below[0].eq(0) | below[1].eq(0)):
        product = h.const(int(op.text.startswith("fmul")), 1)
        result = stack.at(op.results[0])
        known = h.entry("x87_infinity").call("i1", h.cpu, *registers, result, product)
        with h.If(known):
            stack.commit(op, stack.sw & ~C1)
            h.next()


def _shortcut(name: str) -> Shortcut | None:
    return _infinity if name.rstrip("p") in ("fadd", "fmul") else None


@x87(*(f"f{a}" for a in ARITHMETIC))
def arithmetic(i: Insn, name: str) -> None:
    """ST(0) with memory, or with ST(n) in either direction."""
    if memory_operand(i):
        operate(i, Operation(f"{name} {{m}}"))
    elif (n := stack_operand(i, 0)) == 0:
        op = Operation(f"{name} st(0), st({{r}})", reads=(0, stack_operand(i)))
        operate(i, op, _shortcut(name))
    else:
        op = Operation(f"{name} st({{r}}), st(0)", reads=(0, n), results=(n,))
        operate(i, op, _shortcut(name))


@x87(*(f"f{a}p" for a in ARITHMETIC))
def arithmetic_pop(i: Insn, name: str) -> None:
    n = stack_operand(i, 0)
    op = Operation(f"{name} st({{r}}), st(0)", reads=(0, n), results=(n,), pops=1)
    operate(i, op, _shortcut(name))


@x87(*(f"fi{a}" for a in ARITHMETIC))
def arithmetic_integer(i: Insn, name: str) -> None:
    operate(i, Operation(f"{name} {{m}}"))


@x87(*COMPARISONS)
def compare(i: Insn, name: str) -> None:
    pops = name.count("p")
    if memory_operand(i):
        op = Operation(f"{name} {{m}}", results=(), pops=pops, conditions=C_ALL)
    else:
        reads = (0, stack_operand(i))
        op = Operation(f"{name} st({{r}})", reads, results=(), pops=pops, conditions=C_ALL)
    operate(i, op)


@x87("ficom", "ficomp")
def compare_integer(i: Insn, name: str) -> None:
    operate(i, Operation(f"{name} {{m}}", results=(), pops=name.count("p"), conditions=C_ALL))


@x87("fcomi", "fcomip", "fucomi", "fucomip")
def compare_to_flags(i: Insn, name: str) -> None:
    """LLVM spells the popping ones as no manual does."""
    text = name.replace("comip", "compi")
    reads = (0, stack_operand(i))
    op = Operation(f"{text} st(0), st({{r}})", reads, (), pops=name.count("p"), gives_flags=True)
    operate(i, op)


operations(
    {
        "fcompp": Operation("fcompp", (0, 1), (), pops=2, conditions=C_ALL),
        "fucompp": Operation("fucompp", (0, 1), (), pops=2, conditions=C_ALL),
        "ftst": Operation("ftst", results=(), conditions=C_ALL),
        "fxam": Operation("fxam", results=(), conditions=C_ALL),
        "fchs": Operation("fchs"),
        "fabs": Operation("fabs"),
        "fsqrt": Operation("fsqrt"),
        "frndint": Operation("frndint"),
        "fscale": Operation("fscale", (0, 1)),
        "fxtract": Operation("fxtract", results=(-1, 0), push=True),
        "fprem": Operation("fprem", (0, 1), conditions=C_ALL),
        "fprem1": Operation("fprem1", (0, 1), conditions=C_ALL),
    }
)
