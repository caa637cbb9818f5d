"""The descriptor of a VM: `kvm_vm_fops` and the VM ioctls that all architectures share."""

from __future__ import annotations

import os
from errno import E2BIG, EBADF, EBUSY, EEXIST, EINVAL, EMFILE, ENODEV, ENOENT, ENXIO

from anykvm.fs.anon_inodes import anon_inode_getfd
from anykvm.fs.file import File, FileOperations, Inode
from anykvm.fs.mapping import Memfd
from anykvm.fs.vfs import noop_llseek
from anykvm.kvm.capability import kvm_vm_ioctl_check_extension_generic
from anykvm.kvm.dirty_ring import kvm_vm_ioctl_enable_dirty_log_ring
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOut, InTail, IoctlTable, Need, Tail, Value, drive
from anykvm.kvm.irqchip import (
    KVM_MAX_IRQ_ROUTES,
    KVM_USERSPACE_IRQ_SOURCE_ID,
    IrqRoutingTable,
    check_routing_entry,
    kvm_set_irq,
)
from anykvm.kvm.kvm_main import (
    Kvm,
    arch,
    kvm_create_vcpu,
    kvm_get_kvm,
    kvm_put_kvm,
)
from anykvm.kvm.vcpu_ioctl import kvm_vcpu_fops
from anykvm.uapi import kvm as uapi

DIRTY_RING_CAPS = (uapi.KVM_CAP_DIRTY_LOG_RING, uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL)
kvm_vm_ioctls: IoctlTable[Kvm] = IoctlTable("kvm_vm_ioctl")
INTC: Need[Kvm] = Need(
    lambda kvm: kvm.kvm_arch_intc_initialized(),
    ENXIO,
    "there is no in-kernel interrupt controller",
    after_copy=True,
)


@kvm_vm_ioctls.row(
    "KVM_CREATE_VCPU",
    Value(),
    returns="the descriptor of a new vCPU",
    errors={
        EINVAL: "the id is not below KVM_CAP_MAX_VCPU_ID",
        EEXIST: "the VM has a vCPU of this id",
        EMFILE: "no descriptor is free",
    },
)
def kvm_vm_ioctl_create_vcpu(kvm: Kvm, vcpu_id: int) -> int:
    """A new descriptor, whose memory is the vCPU's kvm_run area and which holds the VM."""
    name = f"kvm-vcpu:{vcpu_id}"
    memfd = Memfd(name, kvm.vcpu_file_size)
    try:
        vcpu = kvm_create_vcpu(kvm, vcpu_id, memfd)
    except BaseException:
        os.close(memfd.fd)
        raise
    kvm_get_kvm(kvm)
    return anon_inode_getfd(name, kvm_vcpu_fops, vcpu, memfd=memfd)


@kvm_vm_ioctls.row(
    "KVM_REGISTER_COALESCED_MMIO",
    In(uapi.kvm_coalesced_mmio_zone),
    uapi.KVM_CAP_COALESCED_MMIO,
    errors={EINVAL: "pio is neither 0 nor 1"},
)
def kvm_vm_ioctl_register_coalesced_mmio(kvm: Kvm, zone: uapi.kvm_coalesced_mmio_zone) -> None:
    """Writes to the zone go into the ring, and exit only when it is full."""
    kvm.coalesced_zones.register(zone)


@kvm_vm_ioctls.row(
    "KVM_UNREGISTER_COALESCED_MMIO",
    In(uapi.kvm_coalesced_mmio_zone),
    uapi.KVM_CAP_COALESCED_MMIO,
    errors={EINVAL: "pio is neither 0 nor 1"},
)
def kvm_vm_ioctl_unregister_coalesced_mmio(kvm: Kvm, zone: uapi.kvm_coalesced_mmio_zone) -> None:
    """Drop the zones that hold this range; none at all is no error."""
    kvm.coalesced_zones.unregister(zone)


