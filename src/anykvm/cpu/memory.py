"""The guest-physical map: which host page, if any, stands behind each guest page.

What native code reads of it (see mmu.py) is one block of memory:

    a pointer for each GiB to an array of page entries; how many slots there are;
    the slots by guest address, a row of 16 bytes each: address, pointer to its `SlotEntry`.

Page entries have 32 bytes: host page | flags, map of translated bytes, slot, number of the page in
the slot. They are empty until the page is first used, so that a slot costs what is used of it.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from bisect import bisect_left, bisect_right
from typing import NamedTuple

PAGE = 4096
PHYSICAL_BITS = 46
PAGE_ENTRY, E_CODE, E_SLOT, E_PAGE = 32, 8, 16, 24
RAM, READONLY, CODE, LOG = 1, 2, 4, 8  # flags of a page entry and of a slot
GIB_PAGES = 1 << 18
TOP = 1 << (PHYSICAL_BITS - 30)
MAX_SLOTS = 1 << 15
SLOT_COUNT = TOP * 8
SLOT_TABLE, SLOT_TABLE_ROW = SLOT_COUNT + 8, 16
NORESERVE = 0x4000
# In the memory of a CodePage, see translate.py: a word, a map of bytes, and bytes.
BEING_READ, CODE_MAP = 8, 16
MADE_FROM = CODE_MAP + PAGE


class SlotEntry(ctypes.Structure):
    """What native code knows of a slot."""

    _fields_ = [
        ("gpa", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("hva", ctypes.c_uint64),  # | flags
        ("dirty", ctypes.c_uint64),  # a bit a page that was written, where LOG is set
        ("number", ctypes.c_uint32),  # in the dirty ring: address space << 16 | slot
    ]
    gpa: int
    size: int
    hva: int
    dirty: int
    number: int


SLOT_GPA, SLOT_SIZE, SLOT_HVA, SLOT_DIRTY, SLOT_NUMBER = (
    int(getattr(SlotEntry, name).offset) for name in ("gpa", "size", "hva", "dirty", "number")
)


class Slot(NamedTuple):
    """A range of guest-physical memory and the host memory behind it; sizes in bytes."""

    gpa: int
    size: int
    hva: int
    entry: SlotEntry
    dirty: ctypes.Array[ctypes.c_uint8] | None

    @property
    def flags(self) -> int:
        return self.entry.hva & (PAGE - 1)


class PhysicalMap:
    """One guest-physical address space. Changes need every vCPU out of native code."""

    def __init__(self) -> None:
        size = SLOT_TABLE + MAX_SLOTS * SLOT_TABLE_ROW
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | NORESERVE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._words = memoryview(self._memory)[: size // 8 * 8].cast("Q")
        self._leaves: dict[int, tuple[mmap.mmap, memoryview]] = {}
        self._gpas: list[int] = []  # sorted; keys of `slots`
        self.slots: dict[int, Slot] = {}

    def _leaf(self, gib: int) -> memoryview:
        known = self._leaves.get(gib)
        if known is None:
            m = mmap.mmap(-1, GIB_PAGES * PAGE_ENTRY, flags=mmap.MAP_PRIVATE | NORESERVE)
            known = self._leaves[gib] = m, memoryview(m).cast("Q")
            self._words[gib] = ctypes.addressof(ctypes.c_char.from_buffer(m))
        return known[1]

    def map(
        self,
        gpa: int,
        size: int,
        hva: int,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        all_dirty: bool = False,
        number: int = 0,
    ) -> None:
        """Puts host memory at `gpa`, in place of the slot that begins there; all three page
        aligned. With `all_dirty` every page counts as written already.
        """
        if (gpa | size | hva) % PAGE:
            raise ValueError(
                f"expected page-aligned gpa, size and hva, got {gpa:#x} {size:#x} {hva:#x}"
            )
        if gpa in self.slots:
            self.unmap(gpa, self.slots[gpa].size)
        bitmap = (ctypes.c_uint8 * (size // PAGE + 7 >> 3))() if log_dirty else None
        if bitmap is not None and all_dirty:
            ctypes.memset(bitmap, 0xFF, len(bitmap))
        flags = RAM | (READONLY if readonly else 0) | (LOG if log_dirty else 0)
        dirty = 0 if bitmap is None else ctypes.addressof(bitmap)
        entry = SlotEntry(gpa, size, hva | flags, dirty, number)
        self.slots[gpa] = Slot(gpa, size, hva, entry, bitmap)
        for gib in range(gpa >> 30, (gpa + size - 1 >> 30) + 1):
            self._leaf(gib)
        at = bisect_left(self._gpas, gpa)
        self._gpas.insert(at, gpa)
        self._splice_table(at, 0, self.slots[gpa])

    def _splice_table(self, start: int, removed: int, *added: Slot) -> None:
        """Replaces rows of the table that native code reads, from the one numbered `start` on."""
        words, row = self._words, SLOT_TABLE_ROW // 8
        first, count = SLOT_TABLE // 8 + start * row, words[SLOT_COUNT // 8]
        end = SLOT_TABLE // 8 + count * row
        behind, moved = first + removed * row, (len(added) - removed) * row
        words[behind + moved : end + moved] = words[behind:end]
        for n, slot in enumerate(added):
            at = first + n * row
            words[at], words[at + 1] = slot.gpa, ctypes.addressof(slot.entry)
        words[SLOT_COUNT // 8] = count + len(added) - removed

    def inside(self, gpa: int, size: int) -> list[Slot]:
        """The slots that begin inside the range."""
        first, last = bisect_left(self._gpas, gpa), bisect_left(self._gpas, gpa + size)
        return [self.slots[start] for start in self._gpas[first:last]]

    def unmap(self, gpa: int, size: int) -> None:
        """Removes the slots that begin inside the range."""
        gone = self.inside(gpa, size)
        first = bisect_left(self._gpas, gpa)
        for slot in gone:
            slot.entry.hva &= ~RAM  # events are delivered meanwhile, and must find no page of it
            self._empty(slot.gpa, slot.size)
        del self._gpas[first : first + len(gone)]
        self._splice_table(first, len(gone))
        for slot in gone:
            del self.slots[slot.gpa]

    def _empty(self, gpa: int, size: int) -> None:
        """Forgets the page entries of a range."""
        page, end = gpa // PAGE, (gpa + size) // PAGE
        while page < end:
            first = page % GIB_PAGES
            last = min(first + end - page, GIB_PAGES)
            self._empty_part(
                *self._leaves[page // GIB_PAGES], first * PAGE_ENTRY, last * PAGE_ENTRY
            )
            page += last - first

    def _empty_part(self, leaf: mmap.mmap, words: memoryview, start: int, end: int) -> None:
        """Bytes of one array of entries; whole pages of it are given back to the host."""
        inner, inner_end = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if inner < inner_end:
            leaf.madvise(mmap.MADV_DONTNEED, inner, inner_end - inner)
        else:
            inner = inner_end = end
        for first, last in ((start, inner), (inner_end, end)):
            words[first // 8 : last // 8] = memoryview(array("Q", bytes(last - first)))

    def slot_at(self, gpa: int) -> Slot | None:
        """The slot that holds `gpa`."""
        index = bisect_right(self._gpas, gpa) - 1
        if index < 0:
            return None
        slot = self.slots.get(self._gpas[index])
        return slot if slot is not None and gpa - slot.gpa < slot.size else None

    def gpas(self, host: int) -> list[int]:
        """Guest-physical addresses of a host page (several where slots share memory)."""
        return [s.gpa + host - s.hva for s in self.slots.values() if s.hva <= host < s.hva + s.size]

    def host(self, gpa: int) -> int | None:
        """Host address of a guest-physical one."""
        slot = self.slot_at(gpa)
        return slot.hva + gpa - slot.gpa if slot is not None else None

    def set_code(self, host: int, bitmap: int) -> None:
        """Stores to this host page must look at the bitmap of translated bytes (0: no code any
        more).
        """
        for gpa in self.gpas(host):
            if self.entry(gpa) is not None:
                words, at = self._leaf(gpa >> 30), (gpa >> 12) % GIB_PAGES * 4
                words[at + 1] = bitmap
                words[at] = words[at] | CODE if bitmap else words[at] & ~CODE

    def entry(self, gpa: int) -> int | None:
        """Where the page's entry is, filled in; None where no slot has the page."""
        slot = self.slot_at(gpa)
        if slot is None:
            return None
        words, at = self._leaf(gpa >> 30), (gpa >> 12) % GIB_PAGES * 4
        if not words[at]:
            page = (gpa - slot.gpa) // PAGE
            words[at + 2], words[at + 3] = ctypes.addressof(slot.entry), page
            words[at] = slot.entry.hva + page * PAGE
        return self._words[gpa >> 30] + at * 8

    def take_dirty(self, gpa: int) -> bytes:
        """Which pages of the slot at `gpa` were written since the last call: a bit a page."""
        slot = self.slots[gpa]
        if slot.dirty is None:
            raise ValueError(f"slot at {gpa:#x} is not logged")
        # Exchanged at once: what an event's delivery writes meanwhile is in the one or the other.
        clean = (ctypes.c_uint8 * len(slot.dirty))()
        self.slots[gpa] = slot._replace(dirty=clean)
        slot.entry.dirty = ctypes.addressof(clean)
        return bytes(slot.dirty)

    def reset_dirty(self, gpa: int, page: int) -> None:
        """The page, counted from the start of the slot at `gpa`, counts as not written."""
        slot = self.slots.get(gpa)
        if slot is not None and slot.dirty is not None:
            slot.dirty[page >> 3] &= ~(1 << (page & 7)) & 0xFF
