"""x87 data transfer (SDM vol. 1, 8.3.3 and 8.3.4): loads, stores, exchange, conditional moves,
constants."""

from __future__ import annotations

from collections.abc import Callable

from anykvm.cpu.forms import Insn
from anykvm.cpu.fpu_image import get, put
from anykvm.cpu.insn.x87 import (
    C1,
    NEW,
    Operation,
    Stack,
    memory_operand,
    note_pointers,
    operate,
    operations,
    require_no_pending,
    stack_operand,
    whole,
    x87,
)

CONSTANTS = ("fld1", "fldl2t", "fldl2e", "fldpi", "fldlg2", "fldln2", "fldz")
CONDITIONS = ("b", "e", "be", "u", "nb", "ne", "nbe", "nu")

operations({name: Operation(name, (), (NEW,), push=True) for name in CONSTANTS})


def _load(i: Insn, name: str) -> None:
    operate(i, Operation(f"{name} {{m}}", (), (NEW,), push=True))


def _store(i: Insn, name: str) -> None:
    operate(i, Operation(f"{name} {{m}}", results=(), pops=int(name.endswith("p"))))


x87("fild", "fbld")(_load)
x87("fist", "fistp", "fisttp", "fbstp")(_store)


def _moving(i: Insn, op: Operation, move: Callable[[Stack], None]) -> None:
    """An operation that only moves registers: its usual case needs no x87 unit."""
    require_no_pending(i)
    note_pointers(i)
    stack = Stack(i)
    with i.h.If(stack.legal(op.reads, push=op.push)):
        move(stack)
        stack.commit(op, stack.sw & ~C1)
        i.h.next()
    whole(i, op, None)


def _copy(i: Insn, op: Operation, source: int, target: int) -> None:
    def move(stack: Stack) -> None:
        put(stack.at(target), get(stack.at(source)))

    _moving(i, op, move)


@x87("fld")
def fld(i: Insn, name: str) -> None:
    if memory_operand(i):
        _load(i, name)
    else:
        n = stack_operand(i)
        _copy(i, Operation("fld st({r})", (n,), (NEW,), push=True), n, NEW)


@x87("fst", "fstp", "fstpnce")
def fst(i: Insn, name: str) -> None:
    if memory_operand(i):
        _store(i, name)
        return
    n, pops = stack_operand(i, 0), int(name != "fst")
    _copy(i, Operation(f"{name[:4]} st({n})", (0,), (n,), pops=pops), 0, n)


@x87("fxch")
def fxch(i: Insn, name: str) -> None:
    n = stack_operand(i)

    def move(stack: Stack) -> None:
        first, second = stack.at(0), stack.at(n)
        a, b = get(first), get(second)
        put(first, b)
        put(second, a)

    _moving(i, Operation("fxch st({r})", (0, n), (0, n)), move)


@x87(*(f"fcmov{c}" for c in CONDITIONS))
def fcmov(i: Insn, name: str) -> None:
    reads = (0, stack_operand(i))
    op = Operation(f"{name} st(0), st({{r}})", reads, conditions=0, takes_flags=True)
    operate(i, op)
