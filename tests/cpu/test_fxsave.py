"""FXSAVE, FXRSTOR, FSAVE, FRSTOR, FSTENV, FLDENV: images in memory against the host's, and their
other forms."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from typing import Any

import pytest

from anykvm.cpu.guest import GP, MF, NM
from anykvm.cpu.state import State

from . import x87_values
from .assembler import assemble
from .differential import differences, run_both
from .harness import machine
from .layout import SCRATCH, X87, Case, Result, fxsave_image
from .x87_values import MEMORY

COUNT = 60


def _fx_case(r: random.Random, code: bytes, image: bytes | None = None) -> Case:
    x = x87_values.state(r, unmasked=r.random() < 0.5)
    xmm = {n: r.getrandbits(128) for n in range(16)}
    data = image if image is not None else r.randbytes(864)
    mxcsr = 0x1F80 | r.getrandbits(6) | r.getrandbits(3) << 13
    gpr = {"rbx": MEMORY}
    return Case(code, gpr, xmm=xmm, mxcsr=mxcsr, x87=x, memory={MEMORY: data})


def _wrong(cases: list[Case]) -> list[str]:
    found = []
    for _, guest, native in run_both(cases):
        if different := differences(guest, native):
            found.append("; ".join(different)[:1500])
    return found


@pytest.mark.parametrize(
    "text",
    ["fxsave [rbx]", "fxsave64 [rbx]", "fnsave [rbx]", "fnstenv [rbx]", "data16; fnsave [rbx]",
     "data16; fnstenv [rbx]"],
)  # fmt: skip
def test_saving(text: str) -> None:
    r = random.Random(text)
    code = assemble(text)
    assert not _wrong([_fx_case(r, code) for _ in range(COUNT)])


def _image(r: random.Random, mxcsr: int) -> bytes:
    """What FXRSTOR may find; the pointers are 0, for processors keep them in different ways."""
    source = _fx_case(r, b"")
    image = bytearray(fxsave_image(replace(source, mxcsr=mxcsr)))
    image[2:4] = r.randbytes(2)
    image[0:2] = r.randbytes(2)
    image[416:512] = r.randbytes(96)
    return bytes(image)


@pytest.mark.parametrize("text", ["fxrstor [rbx]", "fxrstor64 [rbx]"])
def test_restoring(text: str) -> None:
    r = random.Random(text)
    code = assemble(text)
    cases = [_fx_case(r, code, _image(r, r.getrandbits(16))) for _ in range(COUNT)]
    cases += [_fx_case(r, code, _image(r, 1 << 16 | r.getrandbits(32))) for _ in range(4)]
    assert not _wrong(cases)


def _environment(r: random.Random, wide: bool) -> bytes:
    """FRSTOR's image with random words and registers, pointers 0."""
    words = [r.getrandbits(16) for _ in range(3)] + [0] * 4
    head = struct.pack("<7I" if wide else "<7H", *words)
    return head + b"".join(x87_values.value(r) for _ in range(8))


@pytest.mark.parametrize("name", ["frstor", "fldenv"])
@pytest.mark.parametrize("wide", [True, False])
def test_restoring_environment(name: str, wide: bool) -> None:
    r = random.Random(name)
    code = assemble(f"{'' if wide else 'data16; '}{name} [rbx]")
    assert not _wrong([_fx_case(r, code, _environment(r, wide)) for _ in range(COUNT)])


def _run(text: str, mode: int | str = 64, **fields: Any) -> Result:
    case = Case(assemble(text, 32 if mode == "compat" else int(mode)), {"rbx": MEMORY}, **fields)
    return machine().execute(case, mode)


def test_pointers() -> None:
    """FIP, FOP and FDP are those of the last instruction that is not a control instruction."""
    text = "fninit; fld dword ptr [rbx + 16]; fnstsw ax; fxsave64 [rbx + 64]"
    result = _run(text, memory={MEMORY: bytes(1024)})
    image = result.memory[MEMORY][64:]
    fop, fip, fdp = struct.unpack_from("<HQQ", image, 6)
    assert fop == 0x143
    assert fip == result.rip - len(assemble(text)) + len(assemble("fninit"))
    assert fdp == MEMORY + 16


def test_real_mode_environment() -> None:
    """Pointers of 20 bits, split around the opcode."""
    m = machine()
    code = assemble("fninit; fldpi; fnstenv [bx]; fldenv [bx]; fnstenv [bx + 32]", 16)
    m.execute(Case(code, {"rbx": 0x800}), 16)
    first, second = m.read(0x20800, 14), m.read(0x20820, 14)
    cw, sw, tag, ip, ip_op, dp, dp_high = struct.unpack("<7H", first)
    assert (cw, sw, tag) == (0x37F, 0x3800, 0x3FFF)
    assert ip_op & 0xFFF == 0x1EB
    assert (dp, dp_high) == (0, 0)
    assert ip == m.state.rip - len(code) - 1 + len(assemble("fninit", 16))
    assert second == first


