"""XSAVE and its kin: what they store and load, by format and component; XCR0; the bits of CPUID."""

from __future__ import annotations

import struct

import pytest

from anykvm.uapi import kvm as uapi

from .long_guest import RAM, LongGuest, long_guest

AREA, HEADER = 0xE0000, 0xE0200
CR4_OSXSAVE, CPUID_OSXSAVE = 1 << 18, 1 << 27
COMPACT = 1 << 63
X87, SSE, BOTH = 1, 2, 3
MXCSR_INIT = 0x1F80
XSAVE, XSAVEC, XSAVES = b"\x48\x0f\xae\x27", b"\x48\x0f\xc7\x27", b"\x48\x0f\xc7\x2f"
XRSTOR, XRSTORS = b"\x48\x0f\xae\x2f", b"\x48\x0f\xc7\x1f"
XGETBV, XSETBV, CPUID = b"\x0f\x01\xd0", b"\x0f\x01\xd1", b"\x0f\xa2"
SET_OSXSAVE = bytes.fromhex("0f20e0 0d00020400 0f22e0")  # CR4.OSXSAVE and OSFXSR
# fninit; fld1; fldpi; pcmpeqb xmm15, xmm15; push 0x5f80; ldmxcsr [rsp]; pop rax
FILL = bytes.fromhex("dbe3 d9e8 d9eb 66450f74ff 68805f0000 0fae1424 58")
# xorps xmm15, xmm15; fninit; push 0x1f80; ldmxcsr [rsp]; pop rax
CLEAR = bytes.fromhex("450f57ff dbe3 68801f0000 0fae1424 58")
ONE = bytes.fromhex("0000000000000080ff3f")


def with_mask(mask: int, instruction: bytes) -> bytes:
    """EDX:EAX = mask; RDI = the area."""
    load = b"\xb8" + mask.to_bytes(4, "little") + b"\x31\xd2"
    return load + b"\xbf" + AREA.to_bytes(4, "little") + instruction


def enabled(guest: LongGuest, xcr0: int = BOTH) -> None:
    guest.execute(SET_OSXSAVE + b"\x31\xc9" + with_mask(xcr0, XSETBV))


def image(guest: LongGuest) -> bytes:
    return bytes(guest.memory.read(AREA, 576))


def header(guest: LongGuest) -> tuple[int, int]:
    found = struct.unpack("<2Q", guest.memory.read(HEADER, 16))
    return found[0], found[1]


@pytest.fixture(scope="module")
def guest():
    with long_guest() as made:
        enabled(made)
        yield made


@pytest.fixture(autouse=True)
def clean(guest):
    guest.memory.write(AREA, bytes(1024))


def xmm15(guest: LongGuest) -> int:
    area = bytes(guest.vcpus[0].get_xsave().region)
    return int.from_bytes(area[160 + 240 : 160 + 256], "little")


@pytest.mark.parametrize("instruction", [XSAVE, XSAVEC, XSAVES])
def test_everything_comes_back(guest, instruction):
    restore = XRSTORS if instruction == XSAVES else XRSTOR
    guest.execute(FILL + with_mask(BOTH, instruction) + CLEAR)
    assert header(guest) == (BOTH, BOTH | COMPACT if instruction != XSAVE else 0)
    assert image(guest)[48:58] == ONE
    assert xmm15(guest) == 0
    guest.execute(with_mask(BOTH, restore))
    assert xmm15(guest) == (1 << 128) - 1
    assert guest.vcpus[0].get_fpu().ftwx == 0xC0
    assert struct.unpack_from("<I", bytes(guest.vcpus[0].get_xsave().region), 24)[0] == 0x5F80


def test_only_what_is_asked_for_is_stored(guest):
    guest.memory.write(AREA, b"\xee" * 512)
    guest.execute(FILL + with_mask(X87, XSAVE))
    assert header(guest) == (X87, 0)
    assert image(guest)[160:512] == b"\xee" * 352
    assert image(guest)[24:32] == b"\xee" * 8
    guest.execute(with_mask(SSE, XSAVE))
    assert header(guest) == (BOTH, 0)
    assert image(guest)[24:28] == struct.pack("<I", 0x5F80)
    assert image(guest)[416:512] == b"\xee" * 96


@pytest.mark.parametrize("format_", [0, BOTH | COMPACT])
def test_what_the_area_does_not_have_is_initialised(guest, format_):
    """But for MXCSR, which the plain format always has."""
    guest.memory.write(AREA + 24, struct.pack("<I", 0x3F80))
    guest.memory.write(HEADER, struct.pack("<2Q", 0, format_))
    guest.execute(FILL + with_mask(BOTH, XRSTOR))
    assert xmm15(guest) == 0
    assert guest.vcpus[0].get_fpu().ftwx == 0
    assert guest.vcpus[0].get_fpu().fcw == 0x37F
    mxcsr = struct.unpack_from("<I", bytes(guest.vcpus[0].get_xsave().region), 24)[0]
    assert mxcsr == (MXCSR_INIT if format_ else 0x3F80)


