"""Guest memory that the host takes away under a filled TLB: every instruction stops in front of
itself and, when the memory is back, does what it does otherwise.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator

import pytest

from . import flow_cases, integer_cases, sse_cases
from .harness import Exit, Machine, machine
from .integer_cases import DATA
from .layout import SCRATCH, SCRATCH_SIZE, STACK, Case, Result

PAGE = 4096
NONE, READ, ALL = 0, 1, 3  # PROT_*
_libc = ctypes.CDLL(None, use_errno=True)


def protect(m: Machine, address: int, prot: int) -> None:
    page = ctypes.c_void_p(m.hva(address & ~(PAGE - 1)))
    assert _libc.mprotect(page, ctypes.c_size_t(PAGE), prot) == 0


def interrupted(m: Machine, case: Case, address: int, prot: int) -> tuple[Result, bool]:
    """The result where a page is not there at first, and whether that made a difference."""
    at, state = m.load(case, user=True), m.state
    protect(m, address, prot)
    reason = m.cpu.run()
    protect(m, address, ALL)
    faulted = reason is Exit.MEMORY_FAULT
    if faulted:
        assert state.fault_gpa == address & ~(PAGE - 1)
        assert at <= state.rip <= at + len(case.code)
        reason = m.cpu.run()
    assert reason is Exit.HLT
    return m._result(case, at + len(case.code), 64), faulted


def check(cases: Iterable[Case], address: int, prot: int) -> int:
    """How many of the cases met the fault; all have the result that they have without."""
    m, met = machine(), 0
    cases = list(cases)
    m.prepare([case.code for case in cases])
    for case in cases:
        m.write(SCRATCH, bytes(SCRATCH_SIZE))
        expected = m.execute(case, user=True)
        m.write(SCRATCH, bytes(SCRATCH_SIZE))
        found, faulted = interrupted(m, case, address, prot)
        assert found == expected, case.code.hex()
        met += faulted
    return met


def one_of_each(cases: Iterable[Case]) -> Iterator[Case]:
    """Cases with memory, one of each encoding but for its immediates."""
    seen: set[bytes] = set()
    for case in cases:
        if case.memory and case.code[:4] not in seen:
            seen.add(case.code[:4])
            yield case


@pytest.mark.parametrize("prot", [NONE, READ])
@pytest.mark.parametrize("family", integer_cases.FAMILIES)
def test_integer_instructions(family: str, prot: int) -> None:
    made = integer_cases.cases(list(integer_cases.FAMILIES[family]()), 1)
    assert check(one_of_each(case for _, case in made), DATA, prot) or prot == READ


@pytest.mark.parametrize("prot", [NONE, READ])
@pytest.mark.parametrize("address", [DATA, STACK - 8])
@pytest.mark.parametrize("family", flow_cases.FAMILIES)
def test_flow_and_strings(family: str, address: int, prot: int) -> None:
    check((case for _, case in flow_cases.FAMILIES[family](1)), address, prot)


@pytest.mark.parametrize("prot", [NONE, READ])
@pytest.mark.parametrize("feature", ["SSE", "SSE2", "SSE4_1"])
def test_vector_instructions(feature: str, prot: int) -> None:
    rng = random.Random(1)
    made = [sse_cases.case(line, rng) for line in sse_cases.lines(feature, rng, 1)]
    assert check(one_of_each(made), SCRATCH + 0x800, prot) or prot == READ


CRASH = """
import ctypes, faulthandler, signal, sys
from tests.cpu.harness import Exit, machine
from tests.cpu.layout import SCRATCH, Case
{before}
m = machine()
case = Case(bytes.fromhex("8b06"), dict(rsi=SCRATCH))
m.execute(case)
ctypes.CDLL(None).mprotect(ctypes.c_void_p(m.hva(SCRATCH)), ctypes.c_size_t(4096), 0)
m.load(case)
assert m.cpu.run() is Exit.MEMORY_FAULT
print("guest", flush=True)
{after}
"""
OTHERS = {
    "no handler": ("faulthandler.disable()", "ctypes.string_at(8)", -signal.SIGSEGV, b""),
    "faulthandler first": (
        "faulthandler.enable()",
        "ctypes.string_at(8)",
        -signal.SIGSEGV,
        b"Fatal",
    ),
    "a handler of Python's": (
        "signal.signal(signal.SIGSEGV, lambda *_: print('python', flush=True))",
        "signal.raise_signal(signal.SIGSEGV)",
        0,
        b"",
    ),
    "faulthandler later": (
        "machine(); faulthandler.enable(); machine().engine.create_cpu(1)",
        "ctypes.string_at(8)",
        -signal.SIGSEGV,
        b"Fatal",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_faults_that_are_not_the_guests_go_where_they_went_before(name: str) -> None:
    before, after, status, error = OTHERS[name]
    script = CRASH.format(before=before, after=after)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, env=os.environ
    )
    assert (done.returncode, b"guest" in done.stdout) == (status, True), done.stderr
    assert error in done.stderr
    assert (b"python" in done.stdout) == ("Python" in name)
