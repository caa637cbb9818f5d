"""What guests that know they are guests use: KVM's paravirtual features and Hyper-V's (api.rst
4.37, 4.113, 4.118; msr.rst; hypercalls.rst).
"""

from __future__ import annotations

import os
import struct
from errno import E2BIG, EBADF, EEXIST, EFAULT, EINVAL, ENOENT

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import BAD, Guest, Machine, entries, fails, flexible, ioctl
from .test_state import msrs, read_msrs, set_cpuid

SYSTEM_TIME_NEW, STEAL_TIME, PV_EOI_EN, POLL_CONTROL = (0x4B564D00 + n for n in (1, 3, 4, 5))
PV_MSRS = (0x11, 0x12, 0x4B564D00, SYSTEM_TIME_NEW, STEAL_TIME, PV_EOI_EN, POLL_CONTROL)
HV_GUEST_OS_ID, HV_HYPERCALL, HV_VP_INDEX, HV_SCONTROL = (
    0x40000000,
    0x40000001,
    0x40000002,
    0x40000080,
)
HV_TIME_REF_COUNT, HV_CRASH_P0 = 0x40000020, 0x40000100
VMCALL_HLT = bytes.fromhex("0f01c1f4")
POLL_IRQ, MAP_GPA_RANGE, UNKNOWN = 1, 12, 0x1234
ENOSYS, KVM_EINVAL = 1000, 22
HV_LEAVES = 10
HV_SIGNATURE = 0x31237648


def cap(number: int, *args: int, flags: int = 0) -> uapi.kvm_enable_cap:
    made = uapi.kvm_enable_cap(cap=number, flags=flags)
    made.args[: len(args)] = args
    return made


def set_msr(vcpu: int, index: int, value: int) -> bool:
    return ioctl(vcpu, uapi.KVM_SET_MSRS, msrs((index, value))) == 1


@conforms("vCPU:KVM_ENABLE_CAP")
def test_a_vcpus_capabilities(vcpu: int) -> None:
    fails(EINVAL, vcpu, uapi.KVM_ENABLE_CAP, cap(uapi.KVM_CAP_IRQCHIP))
    enforce = uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID
    fails(EINVAL, vcpu, uapi.KVM_ENABLE_CAP, cap(enforce, 1, flags=1))
    fails(EFAULT, vcpu, uapi.KVM_ENABLE_CAP, BAD)


@conforms("vCPU:KVM_ENABLE_CAP")
@host_may_differ("since 6.12 a VMM reads 0 from registers that the guest lacks")
def test_features_are_refused_once_cpuid_is_enforced(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID)
    for index in PV_MSRS:
        assert read_msrs(vcpu, index) != []
    machine.enable_cap(vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)  # without any CPUID
    for index in PV_MSRS:
        assert read_msrs(vcpu, index) == []
        assert not set_msr(vcpu, index, 0)
    machine.enable_cap(vcpu, uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 0)
    assert read_msrs(vcpu, POLL_CONTROL) == [1]


@conforms("KVM_SET_MSRS", "vCPU:KVM_GET_MSRS")
def test_paravirtual_registers_keep_what_is_legal(machine: Machine) -> None:
    guest = machine.guest(b"\xf4")
    for index, value in ((STEAL_TIME, 0x3001), (PV_EOI_EN, 0x4001), (POLL_CONTROL, 0)):
        assert set_msr(guest.vcpu, index, value)
        assert read_msrs(guest.vcpu, index) == [value]
    for index, value in ((STEAL_TIME, 0x3003), (PV_EOI_EN, 0x4003), (POLL_CONTROL, 2)):
        assert not set_msr(guest.vcpu, index, value)
    assert not set_msr(guest.vcpu, PV_EOI_EN, 1 << 40 | 1), "no memory"


def hypercall(guest: Guest, number: int, *args: int) -> int:
    """The result in 32 bits, signed, as real mode has it."""
    guest.reset(rax=number, **dict(zip(("rbx", "rcx", "rdx"), args, strict=False)))
    guest.run_until(uapi.KVM_EXIT_HLT)
    rax: int = guest.regs().rax
    return rax - (1 << 32) if rax >> 31 else rax