def test_what_is_not_asked_for_stays(guest):
    guest.memory.write(HEADER, struct.pack("<2Q", BOTH, 0))
    guest.execute(FILL + with_mask(X87, XRSTOR))
    assert xmm15(guest) == (1 << 128) - 1
    assert guest.vcpus[0].get_fpu().fcw == 0x40  # which is fixed


def faults(guest: LongGuest, code: bytes) -> bool:
    """Whether the code does not come to its end, for want of an IDT."""
    vcpu = guest.vcpus[0]
    sregs = vcpu.get_sregs()
    assert not sregs.idt.limit
    return guest.start(code) == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (HEADER, struct.pack("<2Q", 4, 0)),
        (HEADER, struct.pack("<2Q", 0, 1)),
        (HEADER, struct.pack("<3Q", 0, 0, 1)),
        (HEADER, struct.pack("<2Q", SSE, X87 | COMPACT)),
        (HEADER, struct.pack("<2Q", 0, 4 | COMPACT)),
        (HEADER, struct.pack("<8Q", 0, COMPACT, 0, 0, 0, 0, 0, 1)),
        (AREA + 24, struct.pack("<I", 1 << 16)),
    ],
)
def test_headers_that_cannot_be(place, data):
    with long_guest() as guest:
        enabled(guest)
        guest.memory.write(place, data)
        assert faults(guest, with_mask(BOTH, XRSTOR))


def test_misaligned_disabled_and_unsupervised():
    for code in (
        with_mask(BOTH, b"\xff\xc7" + XSAVE),  # inc edi
        with_mask(BOTH, XRSTORS),  # not compact
        bytes.fromhex("0f20c0 0c08 0f22c0") + with_mask(BOTH, XSAVE),  # CR0.TS
    ):
        with long_guest() as guest:
            enabled(guest)
            assert faults(guest, code)
    for code in (XSAVE, XRSTOR, XGETBV):
        with long_guest() as guest:
            assert faults(guest, b"\x31\xc9" + with_mask(BOTH, code))


def test_a_fault_comes_before_anything_is_stored():
    with long_guest() as guest:
        enabled(guest)
        guest.memory.write(RAM - 576, bytes(576))
        edge = with_mask(BOTH, XSAVE).replace(
            AREA.to_bytes(4, "little"), (RAM - 448).to_bytes(4, "little")
        )
        reason = guest.start(FILL + edge)
        assert reason in (uapi.KVM_EXIT_MMIO, uapi.KVM_EXIT_SHUTDOWN)


def test_xcr0(guest):
    vcpu = guest.vcpus[0]
    assert guest.execute(b"\x31\xc9" + XGETBV) == BOTH
    assert guest.execute(b"\xb9\x01\x00\x00\x00" + XGETBV) == BOTH
    enabled(guest, X87)
    xcrs = vcpu.get_xcrs()
    assert (xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (0, X87)
    guest.execute(with_mask(BOTH, XSAVE))
    assert header(guest) == (X87, 0)
    enabled(guest)


@pytest.mark.parametrize(("index", "value"), [(0, 2), (0, 4 | BOTH), (1, BOTH)])
def test_xcr0_refuses(index, value):
    with long_guest() as guest:
        enabled(guest)
        select = b"\xb9" + index.to_bytes(4, "little")
        assert faults(guest, select + with_mask(value, XSETBV))


def test_cpuid_follows_cr4(guest):
    vcpu = guest.vcpus[0]
    leaf_1 = b"\xb8\x01\x00\x00\x00" + CPUID + b"\x89\xc8"
    assert guest.execute(leaf_1) & CPUID_OSXSAVE
    assert next(e for e in vcpu.get_cpuid2() if e.function == 1).ecx & CPUID_OSXSAVE
    sregs = vcpu.get_sregs()
    sregs.cr4 &= ~CR4_OSXSAVE
    vcpu.set_sregs(sregs)
    assert not guest.execute(leaf_1) & CPUID_OSXSAVE
    enabled(guest)


def test_cpuid_says_how_large_the_area_is(guest):
    leaves = {e.index: e for e in guest.cpuid if e.function == 0xD}
    assert (leaves[0].eax, leaves[0].ebx, leaves[0].ecx, leaves[0].edx) == (BOTH, 576, 576, 0)
    assert (leaves[1].eax, leaves[1].ebx, leaves[1].ecx, leaves[1].edx) == (15, 576, 0, 0)


def test_xss_is_zero():
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        assert vcpu.get_msrs([0xDA0]) == {0xDA0: 0}
        assert vcpu.set_msrs({0xDA0: 1}) == 0
