"""KVM_CHECK_EXTENSION for what all architectures share: a value per capability; what is in no table
is 0.

`kvm_vm_ioctl_check_extension_generic`; api.rst 4.4.
"""

from __future__ import annotations

from anykvm.kvm.dirty_ring import KVM_DIRTY_RING_MAX_SIZE
from anykvm.kvm.irqchip import KVM_MAX_IRQ_ROUTES
from anykvm.kvm.kvm_main import Kvm, arch
from anykvm.kvm.memslots import KVM_USER_MEM_SLOTS
from anykvm.uapi import kvm as uapi
from anykvm.uapi import later

GENERIC_CAPS: dict[int, int] = {
    uapi.KVM_CAP_USER_MEMORY: 1,
    uapi.KVM_CAP_SYNC_MMU: 1,
    uapi.KVM_CAP_DESTROY_MEMORY_REGION_WORKS: 1,
    uapi.KVM_CAP_JOIN_MEMORY_REGIONS_WORKS: 1,
    uapi.KVM_CAP_INTERNAL_ERROR_DATA: 1,
    uapi.KVM_CAP_IOEVENTFD_ANY_LENGTH: 1,
    uapi.KVM_CAP_IRQFD: 1,
    uapi.KVM_CAP_IRQFD_RESAMPLE: 1,
    uapi.KVM_CAP_IOEVENTFD: 1,
    uapi.KVM_CAP_IOEVENTFD_NO_LENGTH: 1,
    uapi.KVM_CAP_CHECK_EXTENSION_VM: 1,
    uapi.KVM_CAP_ENABLE_CAP_VM: 1,
    uapi.KVM_CAP_SIGNAL_MSI: 1,
    uapi.KVM_CAP_IMMEDIATE_EXIT: 1,
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_BINARY_STATS_FD: 1,
    uapi.KVM_CAP_COALESCED_MMIO: uapi.KVM_COALESCED_MMIO_PAGE_OFFSET,
    uapi.KVM_CAP_COALESCED_PIO: 1,
    uapi.KVM_CAP_IRQ_ROUTING: KVM_MAX_IRQ_ROUTES,
    uapi.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE
    | uapi.KVM_DIRTY_LOG_INITIALLY_SET,
    uapi.KVM_CAP_DIRTY_LOG_RING: KVM_DIRTY_RING_MAX_SIZE,
    uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL: KVM_DIRTY_RING_MAX_SIZE,
    later.KVM_CAP_USER_MEMORY2: 1,
    later.KVM_CAP_MEMORY_FAULT_INFO: 1,
}


def kvm_vm_ioctl_check_extension_generic(kvm: Kvm | None, cap: int) -> int:
    """The capability's value, of a VM or (None) of /dev/kvm; 0 for all that is not there."""
    if cap in GENERIC_CAPS:
        return GENERIC_CAPS[cap]
    return arch().kvm_vm_ioctl_check_extension(kvm, cap) or 0
