"""The paravirtual ABI between KVM and its guests, and which of it a vCPU's guest may use.

asm/kvm_para.h and linux/kvm_para.h; Documentation/virt/kvm/x86/cpuid.rst, msr.rst, hypercalls.rst.
Nothing is refused to a guest, whatever its CPUID says, until the VMM enables
KVM_CAP_ENFORCE_PV_FEATURE_CPUID.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from anykvm.x86.cpuid import GuestCpuid

KVM_MSR_ENABLED = 1

MSR_KVM_WALL_CLOCK, MSR_KVM_SYSTEM_TIME = 0x11, 0x12
MSR_KVM_WALL_CLOCK_NEW, MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D00, 0x4B564D01
MSR_KVM_ASYNC_PF_EN, MSR_KVM_STEAL_TIME, MSR_KVM_PV_EOI_EN = range(0x4B564D02, 0x4B564D05)
MSR_KVM_POLL_CONTROL, MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK = range(0x4B564D05, 0x4B564D08)

KVM_HC_VAPIC_POLL_IRQ, KVM_HC_KICK_CPU = 1, 5
KVM_HC_CLOCK_PAIRING, KVM_HC_SEND_IPI, KVM_HC_SCHED_YIELD, KVM_HC_MAP_GPA_RANGE = 9, 10, 11, 12
KVM_CLOCK_PAIRING_WALLCLOCK = 0

# What a hypercall returns, negated.
KVM_EPERM, KVM_EFAULT, KVM_EINVAL, KVM_EOPNOTSUPP, KVM_ENOSYS = 1, 14, 22, 95, 1000


class KvmFeature(IntEnum):
    """KVM_FEATURE_*: bits of EAX in the leaf after KVM's signature."""

    CLOCKSOURCE = 0
    NOP_IO_DELAY = 1
    CLOCKSOURCE2 = 3
    ASYNC_PF = 4
    STEAL_TIME = 5
    PV_EOI = 6
    PV_UNHALT = 7
    PV_TLB_FLUSH = 9
    ASYNC_PF_VMEXIT = 10
    PV_SEND_IPI = 11
    POLL_CONTROL = 12
    PV_SCHED_YIELD = 13
    ASYNC_PF_INT = 14


@dataclass(slots=True)
class PvCpuid:
    """`vcpu->arch.pv_cpuid`: the features that a guest may use."""

    enforce: bool = False
    features: int = 0

    def update(self, cpuid: GuestCpuid) -> None:
        """`kvm_update_pv_runtime`: the guest's CPUID or the VMM's wish has changed."""
        leaf = cpuid.kvm_features()
        if leaf is not None:
            self.features = leaf.eax

    def has(self, feature: KvmFeature) -> bool:
        """`guest_pv_has`."""
        return not self.enforce or bool(self.features >> feature & 1)
