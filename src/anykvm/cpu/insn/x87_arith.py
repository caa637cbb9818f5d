"""x87 arithmetic and comparison (SDM vol. 1, 8.3.5 to 8.3.8): add, subtract, multiply, divide, compare, remainder, rounding."""

from __future__ import annotations

from anykvm.cpu.forms import Insn
from anykvm.cpu.insn.x87 import (
    C_ALL,
    Operation,
    memory_operand,
    operate,
    operations,
    stack_operand,
    x87,
)

ARITHMETIC = ("add", "mul", "sub", "subr", "div", "divr")
COMPARISONS = ("fcom", "fcomp", "fucom", "fucomp")


@x87(*(f"f{a}" for a in ARITHMETIC))
def arithmetic(i: Insn, name: str) -> None:
    """ST(0) with memory, or with ST(n) in either direction."""
    if memory_operand(i):
        operate(i, Operation(f"{name} {{m}}"))
    elif (n := stack_operand(i, 0)) == 0:
        operate(i, Operation(f"{name} st(0), st({{r}})", reads=(0, stack_operand(i))))
    else:
        operate(i, Operation(f"{name} st({{r}}), st(0)", reads=(0, n), results=(n,)))


@x87(*(f"f{a}p" for a in ARITHMETIC))
def arithmetic_pop(i: Insn, name: str) -> None:
    n = stack_operand(i, 0)
    operate(i, Operation(f"{name} st({{r}}), st(0)", reads=(0, n), results=(n,), pops=1))


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
    operate(
        i, Operation(f"{name} {{m}}", results=(), pops=name.count("p"), conditions=C_ALL)
    )


@x87("fcomi", "fcomip", "fucomi", "fucomip")
def compare_to_flags(i: Insn, name: str) -> None:
    text = ("fcompi" if name == "fcomip" else "fucompi" if name == "fucomip" else name)
    operate(
        i,
        Operation(
            f"{text} st(0), st({{r}})",
            reads=(0, stack_operand(i)),
            results=(),
            pops=name.count("p"),
            gives_flags=True,
        ),
    )


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
