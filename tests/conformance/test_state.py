"""A vCPU's registers, CPUID, MSRs and attributes (api.rst 4.11 to 4.23, 4.33 to 4.43, 4.63)."""

from __future__ import annotations

import ctypes
import struct
from errno import E2BIG, EFAULT, EINVAL, ENXIO

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, differs, host_may_differ
from .machine import BAD, Machine, entries, fails, flexible, get, ioctl
from .test_system import cpuid_of, cpuid_table, msr_list

PLAIN = (
    ("REGS", uapi.kvm_regs),
    ("SREGS", uapi.kvm_sregs),
    ("SREGS2", uapi.kvm_sregs2),
    ("FPU", uapi.kvm_fpu),
    ("XSAVE", uapi.kvm_xsave),
    ("XCRS", uapi.kvm_xcrs),
    ("DEBUGREGS", uapi.kvm_debugregs),
    ("VCPU_EVENTS", uapi.kvm_vcpu_events),
    ("MP_STATE", uapi.kvm_mp_state),
)
ALL_PLAIN = tuple(f"KVM_{way}_{name}" for name, _ in PLAIN for way in ("GET", "SET"))
LONG_MODE = {"cr0": 0x80000011, "cr3": 0x1000, "cr4": 0x20, "efer": 0x500}


def number(name: str) -> int:
    return uapi.IOCTLS[name].number


@conforms(*ALL_PLAIN)
@pytest.mark.parametrize(("name", "kind"), PLAIN, ids=[name for name, _ in PLAIN])
def test_what_is_read_can_be_written_and_read_again(
    vcpu: int, name: str, kind: type[ctypes.Structure]
) -> None:
    first = get(vcpu, number(f"KVM_GET_{name}"), kind)
    assert ioctl(vcpu, number(f"KVM_SET_{name}"), first) == 0
    assert bytes(get(vcpu, number(f"KVM_GET_{name}"), kind)) == bytes(first)


@conforms(*ALL_PLAIN)
@pytest.mark.parametrize("name", [name for name, _ in PLAIN])
def test_bad_pointers(vcpu: int, name: str) -> None:
    fails(EFAULT, vcpu, number(f"KVM_GET_{name}"), BAD)
    fails(EFAULT, vcpu, number(f"KVM_SET_{name}"), BAD)


@conforms("KVM_GET_REGS", "KVM_GET_SREGS", "KVM_GET_MP_STATE", "KVM_GET_DEBUGREGS")
def test_power_on(vcpu: int) -> None:
    regs = get(vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs)
    sregs = get(vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    assert (regs.rip, regs.rflags, regs.rax, regs.rsp) == (0xFFF0, 2, 0, 0)
    assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF0000, 0xFFFF)
    assert (sregs.cs.type, sregs.cs.s, sregs.cs.present) == (11, 1, 1)
    assert (sregs.cr0, sregs.cr4, sregs.efer) == (0x60000010, 0, 0)
    assert (sregs.idt.base, sregs.idt.limit, sregs.gdt.limit) == (0, 0xFFFF, 0xFFFF)
    assert sregs.apic_base & ~0xFFF == 0xFEE00000
    assert sregs.apic_base >> 8 & 1, "the boot processor"
    debug = get(vcpu, uapi.KVM_GET_DEBUGREGS, uapi.kvm_debugregs)
    assert (debug.dr6, debug.dr7) == (0xFFFF0FF0, 0x400)
    state = get(vcpu, uapi.KVM_GET_MP_STATE, uapi.kvm_mp_state)
    assert state.mp_state == uapi.KVM_MP_STATE_RUNNABLE


@conforms("KVM_GET_REGS", "KVM_SET_REGS")
def test_general_registers(vcpu: int) -> None:
    names = [name for name, _ in uapi.kvm_regs._fields_ if name != "rflags"]
    regs = uapi.kvm_regs(**{name: (1 << 40) + n for n, name in enumerate(names)}, rflags=0x246)
    ioctl(vcpu, uapi.KVM_SET_REGS, regs)
    assert bytes(get(vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs)) == bytes(regs)
    regs.rflags = 0
    ioctl(vcpu, uapi.KVM_SET_REGS, regs)
    assert get(vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs).rflags == 2, "bit 1 is always set"


# Control registers.


