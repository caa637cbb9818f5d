"""KVM_SET_USER_MEMORY_REGION in both its forms: a slot is created, moved, deleted, or has its flags
changed (virt/kvm/kvm_main.c, `__kvm_set_memory_region`; api.rst 4.35 and 4.140).
"""

from __future__ import annotations

from errno import EEXIST, EINVAL

from anykvm.fs.trace import call
from anykvm.kvm.ioctl import In
from anykvm.kvm.kvm_main import Kvm
from anykvm.kvm.memslots import KvmMrChange, MemoryRegion, check_memory_region
from anykvm.kvm.vm_ioctl import kvm_vm_ioctls
from anykvm.uapi import kvm as uapi
from anykvm.uapi import later

ERRORS = {
    EINVAL: "unknown flags, no whole pages, an impossible range, no such slot, or another address,"
    " size or kind for one that is there",
    EEXIST: "it would overlap another slot",
}


def _set_memory_region(kvm: Kvm, region: MemoryRegion) -> None:
    check_memory_region(region, kvm.address_space_num)
    with kvm.slots_lock:
        slots = kvm.address_spaces[region.slot >> 16]
        change, old, new = slots.plan(region)
        if change is KvmMrChange.NONE:
            return
        kvm.kvm_arch_prepare_memory_region(change, old, new)
        slots.install(old, new, kvm.dirty_log_initially_set)
        with call("kvm_arch_commit_memory_region", change=change.value, slot=region.slot):
            kvm.kvm_arch_commit_memory_region(change, old, new)


@kvm_vm_ioctls.row(
    "KVM_SET_USER_MEMORY_REGION",
    In(uapi.kvm_userspace_memory_region),
    uapi.KVM_CAP_USER_MEMORY,
    errors=ERRORS,
)
def kvm_vm_ioctl_set_memory_region(kvm: Kvm, region: uapi.kvm_userspace_memory_region) -> None:
    """Create, move, delete a slot or change its flags. When it returns, no vCPU uses the slot as it
    was.
    """
    _set_memory_region(kvm, region)


@kvm_vm_ioctls.row(
    "KVM_SET_USER_MEMORY_REGION2",
    In(later.kvm_userspace_memory_region2),
    later.KVM_CAP_USER_MEMORY2,
    errors=ERRORS,
)
def kvm_vm_ioctl_set_memory_region2(kvm: Kvm, region: later.kvm_userspace_memory_region2) -> None:
    """As KVM_SET_USER_MEMORY_REGION. KVM_MEM_GUEST_MEMFD is EINVAL: this type of VM has no private
    memory.
    """
    _set_memory_region(kvm, region)
