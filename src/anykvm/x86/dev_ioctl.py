"""x86's ioctls of /dev/kvm: the CPUID and the MSRs that there are."""

from __future__ import annotations

from ctypes import c_uint32, c_uint64
from errno import ENXIO

from anykvm.fs.file import File
from anykvm.fs.task import copy_to_user
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOutTail, Out, OutTail, Tail
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import KVM_MAX_CPUID_ENTRIES, emulated_cpuid, supported_cpuid
from anykvm.x86.fpu import XCR0_SUPPORTED
from anykvm.x86.mce import MCE_CAP_SUPPORTED
from anykvm.x86.msrs import (
    feature_msr,
    msr_feature_index_list,
    msr_index_list,
)
from anykvm.x86.tables import dev_ioctls
from anykvm.x86.vcpu_ioctl import MAX_IO_MSRS, Cpuid2, Msrs

CPUID = OutTail(
    uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, "nent", KVM_MAX_CPUID_ENTRIES, tell_count=False
)
MSR_LIST = OutTail(uapi.kvm_msr_list, c_uint32, "nmsrs", 1 << 16, tell_count=True)
MsrList = Tail[uapi.kvm_msr_list, c_uint32]


@dev_ioctls.row("KVM_GET_SUPPORTED_CPUID", CPUID, uapi.KVM_CAP_EXT_CPUID)
def kvm_dev_ioctl_get_supported_cpuid(file: File, cpuid: Cpuid2) -> None:
    """The leaves of the one CPU model there is, as KVM_SET_CPUID2 takes them."""
    cpuid.entries = supported_cpuid()


@dev_ioctls.row("KVM_GET_EMULATED_CPUID", CPUID, uapi.KVM_CAP_EXT_EMUL_CPUID)
def kvm_dev_ioctl_get_emulated_cpuid(file: File, cpuid: Cpuid2) -> None:
    """Features that would be slower than the others: none, so leaf 0 alone."""
    cpuid.entries = emulated_cpuid()


@dev_ioctls.row("KVM_GET_MSR_INDEX_LIST", MSR_LIST)
def kvm_dev_ioctl_get_msr_index_list(file: File, msrs: MsrList) -> None:
    """The MSRs that make up the state of a vCPU: each can be read and written back."""
    msrs.entries = [c_uint32(index) for index in msr_index_list()]


@dev_ioctls.row("KVM_GET_MSR_FEATURE_INDEX_LIST", MSR_LIST, uapi.KVM_CAP_GET_MSR_FEATURES)
def kvm_dev_ioctl_get_msr_feature_index_list(file: File, msrs: MsrList) -> None:
    """The MSRs that KVM_GET_MSRS of this descriptor reads."""
    msrs.entries = [c_uint32(index) for index in msr_feature_index_list()]


@dev_ioctls.row(
    "KVM_GET_MSRS",
    InOutTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", MAX_IO_MSRS),
    uapi.KVM_CAP_GET_MSR_FEATURES,
    returns="how many were read, up to the first that is no feature MSR",
)
def kvm_dev_ioctl_get_msrs(file: File, msrs: Msrs) -> int:
    """Feature MSRs alone; how many were read."""
    for done, entry in enumerate(msrs.entries):
        value = feature_msr(entry.index)
        if value is None:
            return done
        entry.data = value
    return len(msrs.entries)


@dev_ioctls.row("KVM_X86_GET_MCE_CAP_SUPPORTED", Out(c_uint64), uapi.KVM_CAP_MCE)
def kvm_dev_ioctl_get_mce_cap_supported(file: File, cap: c_uint64) -> None:
    """Features for KVM_X86_SETUP_MCE; the number of banks is KVM_CAP_MCE."""
    cap.value = MCE_CAP_SUPPORTED


def _known_attr(attr: uapi.kvm_device_attr) -> None:
    if attr.group or attr.attr != uapi.KVM_X86_XCOMP_GUEST_SUPP:
        raise fail(ENXIO, f"/dev/kvm has no attribute {attr.group}:{attr.attr}")


@dev_ioctls.row(
    "KVM_HAS_DEVICE_ATTR",
    In(uapi.kvm_device_attr),
    uapi.KVM_CAP_SYS_ATTRIBUTES,
    errors={ENXIO: "there is no such attribute"},
)
def kvm_x86_dev_has_attr(file: File, attr: uapi.kvm_device_attr) -> None:
    """KVM_X86_XCOMP_GUEST_SUPP alone."""
    _known_attr(attr)


@dev_ioctls.row(
    "KVM_GET_DEVICE_ATTR",
    In(uapi.kvm_device_attr),
    uapi.KVM_CAP_SYS_ATTRIBUTES,
    errors={ENXIO: "there is no such attribute"},
)
def kvm_x86_dev_get_attr(file: File, attr: uapi.kvm_device_attr) -> None:
    """KVM_X86_XCOMP_GUEST_SUPP: the components of extended state that a guest may have."""
    _known_attr(attr)
    copy_to_user(attr.addr, bytes(c_uint64(XCR0_SUPPORTED)))
