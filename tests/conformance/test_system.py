"""/dev/kvm: KVM's version, capabilities, CPUID and MSRs (api.rst 4.1 to 4.6, 4.46, 4.88, 4.103)."""

from __future__ import annotations

import ctypes
import os
from errno import E2BIG, EFAULT, EINVAL, ENOTTY, ENXIO, EOPNOTSUPP

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, differs, host_may_differ
from .machine import BAD, Machine, entries, errno_of, fails, flexible, get, ioctl

PAGE = 4096
NO_SUCH = 0xAEFE
MSR_PLATFORM_INFO, MSR_IA32_TSC = 0xCE, 0x10


def msr_list(fd: int, cmd: int) -> list[int]:
    """The indices of an MSR list, by the protocol of E2BIG."""
    header = uapi.kvm_msr_list()
    fails(E2BIG, fd, cmd, header)
    raw = flexible(header, [ctypes.c_uint32()] * header.nmsrs)
    ioctl(fd, cmd, raw)
    return list(entries(raw, uapi.kvm_msr_list, ctypes.c_uint32, header.nmsrs))


def cpuid_table(room: int) -> ctypes.Array[ctypes.c_ubyte]:
    return flexible(uapi.kvm_cpuid2(nent=room), [uapi.kvm_cpuid_entry2()] * room)


def cpuid_of(fd: int, cmd: int, room: int = 256) -> list[uapi.kvm_cpuid_entry2]:
    """What a CPUID ioctl gives where there is room."""
    raw = cpuid_table(room)
    ioctl(fd, cmd, raw)
    count = uapi.kvm_cpuid2.from_buffer(raw).nent
    return list(entries(raw, uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, count))


@conforms("KVM_GET_API_VERSION")
def test_the_version_is_12_for_good(kvm: int) -> None:
    assert ioctl(kvm, uapi.KVM_GET_API_VERSION) == uapi.KVM_API_VERSION == 12
    fails(EINVAL, kvm, uapi.KVM_GET_API_VERSION, 1)


@conforms("KVM_CREATE_VM")
def test_a_vm_is_a_descriptor_closed_on_exec(machine: Machine, kvm: int) -> None:
    vm, other = machine.create_vm(), machine.create_vm()
    assert vm != other
    assert "kvm-vm" in os.readlink(f"/proc/self/fd/{vm}")
    assert not os.get_inheritable(vm)


@conforms("KVM_CREATE_VM")
def test_a_vm_has_no_other_type(kvm: int) -> None:
    fails(EINVAL, kvm, uapi.KVM_CREATE_VM, 1 << 40)


@conforms("KVM_CREATE_VM")
def test_the_device_may_be_closed_before_its_vm(machine: Machine) -> None:
    kvm = machine.open()
    vm = machine.keep(ioctl(kvm, uapi.KVM_CREATE_VM))
    machine.close(kvm)
    machine.create_vcpu(vm)


