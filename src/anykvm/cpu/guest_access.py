"""How Python reaches guest memory: by linear address with the guest's rights, as microcode needs
it, and by physical address.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from anykvm.cpu import mmu
from anykvm.cpu.faults import Leave, VmExit
from anykvm.cpu.memory import LOG, READONLY
from anykvm.cpu.registers import EFER_LMA, Registers
from anykvm.cpu.state import BOUNCE, PAGE, TLB_ENTRIES, TLB_ENTRY, Exit, offset_of
from anykvm.cpu.vmcb import SvmExit

if TYPE_CHECKING:
    from anykvm.cpu.engine import Engine

CR0_PG = 1 << 31
MASK64 = 2**64 - 1


class GuestAccess(Registers):
    """The memory of a vCPU's guest."""

    def __init__(self, engine: Engine, index: int) -> None:
        super().__init__(engine, index)
        page = (ctypes.c_uint8 * PAGE)()
        self._page, self._page_address = memoryview(page).cast("B"), ctypes.addressof(page)
        self._supervisor = self.address + offset_of("tlb")
        self._user = self._supervisor + TLB_ENTRIES * TLB_ENTRY

    def _native_access(self, name: str, va: int, size: int, *, supervisor: bool) -> None:
        """A native access between guest memory and the bounce buffer. Raises GuestFault, and Leave
        where only the caller of `run` can help.
        """
        s = self.state
        s.exit_kind = 0
        tlb = self._supervisor if supervisor or self.cpl != 3 else self._user
        with self.engine.gate.passed():  # no slot is half changed
            made = self._call[name](
                self.address, tlb, va & MASK64, size, s.exit_record, s.insn_count
            )
        if made:
            return
        if s.exit_kind == Exit.NESTED_FAULT:
            raise self.nested_fault()
        if s.exit_kind:
            raise Leave(Exit(s.exit_kind))
        raise self.noted_fault()

    def nested_fault(self) -> VmExit:
        """The fault of nested paging that native code left in the state."""
        s = self.state
        return VmExit(SvmExit.NPF, s.nested_fault_error, s.nested_fault_gpa)

    def read(self, va: int, size: int, *, supervisor: bool = False) -> bytes:
        """`size` bytes at a linear address; raises GuestFault."""
        data = b""
        while len(data) < size:
            part = min(size - len(data), BOUNCE)
            self._native_access("fetch", va + len(data), part, supervisor=supervisor)
            data += bytes(self.state.bounce[:part])
        return data

    def write(self, va: int, data: bytes, *, supervisor: bool = False) -> None:
        """Writes bytes at a linear address; raises GuestFault, with nothing written."""
        parts = [(at, data[at : at + BOUNCE]) for at in range(0, len(data), BOUNCE)]
        for at, part in parts:
            self._write_access("probe_write", va + at, len(part), supervisor=supervisor)
        for at, part in parts:
            ctypes.memmove(self.state.bounce, part, len(part))
            self._write_access("commit", va + at, len(part), supervisor=supervisor)

    def _write_access(self, name: str, va: int, size: int, *, supervisor: bool) -> None:
        """Where translated code is in the way, it goes first."""
        s = self.state
        while True:
            try:
                return self._native_access(name, va, size, supervisor=supervisor)
            except Leave as leave:
                if leave.exit is not Exit.CODE_WRITE:
                    raise
            self.engine.code_written(s.code_write_gpa, s.code_write_size, self.space)

    def host_bytes(self, address: int, size: int) -> bytes:
        """Guest memory by its host address, such as `fetch_page` gives, at most a page; Leave where
        the host has none there.
        """
        if not self._call["copy_in"](self.address, self._page_address, address, size):
            raise Leave(Exit.MEMORY_FAULT)
        return bytes(self._page[:size])

    def read_guest_physical(self, gpa: int, size: int) -> bytes | None:
        """As `read_physical`, by an address of what runs: nested paging may come in between."""
        s = self.state
        if s.nested_paging:
            with self.engine.gate.passed():
                s.exit_kind = 0
                found = self._call["nested_look"](self.address, gpa)
            if not found and s.exit_kind == Exit.NESTED_FAULT:
                raise self.nested_fault()
            if not found:
                raise Leave(Exit(s.exit_kind))
            gpa = found & mmu.ADDRESS_MASK | gpa & 0xFFF
        return self.read_physical(gpa, size)

    def read_physical(self, gpa: int, size: int) -> bytes | None:
        """Guest memory within a page; None where no slot has it."""
        with self.engine.gate.passed():  # no slot is half changed
            host = self.memory.host(gpa)
            return self.host_bytes(host, size) if host is not None else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        """Writes within a page of guest memory; false where there is none that may be written."""
        source = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        with self.engine.gate.passed(), self.engine.translator.lock:
            slot, entry = self.memory.slot_at(gpa), self.memory.entry(gpa)
            if slot is None or entry is None or slot.flags & READONLY:
                return False
            if slot.flags & LOG:
                self._call["mark_dirty"](self.address, entry)
            host = slot.hva + gpa - slot.gpa
            if not self._call["copy_in"](self.address, host, ctypes.addressof(source), len(data)):
                raise Leave(Exit.MEMORY_FAULT)
        self.engine.code_written(gpa, len(data), self.space)
        return True

    def exchange(self, gpa: int, value: int) -> int:
        """Puts a byte into guest memory, in one step; gives what was there, 0 where nothing is."""
        with self.engine.gate.passed():
            host = self.engine.memory.host(gpa)
            return self._call["exchange"](self.address, host, value) if host is not None else 0

    def read_int(self, va: int, size: int, *, supervisor: bool = False) -> int:
        return int.from_bytes(self.read(va, size, supervisor=supervisor), "little")

    def fetch_page(self, va: int) -> int | None:
        """Host address of the page that code at `va` is in; None with the fault noted."""
        s = self.state
        s.exit_kind = 0
        tlb = self._user if self.cpl == 3 else self._supervisor
        return int(self._call["fetch_page"](self.address, tlb, va & MASK64)) or None

    def translate(self, va: int) -> int | None:
        """The physical address that a supervisor reads from at a linear one; None if it cannot."""
        s = self.state
        if not s.cr0 & CR0_PG:
            return va
        if not s.efer & EFER_LMA:
            va &= 0xFFFF_FFFF
        with self.engine.gate.passed():  # no slot is half changed
            found = self._call["look"](self.address, va)
        return found & mmu.ADDRESS_MASK | va & 0xFFF if found else None

    def set_dirty_ring(self, address: int, entries: int, limit: int) -> None:
        """Written pages of logging slots are noted in a ring of struct kvm_dirty_gfn, whose size is
        a power of two; with `limit` entries it counts as full.
        """
        s = self.state
        s.ring, s.ring_mask, s.ring_limit = address, entries - 1, limit
        s.ring_index = s.ring_reset = 0

    def dirty_ring_full(self) -> bool:
        """Whether entries must be collected before the guest goes on."""
        s = self.state
        return bool(s.ring_mask) and s.ring_index - s.ring_reset >= s.ring_limit

    def mark_dirty(self, gpa: int, space: int) -> None:
        """The page at `gpa` of an address space was written other than by the guest."""
        with self.engine.gate.passed(), self.engine.translator.lock:
            entry = self.engine.spaces[space].entry(gpa)
            if entry is not None:
                self._call["mark_dirty"](self.address, entry)
