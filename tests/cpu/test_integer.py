"""The integer instruction set against the host's processor, and that no row of it is forgotten.

`tools/difftest.py` runs the same with more values and other seeds.
"""

from __future__ import annotations

import inspect

import pytest

from anykvm.cpu.forms import ROWS

from . import flow_cases, integer_cases
from .differential import compare
from .harness import machine

EACH = 3
ROOMS = ("integer", "shifts", "bits", "stack", "control", "strings")
# Rows with tests of their own: other modes, devices, the translator's own records
ELSEWHERE = frozenset(
    """aaa aad aam aas daa das bound pusha popa jcxz link missing seek dropped poll assist into
    device_not_available rdtsc rdtscp prefetch prefetchw reservednop endbr32""".split()
)


@pytest.mark.parametrize("family", integer_cases.FAMILIES)
def test_computation(family: str) -> None:
    lines = list(integer_cases.FAMILIES[family]())
    made = integer_cases.cases(lines, EACH)
    line_of = {id(case): line for line, case in made}
    wrong = compare(
        [case for _, case in made],
        lambda case, result: integer_cases.undefined_flags(line_of[id(case)], case, result),
        lambda case: line_of[id(case)].text,
    )
    assert not wrong, "\n".join(wrong[:10])


@pytest.mark.parametrize("family", flow_cases.FAMILIES)
def test_flow(family: str) -> None:
    made = list(flow_cases.FAMILIES[family](EACH))
    name_of = {id(case): name for name, case in made}
    wrong = compare([case for _, case in made], name=lambda case: name_of[id(case)])
    assert not wrong, "\n".join(wrong[:10])


def test_every_row_is_compared() -> None:
    """Each mnemonic of the integer rooms is in a case above, or named as tested elsewhere."""
    codes = {c.code for _, c in integer_cases.all_cases(1)}
    codes |= {c.code for f in flow_cases.FAMILIES.values() for _, c in f(1)}
    seen = {form.name for form in machine().prepare(codes)}
    rows = set()
    for name, row in ROWS.items():
        function = inspect.getclosurevars(row.semantics).nonlocals["function"]
        if function.__module__.rpartition(".")[2] in ROOMS:
            rows.add(name)
    assert rows - seen - ELSEWHERE == set()
    assert seen & ELSEWHERE - {"assist"} == set(), "compared, so need not be listed"
