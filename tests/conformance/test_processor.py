"""What a VMM says about the processor: the TSC's rate, machine checks, SMIs, the PMU's filter,
quirks and limits (api.rst 4.55, 4.56, 4.104 to 4.107, 4.120, 7, 8).
"""

from __future__ import annotations

import ctypes
from errno import E2BIG, EFAULT, EINVAL

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import BAD, Machine, entries, errno_of, fails, flexible, get, ioctl, set_memory

MSR_TSC, MSR_SMBASE, MSR_SMI_COUNT, MSR_MCG_CAP, MSR_MCG_STATUS = 0x10, 0x9E, 0x34, 0x179, 0x17A
VAL, OVER, UC, PCC = 1 << 63, 1 << 62, 1 << 61, 1 << 57
MCG_CTL_P = 1 << 8
SMM_RAM = 0x10000
OUT_SMM, OUT, RSM, HLT = b"\xe6\x41", b"\xe6\x42", b"\x0f\xaa", b"\xf4"


def read_msr(vcpu: int, index: int) -> int | None:
    raw = flexible(uapi.kvm_msrs(nmsrs=1), [uapi.kvm_msr_entry(index=index)])
    if ioctl(vcpu, uapi.KVM_GET_MSRS, raw) != 1:
        return None
    return int(entries(raw, uapi.kvm_msrs, uapi.kvm_msr_entry, 1)[0].data)


def write_msr(vcpu: int, index: int, value: int) -> bool:
    entry = uapi.kvm_msr_entry(index=index, data=value)
    return ioctl(vcpu, uapi.KVM_SET_MSRS, flexible(uapi.kvm_msrs(nmsrs=1), [entry])) == 1


# The TSC's rate.


