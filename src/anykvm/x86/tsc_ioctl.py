"""The rate of the guest's TSC: KVM_SET_TSC_KHZ and KVM_GET_TSC_KHZ of a vCPU and, for those to
come, of the VM (api.rst 4.55, 4.56).
"""

from __future__ import annotations

from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import Value
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import KvmX86, VcpuX86
from anykvm.x86.tables import vcpu_ioctls, vm_ioctls
from anykvm.x86.tsc import host_tsc_khz, max_guest_tsc_khz

MASK32 = (1 << 32) - 1


def _wanted(arg: int) -> int:
    """The rate that an argument asks for; 0 is the host's."""
    khz = arg & MASK32
    if khz >= max_guest_tsc_khz():
        raise fail(EINVAL, f"a TSC of {khz} kHz is too fast")
    return khz or host_tsc_khz()


@vcpu_ioctls.row("KVM_GET_TSC_KHZ", Value(), uapi.KVM_CAP_GET_TSC_KHZ, returns="kHz")
def kvm_vcpu_ioctl_get_tsc_khz(vcpu: VcpuX86, _: int) -> int:
    """The frequency of the guest's TSC."""
    return vcpu.tsc_khz


@vcpu_ioctls.row(
    "KVM_SET_TSC_KHZ",
    Value(),
    uapi.KVM_CAP_TSC_CONTROL,
    errors={EINVAL: "a rate that cannot be had"},
)
def kvm_vcpu_ioctl_set_tsc_khz(vcpu: VcpuX86, arg: int) -> None:
    """From now on; the TSC's offset stays as it is, so that its value jumps until it is written."""
    khz = _wanted(arg)
    if not vcpu.set_tsc_khz(khz):
        raise fail(EINVAL, f"a TSC of {khz} kHz cannot be scaled from the host's")


@vm_ioctls.row("KVM_GET_TSC_KHZ", Value(), uapi.KVM_CAP_VM_TSC_CONTROL, returns="kHz")
def kvm_vm_ioctl_get_tsc_khz(kvm: KvmX86, _: int) -> int:
    """The frequency that vCPUs start with."""
    return kvm.default_tsc_khz


@vm_ioctls.row(
    "KVM_SET_TSC_KHZ",
    Value(),
    uapi.KVM_CAP_VM_TSC_CONTROL,
    errors={EINVAL: "a rate that cannot be had"},
)
def kvm_vm_ioctl_set_tsc_khz(kvm: KvmX86, arg: int) -> None:
    """For vCPUs that are created from now on."""
    kvm.default_tsc_khz = _wanted(arg)
