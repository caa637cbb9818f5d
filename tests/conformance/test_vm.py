"""The descriptor of a VM: vCPUs, addresses, clock, capabilities, MSR filter (api.rst section 4)."""

from __future__ import annotations

import ctypes
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EBADF, EBUSY, EEXIST, EFAULT, EINVAL, EMFILE, ENODEV, ENOTTY

import pytest

from anykvm import fs
from anykvm.uapi import kvm as uapi

from .framework import conforms, differs, host_may_differ
from .machine import BAD, Machine, enable_cap, errno_of, fails, get, ioctl

PAGE = 4096
OUT = bytes.fromhex("e610f4")  # out 0x10, al; hlt


def u64(value: int) -> ctypes.c_uint64:
    return ctypes.c_uint64(value)


# vCPUs.


@conforms("KVM_CREATE_VCPU")
def test_a_vcpu_is_a_descriptor_named_by_its_number(machine: Machine, vm: int) -> None:
    for number in (0, 3, 2):
        vcpu = machine.create_vcpu(vm, number)
        assert f"kvm-vcpu:{number}" in os.readlink(f"/proc/self/fd/{vcpu}")
        assert not os.get_inheritable(vcpu)


@conforms("KVM_CREATE_VCPU")
def test_a_number_is_used_once_and_within_limits(machine: Machine, vm: int) -> None:
    most = ioctl(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_MAX_VCPU_ID)
    vcpu = machine.create_vcpu(vm, 0)
    fails(EEXIST, vm, uapi.KVM_CREATE_VCPU, 0)
    machine.close(vcpu)
    fails(EEXIST, vm, uapi.KVM_CREATE_VCPU, 0)
    for number in (most, 1 << 31, (1 << 32) - 1):
        fails(EINVAL, vm, uapi.KVM_CREATE_VCPU, number)


@conforms("KVM_CREATE_VCPU")
def test_a_vcpu_outlives_the_vms_descriptor(machine: Machine) -> None:
    vm = machine.create_vm()
    vcpu = machine.create_vcpu(vm)
    machine.close(vm)
    assert get(vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs).rip == 0xFFF0
    fails(EBADF, vm, uapi.KVM_CREATE_VCPU, 1)


@conforms("KVM_SET_BOOT_CPU_ID")
def test_the_boot_processor_has_bsp_in_its_apic_base(machine: Machine) -> None:
    vm = machine.create_vm()
    ioctl(vm, uapi.KVM_CREATE_IRQCHIP)
    ioctl(vm, uapi.KVM_SET_BOOT_CPU_ID, 1)
    bases = [
        get(machine.create_vcpu(vm, n), uapi.KVM_GET_SREGS, uapi.kvm_sregs).apic_base
        for n in (0, 1)
    ]
    assert [base >> 8 & 1 for base in bases] == [0, 1]
    fails(EBUSY, vm, uapi.KVM_SET_BOOT_CPU_ID, 0)


# Addresses.


@conforms("KVM_SET_TSS_ADDR")
def test_the_tss_needs_three_pages_below_4_gib(vm: int) -> None:
    assert ioctl(vm, uapi.KVM_SET_TSS_ADDR, 0xFFFBD000) == 0
    assert ioctl(vm, uapi.KVM_SET_TSS_ADDR, 0) == 0
    fails(EINVAL, vm, uapi.KVM_SET_TSS_ADDR, 0xFFFFFFFF)
    fails(EINVAL, vm, uapi.KVM_SET_TSS_ADDR, 0xFFFFD001)


@conforms("KVM_SET_IDENTITY_MAP_ADDR")
def test_the_identity_map_comes_before_the_vcpus(machine: Machine, vm: int) -> None:
    assert ioctl(vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, u64(0xFEFFC000)) == 0
    assert ioctl(vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, u64(0)) == 0
    fails(EFAULT, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, BAD)
    machine.create_vcpu(vm)
    fails(EINVAL, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, u64(0))
    fails(EINVAL, vm, uapi.KVM_SET_IDENTITY_MAP_ADDR, BAD)


@conforms("KVM_SET_NR_MMU_PAGES")
def test_there_are_at_least_64_shadow_pages(vm: int) -> None:
    assert ioctl(vm, uapi.KVM_SET_NR_MMU_PAGES, 64) == 0
    fails(EINVAL, vm, uapi.KVM_SET_NR_MMU_PAGES, 63)


@conforms("KVM_GET_NR_MMU_PAGES")
@host_may_differ("KVM_GET_NR_MMU_PAGES went away in Linux 6.4")
def test_the_number_of_shadow_pages_is_what_was_set(vm: int) -> None:
    ioctl(vm, uapi.KVM_SET_NR_MMU_PAGES, 1234)
    assert ioctl(vm, uapi.KVM_GET_NR_MMU_PAGES) == 1234