@kvm_vm_ioctls.row(
    "KVM_IRQFD",
    In(uapi.kvm_irqfd),
    uapi.KVM_CAP_IRQFD,
    errors={
        EINVAL: "unknown flags, no in-kernel interrupt controller, or no eventfd",
        EBADF: "a descriptor is not open",
        EBUSY: "the eventfd is an irqfd already",
    },
)
def kvm_irqfd(kvm: Kvm, args: uapi.kvm_irqfd) -> None:
    """An eventfd that raises a line; with resample, one that stays up until the guest ends it."""
    kvm.eventfds.irqfd(args)


@kvm_vm_ioctls.row(
    "KVM_IOEVENTFD",
    In(uapi.kvm_ioeventfd),
    uapi.KVM_CAP_IOEVENTFD,
    errors={
        EINVAL: "unknown flags, a length other than 0, 1, 2, 4 and 8, or no eventfd",
        EBADF: "the descriptor is not open",
        EEXIST: "one that is there matches the same write",
        ENOENT: "there is none to deassign",
    },
)
def kvm_ioeventfd(kvm: Kvm, args: uapi.kvm_ioeventfd) -> None:
    """A guest write to an address or port that becomes an event instead of an exit."""
    kvm.eventfds.ioeventfd(args)


@kvm_vm_ioctls.row(
    "KVM_SIGNAL_MSI",
    In(uapi.kvm_msi),
    uapi.KVM_CAP_SIGNAL_MSI,
    returns="to how many vCPUs it was delivered, 0 where the guest has blocked it",
    errors={EINVAL: "there is no in-kernel local APIC, or unknown flags"},
)
def kvm_send_userspace_msi(kvm: Kvm, msi: uapi.kvm_msi) -> int:
    """Deliver a message: to how many processors, 0 if the guest has blocked it; EINVAL."""
    if not kvm.kvm_arch_intc_initialized() or msi.flags & ~uapi.KVM_MSI_VALID_DEVID:
        raise fail(EINVAL, f"no interrupt controller, or unknown flags {msi.flags:#x}")
    entry = uapi.kvm_irq_routing_entry(type=uapi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.address_hi = msi.address_lo, msi.address_hi
    entry.u.msi.data = msi.data
    route = kvm.kvm_set_routing_entry(entry)
    return route.set(route, KVM_USERSPACE_IRQ_SOURCE_ID, 1)


@kvm_vm_ioctls.row(
    "KVM_IRQ_LINE_STATUS",
    InOut(uapi.kvm_irq_level),
    uapi.KVM_CAP_IRQ_INJECT_STATUS,
    needs=(INTC,),
)
def kvm_vm_ioctl_irq_line_status(kvm: Kvm, event: uapi.kvm_irq_level) -> None:
    """Raise or lower a line; the status takes the place of its number."""
    status = kvm_set_irq(kvm, KVM_USERSPACE_IRQ_SOURCE_ID, event.irq, event.level & 1)
    event.status = status


@kvm_vm_ioctls.row("KVM_IRQ_LINE", In(uapi.kvm_irq_level), uapi.KVM_CAP_IRQCHIP, needs=(INTC,))
def kvm_vm_ioctl_irq_line(kvm: Kvm, event: uapi.kvm_irq_level) -> None:
    """Raise or lower a line."""
    kvm_set_irq(kvm, KVM_USERSPACE_IRQ_SOURCE_ID, event.irq, event.level & 1)


@kvm_vm_ioctls.row(
    "KVM_SET_GSI_ROUTING",
    InTail(
        uapi.kvm_irq_routing, uapi.kvm_irq_routing_entry, "nr", KVM_MAX_IRQ_ROUTES, too_many=EINVAL
    ),
    uapi.KVM_CAP_IRQ_ROUTING,
    errors={EINVAL: "no in-kernel interrupt controller, unknown flags, or an entry that cannot be"},
)
def kvm_set_irq_routing(
    kvm: Kvm, routing: Tail[uapi.kvm_irq_routing, uapi.kvm_irq_routing_entry]
) -> None:
    """Replace the routing table as a whole."""
    if routing.header.flags or not kvm.kvm_arch_intc_initialized():
        raise fail(EINVAL, "no interrupt controller, or unknown flags")
    for entry in routing.entries:
        check_routing_entry(entry)
    kvm.irq_routing = IrqRoutingTable(map(kvm.kvm_set_routing_entry, routing.entries))
    kvm.kvm_arch_post_irq_routing_update()


@kvm_vm_ioctls.row(
    "KVM_CREATE_DEVICE",
    InOut(uapi.kvm_create_device),
    uapi.KVM_CAP_DEVICE_CTRL,
    errors={ENODEV: "there is no such type of device"},
)
def kvm_ioctl_create_device(kvm: Kvm, device: uapi.kvm_create_device) -> None:
    """ENODEV: of x86's device types there is only VFIO, and no VFIO group can exist here."""
    raise fail(ENODEV, f"there is no device of type {device.type}")


@kvm_vm_ioctls.row(
    "KVM_CHECK_EXTENSION",
    Value(),
    uapi.KVM_CAP_CHECK_EXTENSION_VM,
    returns="the capability's value for this VM, 0 for what is not there",
)
def kvm_vm_ioctl_check_extension(kvm: Kvm, cap: int) -> int:
    """What is there and how much of it, for this VM."""
    return kvm_vm_ioctl_check_extension_generic(kvm, cap)


@kvm_vm_ioctls.row(
    "KVM_ENABLE_CAP",
    In(uapi.kvm_enable_cap),
    uapi.KVM_CAP_ENABLE_CAP_VM,
    errors={
        EINVAL: "it is not one to enable on a VM, unknown flags or arguments, or too late",
        EEXIST: "KVM_CAP_SPLIT_IRQCHIP: there is an irqchip or a vCPU",
        E2BIG: "KVM_CAP_DIRTY_LOG_RING: the ring would be too large",
    },
)
def kvm_vm_ioctl_enable_cap_generic(kvm: Kvm, cap: uapi.kvm_enable_cap) -> int:
    """Switch on what is off by default; EINVAL for capabilities that need no switching."""
    if cap.cap in DIRTY_RING_CAPS:
        kvm_vm_ioctl_enable_dirty_log_ring(kvm, cap.args[0])
        return 0
    if cap.cap != uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2:
        return kvm.kvm_vm_ioctl_enable_cap(cap.cap, cap.flags, tuple(cap.args))
    enable = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    allowed = enable | uapi.KVM_DIRTY_LOG_INITIALLY_SET if cap.args[0] & enable else enable
    if cap.flags or cap.args[0] & ~allowed:
        raise fail(EINVAL, f"KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: {cap.args[0]:#x}")
    kvm.manual_dirty_log_protect = cap.args[0]
    return 0


@kvm_vm_ioctls.row(
    "KVM_GET_STATS_FD",
    Value(),
    uapi.KVM_CAP_BINARY_STATS_FD,
    returns="a descriptor to read",
    errors={EMFILE: "no descriptor is free"},
)
def kvm_vm_ioctl_get_stats_fd(kvm: Kvm, _: int) -> int:
    """A new descriptor that reads the VM's statistics; whatever the argument is."""
    kvm.kvm_arch_publish_stats()
    return kvm.stats.getfd()


def kvm_vm_ioctl(file: File, cmd: int, arg: int) -> int:
    kvm: Kvm = file.private_data
    kvm.check_mm()
    return drive((kvm_vm_ioctls, arch().vm_ioctls), kvm, cmd, arg)


def kvm_vm_release(inode: Inode, file: File) -> None:
    kvm: Kvm = file.private_data
    kvm.eventfds.release()
    kvm_put_kvm(kvm)


kvm_vm_fops = FileOperations(
    unlocked_ioctl=kvm_vm_ioctl,
    compat_ioctl=kvm_vm_ioctl,
    release=kvm_vm_release,
    llseek=noop_llseek,
)