@conforms("KVM_GET_SREGS", "KVM_SET_SREGS", "KVM_GET_SREGS2", "KVM_SET_SREGS2")
@pytest.mark.parametrize("kind", [uapi.kvm_sregs, uapi.kvm_sregs2])
def test_long_mode_round_trips(machine: Machine, vcpu: int, kind: type) -> None:
    suffix = "2" if kind is uapi.kvm_sregs2 else ""
    set_cpuid(machine, vcpu)
    sregs = get(vcpu, number(f"KVM_GET_SREGS{suffix}"), kind)
    for name, value in LONG_MODE.items():
        setattr(sregs, name, value)
    sregs.cs.l, sregs.cs.g, sregs.cs.limit = 1, 1, 0xFFFFFFFF
    sregs.gdt.base, sregs.gdt.limit, sregs.cr8 = 0x5000, 0x7F, 5
    ioctl(vcpu, number(f"KVM_SET_SREGS{suffix}"), sregs)
    found = get(vcpu, number(f"KVM_GET_SREGS{suffix}"), kind)
    for name, value in LONG_MODE.items():
        assert getattr(found, name) == value
    assert (found.cs.l, found.gdt.base, found.gdt.limit, found.cr8) == (1, 0x5000, 0x7F, 5)


WRONG_SREGS = [
    {"cr0": 0x80000010},  # paging without protection
    {"cr0": 0x20000011},  # NW without CD
    {"cr0": 1 << 40},
    {"cr4": 1 << 31},
    {"efer": 0x500, "cr0": 0x80000011, "cr4": 0},  # long mode without PAE
    {"efer": 0x400, "cr0": 0x11},  # LMA without paging
]


@conforms("KVM_SET_SREGS", "KVM_SET_SREGS2")
@pytest.mark.parametrize("kind", [uapi.kvm_sregs, uapi.kvm_sregs2])
@pytest.mark.parametrize("wrong", WRONG_SREGS, ids=[" ".join(w) for w in WRONG_SREGS])
def test_control_registers_that_cannot_be_together(
    machine: Machine, vcpu: int, wrong: dict[str, int], kind: type
) -> None:
    suffix = "2" if kind is uapi.kvm_sregs2 else ""
    set_cpuid(machine, vcpu)
    sregs = get(vcpu, number(f"KVM_GET_SREGS{suffix}"), kind)
    before = bytes(sregs)
    for name, value in wrong.items():
        setattr(sregs, name, value)
    fails(EINVAL, vcpu, number(f"KVM_SET_SREGS{suffix}"), sregs)
    assert bytes(get(vcpu, number(f"KVM_GET_SREGS{suffix}"), kind)) == before


@conforms("KVM_SET_SREGS2")
def test_unknown_flags_of_sregs2(vcpu: int) -> None:
    sregs = get(vcpu, uapi.KVM_GET_SREGS2, uapi.kvm_sregs2)
    sregs.flags |= 1 << 9
    fails(EINVAL, vcpu, uapi.KVM_SET_SREGS2, sregs)


@conforms("KVM_GET_SREGS2", "KVM_SET_SREGS2")
@host_may_differ("a KVM without VT or SVM need not know PAE paging")
def test_sregs2_has_the_page_directory_pointers(machine: Machine) -> None:
    vcpu = machine.guest(b"\xf4").vcpu
    set_cpuid(machine, vcpu)
    sregs = get(vcpu, uapi.KVM_GET_SREGS2, uapi.kvm_sregs2)
    sregs.cr0, sregs.cr3, sregs.cr4 = 0x80000011, 0x2000, 0x20
    sregs.flags = uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    sregs.pdptrs[:] = [0x3001, 0x4001, 0x5001, 0x6001]
    ioctl(vcpu, uapi.KVM_SET_SREGS2, sregs)
    found = get(vcpu, uapi.KVM_GET_SREGS2, uapi.kvm_sregs2)
    assert found.flags & uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    assert list(found.pdptrs) == [0x3001, 0x4001, 0x5001, 0x6001]