# Time.


@conforms("KVM_GET_CLOCK", "KVM_SET_CLOCK")
def test_the_clock_goes_on_from_where_it_is_set(vm: int) -> None:
    ioctl(vm, uapi.KVM_SET_CLOCK, uapi.kvm_clock_data(clock=10**15))
    first = get(vm, uapi.KVM_GET_CLOCK, uapi.kvm_clock_data).clock
    time.sleep(0.02)
    second = get(vm, uapi.KVM_GET_CLOCK, uapi.kvm_clock_data).clock
    assert 10**15 <= first < second
    assert second - first >= 19_000_000
    assert second - 10**15 < 8 * 10**9


@conforms("KVM_GET_CLOCK")
def test_the_clocks_flags_are_what_the_capability_says(machine: Machine, vm: int) -> None:
    known = machine.require(uapi.KVM_CAP_ADJUST_CLOCK)
    data = get(vm, uapi.KVM_GET_CLOCK, uapi.kvm_clock_data)
    assert not data.flags & ~known
    if data.flags & uapi.KVM_CLOCK_REALTIME:
        assert abs(data.realtime - time.time_ns()) < 10**9


@conforms("KVM_SET_CLOCK")
def test_the_clock_advances_by_the_real_time_since_it_was_read(machine: Machine, vm: int) -> None:
    if not machine.require(uapi.KVM_CAP_ADJUST_CLOCK) & uapi.KVM_CLOCK_REALTIME:
        return
    hour = 3600 * 10**9
    old = uapi.kvm_clock_data(
        clock=10**12, flags=uapi.KVM_CLOCK_REALTIME, realtime=time.time_ns() - hour
    )
    ioctl(vm, uapi.KVM_SET_CLOCK, old)
    now = get(vm, uapi.KVM_GET_CLOCK, uapi.kvm_clock_data).clock
    assert 0 <= now - 10**12 - hour < 8 * 10**9


@conforms("KVM_GET_CLOCK", "KVM_SET_CLOCK")
def test_bad_clocks(vm: int) -> None:
    fails(EINVAL, vm, uapi.KVM_SET_CLOCK, uapi.kvm_clock_data(flags=1 << 30))
    fails(EFAULT, vm, uapi.KVM_SET_CLOCK, BAD)
    fails(EFAULT, vm, uapi.KVM_GET_CLOCK, BAD)


# Capabilities that are switched on.


@conforms("VM:KVM_ENABLE_CAP")
@pytest.mark.parametrize("cap", [uapi.KVM_CAP_USER_MEMORY, uapi.KVM_CAP_NR_MEMSLOTS, 9999])
def test_what_is_always_on_cannot_be_enabled(vm: int, cap: int) -> None:
    fails(EINVAL, vm, uapi.KVM_ENABLE_CAP, enable_cap(cap))
    fails(EFAULT, vm, uapi.KVM_ENABLE_CAP, BAD)


@conforms("VM:KVM_ENABLE_CAP")
@pytest.mark.parametrize(
    ("cap", "good", "wrong"),
    [
        (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3, 4),
        (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 0, 2),
        (uapi.KVM_CAP_X2APIC_API, 3, 1 << 10),
        (uapi.KVM_CAP_X86_USER_SPACE_MSR, 7, 1 << 10),
        (uapi.KVM_CAP_DISABLE_QUIRKS2, 1, 1 << 20),
        (uapi.KVM_CAP_SPLIT_IRQCHIP, 24, 4097),
    ],
)
def test_arguments_of_a_capability(
    machine: Machine, vm: int, cap: int, good: int, wrong: int
) -> None:
    machine.require(cap)
    fails(EINVAL, vm, uapi.KVM_ENABLE_CAP, enable_cap(cap, wrong))
    fails(EINVAL, vm, uapi.KVM_ENABLE_CAP, enable_cap(cap, good, flags=1))
    assert machine.enable_cap(vm, cap, good) == 0


@conforms("VM:KVM_ENABLE_CAP")
@pytest.mark.parametrize(
    "cap", [uapi.KVM_CAP_EXCEPTION_PAYLOAD, uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT]
)
def test_a_capability_that_is_on_or_off(machine: Machine, vm: int, cap: int) -> None:
    machine.require(cap)
    assert machine.enable_cap(vm, cap, 1) == 0
    assert machine.enable_cap(vm, cap, 0) == 0


@conforms("VM:KVM_ENABLE_CAP", "KVM_CREATE_IRQCHIP")
def test_a_split_irqchip_is_an_irqchip(machine: Machine) -> None:
    split, full, late = (machine.create_vm() for _ in range(3))
    machine.enable_cap(split, uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
    fails(EEXIST, split, uapi.KVM_CREATE_IRQCHIP)
    fails(EEXIST, split, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    ioctl(full, uapi.KVM_CREATE_IRQCHIP)
    fails(EEXIST, full, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_SPLIT_IRQCHIP, 24))
    machine.create_vcpu(late)
    fails(EEXIST, late, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_SPLIT_IRQCHIP, 24))


