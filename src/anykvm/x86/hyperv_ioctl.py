"""Hyper-V's ioctls: KVM_GET_SUPPORTED_HV_CPUID and KVM_HYPERV_EVENTFD (api.rst 4.118, 4.113)."""

from __future__ import annotations

from errno import EBADF, EEXIST, EINVAL, ENOENT

from anykvm.fs.file import File
from anykvm.kvm.errors import fail
from anykvm.kvm.eventfd import EventfdCtx
from anykvm.kvm.ioctl import In, OutTail, Tail
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import KVM_MAX_CPUID_ENTRIES
from anykvm.x86.hyperv_cpuid import hv_cpuid
from anykvm.x86.kvm_host import KvmX86, VcpuX86
from anykvm.x86.tables import dev_ioctls, vcpu_ioctls, vm_ioctls

HV_CPUID = OutTail(
    uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, "nent", KVM_MAX_CPUID_ENTRIES, tell_count=False
)
Cpuid2 = Tail[uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2]


@dev_ioctls.row("KVM_GET_SUPPORTED_HV_CPUID", HV_CPUID, uapi.KVM_CAP_SYS_HYPERV_CPUID)
def kvm_dev_ioctl_get_supported_hv_cpuid(file: File, cpuid: Cpuid2) -> None:
    """Hyper-V's leaves, which overlap KVM's own and are therefore not in
    KVM_GET_SUPPORTED_CPUID.
    """
    cpuid.entries = hv_cpuid(local_apic=True)


@vcpu_ioctls.row("KVM_GET_SUPPORTED_HV_CPUID", HV_CPUID, uapi.KVM_CAP_HYPERV_CPUID)
def kvm_ioctl_get_supported_hv_cpuid(vcpu: VcpuX86, cpuid: Cpuid2) -> None:
    """As of /dev/kvm, for this vCPU."""
    cpuid.entries = hv_cpuid(local_apic=vcpu.apic is not None)


@vm_ioctls.row(
    "KVM_HYPERV_EVENTFD",
    In(uapi.kvm_hyperv_eventfd),
    uapi.KVM_CAP_HYPERV_EVENTFD,
    errors={
        EINVAL: "unknown flags, a connection id above 24 bits, or the descriptor is no eventfd",
        EBADF: "there is no such descriptor",
        EEXIST: "the connection has an eventfd",
        ENOENT: "the connection has none to take away",
    },
)
def kvm_vm_ioctl_hv_eventfd(kvm: KvmX86, args: uapi.kvm_hyperv_eventfd) -> None:
    """Let HvSignalEvent on a connection signal an eventfd instead of exiting."""
    known = not args.flags & ~uapi.KVM_HYPERV_EVENTFD_DEASSIGN
    if not known or args.conn_id & ~uapi.KVM_HYPERV_CONN_ID_MASK:
        raise fail(EINVAL, f"connection {args.conn_id:#x}, flags {args.flags:#x}")
    connections = kvm.hv.connections
    if args.flags == uapi.KVM_HYPERV_EVENTFD_DEASSIGN:
        found = connections.pop(args.conn_id, None)
        if found is None:
            raise fail(ENOENT, f"connection {args.conn_id:#x} has no eventfd")
        found.put()
        return
    eventfd = EventfdCtx(args.fd)
    if connections.setdefault(args.conn_id, eventfd) is not eventfd:
        eventfd.put()
        raise fail(EEXIST, f"connection {args.conn_id:#x} has an eventfd")