@conforms("KVM_GET_SREGS", "KVM_SET_SREGS")
def test_the_bitmap_of_sregs_holds_the_interrupt_that_is_pending(vcpu: int) -> None:
    ioctl(vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x41))
    sregs = get(vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    assert list(sregs.interrupt_bitmap) == [0, 2, 0, 0]
    sregs.interrupt_bitmap[:] = [0, 0, 1, 0]
    ioctl(vcpu, uapi.KVM_SET_SREGS, sregs)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (events.interrupt.injected, events.interrupt.nr) == (1, 128)


# Floating point and extended state.


def fpu_state() -> uapi.kvm_fpu:
    """Nothing in it has its initial value."""
    fpu = uapi.kvm_fpu(fcw=0x27F, mxcsr=0x1FA0, ftwx=0x03, last_opcode=0x5D8, last_ip=0x1234)
    for i in range(16):
        fpu.xmm[i][:] = [i * 16 + n for n in range(16)]
    fpu.fpr[0][:10] = list(struct.pack("<QH", 1 << 63, 0x3FFF))
    return fpu


@conforms("KVM_GET_FPU", "KVM_SET_FPU")
def test_the_fpu_is_set_but_for_mxcsr(vcpu: int) -> None:
    """Linux neither fills `mxcsr` in nor takes it."""
    first = get(vcpu, uapi.KVM_GET_FPU, uapi.kvm_fpu)
    assert (first.fcw, first.mxcsr) == (0x37F, 0)
    fpu = fpu_state()
    ioctl(vcpu, uapi.KVM_SET_FPU, fpu)
    fpu.mxcsr = 0
    assert bytes(get(vcpu, uapi.KVM_GET_FPU, uapi.kvm_fpu)) == bytes(fpu)
    mxcsr = bytes(get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave))[24:28]
    assert mxcsr == struct.pack("<I", 0x1F80)


@conforms("KVM_GET_XSAVE", "KVM_SET_FPU")
@differs(
    linux=0x37F,
    anykvm=0x27F,
    why="Linux's KVM_SET_FPU does not mark x87 as in use, so that KVM_GET_XSAVE shows its initial"
    " state until the guest has run.",
)
def test_the_xsave_area_after_the_fpu_was_set(vcpu: int, expected: int) -> None:
    ioctl(vcpu, uapi.KVM_SET_FPU, fpu_state())
    area = get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave)
    assert area.region[0] & 0xFFFF == expected


@conforms("KVM_SET_XSAVE", "KVM_GET_XSAVE", "KVM_GET_XSAVE2", "KVM_GET_FPU")
def test_the_xsave_area_holds_the_fpu(machine: Machine, vcpu: int) -> None:
    area = get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave)
    region = bytearray(bytes(area))
    fpu = fpu_state()
    region[0:2], region[4:5] = struct.pack("<H", fpu.fcw), b"\x03"
    region[24:28] = struct.pack("<I", 0x1FA0)
    region[160:416] = bytes(fpu.xmm)
    region[512:520] = struct.pack("<Q", 3)
    ioctl(vcpu, uapi.KVM_SET_XSAVE, uapi.kvm_xsave.from_buffer_copy(bytes(region)))
    found = get(vcpu, uapi.KVM_GET_FPU, uapi.kvm_fpu)
    assert (found.fcw, found.ftwx, bytes(found.xmm)) == (0x27F, 3, bytes(fpu.xmm))
    size = max(machine.require(uapi.KVM_CAP_XSAVE2), 4096)
    again = (ctypes.c_ubyte * size)()
    ioctl(vcpu, uapi.KVM_GET_XSAVE2, again)
    assert bytes(again)[:416] == bytes(region)[:416]
    assert again[512] & 3 == 3
    fails(EFAULT, vcpu, uapi.KVM_GET_XSAVE2, BAD)