# Devices.


@conforms("KVM_CREATE_DEVICE")
def test_a_device_of_no_type(vm: int) -> None:
    fails(ENODEV, vm, uapi.KVM_CREATE_DEVICE, uapi.kvm_create_device(type=99))
    fails(EFAULT, vm, uapi.KVM_CREATE_DEVICE, BAD)


@conforms("KVM_CREATE_DEVICE")
@differs(
    linux=0,
    anykvm=ENODEV,
    why="There is no VFIO: no device of the host to assign.",
    errnos=True,
)
def test_the_device_that_stands_for_vfio(vm: int, expected: int) -> None:
    wanted = uapi.kvm_create_device(type=uapi.KVM_DEV_TYPE_VFIO, flags=uapi.KVM_CREATE_DEVICE_TEST)
    assert errno_of(vm, uapi.KVM_CREATE_DEVICE, wanted) == expected


# The MSR filter.


def msr_filter(
    flags: int, *ranges: tuple[int, int, int, ctypes.Array[ctypes.c_ubyte] | None]
) -> uapi.kvm_msr_filter:
    """Ranges are (flags, base, number of MSRs, bitmap)."""
    made = uapi.kvm_msr_filter(flags=flags)
    for slot, (access, base, count, bitmap) in zip(made.ranges, ranges, strict=False):
        slot.flags, slot.base, slot.nmsrs = access, base, count
        slot.bitmap = BAD if bitmap is None else ctypes.addressof(bitmap)
    return made


@conforms("KVM_X86_SET_MSR_FILTER")
def test_msr_filters_that_are_none(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_X86_MSR_FILTER)
    bitmap = (ctypes.c_ubyte * 0x1000)()
    read = uapi.KVM_MSR_FILTER_READ
    for wrong in (
        msr_filter(2),
        msr_filter(uapi.KVM_MSR_FILTER_DEFAULT_DENY),
        msr_filter(0, (4, 0, 8, bitmap)),
        msr_filter(0, (read, 0, 0x600 * 8 + 1, bitmap)),
    ):
        fails(EINVAL, vm, uapi.KVM_X86_SET_MSR_FILTER, wrong)
    fails(EFAULT, vm, uapi.KVM_X86_SET_MSR_FILTER, msr_filter(0, (read, 0, 8, None)))
    fails(EFAULT, vm, uapi.KVM_X86_SET_MSR_FILTER, BAD)
    assert ioctl(vm, uapi.KVM_X86_SET_MSR_FILTER, msr_filter(0, (3, 0x10, 8, bitmap))) == 0
    assert ioctl(vm, uapi.KVM_X86_SET_MSR_FILTER, msr_filter(0)) == 0


RDMSR = bytes.fromhex("66b91b0000000f32f4")  # mov ecx, 0x1b; rdmsr; hlt


@conforms("KVM_X86_SET_MSR_FILTER", "VM:KVM_ENABLE_CAP", "KVM_RUN")
def test_a_filtered_msr_goes_to_the_vmm(machine: Machine, vm: int) -> None:
    machine.enable_cap(vm, uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_FILTER)
    denied = (ctypes.c_ubyte * 8)()
    ioctl(vm, uapi.KVM_X86_SET_MSR_FILTER, msr_filter(0, (1, 0x1B, 1, denied)))
    guest = machine.guest(RDMSR)
    guest.run_until(uapi.KVM_EXIT_X86_RDMSR)
    msr = guest.kvm_run.msr
    assert (msr.index, msr.reason) == (0x1B, uapi.KVM_MSR_EXIT_REASON_FILTER)
    msr.data, msr.error = 0x1234_0000_5678, 0
    guest.run_until(uapi.KVM_EXIT_HLT)
    regs = guest.regs()
    assert (regs.rax, regs.rdx) == (0x5678, 0x1234)


@conforms("KVM_CREATE_VM")
def test_a_vm_is_no_stream(vm: int) -> None:
    with pytest.raises(OSError, match=f"Errno {EINVAL}]"):
        fs.read(vm, 1)
    fails(ENOTTY, vm, 0x5401)  # TCGETS


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Opening anything is EMFILE."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@conforms("KVM_CREATE_VM", "KVM_CREATE_VCPU")
def test_no_descriptor_is_free(machine: Machine, kvm: int, vm: int) -> None:
    with no_descriptor_left():
        found = errno_of(kvm, uapi.KVM_CREATE_VM), errno_of(vm, uapi.KVM_CREATE_VCPU, 0)
    assert found == (EMFILE, EMFILE)
    assert machine.create_vm() > 0
    machine.create_vcpu(vm, 0)
