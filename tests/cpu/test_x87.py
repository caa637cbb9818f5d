"""x87 instructions on random states against the host's own unit."""

from __future__ import annotations

import random
import zlib
from dataclasses import replace

import pytest

from . import x87_values
from .assembler import assemble_many
from .differential import differences, run_both
from .harness import machine
from .layout import X87, Case, Result

UNDEFINED = ("fcomi", "fucomi", "fcompi", "fucompi", "fprem")
C0, C1, C3 = 0x100, 0x200, 0x4000
NOT_A_NUMBER = (b"\xff\x7f", b"\xff\xff")
ARITHMETIC = ("add", "mul", "sub", "subr", "div", "divr")
SIZES = {"dword": 4, "qword": 8, "word": 2, "tbyte": 10}


def _registers() -> list[str]:
    texts = []
    for n in (0, 1, 2, 7):
        for a in ARITHMETIC:
            texts += [f"f{a} st(0), st({n})", f"f{a} st({n}), st(0)", f"f{a}p st({n}), st(0)"]
        for c in ("com", "comp", "ucom", "ucomp"):
            texts.append(f"f{c} st({n})")
        for c in ("fcomi", "fcompi", "fucomi", "fucompi"):
            texts.append(f"{c} st(0), st({n})")
        texts += [f"fcmov{c} st(0), st({n})" for c in "b e be u nb ne nbe nu".split()]
        texts += [f"{m} st({n})" for m in ("fld", "fst", "fstp", "fxch", "ffree", "ffreep")]
    return texts


NULLARY = (
    "fcompp fucompp ftst fxam fchs fabs fsqrt frndint fscale fxtract fprem fprem1 fld1 fldl2t"
    " fldl2e fldpi fldlg2 fldln2 fldz fincstp fdecstp fnop fsin fcos fsincos fptan fpatan f2xm1"
    " fyl2x fyl2xp1 fninit fnclex fwait"
).split()


def _memory() -> list[str]:
    texts = []
    for size in ("dword", "qword"):
        for m in (*ARITHMETIC, "com", "comp", "ld", "st", "stp"):
            texts.append(f"f{m} {size} ptr [rbx]")
    for size in ("word", "dword"):
        for m in (*ARITHMETIC, "com", "comp", "ld", "st", "stp", "sttp"):
            texts.append(f"fi{m} {size} ptr [rbx]")
    texts += [f"{m} qword ptr [rbx]" for m in ("fild", "fistp", "fisttp")]
    texts += [f"{m} tbyte ptr [rbx]" for m in ("fld", "fstp", "fbld", "fbstp")]
    return texts


CONTROL = ["fnstcw word ptr [rbx]", "fnstsw word ptr [rbx]", "fnstsw ax", "fldcw word ptr [rbx]"]
GROUPS = {
    "registers": _registers(), "nullary": NULLARY, "memory": _memory(), "control": CONTROL,
}  # fmt: skip


def _cases(texts: list[str], count: int, *, unmasked: bool) -> tuple[list[Case], dict[bytes, str]]:
    codes = assemble_many(texts)
    cases = []
    for text, code in zip(texts, codes, strict=True):
        r = random.Random(zlib.crc32(text.encode()) + unmasked)
        size = next((n for word, n in SIZES.items() if f" {word} ptr" in text), 0)
        cases += [x87_values.case(r, code, size, unmasked=unmasked) for _ in range(count)]
    return cases, dict(zip(codes, texts, strict=True))


def _undefined(text: str) -> int:
    """Condition codes on which manual and processors, or processors, do not agree."""
    if text.startswith(UNDEFINED[:4]):
        return C1
    return C0 | C3 if text.startswith("fprem") else 0


def _without(result: Result, conditions: int) -> Result:
    """FPREM leaves C0 and C3 alone where its result is no number."""
    x = result.x87
    if conditions & C0 and x.st[0][8:] not in NOT_A_NUMBER:
        return result
    return replace(result, x87=replace(x, sw=x.sw & ~conditions))