@conforms("KVM_SET_XSAVE", "KVM_GET_XSAVE")
def test_components_that_the_guest_cannot_have(vcpu: int) -> None:
    area = get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave)
    area.region[512 // 4 + 1] = 1 << 30  # bit 62 of XSTATE_BV
    fails(EINVAL, vcpu, uapi.KVM_SET_XSAVE, area)


@conforms("KVM_SET_XSAVE", "KVM_GET_XSAVE")
def test_components_not_in_use_are_initialised(vcpu: int) -> None:
    fpu = get(vcpu, uapi.KVM_GET_FPU, uapi.kvm_fpu)
    fpu.xmm[3][0], fpu.fcw = 0x77, 0x27F
    ioctl(vcpu, uapi.KVM_SET_FPU, fpu)
    area = get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave)
    area.region[512 // 4] = 0  # nothing is in use
    ioctl(vcpu, uapi.KVM_SET_XSAVE, area)
    found = bytes(get(vcpu, uapi.KVM_GET_XSAVE, uapi.kvm_xsave))
    assert found[:2] == b"\x7f\x03"
    assert found[160:416] == bytes(256)


@conforms("KVM_GET_XCRS", "KVM_SET_XCRS")
def test_xcr0(machine: Machine, vcpu: int) -> None:
    set_cpuid(machine, vcpu)
    xcrs = get(vcpu, uapi.KVM_GET_XCRS, uapi.kvm_xcrs)
    assert (xcrs.nr_xcrs, xcrs.xcrs[0].xcr, xcrs.xcrs[0].value) == (1, 0, 1)
    xcrs.xcrs[0].value = 3
    ioctl(vcpu, uapi.KVM_SET_XCRS, xcrs)
    assert get(vcpu, uapi.KVM_GET_XCRS, uapi.kvm_xcrs).xcrs[0].value == 3
    for wrong in (0, 2, 1 << 62):
        xcrs.xcrs[0].value = wrong
        fails(EINVAL, vcpu, uapi.KVM_SET_XCRS, xcrs)
    fails(EINVAL, vcpu, uapi.KVM_SET_XCRS, uapi.kvm_xcrs(nr_xcrs=17))
    fails(EINVAL, vcpu, uapi.KVM_SET_XCRS, uapi.kvm_xcrs(flags=1))


@conforms("KVM_GET_DEBUGREGS", "KVM_SET_DEBUGREGS")
def test_debug_registers(vcpu: int) -> None:
    regs = get(vcpu, uapi.KVM_GET_DEBUGREGS, uapi.kvm_debugregs)
    regs.db[:] = [0x1000, 0x2000, 0x3000, 0x4000]
    regs.dr7 = 0x455
    ioctl(vcpu, uapi.KVM_SET_DEBUGREGS, regs)
    assert bytes(get(vcpu, uapi.KVM_GET_DEBUGREGS, uapi.kvm_debugregs)) == bytes(regs)
    for name in ("flags", "dr6", "dr7"):
        wrong = uapi.kvm_debugregs.from_buffer_copy(regs)
        setattr(wrong, name, 1 << 32)
        fails(EINVAL, vcpu, uapi.KVM_SET_DEBUGREGS, wrong)


# CPUID.


def set_cpuid(machine: Machine, vcpu: int) -> int:
    """Give the vCPU all that KVM supports: how many entries."""
    found = cpuid_of(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID)
    ioctl(vcpu, uapi.KVM_SET_CPUID2, flexible(uapi.kvm_cpuid2(nent=len(found)), found))
    return len(found)


@conforms("KVM_SET_CPUID2", "KVM_GET_CPUID2", "KVM_GET_SUPPORTED_CPUID")
def test_a_vcpu_takes_what_is_supported(machine: Machine, vcpu: int) -> None:
    assert cpuid_of(vcpu, uapi.KVM_GET_CPUID2) == []
    count = set_cpuid(machine, vcpu)
    assert len(cpuid_of(vcpu, uapi.KVM_GET_CPUID2)) == count
    fails(E2BIG, vcpu, uapi.KVM_GET_CPUID2, cpuid_table(1))
    fails(EFAULT, vcpu, uapi.KVM_GET_CPUID2, BAD)


@conforms("KVM_SET_CPUID2", "KVM_SET_CPUID")
@pytest.mark.parametrize("cmd", [uapi.KVM_SET_CPUID2, uapi.KVM_SET_CPUID])
def test_cpuid_tables_that_are_too_long_or_not_there(vcpu: int, cmd: int) -> None:
    fails(E2BIG, vcpu, cmd, uapi.kvm_cpuid2(nent=257))
    fails(EFAULT, vcpu, cmd, BAD)
    assert ioctl(vcpu, cmd, uapi.kvm_cpuid2(nent=0)) == 0


@conforms("KVM_SET_CPUID2", "KVM_GET_CPUID2", "KVM_RUN")
def test_cpuid_stays_as_it_is_once_the_guest_ran(machine: Machine) -> None:
    guest = machine.guest(b"\xf4")
    first, other = (
        flexible(uapi.kvm_cpuid2(nent=1), [uapi.kvm_cpuid_entry2(function=0, eax=eax)])
        for eax in (0, 1)
    )
    for table in (first, other, first):
        assert ioctl(guest.vcpu, uapi.KVM_SET_CPUID2, table) == 0
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert ioctl(guest.vcpu, uapi.KVM_SET_CPUID2, first) == 0
    fails(EINVAL, guest.vcpu, uapi.KVM_SET_CPUID2, other)
    fails(EINVAL, guest.vcpu, uapi.KVM_SET_CPUID2, uapi.kvm_cpuid2(nent=0))


@conforms("KVM_SET_CPUID", "KVM_GET_CPUID2", "KVM_RUN")
def test_the_guest_sees_the_vmms_cpuid(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("66b8000000400fa2f4"))  # mov eax, 0x40000000; cpuid; hlt
    entry = uapi.kvm_cpuid_entry(function=0x40000000, eax=1, ebx=2, ecx=3, edx=4)
    ioctl(guest.vcpu, uapi.KVM_SET_CPUID, flexible(uapi.kvm_cpuid(nent=1), [entry]))
    (found,) = cpuid_of(guest.vcpu, uapi.KVM_GET_CPUID2)
    assert (found.function, found.index, found.flags, found.ebx) == (0x40000000, 0, 0, 2)
    guest.run_until(uapi.KVM_EXIT_HLT)
    regs = guest.regs()
    assert (regs.rax, regs.rbx, regs.rcx, regs.rdx) == (1, 2, 3, 4)


# MSRs.


def msrs(*pairs: tuple[int, int]) -> ctypes.Array[ctypes.c_ubyte]:
    return flexible(
        uapi.kvm_msrs(nmsrs=len(pairs)),
        [uapi.kvm_msr_entry(index=index, data=data) for index, data in pairs],
    )


def read_msrs(vcpu: int, *indices: int) -> list[int]:
    raw = msrs(*((index, 0) for index in indices))
    count = ioctl(vcpu, uapi.KVM_GET_MSRS, raw)
    return [e.data for e in entries(raw, uapi.kvm_msrs, uapi.kvm_msr_entry, count)]


@conforms("vCPU:KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_GET_MSR_INDEX_LIST")
def test_every_listed_msr_round_trips(machine: Machine, irqchip_vm: int) -> None:
    vcpu = machine.create_vcpu(irqchip_vm)
    set_cpuid(machine, vcpu)
    listed = msr_list(machine.kvm, uapi.KVM_GET_MSR_INDEX_LIST)
    lost = []
    for index in listed:
        values = read_msrs(vcpu, index)
        if not values or ioctl(vcpu, uapi.KVM_SET_MSRS, msrs((index, values[0]))) != 1:
            lost.append(hex(index))
    assert not lost


@conforms("vCPU:KVM_GET_MSRS", "KVM_SET_MSRS")
def test_msrs_are_done_up_to_the_first_that_refuses(machine: Machine, vcpu: int) -> None:
    set_cpuid(machine, vcpu)
    good, none = (0x174, 0x1234), (0x7FFF_FFFF, 0)
    assert ioctl(vcpu, uapi.KVM_SET_MSRS, msrs(good, none, good)) == 1
    assert read_msrs(vcpu, 0x174, 0x7FFF_FFFF, 0x174) == [0x1234]
    assert ioctl(vcpu, uapi.KVM_SET_MSRS, msrs((0xC0000102, 1 << 62))) == 0, "not canonical"
    assert ioctl(vcpu, uapi.KVM_SET_MSRS, uapi.kvm_msrs(nmsrs=0)) == 0


@conforms("vCPU:KVM_GET_MSRS", "KVM_SET_MSRS")
@pytest.mark.parametrize("cmd", [uapi.KVM_GET_MSRS, uapi.KVM_SET_MSRS])
def test_too_many_msrs(vcpu: int, cmd: int) -> None:
    fails(E2BIG, vcpu, cmd, uapi.kvm_msrs(nmsrs=257))
    fails(EFAULT, vcpu, cmd, BAD)


@conforms("vCPU:KVM_GET_MSRS", "KVM_SET_MSRS", "KVM_RUN")
def test_the_guest_reads_what_the_vmm_has_written(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("66b9750100000f32f4"))  # mov ecx, 0x175; rdmsr; hlt
    ioctl(guest.vcpu, uapi.KVM_SET_MSRS, msrs((0x175, 0x1234_5678)))
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax == 0x1234_5678


# Time.


@conforms("vCPU:KVM_GET_TSC_KHZ", "vCPU:KVM_SET_TSC_KHZ")
def test_the_frequency_can_be_set_to_what_it_is(vcpu: int) -> None:
    khz = ioctl(vcpu, uapi.KVM_GET_TSC_KHZ)
    assert khz > 100_000
    assert ioctl(vcpu, uapi.KVM_SET_TSC_KHZ, khz) == 0
    assert ioctl(vcpu, uapi.KVM_SET_TSC_KHZ, 0) == 0
    assert ioctl(vcpu, uapi.KVM_GET_TSC_KHZ) == khz


@conforms("KVM_KVMCLOCK_CTRL")
def test_a_guest_without_kvmclock_cannot_be_told(vcpu: int) -> None:
    fails(EINVAL, vcpu, uapi.KVM_KVMCLOCK_CTRL)


@conforms("KVM_KVMCLOCK_CTRL", "KVM_SET_MSRS", "KVM_RUN")
def test_a_guest_with_kvmclock_is_told_that_it_was_stopped(machine: Machine) -> None:
    guest = machine.guest(b"\xf4")
    set_cpuid(machine, guest.vcpu)
    ioctl(guest.vcpu, uapi.KVM_SET_MSRS, msrs((0x4B564D01, 0x3000 | 1)))
    assert ioctl(guest.vcpu, uapi.KVM_KVMCLOCK_CTRL) == 0
    guest.run_until(uapi.KVM_EXIT_HLT)
    stopped = 2
    version = guest.word(0x3000)
    assert version
    assert not version & 1
    assert guest.read(0x3000 + 29, 1)[0] & stopped


def attr(group: int, name: int, value: ctypes.c_uint64 | None = None) -> uapi.kvm_device_attr:
    address = ctypes.addressof(value) if value is not None else BAD
    return uapi.kvm_device_attr(group=group, attr=name, addr=address)


@conforms("vCPU:KVM_HAS_DEVICE_ATTR", "vCPU:KVM_GET_DEVICE_ATTR", "vCPU:KVM_SET_DEVICE_ATTR")
@host_may_differ("a KVM without VT or SVM cannot offset the TSC")
def test_the_offset_of_the_tsc_is_an_attribute(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_VCPU_ATTRIBUTES)
    value = ctypes.c_uint64()
    offset = attr(uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET, value)
    assert ioctl(vcpu, uapi.KVM_HAS_DEVICE_ATTR, offset) == 0
    assert ioctl(vcpu, uapi.KVM_GET_DEVICE_ATTR, offset) == 0
    before = value.value
    value.value = (before + (1 << 40)) % (1 << 64)
    assert ioctl(vcpu, uapi.KVM_SET_DEVICE_ATTR, offset) == 0
    wanted, value.value = value.value, 0
    ioctl(vcpu, uapi.KVM_GET_DEVICE_ATTR, offset)
    assert value.value == wanted


@conforms("vCPU:KVM_HAS_DEVICE_ATTR", "vCPU:KVM_GET_DEVICE_ATTR", "vCPU:KVM_SET_DEVICE_ATTR")
@pytest.mark.parametrize(
    "cmd", [uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR, uapi.KVM_SET_DEVICE_ATTR]
)
def test_attributes_that_a_vcpu_has_not(vcpu: int, cmd: int) -> None:
    fails(ENXIO, vcpu, cmd, attr(uapi.KVM_VCPU_TSC_CTRL, 7))
    fails(EFAULT, vcpu, cmd, BAD)
    if cmd != uapi.KVM_HAS_DEVICE_ATTR:
        fails(EFAULT, vcpu, cmd, attr(uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET))


@conforms("vCPU:KVM_HAS_DEVICE_ATTR")
def test_groups_of_attributes_that_a_vcpu_has_not(vcpu: int) -> None:
    fails(ENXIO, vcpu, uapi.KVM_HAS_DEVICE_ATTR, attr(9, 0))


@conforms("KVM_X86_SETUP_MCE")
def test_machine_checks_are_set_up_within_what_is_supported(machine: Machine, vcpu: int) -> None:
    banks = machine.require(uapi.KVM_CAP_MCE)
    cap = get(machine.kvm, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.c_uint64).value
    fails(EINVAL, vcpu, uapi.KVM_X86_SETUP_MCE, ctypes.c_uint64(cap & ~0xFF))
    fails(EINVAL, vcpu, uapi.KVM_X86_SETUP_MCE, ctypes.c_uint64(cap & ~0xFF | banks + 1))
    fails(EINVAL, vcpu, uapi.KVM_X86_SETUP_MCE, ctypes.c_uint64(1 << 40 | 10))
    fails(EFAULT, vcpu, uapi.KVM_X86_SETUP_MCE, BAD)
    wanted = cap & ~0xFF | 10
    assert ioctl(vcpu, uapi.KVM_X86_SETUP_MCE, ctypes.c_uint64(wanted)) == 0
    assert read_msrs(vcpu, 0x179) == [wanted]
