"""Hyper-V's CPUID leaves: what KVM_GET_SUPPORTED_HV_CPUID offers, and what a guest's CPUID allows.

`kvm_get_hv_cpuid` and `kvm_hv_set_cpuid` of arch/x86/kvm/hyperv.c; api.rst 4.118.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from anykvm.kvm.kvm_main import KVM_MAX_VCPUS
from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.cpuid import GuestCpuid, Regs
from anykvm.x86.hyperv_tlfs import Access, Feature, Hint, Privilege

VENDOR, SYNDBG = b"Linux KVM Hv", b"VS#1"
VERSION_2016 = (0x3839, 0xA0000, 0, 0)
SPINLOCK_RETRIES, LOGICAL_PROCESSORS = 0xFFF, 64  # as of Hyper-V 2016
SMT_CONTROL = Path("/sys/devices/system/cpu/smt/control")


def cpu_smt_possible() -> bool:
    """Whether two of the host's processors may share a core."""
    if not SMT_CONTROL.exists():
        return True
    return SMT_CONTROL.read_text().strip() not in ("forceoff", "notsupported")


def _features(local_apic: bool) -> Regs:
    edx = sum(Feature) - (0 if local_apic else Feature.STIMER_DIRECT)
    return sum(Access), sum(Privilege), 0, edx


def _enlightenments(local_apic: bool) -> Regs:
    eax = sum(Hint) - (Hint.NO_NONARCH_CORESHARING if cpu_smt_possible() else 0)
    eax -= 0 if local_apic else Hint.CLUSTER_IPI
    return eax, SPINLOCK_RETRIES, 0, 0


def hv_cpuid(local_apic: bool) -> list[uapi.kvm_cpuid_entry2]:
    """The leaves in Linux's order; IPIs, and timers that interrupt directly, need an in-kernel
    local APIC.
    """
    b, c, d = struct.unpack("<III", VENDOR)
    nested = (hv.HV_NESTED_MSR_BITMAP, hv.HV_NESTED_EVMCS1_PERF_GLOBAL_CTRL, 0, 0)
    leaves: tuple[tuple[int, Regs], ...] = (
        (hv.HV_VENDOR_AND_MAX_FUNCTIONS, (hv.HV_SYNDBG_CAPABILITIES, b, c, d)),
        (hv.HV_INTERFACE, (hv.HV_SIGNATURE_EAX, 0, 0, 0)),
        (hv.HV_VERSION, VERSION_2016),
        (hv.HV_FEATURES, _features(local_apic)),
        (hv.HV_ENLIGHTENMENT_INFO, _enlightenments(local_apic)),
        (hv.HV_IMPLEMENT_LIMITS, (KVM_MAX_VCPUS, LOGICAL_PROCESSORS, 0, 0)),
        (hv.HV_SYNDBG_VENDOR, (0, b, c, d)),
        (hv.HV_SYNDBG_INTERFACE, (int.from_bytes(SYNDBG, "little"), 0, 0, 0)),
        (hv.HV_SYNDBG_CAPABILITIES, (hv.HV_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING, 0, 0, 0)),
        (hv.HV_NESTED_FEATURES, nested),
    )
    return [
        uapi.kvm_cpuid_entry2(function=function, eax=regs[0], ebx=regs[1], ecx=regs[2], edx=regs[3])
        for function, regs in leaves
    ]


@dataclass(slots=True)
class HvCpuid:
    """What a guest was given; a VMM may have it enforced (KVM_CAP_HYPERV_ENFORCE_CPUID)."""

    enabled: bool = False
    enforce: bool = False
    access: int = 0
    privileges: int = 0
    features: int = 0
    hints: int = 0
    spinlock_retries: int = 0
    syndbg: bool = False

    def update(self, cpuid: GuestCpuid) -> None:
        """`kvm_hv_set_cpuid`."""
        self.enabled = cpuid.regs(hv.HV_INTERFACE)[0] == hv.HV_SIGNATURE_EAX
        self.access, self.privileges, _, self.features = cpuid.regs(hv.HV_FEATURES)
        self.hints, self.spinlock_retries, _, _ = cpuid.regs(hv.HV_ENLIGHTENMENT_INFO)
        allowed = cpuid.regs(hv.HV_SYNDBG_CAPABILITIES)[0]
        self.syndbg = bool(allowed & hv.HV_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING)
