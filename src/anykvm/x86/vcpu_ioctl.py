"""vCPU ioctls of x86 other than registers and events: CPUID, MSRs, local APIC, TSC, debug
registers, machine checks.
"""

from __future__ import annotations

from ctypes import c_uint64, memmove, sizeof
from errno import EINVAL, ENXIO

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOutTail, InTail, Out, OutTail, Tail, Value
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import KVM_MAX_CPUID_ENTRIES, GuestCpuid
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.kvm_para import KVM_MSR_ENABLED, MSR_KVM_SYSTEM_TIME_NEW
from anykvm.x86.msrs import (
    kvm_get_msr,
    kvm_set_msr,
)
from anykvm.x86.tables import LAPIC, vcpu_ioctls

MAX_IO_MSRS = 256

Cpuid2 = Tail[uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2]
Msrs = Tail[uapi.kvm_msrs, uapi.kvm_msr_entry]


# CPUID.


def _set_cpuid(vcpu: VcpuX86, entries: list[uapi.kvm_cpuid_entry2]) -> None:
    cpuid = GuestCpuid(entries)
    vcpu.update_cpuid_runtime(cpuid)
    if vcpu.has_run:
        if not cpuid.same_as(vcpu.cpuid):
            raise fail(EINVAL, "CPUID cannot change after KVM_RUN")
        return
    vcpu.cpuid = cpuid
    vcpu.pv_cpuid.update(vcpu.cpuid)
    vcpu.hv.cpuid.update(vcpu.cpuid)
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
    errors={EINVAL: "another CPUID than before, after KVM_RUN"},
)
def kvm_vcpu_ioctl_set_cpuid2(vcpu: VcpuX86, cpuid: Cpuid2) -> None:
    """What CPUID tells the guest; what it does not offer is #UD or #GP."""
    _set_cpuid(vcpu, list(cpuid.entries))


@vcpu_ioctls.row(
    "KVM_SET_CPUID",
    InTail(uapi.kvm_cpuid, uapi.kvm_cpuid_entry, "nent", KVM_MAX_CPUID_ENTRIES),
    errors={EINVAL: "another CPUID than before, after KVM_RUN"},
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
    """What was set, with the bits that follow CR4 and the APIC base."""
    vcpu.update_cpuid_runtime()
    cpuid.entries = vcpu.cpuid.entries


# MSRs.


@vcpu_ioctls.row(
    "KVM_GET_MSRS",
    InOutTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", MAX_IO_MSRS),
    returns="how many were read, up to the first that does not exist",
)
def kvm_vcpu_ioctl_get_msrs(vcpu: VcpuX86, msrs: Msrs) -> int:
    """How many were read, which ends at the first that does not exist."""
    for done, entry in enumerate(msrs.entries):
        value = kvm_get_msr(vcpu, entry.index, host=True)
        if value is None:
            return done
        entry.data = value
    return len(msrs.entries)


@vcpu_ioctls.row(
    "KVM_SET_MSRS",
    InTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", MAX_IO_MSRS),
    returns="how many were written, up to the first that refuses",
)
def kvm_vcpu_ioctl_set_msrs(vcpu: VcpuX86, msrs: Msrs) -> int:
    """How many were written, which ends at the first that refuses."""
    for done, entry in enumerate(msrs.entries):
        if not kvm_set_msr(vcpu, entry.index, entry.data, host=True):
            return done
    return len(msrs.entries)


# The local APIC.


@vcpu_ioctls.row("KVM_GET_LAPIC", Out(uapi.kvm_lapic_state), uapi.KVM_CAP_IRQCHIP, needs=(LAPIC,))
def kvm_vcpu_ioctl_get_lapic(vcpu: VcpuX86, state: uapi.kvm_lapic_state) -> None:
    """The local APIC's registers, as they lie in its page."""
    assert vcpu.apic is not None
    with vcpu.kvm.irqchip.lock:
        found = vcpu.apic.get_state(vcpu.kvm.x2apic_format)
    memmove(state.regs, found.regs, sizeof(found))


@vcpu_ioctls.row("KVM_SET_LAPIC", In(uapi.kvm_lapic_state), uapi.KVM_CAP_IRQCHIP, needs=(LAPIC,))
def kvm_vcpu_ioctl_set_lapic(vcpu: VcpuX86, state: uapi.kvm_lapic_state) -> None:
    """Load them; the timer goes on from its current count."""
    assert vcpu.apic is not None
    with vcpu.kvm.irqchip.lock:
        vcpu.apic.set_state(state, vcpu.kvm.x2apic_format)
        vcpu.state.cr8 = vcpu.apic.cr8
    vcpu.requests.add(Request.EVENT)


# Time.


@vcpu_ioctls.row(
    "KVM_KVMCLOCK_CTRL",
    Value(),
    uapi.KVM_CAP_KVMCLOCK_CTRL,
    errors={EINVAL: "the guest has not enabled kvmclock"},
)
def kvm_set_guest_paused(vcpu: VcpuX86, _: int) -> None:
    """Tell the guest that it was stopped; EINVAL where it does not use kvmclock."""
    if not vcpu.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0) & KVM_MSR_ENABLED:
        raise fail(EINVAL, "the guest has not enabled kvmclock")
    vcpu.pvclock.guest_stopped = True
    vcpu.requests.add(Request.CLOCK_UPDATE)


