"""The dirty log: which pages of a slot were written since it was last asked (api.rst 4.8, 4.117).

Ordinarily KVM_GET_DIRTY_LOG clears what it reports. With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it only
reports, and KVM_CLEAR_DIRTY_LOG clears the part that the caller has dealt with. No write is lost
between the two: one that is not in the log when it is read is in it the next time.

With the dirty ring (dirty_ring.py) there is no log.
"""

from __future__ import annotations

from errno import EINVAL, ENOENT, ENXIO

from anykvm.kvm.dirty_ring import kvm_reset_dirty_rings
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, Need, Value
from anykvm.kvm.kvm_main import Kvm
from anykvm.kvm.memslots import KVM_USER_MEM_SLOTS, KvmMemorySlot
from anykvm.kvm.vm_ioctl import kvm_vm_ioctls
from anykvm.uapi import kvm as uapi

NO_RING: Need[Kvm] = Need(
    lambda kvm: not kvm.dirty_ring_size, ENXIO, "the VM has a dirty ring", after_copy=True
)
RING: Need[Kvm] = Need(lambda kvm: bool(kvm.dirty_ring_size), EINVAL, "the VM has no dirty ring")


def _logging_slot(kvm: Kvm, number: int) -> KvmMemorySlot:
    """EINVAL for a number that no slot can have, ENOENT where there is no log."""
    space, slot_id = number >> 16, number & 0xFFFF
    if space >= kvm.address_space_num or slot_id >= KVM_USER_MEM_SLOTS:
        raise fail(EINVAL, f"there is no slot {number:#x}")
    return kvm.address_spaces[space].logging_slot(slot_id)


@kvm_vm_ioctls.row(
    "KVM_GET_DIRTY_LOG",
    In(uapi.kvm_dirty_log),
    needs=(NO_RING,),
    errors={EINVAL: "there is no such slot number", ENOENT: "the slot does not log"},
)
def kvm_vm_ioctl_get_dirty_log(kvm: Kvm, log: uapi.kvm_dirty_log) -> None:
    """The pages written since; read and cleared at once, unless clearing is manual."""
    with kvm.slots_lock:
        slot = _logging_slot(kvm, log.slot)
        kvm.kvm_arch_sync_dirty_log(slot)
        found = slot.dirty_pages()
        kvm.mm.write(log.dirty_bitmap, found)
        if not kvm.manual_dirty_log_protect:
            slot.clear_dirty(0, found)


@kvm_vm_ioctls.row(
    "KVM_CLEAR_DIRTY_LOG",
    In(uapi.kvm_clear_dirty_log),
    uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    needs=(NO_RING,),
    errors={
        EINVAL: "there is no such slot number, or the pages are no whole words of the bitmap",
        ENOENT: "the slot does not log",
    },
)
def kvm_vm_ioctl_clear_dirty_log(kvm: Kvm, log: uapi.kvm_clear_dirty_log) -> None:
    """Clear bits, for those pages to be logged again."""
    with kvm.slots_lock:
        first, pages = log.first_page, log.num_pages
        if first % 64:
            raise fail(EINVAL, f"page {first} does not begin a word of the bitmap")
        slot = _logging_slot(kvm, log.slot)
        kvm.kvm_arch_sync_dirty_log(slot)
        ends_inside = pages % 64 and first + pages != slot.npages
        if first > slot.npages or pages > slot.npages - first or ends_inside:
            raise fail(EINVAL, f"pages {first}+{pages} are no whole words of slot {slot.id}")
        cleared = kvm.mm.read(log.dirty_bitmap, (pages + 63) // 64 * 8)
        slot.clear_dirty(first // 8, cleared)


@kvm_vm_ioctls.row(
    "KVM_RESET_DIRTY_RINGS",
    Value(),
    uapi.KVM_CAP_DIRTY_LOG_RING,
    needs=(RING,),
    returns="how many pages were collected",
)
def kvm_vm_ioctl_reset_dirty_pages(kvm: Kvm, _: int) -> int:
    """Takes back what userspace has collected from the rings of all vCPUs. Only after that may it
    read the pages.
    """
    with kvm.slots_lock:
        return kvm_reset_dirty_rings(kvm)
