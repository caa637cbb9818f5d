"""The dirty ring: in memory that userspace shares, each vCPU tells which pages it wrote
(virt/kvm/dirty_ring.c; api.rst 8.29).

An entry goes from empty to DIRTY, by the vCPU; to DIRTY | RESET, by userspace, which has seen it;
and back to empty by KVM_RESET_DIRTY_RINGS, from when on the next write to the page is told again.
A vCPU whose ring is all but full leaves with KVM_EXIT_DIRTY_RING_FULL before it writes to one more
page.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from errno import E2BIG, EINVAL
from typing import TYPE_CHECKING, Any

from anykvm.fs.mapping import Mapping
from anykvm.kvm.errors import fail
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.uapi.kvm import (
    KVM_DIRTY_GFN_F_RESET,
    KVM_DIRTY_LOG_PAGE_OFFSET,
    kvm_dirty_gfn,
)

if TYPE_CHECKING:
    from anykvm.kvm.kvm_main import Kvm

ENTRY = ctypes.sizeof(kvm_dirty_gfn)
KVM_DIRTY_RING_MAX_ENTRIES = 65536
KVM_DIRTY_RING_MAX_SIZE = KVM_DIRTY_RING_MAX_ENTRIES * ENTRY
# Room for what one instruction may write once the ring counts as full
KVM_DIRTY_RING_RSVD_ENTRIES = 64
RING_OFFSET = KVM_DIRTY_LOG_PAGE_OFFSET * PAGE_SIZE


class KvmDirtyRing:
    """struct kvm_dirty_ring: the ring of one vCPU, behind its kvm_run in the same file."""

    def __init__(self, mapping: Mapping, size: int) -> None:
        self.size = size // ENTRY
        self.soft_limit = self.size - KVM_DIRTY_RING_RSVD_ENTRIES
        entries: Any = kvm_dirty_gfn * self.size
        self.dirty_gfns = mapping.view(entries, RING_OFFSET)
        self.reset_index = 0

    @property
    def address(self) -> int:
        return ctypes.addressof(self.dirty_gfns)

    def harvest(self) -> Iterator[tuple[int, int]]:
        """Empties the entries that userspace has collected: (slot number, page in the slot)."""
        for _ in range(self.size):
            entry = self.dirty_gfns[self.reset_index & (self.size - 1)]
            if not entry.flags & KVM_DIRTY_GFN_F_RESET:
                return
            gfn = entry.slot, entry.offset
            entry.flags = 0
            self.reset_index += 1
            yield gfn


def kvm_vm_ioctl_enable_dirty_log_ring(kvm: Kvm, size: int) -> None:
    """KVM_CAP_DIRTY_LOG_RING, once and before any vCPU: rings of `size` bytes. EINVAL, E2BIG."""
    if not size or size & (size - 1):
        raise fail(EINVAL, f"a ring of {size} bytes is no power of two")
    if size < KVM_DIRTY_RING_RSVD_ENTRIES * ENTRY or size < PAGE_SIZE:
        raise fail(EINVAL, f"a ring of {size} bytes is too small, {PAGE_SIZE} are the least")
    if size > KVM_DIRTY_RING_MAX_SIZE:
        raise fail(E2BIG, f"a ring of {size} bytes is more than {KVM_DIRTY_RING_MAX_SIZE}")
    if kvm.dirty_ring_size:
        raise fail(EINVAL, "the VM has its dirty rings already")
    with kvm.lock:
        if kvm.vcpus:
            raise fail(EINVAL, "dirty rings come before the first vCPU")
        kvm.dirty_ring_size = size


def kvm_reset_dirty_rings(kvm: Kvm) -> int:
    """`kvm_vm_ioctl_reset_dirty_pages`: how many entries userspace had collected."""
    rings = [vcpu.dirty_ring for vcpu in kvm.vcpus.values() if vcpu.dirty_ring is not None]
    gfns = [gfn for ring in rings for gfn in ring.harvest()]
    if gfns:
        kvm.kvm_arch_reset_dirty_gfns(gfns)
    return len(gfns)