@conforms("KVM_RUN")
def test_hypercalls_have_results_of_32_bits_in_real_mode(machine: Machine) -> None:
    guest = machine.guest(VMCALL_HLT)
    assert hypercall(guest, POLL_IRQ) == 0
    assert hypercall(guest, UNKNOWN) == -ENOSYS
    assert hypercall(guest, 0xFFFF_FFFF_0000_0000 | POLL_IRQ) == 0
    assert hypercall(guest, MAP_GPA_RANGE, 0x1000, 1, 0) == -ENOSYS


@conforms("VM:KVM_ENABLE_CAP", "KVM_RUN")
def test_a_hypercall_that_userspace_answers(machine: Machine) -> None:
    guest = machine.guest(VMCALL_HLT)
    mask = machine.require(uapi.KVM_CAP_EXIT_HYPERCALL)
    fails(EINVAL, guest.vm, uapi.KVM_ENABLE_CAP, cap(uapi.KVM_CAP_EXIT_HYPERCALL, 1))
    machine.enable_cap(guest.vm, uapi.KVM_CAP_EXIT_HYPERCALL, mask)
    assert hypercall(guest, MAP_GPA_RANGE, 0x1001, 1, 0) == -KVM_EINVAL
    guest.reset(rax=MAP_GPA_RANGE, rbx=0x1000, rcx=2, rdx=3)
    guest.run_until(uapi.KVM_EXIT_HYPERCALL)
    exit_ = guest.kvm_run.hypercall
    assert (exit_.nr, list(exit_.args[:3]), exit_.longmode) == (MAP_GPA_RANGE, [0x1000, 2, 3], 0)
    exit_.ret = 1 << 32 | 7
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax == 7


@conforms("system:KVM_GET_SUPPORTED_HV_CPUID", "vCPU:KVM_GET_SUPPORTED_HV_CPUID")
@host_may_differ("later kernels have a leaf more")
def test_hyperv_leaves(machine: Machine, kvm: int, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_SYS_HYPERV_CPUID)
    for fd in (kvm, vcpu):
        raw = flexible(uapi.kvm_cpuid2(nent=32), [uapi.kvm_cpuid_entry2()] * 32)
        ioctl(fd, uapi.KVM_GET_SUPPORTED_HV_CPUID, raw)
        assert uapi.kvm_cpuid2.from_buffer(raw).nent == HV_LEAVES
        found = entries(raw, uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, HV_LEAVES)
        assert struct.pack("<III", found[0].ebx, found[0].ecx, found[0].edx) == b"Linux KVM Hv"
        assert found[1].eax == HV_SIGNATURE
        assert all(e.flags == e.index == 0 and e.function >> 8 == 0x400000 for e in found)
        few = flexible(uapi.kvm_cpuid2(nent=3), [uapi.kvm_cpuid_entry2()] * 3)
        fails(E2BIG, fd, uapi.KVM_GET_SUPPORTED_HV_CPUID, few)
        fails(EFAULT, fd, uapi.KVM_GET_SUPPORTED_HV_CPUID, BAD)


@conforms("KVM_HYPERV_EVENTFD")
def test_an_eventfd_for_a_connection(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_HYPERV_EVENTFD)
    eventfd = os.eventfd(0)
    try:
        one = uapi.kvm_hyperv_eventfd(conn_id=1, fd=eventfd)
        ioctl(vm, uapi.KVM_HYPERV_EVENTFD, one)
        fails(EEXIST, vm, uapi.KVM_HYPERV_EVENTFD, one)
        for code, wrong in (
            (EINVAL, uapi.kvm_hyperv_eventfd(conn_id=1 << 24, fd=eventfd)),
            (EINVAL, uapi.kvm_hyperv_eventfd(conn_id=2, fd=eventfd, flags=2)),
            (EINVAL, uapi.kvm_hyperv_eventfd(conn_id=2, fd=vm)),
            (EBADF, uapi.kvm_hyperv_eventfd(conn_id=2, fd=-1)),
            (ENOENT, uapi.kvm_hyperv_eventfd(conn_id=2, flags=uapi.KVM_HYPERV_EVENTFD_DEASSIGN)),
        ):
            fails(code, vm, uapi.KVM_HYPERV_EVENTFD, wrong)
        one.flags = uapi.KVM_HYPERV_EVENTFD_DEASSIGN
        ioctl(vm, uapi.KVM_HYPERV_EVENTFD, one)
        fails(ENOENT, vm, uapi.KVM_HYPERV_EVENTFD, one)
        fails(EFAULT, vm, uapi.KVM_HYPERV_EVENTFD, BAD)
    finally:
        os.close(eventfd)


