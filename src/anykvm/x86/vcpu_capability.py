"""KVM_ENABLE_CAP of a vCPU: what a VMM switches on for one processor (api.rst 4.37, 6).

`kvm_vcpu_ioctl_enable_cap` of arch/x86/kvm/x86.c.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In
from anykvm.uapi import kvm as uapi
from anykvm.x86.hyperv import enable_enforce_cpuid, enable_synic, enable_synic2
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.tables import vcpu_ioctls


def _enforce_pv_feature_cpuid(vcpu: VcpuX86, args: tuple[int, ...]) -> None:
    vcpu.pv_cpuid.enforce = bool(args[0])
    vcpu.pv_cpuid.update(vcpu.cpuid)


ENABLE: dict[int, Callable[[VcpuX86, tuple[int, ...]], None]] = {
    uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: _enforce_pv_feature_cpuid,
    uapi.KVM_CAP_HYPERV_SYNIC: enable_synic,
    uapi.KVM_CAP_HYPERV_SYNIC2: enable_synic2,
    uapi.KVM_CAP_HYPERV_ENFORCE_CPUID: enable_enforce_cpuid,
}


@vcpu_ioctls.row(
    "KVM_ENABLE_CAP",
    In(uapi.kvm_enable_cap),
    uapi.KVM_CAP_ENABLE_CAP,
    errors={EINVAL: "flags, or no capability of a vCPU"},
)
def kvm_vcpu_ioctl_enable_cap(vcpu: VcpuX86, cap: uapi.kvm_enable_cap) -> None:
    """Switch on what is off by default, for this vCPU alone."""
    enable = ENABLE.get(cap.cap)
    if cap.flags or enable is None:
        raise fail(EINVAL, f"a vCPU has no capability {cap.cap} (flags {cap.flags:#x})")
    enable(vcpu, tuple(cap.args))