def test_32_bit_images() -> None:
    """Outside 64-bit mode XMM8 to XMM15 are neither saved nor loaded."""
    xmm = {n: n + 1 << 64 for n in range(16)}
    result = _run("fxsave [ebx]", 32, xmm=xmm, memory={MEMORY: b"\xaa" * 512})
    image = result.memory[MEMORY]
    assert image[160:288] == b"".join(xmm[n].to_bytes(16, "little") for n in range(8))
    assert image[288:] == b"\xaa" * 224
    zeros = fxsave_image(Case(b""))
    result = _run("fxrstor [ebx]", "compat", xmm=xmm, memory={MEMORY: zeros})
    assert result.xmm == (*[0] * 8, *[xmm[n] for n in range(8, 16)])


def _without_osfxsr(state: State) -> None:
    state.cr4 &= ~0x200


def test_without_osfxsr() -> None:
    """The x87 part alone; MXCSR stays, whatever the image says of it."""
    x = X87(sw=0x3800, tag=0x80, st=(b"\x01" * 10, *[bytes(10)] * 7))
    memory = {MEMORY: fxsave_image(Case(b"", x87=x, mxcsr=0xFFFF_FFFF, xmm={3: 5}))}
    case = Case(assemble("fxrstor64 [rbx]"), {"rbx": MEMORY}, xmm={3: 7}, memory=memory)
    result = machine().execute(case, setup=_without_osfxsr)
    assert result.vector is None
    assert (result.x87.sw, result.x87.tag, result.x87.st[0]) == (0x3800, 0x80, b"\x01" * 10)
    assert (result.mxcsr, result.xmm[3]) == (0x1F80, 7)
    case = replace(case, code=assemble("fxsave64 [rbx]"), memory={MEMORY: b"\xaa" * 512})
    result = machine().execute(case, setup=_without_osfxsr)
    assert result.memory[MEMORY][160:] == b"\xaa" * 352


@pytest.mark.parametrize("text", ["fxsave [rbx + 8]", "fxrstor64 [rbx + 8]"])
def test_alignment(text: str) -> None:
    result = _run(text, memory={MEMORY: bytes(520)})
    assert (result.vector, result.error) == (GP, 0)


@pytest.mark.parametrize("text", ["fxsave [rbx]", "fxrstor [rbx]"])
def test_fault_on_second_page(text: str) -> None:
    """Nothing has changed when the page fault comes."""
    m = machine()
    at = SCRATCH + 0x3000 - 0x100
    image = fxsave_image(Case(b"", x87=X87(sw=0x3800)))[:256]
    m.protect(SCRATCH + 0x3000, 0)
    try:
        case = Case(assemble(text), {"rbx": at}, memory={at: image})
        result = m.execute(case)
    finally:
        m.protect(SCRATCH + 0x3000)
    assert (result.vector, result.memory[at], result.x87) == (14, image, case.x87)
    assert result.cr2 == SCRATCH + 0x3000


CR0_MP, CR0_EM, CR0_TS = 2, 4, 8
AVAILABILITY = [
    ("fnop", CR0_TS, NM), ("fnop", CR0_EM, NM), ("fxsave [rbx]", CR0_TS, NM),
    ("fxrstor [rbx]", CR0_EM, NM), ("fwait", CR0_TS, None), ("fwait", CR0_TS | CR0_MP, NM),
    ("fwait", CR0_EM | CR0_MP, None), ("fninit", CR0_TS | CR0_MP, NM),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cr0", "vector"), AVAILABILITY)
def test_availability(text: str, cr0: int, vector: int | None) -> None:
    def setup(state: State) -> None:
        state.cr0 = state.cr0 & ~(CR0_MP | CR0_EM | CR0_TS) | cr0

    case = Case(assemble(text), {"rbx": MEMORY}, memory={MEMORY: fxsave_image(Case(b""))})
    assert machine().execute(case, setup=setup).vector == vector


PENDING = X87(cw=0x37E, sw=0xB881, tag=0x80)


@pytest.mark.parametrize("text", ["fld1", "fwait", "fldcw [rbx]", "fadd dword ptr [rcx]", "fxch"])
def test_pending_exception(text: str) -> None:
    """It comes before anything else that the instruction does, faults included, and changes
    nothing.
    """
    case = Case(assemble(text), {"rbx": MEMORY, "rcx": 0x7000_0000}, x87=PENDING)
    result = machine().execute(case)
    assert (result.vector, result.error, result.x87) == (MF, None, PENDING)


@pytest.mark.parametrize("text", ["fninit", "fnclex", "fnstsw ax", "fnstcw [rbx]", "fxsave [rbx]"])
def test_not_waiting(text: str) -> None:
    case = Case(assemble(text), {"rbx": MEMORY}, x87=PENDING, memory={MEMORY: bytes(512)})
    assert machine().execute(case).vector is None


def test_host_unit_is_left_alone() -> None:
    """Rounding and precision of the guest end with its run; its flags do not leak into the next
    one's.
    """
    third = b"\x55" * 7 + b"\xd5\xff\x3f"
    inexact = X87(sw=0x3800, tag=0x80, st=(third, *[bytes(10)] * 7))
    m = machine()
    m.execute(Case(assemble("fld1; fdivp st(1), st(0)"), x87=replace(inexact, cw=0x17F)))
    assert 0.1 + 0.2 == 0.30000000000000004
    again = m.execute(Case(assemble("fld1; fnstsw ax"), x87=X87()))
    assert again.gpr["rax"] == 0x3800