def _tsc_offset_attr(attr: uapi.kvm_device_attr) -> None:
    if (attr.group, attr.attr) != (uapi.KVM_VCPU_TSC_CTRL, uapi.KVM_VCPU_TSC_OFFSET):
        raise fail(ENXIO, f"a vCPU has no attribute {attr.group}:{attr.attr}")


@vcpu_ioctls.row(
    "KVM_HAS_DEVICE_ATTR",
    In(uapi.kvm_device_attr),
    uapi.KVM_CAP_VCPU_ATTRIBUTES,
    errors={ENXIO: "there is no such attribute"},
)
def kvm_vcpu_ioctl_has_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    """KVM_VCPU_TSC_OFFSET of KVM_VCPU_TSC_CTRL alone."""
    _tsc_offset_attr(attr)


@vcpu_ioctls.row(
    "KVM_GET_DEVICE_ATTR",
    In(uapi.kvm_device_attr),
    uapi.KVM_CAP_VCPU_ATTRIBUTES,
    errors={ENXIO: "there is no such attribute"},
)
def kvm_vcpu_ioctl_get_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    """The offset of the guest's TSC from the host's."""
    _tsc_offset_attr(attr)
    vcpu.kvm.mm.write(attr.addr, bytes(c_uint64(vcpu.l1_tsc_offset)))


@vcpu_ioctls.row(
    "KVM_SET_DEVICE_ATTR",
    In(uapi.kvm_device_attr),
    uapi.KVM_CAP_VCPU_ATTRIBUTES,
    errors={ENXIO: "there is no such attribute"},
)
def kvm_vcpu_ioctl_set_device_attr(vcpu: VcpuX86, attr: uapi.kvm_device_attr) -> None:
    """Set the offset of the guest's TSC from the host's."""
    _tsc_offset_attr(attr)
    offset = int.from_bytes(vcpu.kvm.mm.read(attr.addr, 8), "little")
    vcpu.kvm.cur_tsc_offset = offset  # what later writes of the TSC are compared with
    vcpu.set_tsc_offset(offset)


# Debugging and machine checks.


@vcpu_ioctls.row("KVM_GET_DEBUGREGS", Out(uapi.kvm_debugregs), uapi.KVM_CAP_DEBUGREGS)
def kvm_vcpu_ioctl_x86_get_debugregs(vcpu: VcpuX86, regs: uapi.kvm_debugregs) -> None:
    """DR0 to DR3, DR6 and DR7 of the guest."""
    regs.db[:] = list(vcpu.state.dr)
    regs.dr6, regs.dr7 = vcpu.state.dr6, vcpu.state.dr7


@vcpu_ioctls.row(
    "KVM_SET_DEBUGREGS",
    In(uapi.kvm_debugregs),
    uapi.KVM_CAP_DEBUGREGS,
    errors={EINVAL: "flags, or bits of dr6 or dr7 above 31"},
)
def kvm_vcpu_ioctl_x86_set_debugregs(vcpu: VcpuX86, regs: uapi.kvm_debugregs) -> None:
    """Load them."""
    if regs.flags or regs.dr6 >> 32 or regs.dr7 >> 32:
        raise fail(EINVAL, f"KVM_SET_DEBUGREGS: dr6 {regs.dr6:#x}, dr7 {regs.dr7:#x}")
    for i in range(4):
        vcpu.state.dr[i] = regs.db[i]
    vcpu.state.dr6, vcpu.state.dr7 = regs.dr6, regs.dr7
    vcpu.cpu.debug.changed()
