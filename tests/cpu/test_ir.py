"""The value algebra: what it writes is compiled and called."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest

from anykvm.cpu.ir import PTR, Function, Module, Value
from anykvm.cpu.jit import callable_at, process_jit

_names = itertools.count()
U64 = ctypes.c_uint64
MASK = 2**64 - 1


def compiled(body: Callable[[Function, Value, Value], Value]) -> Callable[[int, int], int]:
    """`body` as a function of two 64-bit integers."""
    f = Function(f"ir_test_{next(_names)}", "i64", (("a", "i64"), ("b", "i64")))
    f.ret(body(f, *f.args))
    jit = process_jit()
    module = Module().add(f)
    jit._load([f.name], jit.compile_ir(module.render()))
    return callable_at(jit._addresses[f.name], U64, U64, U64)


def test_if_and_else() -> None:
    def body(f: Function, a: Value, b: Value) -> Value:
        out = f.var(f.const(0, 64))
        with f.If(a.ult(b)):
            out.set(1)
        with f.Else():
            out.set(2)
            with f.If(a.eq(b)):
                out.set(3)
        return out.get()

    call = compiled(body)
    assert [call(1, 2), call(2, 1), call(2, 2)] == [1, 2, 3]


def test_an_else_after_an_if_that_returns_or_ends_in_another() -> None:
    def body(f: Function, a: Value, b: Value) -> Value:
        with f.If(a.eq(0)):
            f.ret(b + 100)
        with f.Else():
            out = f.var(f.const(7, 64))
            with f.If(b.eq(0)):
                with f.If(a.eq(1)):
                    out.set(8)
                with f.Else():
                    out.set(9)
            with f.Else():
                out.set(10)
        return out.get()

    call = compiled(body)
    assert [call(0, 5), call(1, 0), call(2, 0), call(1, 1)] == [105, 8, 9, 10]


def test_else_must_follow_directly() -> None:
    f = Function("never_compiled", "void", (("a", "i64"),))
    with f.If(f.args[0].eq(0)):
        pass
    _ = f.args[0] + 1
    with pytest.raises(SyntaxError, match="Else must follow"), f.Else():
        pass


def test_loops_break_and_continue() -> None:
    """The sum of the odd numbers below `a`, but at most `b` turns."""

    def body(f: Function, a: Value, b: Value) -> Value:
        n, total, turns = (f.var(f.const(0, 64)) for _ in range(3))
        with f.Loop() as loop:
            loop.break_if(n.get().uge(a))
            turns.set(turns.get() + 1)
            with f.If(turns.get().ugt(b)):
                loop.break_()
            at = n.get()
            n.set(at + 1)
            with f.If((at & 1).eq(0)):
                loop.continue_()
            total.set(total.get() + at)
        return total.get()

    call = compiled(body)
    assert call(10, 100) == 1 + 3 + 5 + 7 + 9
    assert call(10, 4) == 1 + 3
    assert call(0, 5) == 0


def test_nested_loops() -> None:
    def body(f: Function, a: Value, b: Value) -> Value:
        total, i = f.var(f.const(0, 64)), f.var(f.const(0, 64))
        with f.Loop() as outer:
            outer.break_if(i.get().eq(a))
            j = f.var(f.const(0, 64))
            with f.Loop() as inner:
                inner.break_if(j.get().eq(b))
                j.set(j.get() + 1)
                total.set(total.get() + 1)
            i.set(i.get() + 1)
        return total.get()

    assert compiled(body)(7, 6) == 42


ARITHMETIC: list[tuple[Callable[[Value, Value], Value], Callable[[int, int], int]]] = [
    (lambda a, b: a + b, lambda a, b: a + b),
    (lambda a, b: a - b, lambda a, b: a - b),
    (lambda a, b: 5 - a, lambda a, b: 5 - a),
    (lambda a, b: a * b, lambda a, b: a * b),
    (lambda a, b: ~a ^ (b | 3), lambda a, b: ~a ^ (b | 3)),
    (lambda a, b: -a & b, lambda a, b: -a & b),
    (lambda a, b: (a << 3) | (b >> 5), lambda a, b: (a << 3) | (b >> 5)),
    (lambda a, b: a.udiv(b), lambda a, b: a // b),
    (lambda a, b: a.urem(b), lambda a, b: a % b),
    (lambda a, b: a.trunc(8).sext(64), lambda a, b: (a & 0xFF ^ 0x80) - 0x80),
    (lambda a, b: a.trunc(8).zext(64), lambda a, b: a & 0xFF),
    (lambda a, b: a.sar(9), lambda a, b: (a - (a >> 63 << 64)) >> 9),
    (lambda a, b: a.ult(b).select(a, b), min),
    (lambda a, b: a.slt(b).zext(64), lambda a, b: a - (a >> 63 << 64) < b - (b >> 63 << 64)),
    (lambda a, b: a.bit(63).select(1, b), lambda a, b: 1 if a >> 63 else b),
    (lambda a, b: a.resize(128).trunc(64) + 0, lambda a, b: a),
]


@pytest.mark.parametrize("n", range(len(ARITHMETIC)))
def test_arithmetic(n: int) -> None:
    emit, expected = ARITHMETIC[n]
    call = compiled(lambda f, a, b: emit(a, b))
    for a in (0, 1, 0x80, 0xFF, 1 << 63, MASK, 0x123456789ABCDEF0):
        for b in (1, 7, 1 << 63, MASK):
            assert call(a, b) == expected(a, b) & MASK


def test_vectors() -> None:
    def body(f: Function, a: Value, b: Value) -> Value:
        x, y = a.bitcast("<8 x i8>"), b.bitcast("<8 x i8>")
        greater = x.ugt(y)
        assert greater.type == "<8 x i1>"
        return (greater.select(x, y) + 1).bitcast("i64")

    assert compiled(body)(0x0102030405060708, 0x0807060504030201) == 0x0908070606070809


def test_memory() -> None:
    def body(f: Function, a: Value, b: Value) -> Value:
        at = a.to_ptr().offset(b)
        old = at.load("i16", volatile=True)
        at.store(old + 1)
        return at.offset(-2).load("i64")

    data = (ctypes.c_uint16 * 8)(1, 2, 0xFFFF, 4, 5)
    assert compiled(body)(ctypes.addressof(data), 4) == 0x0005_0004_0000_0002
    assert list(data)[:5] == [1, 2, 0, 4, 5]


def test_mistakes_are_found_when_generating() -> None:
    f = Function("never_compiled", "void", (("a", "i64"), ("p", PTR)))
    a, p = f.args
    with pytest.raises(TypeError, match="operands differ"):
        _ = a + f.const(1, 32)
    with pytest.raises(TypeError, match="expected an integer"):
        p.zext(64)
    with pytest.raises(TypeError, match=r"use f\.If"):
        bool(a.eq(0))
    with pytest.raises(TypeError, match="variable of type i64"):
        f.var(a).set(f.const(1, 8))


def test_what_follows_a_return_is_not_written() -> None:
    f = Function("never_compiled", "i64", (("a", "i64"),))
    f.ret(f.args[0])
    f.ret(f.args[0] + 1)
    assert f.render().count("ret i64") == 1
    assert f.terminated
