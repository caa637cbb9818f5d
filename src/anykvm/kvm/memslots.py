"""Memory slots: which guest-physical pages are backed by which addresses of the caller, and which
are dirty.

virt/kvm/kvm_main.c, `__kvm_set_memory_region`; api.rst 4.35 (slots), 4.8 and 4.117 (dirty log).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from errno import EEXIST, EINVAL, ENOENT

from anykvm.kvm.errors import fail
from anykvm.uapi.kvm import (
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    kvm_userspace_memory_region,
)

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
KVM_USER_MEM_SLOTS = 32764  # SHRT_MAX less the three private slots of x86
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
TASK_SIZE_MAX = (1 << 47) - PAGE_SIZE


class KvmMrChange(Enum):
    """enum kvm_mr_change: what KVM_SET_USER_MEMORY_REGION amounts to."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags"
    NONE = "none"


@dataclass(slots=True)
class KvmMemorySlot:
    """struct kvm_memory_slot. `dirty` is a logging slot's bitmap: a bit a page, little-endian."""

    id: int
    base_gfn: int
    npages: int
    userspace_addr: int
    flags: int
    dirty: bytearray | None = field(default=None, repr=False)

    @property
    def gpa(self) -> int:
        return self.base_gfn << PAGE_SHIFT

    @property
    def size(self) -> int:
        return self.npages << PAGE_SHIFT

    @property
    def readonly(self) -> bool:
        return bool(self.flags & KVM_MEM_READONLY)

    @property
    def log_dirty(self) -> bool:
        return bool(self.flags & KVM_MEM_LOG_DIRTY_PAGES)

    @property
    def dirty_bytes(self) -> int:
        """Size of the bitmap: whole 64-bit words."""
        return (self.npages + 63) // 64 * 8

    def new_bitmap(self, all_dirty: bool) -> bytearray:
        pages = (1 << self.npages) - 1 if all_dirty else 0
        return bytearray(pages.to_bytes(self.dirty_bytes, "little"))

    def hva(self, gpa: int) -> int:
        return self.userspace_addr + gpa - self.gpa

    def mark_dirty(self, gpa: int, size: int) -> None:
        if self.dirty is None or not size:
            return
        first = (gpa - self.gpa) >> PAGE_SHIFT
        last = (gpa + size - 1 - self.gpa) >> PAGE_SHIFT
        for page in range(first, last + 1):
            self.dirty[page >> 3] |= 1 << (page & 7)


def check_memory_region(region: kvm_userspace_memory_region) -> None:
    """What is wrong with a region by itself: EINVAL, in the kernel's order."""
    flags, size, gpa = region.flags, region.memory_size, region.guest_phys_addr
    addr = region.userspace_addr
    rules = (
        (flags & ~(KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY), f"unknown flags {flags:#x}"),
        (size % PAGE_SIZE, f"size {size:#x} is not a multiple of a page"),
        (gpa % PAGE_SIZE, f"guest address {gpa:#x} is not page-aligned"),
        (
            addr % PAGE_SIZE or addr + size > TASK_SIZE_MAX,
            f"{addr:#x} is no page-aligned user address with {size:#x} bytes",
        ),
        (region.slot >> 16, f"there is no address space {region.slot >> 16}"),
        ((region.slot & 0xFFFF) >= KVM_USER_MEM_SLOTS, f"slot {region.slot & 0xFFFF} is too high"),
        (gpa + size > 1 << 64, "the region wraps around"),
        (size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES, f"{size:#x} bytes are too many"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_SET_USER_MEMORY_REGION: {text}")


class KvmMemslots:
    """struct kvm_memslots: the slots by number, and in order of guest address for look-up."""

    def __init__(self) -> None:
        self._by_id: dict[int, KvmMemorySlot] = {}
        # Replaced together, so that vCPU threads can look up without a lock.
        self._order: tuple[list[int], list[KvmMemorySlot]] = ([], [])

    def __iter__(self) -> Iterator[KvmMemorySlot]:
        return iter(self._order[1])

    def __len__(self) -> int:
        return len(self._by_id)

    def id_to_memslot(self, slot_id: int) -> KvmMemorySlot | None:
        return self._by_id.get(slot_id)

    def gpa_to_memslot(self, gpa: int) -> KvmMemorySlot | None:
        """The slot that holds `gpa`, None for a hole (MMIO)."""
        starts, slots = self._order
        index = bisect_right(starts, gpa) - 1
        if index < 0:
            return None
        slot = slots[index]
        return slot if gpa - slot.gpa < slot.size else None

    def plan(
        self, region: kvm_userspace_memory_region
    ) -> tuple[KvmMrChange, KvmMemorySlot | None, KvmMemorySlot | None]:
        """The change a checked region asks for, the slot before and after; EINVAL, EEXIST."""
        old = self._by_id.get(region.slot & 0xFFFF)
        if not region.memory_size:
            if old is None:
                raise fail(EINVAL, f"slot {region.slot} does not exist, cannot delete it")
            return KvmMrChange.DELETE, old, None
        new = KvmMemorySlot(
            region.slot & 0xFFFF,
            region.guest_phys_addr >> PAGE_SHIFT,
            region.memory_size >> PAGE_SHIFT,
            region.userspace_addr,
            region.flags,
        )
        change = _classify(old, new)
        if change in (KvmMrChange.CREATE, KvmMrChange.MOVE):
            self._refuse_overlap(new)
        return change, old, new

    def _refuse_overlap(self, new: KvmMemorySlot) -> None:
        for slot in self:
            apart = slot.gpa + slot.size <= new.gpa or new.gpa + new.size <= slot.gpa
            if slot.id != new.id and not apart:
                raise fail(EEXIST, f"slot {new.id} would overlap slot {slot.id}")

    def install(
        self, old: KvmMemorySlot | None, new: KvmMemorySlot | None, all_dirty: bool = False
    ) -> None:
        """Replace `old` by `new`, keeping the dirty bitmap of a slot that goes on logging.

        A slot that begins to log has no dirty page, or every one with `all_dirty`.
        """
        if old is not None:
            del self._by_id[old.id]
        if new is not None:
            self._by_id[new.id] = new
            if new.log_dirty:
                kept = old.dirty if old is not None and old.npages == new.npages else None
                new.dirty = kept if kept is not None else new.new_bitmap(all_dirty)
        slots = sorted(self._by_id.values(), key=lambda slot: slot.base_gfn)
        self._order = ([slot.gpa for slot in slots], slots)

    def logging_slot(self, slot: int) -> KvmMemorySlot:
        """The slot whose dirty log is asked for; EINVAL for a bad number, ENOENT if none logs."""
        if slot >> 16 or (slot & 0xFFFF) >= KVM_USER_MEM_SLOTS:
            raise fail(EINVAL, f"there is no slot {slot:#x}")
        found = self._by_id.get(slot)
        if found is None or found.dirty is None:
            raise fail(ENOENT, f"slot {slot} does not log dirty pages")
        return found


def _classify(old: KvmMemorySlot | None, new: KvmMemorySlot) -> KvmMrChange:
    if old is None:
        return KvmMrChange.CREATE
    changed = (old.flags ^ new.flags) & KVM_MEM_READONLY
    if old.userspace_addr != new.userspace_addr or old.npages != new.npages or changed:
        raise fail(EINVAL, f"slot {new.id} exists; its address, size and kind cannot change")
    if old.base_gfn != new.base_gfn:
        return KvmMrChange.MOVE
    return KvmMrChange.FLAGS_ONLY if old.flags != new.flags else KvmMrChange.NONE
