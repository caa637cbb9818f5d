"""MMX and SSE up to SSE4.2 on the software processor against the host's own."""

from __future__ import annotations

import dataclasses
import random

import pytest

from . import sse_cases
from .assembler import assemble
from .differential import compare, differences, run_both
from .layout import SCRATCH, SCRATCH_SIZE, Case, Result
from .sse_cases import DATA

INPUTS = 10
OVERFLOW_UNDERFLOW, INEXACT = 0x18, 0x20
XM, GP = 19, 13


@pytest.mark.parametrize("feature", sse_cases.FEATURES)
def test_every_encoding(feature: str) -> None:
    rng = random.Random(feature)
    names: dict[bytes, str] = {}
    cases: list[Case] = []
    for line in sse_cases.lines(feature, rng):
        names[line.code] = line.name
        cases += [sse_cases.case(line, rng) for _ in range(INPUTS)]
    wrong = compare(cases, name=lambda c: names[c.code])
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(wrong[:20])


def _inexact_is_unknown(guest: Result, native: Result) -> Result:
    """After an unmasked overflow or underflow the guest's inexact flag is always set (mxcsr.py)."""
    raised = native.mxcsr & ~(native.mxcsr >> 7)
    if native.vector == XM and raised & OVERFLOW_UNDERFLOW:
        return dataclasses.replace(guest, mxcsr=guest.mxcsr & ~INEXACT | native.mxcsr & INEXACT)
    return guest


@pytest.mark.parametrize("feature", ["SSE", "SSE2", "SSE3", "SSE4_1"])
def test_unmasked_exceptions(feature: str) -> None:
    rng = random.Random("unmasked " + feature)
    cases = [
        sse_cases.case(line, rng, unmasked=True)
        for line in sse_cases.lines(feature, rng, immediates=2)
        if line.name[0] != "p"
        for _ in range(INPUTS // 2)
    ]
    both = run_both(cases)
    wrong = [(c, f) for c, g, n in both if (f := differences(_inexact_is_unknown(g, n), n))]
    assert not wrong, wrong[:5]
    assert len([c for c, _, n in both if n.vector == XM]) > len(cases) // 50


def test_alignment() -> None:
    """Every form with a memory operand that is not aligned: #GP, or the access."""
    rng = random.Random("alignment")
    cases = []
    for feature in sse_cases.FEATURES:
        for line in sse_cases.lines(feature, rng, immediates=1):
            case = sse_cases.case(line, rng)
            cases.append(dataclasses.replace(case, gpr={**case.gpr, "rbx": DATA + 4}))
    both = run_both(cases)
    wrong = [(c, f) for c, g, n in both if (f := differences(g, n))]
    assert not wrong, wrong[:5]
    assert len([n for _, _, n in both if n.vector == GP]) > 100


def test_control_register() -> None:
    """LDMXCSR takes effect at once, faults on reserved bits; STMXCSR shows what happened since."""
    rng = random.Random("mxcsr")
    code = assemble(
        "ldmxcsr [rbx]; divss xmm1, xmm10; cvtsd2si rax, xmm1; mulpd xmm2, xmm10; stmxcsr [rbx+4]"
    )
    cases = []
    for n in range(300):
        value = sse_cases.mxcsr_of(rng) | (rng.getrandbits(16) << 16 if n % 5 == 0 else 0)
        line = sse_cases.Line("mulpd", "SSE2", code, False)
        case = sse_cases.case(line, rng)
        memory = {DATA: value.to_bytes(4, "little") + bytes(4)}
        cases.append(dataclasses.replace(case, memory=memory))
    assert not compare(cases)


def test_masked_store_at_the_end_of_memory() -> None:
    """Any of the bytes that cannot be written faults, even where the mask leaves it out."""
    code = assemble("maskmovdqu xmm1, xmm10")
    end = SCRATCH + SCRATCH_SIZE
    masks = [1 << 8 * n + 7 for n in (0, 7, 8, 15)] + [0, 2**128 - 1, 0x8080, 0x8080 << 56]
    source = int.from_bytes(range(1, 17), "little")
    cases = [
        Case(code, {"rdi": end - k}, xmm={1: source, 10: mask}, memory={end - 32: bytes(32)})
        for mask in masks
        for k in (8, 1, 16, 17)
    ]
    for case, guest, native in run_both(cases):
        same_page = guest.cr2 is not None and guest.cr2 | 4095 == (native.cr2 or 0) | 4095
        guest = dataclasses.replace(guest, cr2=native.cr2 if same_page else guest.cr2)
        assert not differences(guest, native), case


def test_across_a_page() -> None:
    texts = [f"{m} xmm1, [rbx]" for m in "movups movupd movdqu lddqu movsd movss movhps".split()]
    texts += [f"{m} [rbx], xmm1" for m in "movups movdqu movsd movss movhps movlps".split()]
    at = SCRATCH + 0x1000
    image = {at - 16: random.Random(1).randbytes(32)}
    cases = [
        Case(assemble(text), {"rbx": at - k}, xmm={1: 0x1234 << 100 | 0x5678}, memory=image)
        for text in texts
        for k in (1, 3, 8, 15)
    ]
    assert not compare(cases)