def _text(x: X87) -> str:
    values = " ".join(f"{int.from_bytes(v, 'little'):020x}" for v in x.st)
    return f"cw={x.cw:04x} sw={x.sw:04x} tag={x.tag:08b} {values}"


def _report(text: str, case: Case, guest: Result, native: Result) -> str:
    lines = [f"{text}: {'; '.join(differences(guest, native))[:300]}"]
    states = (("before", case.x87), ("guest", guest.x87), ("host", native.x87))
    return "\n".join([*lines, *(f"  {name:6} {_text(x)}" for name, x in states)])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("unmasked", [False, True], ids=["masked", "unmasked"])
def test_against_host(group: str, unmasked: bool) -> None:
    cases, names = _cases(GROUPS[group], 40, unmasked=unmasked)
    wrong = []
    for case, *results in run_both(cases):
        text = names[case.code]
        guest, native = (_without(r, _undefined(text)) for r in results)
        if differences(guest, native):
            wrong.append(_report(text, case, guest, native))
    assert not wrong, f"{len(wrong)} of {len(cases)} differ\n" + "\n".join(wrong[:5])


INFINITY, ONE = b"\0" * 7 + b"\x80\xff\x7f", b"\0" * 7 + b"\x80\xff\x3f"
SPECIAL = (
    INFINITY, INFINITY[:9] + b"\xff", ONE, ONE[:9] + b"\xbf", bytes(10), b"\0" * 9 + b"\x80",
    b"\0" * 7 + b"\x40\0\0", b"\0" * 7 + b"\x80\0\0", b"\0" * 7 + b"\x40\xff\x3f",
    b"\0" * 7 + b"\xc0\xff\x7f", b"\1" + b"\0" * 6 + b"\x80\xff\xff", b"\0" * 8 + b"\xff\x7f",
)  # fmt: skip


@pytest.mark.parametrize("cw", [0x37F, 0x340], ids=["masked", "unmasked"])
@pytest.mark.parametrize(
    "text", ["fadd st(0), st(1)", "fadd st(1), st(0)", "faddp st(1), st(0)", "fmul st(0), st(1)"]
)
def test_infinities(text: str, cw: int) -> None:
    code = assemble_many([text])[0]
    cases = [
        Case(code, x87=X87(cw, 0x3200, 0xC0, (a, b, *[bytes(10)] * 6)))
        for a in SPECIAL
        for b in SPECIAL
    ]
    wrong = [_report(text, *done) for done in run_both(cases) if differences(done[1], done[2])]
    assert not wrong, "\n".join(wrong[:5])


def test_sequences() -> None:
    """Flags stay until they are cleared, and the stack moves as on the host."""
    texts = [t for t in (*_registers(), *NULLARY, *_memory()) if not t.startswith(UNDEFINED)]
    codes = dict(zip(texts, assemble_many(texts), strict=True))
    r = random.Random(87)
    cases, names = [], {}
    for _ in range(400):
        chosen = r.choices(texts, k=10)
        code = b"".join(codes[t] for t in chosen)
        names[code] = "; ".join(chosen)
        cases.append(x87_values.case(r, code, 10, unmasked=r.random() < 0.3))
    wrong = [
        _report(names[done[0].code], *done)
        for done in run_both(cases)
        if differences(done[1], done[2])
    ]
    assert not wrong, f"{len(wrong)} differ\n" + "\n".join(wrong[:5])


def test_third() -> None:
    """1/3 in 80 bits, and what the division left in the status word."""
    code = assemble_many(["fninit; fld1; fidiv dword ptr [rbx]; fnstsw ax"])[0]
    memory = {x87_values.MEMORY: (3).to_bytes(4, "little")}
    result = machine().execute(Case(code, {"rbx": x87_values.MEMORY}, memory=memory))
    assert result.x87.st[0] == bytes.fromhex("abaaaaaaaaaaaaaafd3f")
    assert result.gpr["rax"] == 0x3A20  # inexact, rounded up
