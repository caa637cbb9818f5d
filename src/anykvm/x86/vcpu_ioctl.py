"""vCPU ioctls of x86 other than registers and events: CPUID, MSRs, local APIC, TSC, debug
registers, machine checks.
"""

from __future__ import annotations

from ctypes import c_uint64, memmove, sizeof
from errno import EINVAL, ENOTTY, ENXIO

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOutTail, InTail, Need, Out, OutTail, Tail, Value
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import KVM_MAX_CPUID_ENTRIES, GuestCpuid
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import (
    KVM_MAX_MCE_BANKS,
    MCE_CAP_SUPPORTED,
    MSR_IA32_MCG_CAP,
    MSR_KVM_SYSTEM_TIME_NEW,
    SYSTEM_TIME_ENABLE,
    kvm_get_msr,
    kvm_set_msr,
)
from anykvm.x86.regs import CR4_OSXSAVE
from anykvm.x86.tables import vcpu_ioctls
from anykvm.x86.tsc import host_tsc_khz

MAX_IO_MSRS = 256
TSC_TOLERANCE_PPM = 250
LAPIC: Need[VcpuX86] = Need(
    lambda vcpu: vcpu.apic is not None, EINVAL, "the local APIC is the VMM's"
)

Cpuid2 = Tail[uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2]
Msrs = Tail[uapi.kvm_msrs, uapi.kvm_msr_entry]


# CPUID.


def _set_cpuid(vcpu: VcpuX86, entries: list[uapi.kvm_cpuid_entry2]) -> None:
    vcpu.cpuid = GuestCpuid(entries)
    enabled = bool(vcpu.state.apic_base >> 11 & 1)
    vcpu.cpuid.set_runtime(bool(vcpu.state.cr4 & CR4_OSXSAVE), enabled)
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.set_cpuid(
                x2apic=vcpu.cpuid.has("x2apic"),
                tsc_deadline=vcpu.cpuid.has("tsc_deadline_timer"),
                maxphyaddr=vcpu.maxphyaddr(),
            )


@vcpu_ioctls.row(
    "KVM_SET_CPUID2",
    InTail(uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, "nent", KVM_MAX_CPUID_ENTRIES),
    uapi.KVM_CAP_EXT_CPUID,
)
def kvm_vcpu_ioctl_set_cpuid2(vcpu: VcpuX86, cpuid: Cpuid2) -> None:
    _set_cpuid(vcpu, list(cpuid.entries))


@vcpu_ioctls.row(
    "KVM_SET_CPUID",
    InTail(uapi.kvm_cpuid, uapi.kvm_cpuid_entry, "nent", KVM_MAX_CPUID_ENTRIES),
)
def kvm_vcpu_ioctl_set_cpuid(
    vcpu: VcpuX86, cpuid: Tail[uapi.kvm_cpuid, uapi.kvm_cpuid_entry]
) -> None:
    """The first form, without subleaves."""
    _set_cpuid(
        vcpu,
        [
            uapi.kvm_cpuid_entry2(function=e.function, eax=e.eax, ebx=e.ebx, ecx=e.ecx, edx=e.edx)
            for e in cpuid.entries
        ],
    )


@vcpu_ioctls.row(
    "KVM_GET_CPUID2",
    OutTail(
        uapi.kvm_cpuid2,
        uapi.kvm_cpuid_entry2,
        "nent",
        KVM_MAX_CPUID_ENTRIES,
        tell_count=False,
    ),
    uapi.KVM_CAP_EXT_CPUID,
)
def kvm_vcpu_ioctl_get_cpuid2(vcpu: VcpuX86, cpuid: Cpuid2) -> None:
    cpuid.entries = vcpu.cpuid.entries


# MSRs.


