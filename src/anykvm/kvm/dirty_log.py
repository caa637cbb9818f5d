"""The dirty log: which pages of a slot were written since it was last asked (api.rst 4.8, 4.117).

Ordinarily KVM_GET_DIRTY_LOG clears what it reports. With KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 it only
reports, and KVM_CLEAR_DIRTY_LOG clears the part that the caller has dealt with.
"""

from __future__ import annotations

from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In
from anykvm.kvm.kvm_main import Kvm
from anykvm.kvm.memslots import KvmMemorySlot
from anykvm.kvm.vm_ioctl import kvm_vm_ioctls
from anykvm.uapi import kvm as uapi


def _synced(kvm: Kvm, slot_id: int) -> tuple[KvmMemorySlot, bytearray]:
    slot = kvm.memslots.logging_slot(slot_id)
    assert slot.dirty is not None
    kvm.kvm_arch_sync_dirty_log(slot)
    return slot, slot.dirty


@kvm_vm_ioctls.row("KVM_GET_DIRTY_LOG", In(uapi.kvm_dirty_log))
def kvm_vm_ioctl_get_dirty_log(kvm: Kvm, log: uapi.kvm_dirty_log) -> None:
    with kvm.slots_lock:
        _, dirty = _synced(kvm, log.slot)
        kvm.mm.write(log.dirty_bitmap, bytes(dirty))
        if not kvm.manual_dirty_log_protect:
            dirty[:] = bytes(len(dirty))


@kvm_vm_ioctls.row(
    "KVM_CLEAR_DIRTY_LOG", In(uapi.kvm_clear_dirty_log), uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
)
def kvm_vm_ioctl_clear_dirty_log(kvm: Kvm, log: uapi.kvm_clear_dirty_log) -> None:
    with kvm.slots_lock:
        slot, dirty = _synced(kvm, log.slot)
        first, pages = log.first_page, log.num_pages
        ends_inside = pages % 64 and first + pages != slot.npages
        if first % 64 or first > slot.npages or pages > slot.npages - first or ends_inside:
            raise fail(EINVAL, f"pages {first}+{pages} are no whole words of slot {slot.id}")
        size = (pages + 63) // 64 * 8
        cleared = kvm.mm.read(log.dirty_bitmap, size)
        for i, bits in enumerate(cleared, first // 8):
            dirty[i] &= ~bits & 0xFF
