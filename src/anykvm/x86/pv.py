"""Paravirtual MSRs that only keep what is written: halt polling, and asynchronous page faults.

Documentation/virt/kvm/x86/msr.rst; `kvm_pv_enable_async_pf` in arch/x86/kvm/x86.c. CPUID does not
offer asynchronous page faults: guest memory is reached by native code in which a page of the host
is waited for, so no "page not present" can be told. The MSRs are there for state that comes from a
KVM that does.
"""

from __future__ import annotations

from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.kvm_para import (
    KVM_MSR_ENABLED,
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    MSR_KVM_POLL_CONTROL,
    KvmFeature,
)
from anykvm.x86.msrs import Msr, enter, stored

ASYNC_PF_AS_PF_VMEXIT, ASYNC_PF_AS_INT = 1 << 2, 1 << 3
ASYNC_PF_RESERVED, ASYNC_PF_FLAGS = 0x30, 0x3F

stored(
    MSR_KVM_POLL_CONTROL,
    "kvm_poll_control",
    1,
    lambda value: value in (0, 1),
    pv=KvmFeature.POLL_CONTROL,
)


def _write_async_pf_en(vcpu: VcpuX86, value: int, host: bool) -> bool:
    lacking = (
        value & ASYNC_PF_AS_PF_VMEXIT and not vcpu.pv_cpuid.has(KvmFeature.ASYNC_PF_VMEXIT)
    ) or (value & ASYNC_PF_AS_INT and not vcpu.pv_cpuid.has(KvmFeature.ASYNC_PF_INT))
    if value & ASYNC_PF_RESERVED or lacking:
        return False
    if vcpu.apic is None:
        return not value
    wanted = value & KVM_MSR_ENABLED and value & ASYNC_PF_AS_INT
    if wanted and vcpu.kvm.memslots.gpa_to_memslot(value & ~ASYNC_PF_FLAGS) is None:
        return False
    vcpu.msrs[MSR_KVM_ASYNC_PF_EN] = value
    return True


def _write_async_pf_int(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """The vector; only with an in-kernel local APIC."""
    if value >> 8 or vcpu.apic is None:
        return False
    vcpu.msrs[MSR_KVM_ASYNC_PF_INT] = value
    return True


enter(
    MSR_KVM_ASYNC_PF_EN,
    Msr(
        "kvm_async_pf_en",
        lambda vcpu: vcpu.msrs.get(MSR_KVM_ASYNC_PF_EN, 0),
        _write_async_pf_en,
        pv=KvmFeature.ASYNC_PF,
    ),
)
enter(
    MSR_KVM_ASYNC_PF_INT,
    Msr(
        "kvm_async_pf_int",
        lambda vcpu: vcpu.msrs.get(MSR_KVM_ASYNC_PF_INT, 0),
        _write_async_pf_int,
        pv=KvmFeature.ASYNC_PF_INT,
    ),
)
enter(
    MSR_KVM_ASYNC_PF_ACK,
    Msr(
        "kvm_async_pf_ack",
        lambda vcpu: 0,
        lambda vcpu, value, host: True,
        pv=KvmFeature.ASYNC_PF_INT,
    ),
)