@vcpu_ioctls.row("KVM_GET_MSRS", InOutTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", MAX_IO_MSRS))
def kvm_vcpu_ioctl_get_msrs(vcpu: VcpuX86, msrs: Msrs) -> int:
    """How many were read, which ends at the first that does not exist."""
    for done, entry in enumerate(msrs.entries):
        value = kvm_get_msr(vcpu, entry.index)
        if value is None:
            return done
        entry.data = value
    return len(msrs.entries)


@vcpu_ioctls.row("KVM_SET_MSRS", InTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", MAX_IO_MSRS))
def kvm_vcpu_ioctl_set_msrs(vcpu: VcpuX86, msrs: Msrs) -> int:
    """How many were written, which ends at the first that refuses."""
    for done, entry in enumerate(msrs.entries):
        if not kvm_set_msr(vcpu, entry.index, entry.data, host=True):
            return done
    return len(msrs.entries)


# The local APIC.


@vcpu_ioctls.row("KVM_GET_LAPIC", Out(uapi.kvm_lapic_state), uapi.KVM_CAP_IRQCHIP, needs=(LAPIC,))
def kvm_vcpu_ioctl_get_lapic(vcpu: VcpuX86, state: uapi.kvm_lapic_state) -> None:
    assert vcpu.apic is not None
    with vcpu.kvm.irqchip.lock:
        found = vcpu.apic.get_state(vcpu.kvm.x2apic_format)
    memmove(state.regs, found.regs, sizeof(found))


@vcpu_ioctls.row("KVM_SET_LAPIC", In(uapi.kvm_lapic_state), uapi.KVM_CAP_IRQCHIP, needs=(LAPIC,))
def kvm_vcpu_ioctl_set_lapic(vcpu: VcpuX86, state: uapi.kvm_lapic_state) -> None:
    assert vcpu.apic is not None
    with vcpu.kvm.irqchip.lock:
        vcpu.apic.set_state(state, vcpu.kvm.x2apic_format)
        vcpu.state.cr8 = vcpu.apic.cr8
    vcpu.requests.add(Request.EVENT)


# Time.


@vcpu_ioctls.row("KVM_GET_TSC_KHZ", Value(), uapi.KVM_CAP_GET_TSC_KHZ)
def kvm_vcpu_ioctl_get_tsc_khz(vcpu: VcpuX86, _: int) -> int:
    return vcpu.tsc_khz


@vcpu_ioctls.row("KVM_SET_TSC_KHZ", Value(), uapi.KVM_CAP_TSC_CONTROL)
def kvm_vcpu_ioctl_set_tsc_khz(vcpu: VcpuX86, khz: int) -> None:
    """The TSC is the host's and not scaled, so only its frequency, or 0 for it, can be had."""
    host = host_tsc_khz()
    if khz and abs(khz - host) * 1_000_000 > host * TSC_TOLERANCE_PPM:
        raise fail(EINVAL, f"the TSC runs at {host} kHz and cannot at {khz}")


@vcpu_ioctls.row("KVM_KVMCLOCK_CTRL", Value(), uapi.KVM_CAP_KVMCLOCK_CTRL)
def kvm_set_guest_paused(vcpu: VcpuX86, _: int) -> None:
    """Tell the guest that it was stopped; EINVAL where it does not use kvmclock."""
    if not vcpu.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0) & SYSTEM_TIME_ENABLE:
        raise fail(EINVAL, "the guest has not enabled kvmclock")
    vcpu.pvclock.guest_stopped = True
    vcpu.requests.add(Request.CLOCK_UPDATE)


def _tsc_offset_attr(attr: uapi.kvm_device_attr) -> None:
    if (attr.group, attr.attr) != (uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET):
        raise fail(ENXIO, f"a vCPU has no attribute {attr.group}:{attr.attr}")


@vcpu_ioctls.row("KVM_HAS_DEVICE_ATTR", In(uapi.kvm_device_attr), uapi.KVM_CAP_VCPU_ATTRIBUTES)
def kvm_vcpu_ioctl_has_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    _tsc_offset_attr(attr)


@vcpu_ioctls.row("KVM_GET_DEVICE_ATTR", In(uapi.kvm_device_attr), uapi.KVM_CAP_VCPU_ATTRIBUTES)
def kvm_vcpu_ioctl_get_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    _tsc_offset_attr(attr)
    vcpu.kvm.mm.write(attr.addr, bytes(c_uint64(vcpu.state.tsc_offset)))


@vcpu_ioctls.row("KVM_SET_DEVICE_ATTR", In(uapi.kvm_device_attr), uapi.KVM_CAP_VCPU_ATTRIBUTES)
def kvm_vcpu_ioctl_set_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    _tsc_offset_attr(attr)
    vcpu.set_tsc_offset(int.from_bytes(vcpu.kvm.mm.read(attr.addr, 8), "little"))


# Debugging and machine checks.


@vcpu_ioctls.row("KVM_GET_DEBUGREGS", Out(uapi.kvm_debugregs), uapi.KVM_CAP_DEBUGREGS)
def kvm_vcpu_ioctl_x86_get_debugregs(vcpu: VcpuX86, regs: uapi.kvm_debugregs) -> None:
    regs.db[:] = list(vcpu.state.dr)
    regs.dr6, regs.dr7 = vcpu.state.dr6, vcpu.state.dr7


@vcpu_ioctls.row("KVM_SET_DEBUGREGS", In(uapi.kvm_debugregs), uapi.KVM_CAP_DEBUGREGS)
def kvm_vcpu_ioctl_x86_set_debugregs(vcpu: VcpuX86, regs: uapi.kvm_debugregs) -> None:
    if regs.flags or regs.dr6 >> 32 or regs.dr7 >> 32:
        raise fail(EINVAL, f"KVM_SET_DEBUGREGS: dr6 {regs.dr6:#x}, dr7 {regs.dr7:#x}")
    for i in range(4):
        vcpu.state.dr[i] = regs.db[i]
    vcpu.state.dr6, vcpu.state.dr7 = regs.dr6, regs.dr7
    vcpu.cpu.mode_changed()


@vcpu_ioctls.row("KVM_X86_SETUP_MCE", In(c_uint64), uapi.KVM_CAP_MCE)
def kvm_vcpu_ioctl_x86_setup_mce(vcpu: VcpuX86, mcg_cap: c_uint64) -> None:
    """Which of the machine-check features and banks the guest sees."""
    cap = mcg_cap.value
    banks = cap & 0xFF
    if not 0 < banks <= KVM_MAX_MCE_BANKS or cap & ~(MCE_CAP_SUPPORTED | 0xFF | 0xFF0000):
        raise fail(EINVAL, f"KVM_X86_SETUP_MCE: {cap:#x}")
    vcpu.msrs[MSR_IA32_MCG_CAP] = cap


# Linux has these only with what is not here: SMM, nested virtualization, Hyper-V, Xen.
vcpu_ioctls.mark_absent(ENOTTY, "KVM_SMI", "KVM_X86_SET_MCE", "KVM_TRANSLATE")
vcpu_ioctls.mark_absent(ENOTTY, "KVM_XEN_VCPU_GET_ATTR", "KVM_XEN_VCPU_SET_ATTR")
vcpu_ioctls.mark_absent(ENOTTY, "KVM_SET_GUEST_DEBUG", "KVM_GET_SUPPORTED_HV_CPUID")
vcpu_ioctls.mark_absent(EINVAL, "KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE", "KVM_ENABLE_CAP")
