"""What decides whether MMX and SSE instructions execute at all, and in which modes they do."""

from __future__ import annotations

import pytest

from anykvm.cpu.state import State

from .assembler import assemble
from .harness import machine
from .layout import SCRATCH, X87, Case

UD, NM, MF, XM = 6, 7, 16, 19
MP_EM_TS = {"em": 4, "ts": 8}
OSFXSR, OSXMMEXCPT = 1 << 9, 1 << 10
ALL_SSE = (
    "addps xmm1, xmm2", "movd xmm1, eax", "pabsb xmm1, xmm2", "haddpd xmm1, xmm2",
    "ptest xmm1, xmm2", "cvtps2pi mm1, xmm2", "cvtpi2ps xmm1, mm2", "pcmpistri xmm1, xmm2, 0",
)  # fmt: skip
ONLY_MMX = ("paddb mm1, mm2", "pmaxub mm1, mm2", "pabsb mm1, mm2", "movd mm1, eax", "emms")
NEITHER = ("crc32 eax, ecx", "movnti [rbx], eax", "prefetcht0 [rbx]", "sfence")


def _vector(
    text: str, *, cr0: int = 0, without_cr4: int = 0, case: Case | None = None
) -> int | None:
    def setup(s: State) -> None:
        s.cr0 |= cr0
        s.cr4 &= ~without_cr4

    case = case or Case(assemble(text), {"rbx": SCRATCH})
    return machine().execute(case, user=True, setup=setup).vector


@pytest.mark.parametrize(
    ("texts", "cr0", "without_cr4", "vector"),
    [
        (ALL_SSE + ONLY_MMX, MP_EM_TS["ts"], 0, NM),
        (ALL_SSE + ONLY_MMX, MP_EM_TS["em"], 0, UD),
        (ALL_SSE, 0, OSFXSR, UD),
        (ONLY_MMX, 0, OSFXSR, None),
        (NEITHER, MP_EM_TS["ts"], 0, None),
        (NEITHER, MP_EM_TS["em"], OSFXSR, None),
    ],
)
def test_control_bits(
    texts: tuple[str, ...], cr0: int, without_cr4: int, vector: int | None
) -> None:
    found = {t: _vector(t, cr0=cr0, without_cr4=without_cr4) for t in texts}
    assert found == dict.fromkeys(texts, vector)


def test_strings_are_not_sse() -> None:
    """MOVSD and CMPSD of memory share their names with scalar moves and comparisons."""
    case = Case(b"\xa5\xa7", {"rsi": SCRATCH, "rdi": SCRATCH + 64})
    assert _vector("", cr0=MP_EM_TS["ts"], without_cr4=OSFXSR, case=case) is None


def test_exceptions_the_system_does_not_take() -> None:
    """Without CR4.OSXMMEXCPT an unmasked exception is #UD."""
    case = Case(assemble("divss xmm1, xmm2"), xmm={1: 0x3F80_0000}, mxcsr=0x1D80)
    assert _vector("", case=case) == XM
    assert _vector("", case=case, without_cr4=OSXMMEXCPT) == UD


def test_pending_x87_exception() -> None:
    """MMX instructions report it; SSE's do not look."""
    pending = X87(cw=0x37E, sw=0x8081)
    for text in (*ONLY_MMX, "cvtps2pi mm1, xmm2", "cvtpi2ps xmm1, mm2"):
        assert _vector("", case=Case(assemble(text), x87=pending)) == MF, text
    for text in ("addps xmm1, xmm2", "cvtpi2ps xmm1, qword ptr [rbx]"):
        case = Case(assemble(text), {"rbx": SCRATCH}, x87=pending)
        assert _vector("", case=case) is None, text


@pytest.mark.parametrize("mode", [64, 32, "compat"])
def test_modes(mode: int | str) -> None:
    bits = 64 if mode == 64 else 32
    base = "rbx" if mode == 64 else "ebx"
    text = f"movdqu xmm1, [{base}+1]; paddd xmm1, [{base}+16]; movq mm0, [{base}]; "
    text += "maskmovdqu xmm1, xmm1"
    data = bytes(range(48))
    case = Case(
        assemble(text, bits),
        {"rbx": SCRATCH + 0x100, "rdi": SCRATCH + 0x200},
        xmm={1: 0},
        memory={SCRATCH + 0x100: data, SCRATCH + 0x200: bytes(16)},
    )
    result = machine().execute(case, mode)
    words = [
        int.from_bytes(data[1 + n : 5 + n], "little")
        + int.from_bytes(data[16 + n : 20 + n], "little")
        for n in range(0, 16, 4)
    ]
    assert result.vector is None
    assert result.xmm[1] == sum(w << 32 * n for n, w in enumerate(words))
    assert result.x87.st[0][:8] == data[:8]
    assert result.memory[SCRATCH + 0x200] == bytes(16)


def test_alignment_in_real_mode() -> None:
    case = Case(assemble("movaps xmm1, [bx]", 16), {"rbx": 0x101})
    assert machine().execute(case, 16).vector == 13
    case = Case(assemble("movups xmm1, [bx]", 16), {"rbx": 0x101})
    assert machine().execute(case, 16).vector is None
