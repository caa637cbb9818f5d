"""RFLAGS to the lazy form and back, in Python and in native code."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from anykvm.cpu.flags import read_rflags, write_rflags
from anykvm.cpu.guest import Routine
from anykvm.cpu.ir import Module, Value
from anykvm.cpu.jit import callable_at, process_jit
from anykvm.cpu.state import STATUS_FLAGS, Flag, State

U64, PTR = ctypes.c_uint64, ctypes.c_void_p
WORD = st.integers(0, 2**22 - 1)
CARRY, ZERO, SIGN, OVERFLOW, PARITY = 1, 1 << 6, 1 << 7, 1 << 11, 1 << 2


def _call(name: str, body: Callable[[Routine], Value]) -> Callable[[State, int, int, int], int]:
    f = Routine(name, "i64", ("a", "i64"), ("b", "i64"), ("r", "i64"))
    f.ret(body(f))
    jit = process_jit()
    jit._load([name], jit.compile_ir(Module().add(f).render()))
    function = callable_at(jit._addresses[name], U64, PTR, U64, U64, U64)
    return lambda state, a, b, r: function(ctypes.addressof(state), a, b, r)


@cache
def _native(name: str) -> Callable[[State, int, int, int], int]:
    def write(f: Routine) -> Value:
        f.flags.write_status(f["a"])
        return f.flags.read()

    def conditions(f: Routine) -> Value:
        bits = f.const(0, 64)
        for code in range(16):
            bits = bits | (f.flags.condition(code).zext(64) << code)
        return bits

    def change(f: Routine) -> Value:
        f.flags.set_cf(f["a"].bit(0))
        f.flags.set_zf(f["b"].bit(0))
        return f.flags.read()

    def add(f: Routine) -> Value:
        a, b, r = (f[n].trunc(8) for n in "abr")
        f.flags.add(a, b, r)
        return f.flags.read()

    def subtract(f: Routine) -> Value:
        a, b, r = (f[n].trunc(8) for n in "abr")
        f.flags.sub(a, b, r)
        return f.flags.read()

    bodies = {
        "write": write,
        "conditions": conditions,
        "change": change,
        "add": add,
        "sub": subtract,
    }
    return _call(f"flags_test_{name}", bodies[name])


@given(WORD)
def test_what_is_written_is_read(value: int) -> None:
    state = State()
    write_rflags(state, value)
    assert read_rflags(state) == value | 2
    assert not state.flags & STATUS_FLAGS


@given(WORD, WORD)
def test_native_code_agrees(before: int, value: int) -> None:
    state = State()
    write_rflags(state, before)
    read = _native("write")(state, value, 0, 0)
    expected = before & ~STATUS_FLAGS | value & STATUS_FLAGS | 2
    assert read == read_rflags(state) == expected


@given(WORD)
def test_conditions(value: int) -> None:
    state = State()
    write_rflags(state, value)
    c, z, s, o, p = (bool(value & f) for f in (CARRY, ZERO, SIGN, OVERFLOW, PARITY))
    true = (o, c, z, c or z, s, p, s != o, z or s != o)
    expected = sum((true[n >> 1] ^ (n & 1)) << n for n in range(16))
    assert _native("conditions")(state, 0, 0, 0) == expected


@given(WORD, st.booleans(), st.booleans())
def test_changing_one_flag_keeps_the_others(value: int, carry: bool, zero: bool) -> None:
    state = State()
    write_rflags(state, value)
    read = _native("change")(state, carry, zero, 0)
    expected = value & ~(Flag.CF | Flag.ZF) | carry * Flag.CF | zero * Flag.ZF | 2
    assert read == expected


def _expected(a: int, b: int, carry: int, *, subtract: bool) -> int:
    """The status flags of an 8-bit addition or subtraction, after SDM vol. 1, 3.4.3.1."""
    wide = a - b - carry if subtract else a + b + carry
    low = (a & 15) - (b & 15) - carry if subtract else (a & 15) + (b & 15) + carry
    r = wide & 0xFF
    signed = [v - 256 if v & 0x80 else v for v in (a, b)]
    exact = signed[0] - signed[1] - carry if subtract else sum(signed) + carry
    return (
        (wide != r) * Flag.CF
        | (r.bit_count() % 2 == 0) * Flag.PF
        | (not 0 <= low <= 15) * Flag.AF
        | (r == 0) * Flag.ZF
        | (r >> 7) * Flag.SF
        | (not -128 <= exact <= 127) * Flag.OF
        | 2
    )


def test_every_8_bit_sum_and_difference() -> None:
    state = State()
    write_rflags(state, 2)
    add, sub = _native("add"), _native("sub")
    for a in range(0, 256, 3):
        for b in range(256):
            for carry in (0, 1):
                assert add(state, a, b, a + b + carry) == _expected(a, b, carry, subtract=False)
                assert sub(state, a, b, a - b - carry) == _expected(a, b, carry, subtract=True)
