"""Memory slots: which guest-physical pages are backed by which addresses of the caller, and which
are dirty.

virt/kvm/kvm_main.c, `__kvm_set_memory_region`; api.rst 4.35 (slots), 4.8 and 4.117 (dirty log).
"""

from __future__ import annotations

import threading
from bisect import bisect_left, bisect_right
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
from anykvm.uapi.later import kvm_userspace_memory_region2

MemoryRegion = kvm_userspace_memory_region | kvm_userspace_memory_region2

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
KVM_USER_MEM_SLOTS = 32764  # SHRT_MAX less the three private slots of x86
KVM_MEM_MAX_NR_PAGES = (1 << 31) - 1
TASK_SIZE_MAX = (1 << 47) - PAGE_SIZE


_bitmaps = threading.Lock()  # held for a moment, by whoever changes a dirty bitmap


class KvmMrChange(Enum):
    """enum kvm_mr_change: what KVM_SET_USER_MEMORY_REGION amounts to."""

    CREATE = "create"
    DELETE = "delete"
    MOVE = "move"
    FLAGS_ONLY = "flags"
    NONE = "none"


@dataclass(slots=True)
class KvmMemorySlot:
    """struct kvm_memory_slot. `dirty` is a logging slot's bitmap: a bit a page, little-endian.
    `host_address` is where this process has the memory, which the architecture prepares.
    """

    id: int
    base_gfn: int
    npages: int
    userspace_addr: int
    flags: int
    as_id: int = 0
    dirty: bytearray | None = field(default=None, repr=False)
    host_address: int = field(default=0, repr=False, compare=False)

    @property
    def gpa(self) -> int:
        return self.base_gfn << PAGE_SHIFT

    @property
    def size(self) -> int:
        return self.npages << PAGE_SHIFT

    @property
    def number(self) -> int:
        """What userspace calls it: address space << 16 | slot."""
        return self.as_id << 16 | self.id

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
        """Pages that KVM itself has written."""
        if not size:
            return
        first = (gpa - self.gpa) >> PAGE_SHIFT
        last = (gpa + size - 1 - self.gpa) >> PAGE_SHIFT
        with _bitmaps:
            if self.dirty is not None:
                for page in range(first, last + 1):
                    self.dirty[page >> 3] |= 1 << (page & 7)

    def merge_dirty(self, found: bytes) -> None:
        """Pages that the guest has written, a bit each."""
        with _bitmaps:
            if self.dirty is not None and any(found):
                merged = int.from_bytes(self.dirty, "little") | int.from_bytes(found, "little")
                self.dirty[:] = merged.to_bytes(len(self.dirty), "little")

    def dirty_pages(self) -> bytes:
        return bytes(self.dirty or b"")

    def clear_dirty(self, at: int, pages: bytes) -> None:
        """Forgets pages, whose bits begin at byte `at` of the bitmap."""
        with _bitmaps:
            if self.dirty is not None:
                before = int.from_bytes(self.dirty[at : at + len(pages)], "little")
                left = before & ~int.from_bytes(pages, "little")
                self.dirty[at : at + len(pages)] = left.to_bytes(len(pages), "little")


def check_memory_region(region: MemoryRegion, address_spaces: int = 1) -> None:
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
        (region.slot >> 16 >= address_spaces, f"there is no address space {region.slot >> 16}"),
        ((region.slot & 0xFFFF) >= KVM_USER_MEM_SLOTS, f"slot {region.slot & 0xFFFF} is too high"),
        (gpa + size >= 1 << 64, "the region wraps around"),
        (size >> PAGE_SHIFT > KVM_MEM_MAX_NR_PAGES, f"{size:#x} bytes are too many"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_SET_USER_MEMORY_REGION: {text}")


class KvmMemslots:
    """struct kvm_memslots, one address space: the slots by number, and in order of guest address
    for look-up.
    """

    def __init__(self, as_id: int = 0) -> None:
        self.as_id = as_id
        self._by_id: dict[int, KvmMemorySlot] = {}
        self._starts: list[int] = []
        self._slots: list[KvmMemorySlot] = []
        # vCPU threads look up without a lock, and again where a change came between: odd while one
        # is made (a seqcount).
        self._changes = 0

    def __iter__(self) -> Iterator[KvmMemorySlot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._by_id)

    def id_to_memslot(self, slot_id: int) -> KvmMemorySlot | None:
        return self._by_id.get(slot_id)

    def gpa_to_memslot(self, gpa: int) -> KvmMemorySlot | None:
        """The slot that holds `gpa`, None for a hole (MMIO)."""
        while True:
            changes = self._changes
            index = bisect_right(self._starts, gpa) - 1
            near = self._slots[index : index + 1] if index >= 0 else []
            if changes == self._changes and not changes & 1:
                return near[0] if near and gpa - near[0].gpa < near[0].size else None

    def plan(
        self, region: MemoryRegion
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
            self.as_id,
        )
        change = _classify(old, new)
        if change in (KvmMrChange.CREATE, KvmMrChange.MOVE):
            self._refuse_overlap(new)
        return change, old, new

    def _refuse_overlap(self, new: KvmMemorySlot) -> None:
        """At most two others can be near: the last that begins before its end is one of them."""
        before_end = bisect_left(self._starts, new.gpa + new.size)
        for slot in self._slots[max(before_end - 2, 0) : before_end]:
            if slot.id != new.id and slot.gpa + slot.size > new.gpa:
                raise fail(EEXIST, f"slot {new.id} would overlap slot {slot.id}")

    def install(
        self, old: KvmMemorySlot | None, new: KvmMemorySlot | None, all_dirty: bool = False
    ) -> None:
        """Replace `old` by `new`, keeping the dirty bitmap of a slot that goes on logging.

        A slot that begins to log has no dirty page, or every one with `all_dirty`.
        """
        self._changes += 1
        if old is not None:
            at = bisect_left(self._starts, old.gpa)
            del self._by_id[old.id], self._starts[at], self._slots[at]
        if new is not None:
            if new.log_dirty:
                kept = old.dirty if old is not None and old.npages == new.npages else None
                new.dirty = kept if kept is not None else new.new_bitmap(all_dirty)
            at = bisect_left(self._starts, new.gpa)
            self._by_id[new.id] = new
            self._starts.insert(at, new.gpa)
            self._slots.insert(at, new)
        self._changes += 1

    def logging_slot(self, slot_id: int) -> KvmMemorySlot:
        """The slot whose dirty log is asked for; ENOENT if it does not log."""
        found = self._by_id.get(slot_id)
        if found is None or found.dirty is None:
            raise fail(ENOENT, f"slot {slot_id} does not log dirty pages")
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