@conforms("vCPU:KVM_GET_TSC_KHZ", "vCPU:KVM_SET_TSC_KHZ")
def test_the_rate_of_a_tsc(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_GET_TSC_KHZ)
    own = ioctl(vcpu, uapi.KVM_GET_TSC_KHZ)
    assert own > 0
    ioctl(vcpu, uapi.KVM_SET_TSC_KHZ, 0)
    assert ioctl(vcpu, uapi.KVM_GET_TSC_KHZ) == own
    machine.require(uapi.KVM_CAP_TSC_CONTROL)
    ioctl(vcpu, uapi.KVM_SET_TSC_KHZ, own // 2)
    assert ioctl(vcpu, uapi.KVM_GET_TSC_KHZ) == own // 2
    fails(EINVAL, vcpu, uapi.KVM_SET_TSC_KHZ, 0x7FFFFFFF)


@conforms("VM:KVM_GET_TSC_KHZ", "VM:KVM_SET_TSC_KHZ")
def test_the_rate_of_new_vcpus(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_VM_TSC_CONTROL)
    own = ioctl(vm, uapi.KVM_GET_TSC_KHZ)
    ioctl(vm, uapi.KVM_SET_TSC_KHZ, own // 2)
    assert ioctl(vm, uapi.KVM_GET_TSC_KHZ) == own // 2
    vcpu = machine.create_vcpu(vm)
    assert ioctl(vcpu, uapi.KVM_GET_TSC_KHZ) == own // 2
    ioctl(vm, uapi.KVM_SET_TSC_KHZ, 0)
    assert ioctl(vm, uapi.KVM_GET_TSC_KHZ) == own
    fails(EINVAL, vm, uapi.KVM_SET_TSC_KHZ, 0x7FFFFFFF)


# Machine checks.


def setup_mce(vcpu: int, cap: int) -> int:
    return errno_of(vcpu, uapi.KVM_X86_SETUP_MCE, ctypes.c_uint64(cap))


@conforms("KVM_X86_SETUP_MCE")
def test_machine_check_banks(machine: Machine, vcpu: int) -> None:
    most = machine.require(uapi.KVM_CAP_MCE)
    supported = get(machine.kvm, uapi.KVM_X86_GET_MCE_CAP_SUPPORTED, ctypes.c_uint64).value
    assert supported & MCG_CTL_P
    assert read_msr(vcpu, MSR_MCG_CAP) == most
    assert setup_mce(vcpu, supported | 4) == 0
    assert read_msr(vcpu, MSR_MCG_CAP) == supported | 4
    assert read_msr(vcpu, 0x40C) == (1 << 64) - 1
    assert setup_mce(vcpu, 0) == setup_mce(vcpu, most + 1) == setup_mce(vcpu, 1 | 1 << 60) == EINVAL
    fails(EFAULT, vcpu, uapi.KVM_X86_SETUP_MCE, BAD)


@conforms("KVM_X86_SET_MCE")
def test_a_corrected_error_is_recorded_in_its_bank(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_MCE)
    assert setup_mce(vcpu, MCG_CTL_P | 4) == 0
    error = uapi.kvm_x86_mce(status=VAL | 9, addr=0x1234, misc=0x8C, bank=2)
    ioctl(vcpu, uapi.KVM_X86_SET_MCE, error)
    assert [read_msr(vcpu, 0x408 + n) for n in (1, 2, 3)] == [VAL | 9, 0x1234, 0x8C]
    ioctl(vcpu, uapi.KVM_X86_SET_MCE, error)
    assert read_msr(vcpu, 0x409) == VAL | OVER | 9
    fails(EINVAL, vcpu, uapi.KVM_X86_SET_MCE, uapi.kvm_x86_mce(status=VAL, bank=4))
    fails(EINVAL, vcpu, uapi.KVM_X86_SET_MCE, uapi.kvm_x86_mce(status=9, bank=2))
    fails(EFAULT, vcpu, uapi.KVM_X86_SET_MCE, BAD)


@conforms("KVM_X86_SET_MCE")
def test_an_uncorrected_error_that_cannot_be_taken_shuts_down(machine: Machine) -> None:
    machine.require(uapi.KVM_CAP_MCE)
    guest = machine.guest(HLT)  # CR4.MCE is clear
    assert setup_mce(guest.vcpu, MCG_CTL_P | 4) == 0
    error = uapi.kvm_x86_mce(status=VAL | UC | PCC, mcg_status=5, bank=0)
    ioctl(guest.vcpu, uapi.KVM_X86_SET_MCE, error)
    assert read_msr(guest.vcpu, 0x401) == 0
    guest.run_until(uapi.KVM_EXIT_SHUTDOWN)


# System management mode.


@conforms("KVM_SMI")
def test_an_smi_runs_code_of_an_address_space_of_its_own(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_X86_SMM)
    assert ioctl(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_MULTI_ADDRESS_SPACE) == 2
    guest = machine.guest(OUT + HLT, vm=vm)
    smram = machine.memory(SMM_RAM)
    set_memory(vm, 1 << 16, 0x30000, SMM_RAM, smram.address)
    handler = OUT_SMM + RSM
    ctypes.memmove(smram.address + 0x8000, handler, len(handler))
    assert read_msr(guest.vcpu, MSR_SMBASE) == 0x30000
    ioctl(guest.vcpu, uapi.KVM_SMI)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.kvm_run.io.port == 0x41
    assert guest.kvm_run.flags & uapi.KVM_RUN_X86_SMM
    events = get(guest.vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (events.smi.smm, events.smi.pending) == (1, 0)
    revision = ctypes.c_uint32.from_address(smram.address + 0xFEFC).value
    assert revision == 0x20000  # the vCPU's CPUID has no long mode
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.kvm_run.io.port == 0x42
    assert not guest.kvm_run.flags & uapi.KVM_RUN_X86_SMM
    assert read_msr(guest.vcpu, MSR_SMI_COUNT) == 1


@conforms("KVM_SET_VCPU_EVENTS")
def test_smm_is_part_of_a_vcpus_events(machine: Machine, irqchip_vm: int) -> None:
    machine.require(uapi.KVM_CAP_X86_SMM)
    vcpu = machine.create_vcpu(irqchip_vm)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert events.flags & uapi.KVM_VCPUEVENT_VALID_SMM
    events.smi.smm = events.smi.smm_inside_nmi = events.smi.latched_init = 1
    ioctl(vcpu, uapi.KVM_SET_VCPU_EVENTS, events)
    back = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (back.smi.smm, back.smi.smm_inside_nmi, back.smi.latched_init) == (1, 1, 1)
    init = uapi.kvm_mp_state(mp_state=uapi.KVM_MP_STATE_INIT_RECEIVED)
    fails(EINVAL, vcpu, uapi.KVM_SET_MP_STATE, init)


# The PMU's filter.


def pmu_filter(events: int = 1, **fields: int) -> ctypes.Array[ctypes.c_ubyte]:
    header = uapi.kvm_pmu_event_filter(**({"nevents": events} | fields))
    return flexible(header, [ctypes.c_uint64(0x3C + n) for n in range(events)])


@conforms("KVM_SET_PMU_EVENT_FILTER")
def test_pmu_filters(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_PMU_EVENT_FILTER)
    cmd = uapi.KVM_SET_PMU_EVENT_FILTER
    for action in (uapi.KVM_PMU_EVENT_ALLOW, uapi.KVM_PMU_EVENT_DENY):
        ioctl(vm, cmd, pmu_filter(300, action=action))
        ioctl(vm, cmd, pmu_filter(0, action=action))
    fails(EINVAL, vm, cmd, pmu_filter(action=2))
    fails(E2BIG, vm, cmd, pmu_filter(301))
    fails(EINVAL, vm, cmd, pmu_filter(301, action=2))
    fails(EFAULT, vm, cmd, BAD)


@conforms("KVM_SET_PMU_EVENT_FILTER")
@host_may_differ("masked events are a flag since 6.3")
def test_pmu_filters_have_no_flags(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_PMU_EVENT_FILTER)
    fails(EINVAL, vm, uapi.KVM_SET_PMU_EVENT_FILTER, pmu_filter(flags=1))


# Capabilities to enable.


@conforms("VM:KVM_ENABLE_CAP")
@pytest.mark.parametrize(
    ("cap", "args"),
    [
        (uapi.KVM_CAP_X86_DISABLE_EXITS, 1 << 4),
        (uapi.KVM_CAP_DISABLE_QUIRKS2, 1 << 40),
        (uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2),
        (uapi.KVM_CAP_X86_BUS_LOCK_EXIT, 3),
        (uapi.KVM_CAP_X86_BUS_LOCK_EXIT, 4),
        (uapi.KVM_CAP_PMU_CAPABILITY, 2),
        (uapi.KVM_CAP_HALT_POLL, 1 << 32),
        (uapi.KVM_CAP_MAX_VCPU_ID, 1 << 20),
    ],
)
def test_arguments_that_cannot_be(machine: Machine, vm: int, cap: int, args: int) -> None:
    machine.require(cap)
    assert errno_of(vm, uapi.KVM_ENABLE_CAP, enable(cap, args)) == EINVAL
    assert errno_of(vm, uapi.KVM_ENABLE_CAP, enable(cap, 0, flags=1)) == EINVAL


def enable(cap: int, arg: int, flags: int = 0) -> uapi.kvm_enable_cap:
    made = uapi.kvm_enable_cap(cap=cap, flags=flags)
    made.args[0] = arg
    return made


@conforms("VM:KVM_ENABLE_CAP", "KVM_CREATE_VCPU")
def test_vcpu_ids_are_limited_once(machine: Machine, vm: int) -> None:
    machine.require(uapi.KVM_CAP_MAX_VCPU_ID, 2)
    limit = enable(uapi.KVM_CAP_MAX_VCPU_ID, 2)
    ioctl(vm, uapi.KVM_ENABLE_CAP, limit)
    ioctl(vm, uapi.KVM_ENABLE_CAP, limit)
    fails(EINVAL, vm, uapi.KVM_ENABLE_CAP, enable(uapi.KVM_CAP_MAX_VCPU_ID, 3))
    fails(EINVAL, vm, uapi.KVM_CREATE_VCPU, 2)
    machine.create_vcpu(vm, 1)


@conforms("VM:KVM_ENABLE_CAP")
def test_quirks_are_disabled_by_the_last_call(machine: Machine, vm: int) -> None:
    known = machine.require(uapi.KVM_CAP_DISABLE_QUIRKS2)
    ioctl(vm, uapi.KVM_ENABLE_CAP, enable(uapi.KVM_CAP_DISABLE_QUIRKS2, known))
    ioctl(vm, uapi.KVM_ENABLE_CAP, enable(uapi.KVM_CAP_DISABLE_QUIRKS, 0))
    guest = machine.guest(b"\xe6\x7e" + HLT, vm=vm)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.regs().rip == 0x1002  # OUT to 0x7e is stepped over first again