@conforms("vCPU:KVM_ENABLE_CAP", "KVM_SET_MSRS", "vCPU:KVM_GET_MSRS")
def test_the_vmm_has_them_whatever_cpuid_says(machine: Machine, irqchip_vm: int) -> None:
    machine.require(uapi.KVM_CAP_HYPERV_SYNIC2)
    vcpu = machine.create_vcpu(irqchip_vm)
    for index, value in ((HV_VP_INDEX, 9), (HV_CRASH_P0, 0x1234), (HV_GUEST_OS_ID, 0x8100 << 48)):
        assert set_msr(vcpu, index, value)
        assert read_msrs(vcpu, index) == [value]
    assert set_msr(vcpu, HV_TIME_REF_COUNT, 0), "ignored"
    assert not set_msr(vcpu, HV_SCONTROL, 1), "no SynIC"
    assert set_msr(vcpu, HV_SCONTROL, 0)
    fails(EINVAL, vcpu, uapi.KVM_ENABLE_CAP, cap(uapi.KVM_CAP_HYPERV_SYNIC2, 1))
    machine.enable_cap(vcpu, uapi.KVM_CAP_HYPERV_SYNIC2)
    assert read_msrs(vcpu, HV_SCONTROL) == [1]
    assert set_msr(vcpu, HV_SCONTROL, 0)


@conforms("vCPU:KVM_ENABLE_CAP")
def test_the_synic_needs_a_local_apic(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_HYPERV_SYNIC)
    fails(EINVAL, vcpu, uapi.KVM_ENABLE_CAP, cap(uapi.KVM_CAP_HYPERV_SYNIC))


@conforms("KVM_SET_MSRS")
@pytest.mark.parametrize("index", [HV_GUEST_OS_ID, HV_VP_INDEX, HV_TIME_REF_COUNT])
def test_a_guest_has_them_only_with_hypervs_cpuid(machine: Machine, index: int) -> None:
    guest = machine.guest(bytes.fromhex("0f32f4"))  # rdmsr; hlt
    set_cpuid(machine, guest.vcpu)
    guest.write(13 * 4, struct.pack("<HH", 0x1100, 0))  # #GP's vector
    guest.write(0x1100, bytes.fromhex("b80d00e680"))  # mov ax, 13; out 0x80, al
    guest.set_regs(rcx=index)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"\x0d"


# Xen.


@conforms("KVM_XEN_HVM_CONFIG")
def test_xens_configuration(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_XEN_HVM)
    intercept = uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    fails(EFAULT, vm, uapi.KVM_XEN_HVM_CONFIG, BAD)
    for fields in ({"flags": 1 << 31}, {"flags": intercept, "blob_size_64": 1}):
        fails(EINVAL, vm, uapi.KVM_XEN_HVM_CONFIG, uapi.kvm_xen_hvm_config(msr=1, **fields))
    config = uapi.kvm_xen_hvm_config(flags=intercept, msr=0x40000200)
    assert ioctl(vm, uapi.KVM_XEN_HVM_CONFIG, config) == 0


@conforms("KVM_XEN_HVM_CONFIG", "KVM_RUN")
@host_may_differ("a KVM without VT or SVM need not leave the guest for VMCALL in real mode")
def test_xens_hypercalls_are_userspaces(machine: Machine) -> None:
    machine.require(uapi.KVM_CAP_XEN_HVM)
    guest = machine.guest(VMCALL_HLT)
    flags = uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
    config = uapi.kvm_xen_hvm_config(flags=flags, msr=0x40000200)
    assert ioctl(guest.vm, uapi.KVM_XEN_HVM_CONFIG, config) == 0
    guest.run_until(uapi.KVM_EXIT_XEN)
    call = guest.kvm_run.xen.u.hcall
    assert (guest.kvm_run.xen.type, call.longmode, call.cpl) == (uapi.KVM_EXIT_XEN_HCALL, 0, 0)
    call.result = 0x55
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax == 0x55