@conforms("system:KVM_CHECK_EXTENSION", "VM:KVM_CHECK_EXTENSION")
@pytest.mark.parametrize(
    ("cap", "value"),
    [
        (uapi.KVM_CAP_USER_MEMORY, 1),
        (uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS, 1),
        (uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS, 1),
        (uapi.KVM_CAP_INTERNAL_ERROR_DATA, 1),
        (uapi.KVM_CAP_IRQCHIP, 1),
        (uapi.KVM_CAP_HLT, 1),
        (uapi.KVM_CAP_SET_TSS_ADDR, 1),
        (uapi.KVM_CAP_EXT_CPUID, 1),
        (uapi.KVM_CAP_NOP_IO_DELAY, 1),
        (uapi.KVM_CAP_MP_STATE, 1),
        (uapi.KVM_CAP_COALESCED_MMIO, uapi.KVM_COALESCED_MMIO_PAGE_OFFSET),
        (uapi.KVM_CAP_COALESCED_PIO, 1),
        (uapi.KVM_CAP_SYNC_MMU, 1),
        (uapi.KVM_CAP_USER_NMI, 1),
        (uapi.KVM_CAP_REINJECT_CONTROL, 1),
        (uapi.KVM_CAP_IRQ_INJECT_STATUS, 1),
        (uapi.KVM_CAP_IRQ_ROUTING, 4096),
        (uapi.KVM_CAP_PIT2, 1),
        (uapi.KVM_CAP_PIT_STATE2, 1),
        (uapi.KVM_CAP_IOEVENTFD, 1),
        (uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH, 1),
        (uapi.KVM_CAP_IOEVENTFD_NO_LENGTH, 1),
        (uapi.KVM_CAP_IRQFD, 1),
        (uapi.KVM_CAP_IRQFD_RESAMPLE, 1),
        (uapi.KVM_CAP_SIGNAL_MSI, 1),
        (uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR, 1),
        (uapi.KVM_CAP_VCPU_EVENTS, 1),
        (uapi.KVM_CAP_XSAVE, 1),
        (uapi.KVM_CAP_DEBUGREGS, 1),
        (uapi.KVM_CAP_KVMCLOCK_CTRL, 1),
        (uapi.KVM_CAP_READONLY_MEM, 1),
        (uapi.KVM_CAP_TSC_DEADLINE_TIMER, 1),
        (uapi.KVM_CAP_CHECK_EXTENSION_VM, 1),
        (uapi.KVM_CAP_IMMEDIATE_EXIT, 1),
        (uapi.KVM_CAP_SPLIT_IRQCHIP, 1),
        (uapi.KVM_CAP_SREGS2, 1),
        (uapi.KVM_CAP_STEAL_TIME, 1),
        (uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1),
        (uapi.KVM_CAP_SYNC_REGS, uapi.KVM_SYNC_X86_VALID_FIELDS),
        (uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
    ],
)
def test_a_capability_has_its_value_on_both_descriptors(
    kvm: int, vm: int, cap: int, value: int
) -> None:
    assert ioctl(kvm, uapi.KVM_CHECK_EXTENSION, cap) == value
    assert ioctl(vm, uapi.KVM_CHECK_EXTENSION, cap) == value


@conforms("system:KVM_CHECK_EXTENSION", "VM:KVM_CHECK_EXTENSION")
@pytest.mark.parametrize("cap", [5, 99999, 1 << 40, (1 << 64) - 1])
def test_a_capability_that_nobody_knows_is_0(kvm: int, vm: int, cap: int) -> None:
    assert ioctl(kvm, uapi.KVM_CHECK_EXTENSION, cap) == 0
    assert ioctl(vm, uapi.KVM_CHECK_EXTENSION, cap) == 0


@conforms("system:KVM_CHECK_EXTENSION")
def test_the_limits_of_a_vm_are_ordered(kvm: int) -> None:
    recommended, most, ids = (
        ioctl(kvm, uapi.KVM_CHECK_EXTENSION, cap)
        for cap in (uapi.KVM_CAP_NR_VCPUS, uapi.KVM_CAP_MAX_VCPUS, uapi.KVM_CAP_MAX_VCPU_ID)
    )
    assert 1 <= recommended <= most <= ids
    assert ioctl(kvm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS) >= 509


@conforms("KVM_GET_VCPU_MMAP_SIZE")
def test_a_vcpu_maps_its_run_its_data_and_its_ring(kvm: int) -> None:
    assert ioctl(kvm, uapi.KVM_GET_VCPU_MMAP_SIZE) == 3 * PAGE
    fails(EINVAL, kvm, uapi.KVM_GET_VCPU_MMAP_SIZE, 1)


@conforms("KVM_GET_SUPPORTED_CPUID")
def test_supported_cpuid_has_the_basic_leaves(kvm: int) -> None:
    found = {e.function: e for e in cpuid_of(kvm, uapi.KVM_GET_SUPPORTED_CPUID)}
    assert {0, 1, 7, 0xD, 0x40000000, 0x40000001, 0x80000000, 0x80000001, 0x80000008} <= set(found)
    assert found[0].eax >= 0xD
    assert found[1].edx & 1  # an FPU
    signature = found[0x40000000]
    assert bytes(ctypes.c_uint32(signature.ebx)) == b"KVMK"


@conforms("KVM_GET_SUPPORTED_CPUID", "KVM_GET_EMULATED_CPUID")
@pytest.mark.parametrize("cmd", [uapi.KVM_GET_SUPPORTED_CPUID, uapi.KVM_GET_EMULATED_CPUID])
def test_too_little_room_for_cpuid_is_e2big(kvm: int, cmd: int) -> None:
    count = len(cpuid_of(kvm, cmd))
    assert len(cpuid_of(kvm, cmd, count + 8)) == count
    raw = cpuid_table(1)
    uapi.kvm_cpuid2.from_buffer(raw).nent = 0
    fails(E2BIG, kvm, cmd, raw)
    fails(EFAULT, kvm, cmd, BAD)


@conforms("KVM_GET_EMULATED_CPUID")
@differs(linux=1, anykvm=0, why="Every instruction is emulated; MOVBE is as fast as others.")
def test_movbe_is_emulated(kvm: int, expected: int) -> None:
    found = {e.function: e for e in cpuid_of(kvm, uapi.KVM_GET_EMULATED_CPUID)}
    assert 0 in found
    assert (found[1].ecx >> 22 & 1 if 1 in found else 0) == expected


@conforms("KVM_GET_MSR_INDEX_LIST")
def test_the_msr_list_tells_its_length_and_its_indices(kvm: int) -> None:
    found = msr_list(kvm, uapi.KVM_GET_MSR_INDEX_LIST)
    assert len(found) == len(set(found))
    assert {MSR_IA32_TSC, 0x174, 0x175, 0x176, 0x277, 0xC0000081, 0x4B564D00, 0x4B564D01} <= set(
        found
    )
    fails(EFAULT, kvm, uapi.KVM_GET_MSR_INDEX_LIST, BAD)


@conforms("KVM_GET_MSR_FEATURE_INDEX_LIST", "system:KVM_GET_MSRS")
def test_every_feature_msr_can_be_read(kvm: int) -> None:
    found = msr_list(kvm, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST)
    assert found
    raw = flexible(
        uapi.kvm_msrs(nmsrs=len(found)), [uapi.kvm_msr_entry(index=index) for index in found]
    )
    assert ioctl(kvm, uapi.KVM_GET_MSRS, raw) == len(found)
    fails(EFAULT, kvm, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST, BAD)


@conforms("system:KVM_GET_MSRS")
def test_reading_feature_msrs_ends_at_one_that_is_none(kvm: int) -> None:
    listed = msr_list(kvm, uapi.KVM_GET_MSR_FEATURE_INDEX_LIST)[0]
    wanted = [uapi.kvm_msr_entry(index=index) for index in (listed, 0x7FFF_FFFF, listed)]
    assert ioctl(kvm, uapi.KVM_GET_MSRS, flexible(uapi.kvm_msrs(nmsrs=3), wanted)) == 1
    fails(E2BIG, kvm, uapi.KVM_GET_MSRS, uapi.kvm_msrs(nmsrs=257))
    fails(EFAULT, kvm, uapi.KVM_GET_MSRS, BAD)


@conforms("KVM_X86_GET_MCE_CAP_SUPPORTED")
def test_machine_check_features(kvm: int) -> None:
    cap = get(kvm, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.c_uint64).value
    mcg_ctl_p, mcg_ser_p = 1 << 8, 1 << 24
    assert cap & mcg_ctl_p
    assert cap & mcg_ser_p
    assert not cap & 0xFF, "the banks are KVM_CAP_MCE's"
    fails(EFAULT, kvm, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, BAD)


@conforms("system:KVM_HAS_DEVICE_ATTR", "system:KVM_GET_DEVICE_ATTR")
def test_the_components_of_extended_state(machine: Machine, kvm: int) -> None:
    machine.require(uapi.KVM_CAP_SYS_ATTRIBUTES)
    value = ctypes.c_uint64()
    attr = uapi.kvm_device_attr(attr=uapi.KVM_X86_XCOMP_GUEST_SUPP, addr=ctypes.addressof(value))
    assert ioctl(kvm, uapi.KVM_HAS_DEVICE_ATTR, attr) == 0
    assert ioctl(kvm, uapi.KVM_GET_DEVICE_ATTR, attr) == 0
    assert value.value & 3 == 3, "x87 and SSE"
    attr.addr = BAD
    fails(EFAULT, kvm, uapi.KVM_GET_DEVICE_ATTR, attr)


@conforms("system:KVM_HAS_DEVICE_ATTR", "system:KVM_GET_DEVICE_ATTR")
@pytest.mark.parametrize("cmd", [uapi.KVM_HAS_DEVICE_ATTR, uapi.KVM_GET_DEVICE_ATTR])
def test_attributes_that_the_device_has_not(kvm: int, cmd: int) -> None:
    fails(ENXIO, kvm, cmd, uapi.kvm_device_attr(attr=99))
    fails(EFAULT, kvm, cmd, BAD)


@conforms("system:KVM_HAS_DEVICE_ATTR")
@host_may_differ("a group other than 0 is EINVAL since Linux 6.11")
def test_the_device_has_one_group_of_attributes(kvm: int) -> None:
    fails(ENXIO, kvm, uapi.KVM_HAS_DEVICE_ATTR, uapi.kvm_device_attr(group=7))


@conforms("KVM_GET_API_VERSION", "KVM_CREATE_VCPU", "KVM_RUN")
def test_a_number_that_a_descriptor_does_not_know(kvm: int, vm: int, vcpu: int) -> None:
    """ENOTTY is a VM's answer, EINVAL that of x86's /dev/kvm and vCPUs."""
    for number in (NO_SUCH, uapi.KVM_S390_STORE_STATUS, uapi.KVM_ASSIGN_PCI_DEVICE):
        fails(EINVAL, kvm, number)
        fails(ENOTTY, vm, number)
        fails(EINVAL, vcpu, number)
    fails(EINVAL, kvm, uapi.KVM_RUN)
    fails(ENOTTY, vm, uapi.KVM_RUN)
    fails(ENOTTY, vm, uapi.KVM_CREATE_VM)
    fails(EINVAL, vcpu, uapi.KVM_CREATE_VCPU)


@conforms("KVM_GET_API_VERSION")
@host_may_differ("the numbers of KVM's own tracing went away after Linux 6.1: EINVAL")
def test_the_numbers_of_tracing_are_refused(kvm: int) -> None:
    for number in (uapi.KVM_TRACE_ENABLE, uapi.KVM_TRACE_PAUSE, uapi.KVM_TRACE_DISABLE):
        assert errno_of(kvm, number) == EOPNOTSUPP


@conforms("system:KVM_CHECK_EXTENSION")
@differs(
    linux=True,
    anykvm=False,
    why="What is not built in: asynchronous page faults, memory encryption.",
)
@host_may_differ("they depend on the processor and the kernel's configuration")
@pytest.mark.parametrize(
    "cap",
    [
        uapi.KVM_CAP_ASYNC_PF,
        uapi.KVM_CAP_ASYNC_PF_INT,
        uapi.KVM_CAP_VM_COPY_ENC_CONTEXT_FROM,
        uapi.KVM_CAP_VM_MOVE_ENC_CONTEXT_FROM,
    ],
)
def test_capabilities_of_what_is_not_built_in(kvm: int, cap: int, expected: bool) -> None:
    assert bool(ioctl(kvm, uapi.KVM_CHECK_EXTENSION, cap)) == expected


@conforms("system:KVM_CHECK_EXTENSION", "KVM_CREATE_VCPU")
@differs(linux=1024, anykvm=255, why="Every APIC ID fits the eight bits of an xAPIC.")
@host_may_differ("the kernel's configuration decides")
def test_how_many_vcpus_a_vm_may_have(kvm: int, expected: int) -> None:
    assert ioctl(kvm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_MAX_VCPUS) == expected


@conforms("KVM_CREATE_VM")
@differs(
    linux="anon_inode:kvm-vm",
    anykvm="/memfd:kvm-vm (deleted)",
    why="Descriptors are memfds, which any process can be given, and /proc shows them so.",
)
def test_how_a_vms_descriptor_looks_in_proc(vm: int, expected: str) -> None:
    assert os.readlink(f"/proc/self/fd/{vm}") == expected
