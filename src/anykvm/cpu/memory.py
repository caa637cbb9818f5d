"""The guest-physical map: which host page, if any, stands behind each guest page.

Two levels, read by native code (see mmu.py). Entries of 32 bytes: host page | flags, bitmap of
translated bytes, and where to note that the page was written.
"""

from __future__ import annotations

import ctypes
import mmap
from array import array
from typing import NamedTuple

from anykvm.cpu.mmu import CODE, LOG, PAGE_ENTRY, PHYSICAL_BITS, RAM, READONLY

PAGE = 4096
GIB_PAGES = 1 << 18
TOP = 1 << (PHYSICAL_BITS - 30)
NORESERVE = 0x4000


class Slot(NamedTuple):
    """A range of guest-physical memory and the host memory behind it; sizes in bytes."""

    gpa: int
    size: int
    hva: int
    readonly: bool
    dirty: ctypes.Array[ctypes.c_uint8] | None


class PhysicalMap:
    """Guest-physical memory of one engine. Changes need every vCPU out of native code."""

    def __init__(self) -> None:
        self._top = mmap.mmap(-1, TOP * 8, flags=mmap.MAP_PRIVATE | NORESERVE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._top))
        self._pointers = memoryview(self._top).cast("Q")
        self._leaves: dict[int, memoryview] = {}
        self._addresses: dict[int, int] = {}
        self.slots: dict[int, Slot] = {}

    def _leaf(self, gib: int) -> memoryview:
        leaf = self._leaves.get(gib)
        if leaf is None:
            m = mmap.mmap(-1, GIB_PAGES * PAGE_ENTRY, flags=mmap.MAP_PRIVATE | NORESERVE)
            leaf = self._leaves[gib] = memoryview(m).cast("Q")
            self._addresses[gib] = ctypes.addressof(ctypes.c_char.from_buffer(m))
            self._pointers[gib] = self._addresses[gib]
        return leaf

    def map(self, gpa: int, size: int, hva: int, *, readonly: bool, log_dirty: bool) -> None:
        """Puts host memory at `gpa`; all three page aligned."""
        if (gpa | size | hva) % PAGE:
            raise ValueError(
                f"expected page-aligned gpa, size and hva, got {gpa:#x} {size:#x} {hva:#x}"
            )
        pages = size // PAGE
        dirty = (ctypes.c_uint8 * ((pages + 7) // 8))() if log_dirty else None
        flags = RAM | (READONLY if readonly else 0) | (LOG if dirty is not None else 0)
        self.slots[gpa] = Slot(gpa, size, hva, readonly, dirty)
        done = 0
        while done < pages:
            gfn = gpa // PAGE + done
            leaf, first = self._leaf(gfn // GIB_PAGES), gfn % GIB_PAGES
            n = min(pages - done, GIB_PAGES - first)
            start = hva + done * PAGE | flags
            column = array("Q", range(start, start + n * PAGE, PAGE))
            leaf[first * 4 : (first + n) * 4 : 4] = memoryview(column)
            if dirty is not None:
                base = ctypes.addressof(dirty)
                where = array("Q", [base + (done + i) // 8 for i in range(n)])
                masks = array("Q", [1 << ((done + i) % 8) for i in range(n)])
                leaf[first * 4 + 2 : (first + n) * 4 : 4] = memoryview(where)
                leaf[first * 4 + 3 : (first + n) * 4 : 4] = memoryview(masks)
            done += n

    def unmap(self, gpa: int, size: int) -> None:
        for start in [s for s in self.slots if gpa <= s < gpa + size]:
            del self.slots[start]
        pages, done = size // PAGE, 0
        while done < pages:
            gfn = gpa // PAGE + done
            first = gfn % GIB_PAGES
            n = min(pages - done, GIB_PAGES - first)
            if leaf := self._leaves.get(gfn // GIB_PAGES):
                leaf[first * 4 : (first + n) * 4] = memoryview(array("Q", bytes(n * PAGE_ENTRY)))
            done += n

    def gpas(self, host: int) -> list[int]:
        """Guest-physical addresses of a host page (several where slots share memory)."""
        return [s.gpa + host - s.hva for s in self.slots.values() if s.hva <= host < s.hva + s.size]

    def host(self, gpa: int) -> int | None:
        """Host address of a guest-physical one."""
        leaf = self._leaves.get(gpa >> 30)
        entry = leaf[(gpa >> 12) % GIB_PAGES * 4] if leaf else 0
        return (entry & ~0xFFF) + (gpa & 0xFFF) if entry else None

    def set_code(self, host: int, bitmap: int) -> None:
        """Stores to this host page must look at the bitmap of translated bytes (0: no code any
        more).
        """
        for gpa in self.gpas(host):
            leaf, at = self._leaves[gpa >> 30], (gpa >> 12) % GIB_PAGES * 4
            leaf[at + 1] = bitmap
            leaf[at] = leaf[at] | CODE if bitmap else leaf[at] & ~CODE

    def take_dirty(self, gpa: int) -> bytes:
        """Which pages of the slot at `gpa` were written since the last call: a bit a page."""
        slot = self.slots[gpa]
        if slot.dirty is None:
            raise ValueError(f"slot at {gpa:#x} is not logged")
        taken = bytes(slot.dirty)
        ctypes.memset(slot.dirty, 0, len(slot.dirty))
        return taken
