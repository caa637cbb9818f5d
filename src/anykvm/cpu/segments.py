"""Descriptors and segment registers, in Python (SDM vol. 3, 3.4, 3.5, 5.5 to 5.8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP, NP, SS
from anykvm.cpu.state import Flag, Mode, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

UNUSABLE = 0x10000
PRESENT, LONG, BIG = 1 << 7, 1 << 13, 1 << 14
CODE, CONFORMING, RW, ACCESSED = 8, 4, 2, 1
TSS_AVAILABLE, TSS_BUSY, LDT, CALL_GATE, TASK_GATE = 9, 11, 2, 12, 5
CR0_PE = 1


class Descriptor(NamedTuple):
    """A segment descriptor; `attr` as in `state.Segment`, `limit` in bytes, `raw` its 8 bytes."""

    raw: int
    base: int
    limit: int
    attr: int

    @property
    def type(self) -> int:
        return self.attr & 15

    @property
    def system(self) -> bool:
        return not self.attr & 16

    @property
    def code(self) -> bool:
        return self.attr & 0x18 == 0x18

    @property
    def dpl(self) -> int:
        return self.attr >> 5 & 3

    @property
    def present(self) -> bool:
        return bool(self.attr & PRESENT)

    @property
    def conforming(self) -> bool:
        return self.attr & 0x1C == 0x1C


def unpack(raw: int) -> Descriptor:
    """A descriptor from its 8 bytes."""
    base = raw >> 16 & 0xFF_FFFF | (raw >> 56 & 0xFF) << 24
    limit = raw & 0xFFFF | (raw >> 48 & 15) << 16
    if raw >> 55 & 1:
        limit = limit << 12 | 0xFFF
    return Descriptor(raw, base, limit, raw >> 40 & 0xF0FF)


def address_of(cpu: Cpu, selector: int, *, vector: int = GP) -> int:
    """Linear address of a selector's descriptor; outside the table is #GP (or `vector`) with the
    selector.
    """
    s = cpu.state
    base, limit = s.gdt_base, s.gdt_limit
    if selector & 4:
        ldt = s.seg[Seg.LDTR]
        if ldt.attr & UNUSABLE or not ldt.selector & 0xFFFC:
            raise GuestFault(vector, selector & 0xFFFC)
        base, limit = ldt.base, ldt.limit
    if (selector | 7) > limit:
        raise GuestFault(vector, selector & 0xFFFC)
    return int(base) + (selector & 0xFFF8)


def read_descriptor(cpu: Cpu, selector: int, *, vector: int = GP) -> Descriptor:
    at = address_of(cpu, selector, vector=vector)
    return unpack(cpu.read_int(at, 8, supervisor=True))


def read_system(cpu: Cpu, selector: int, *, vector: int = GP) -> Descriptor:
    """A system descriptor: 16 bytes in IA-32e mode."""
    found = read_descriptor(cpu, selector, vector=vector)
    if not cpu.state.mode & Mode.LONG:
        return found
    high = cpu.read_int(address_of(cpu, selector, vector=vector) + 8, 8, supervisor=True)
    if high >> 40 & 0x1F:
        raise GuestFault(vector, selector & 0xFFFC)
    return found._replace(base=found.base | (high & 0xFFFF_FFFF) << 32)


def mark_accessed(cpu: Cpu, selector: int, descriptor: Descriptor) -> Descriptor:
    """Sets the accessed bit in the table too."""
    if descriptor.attr & ACCESSED:
        return descriptor
    access = (descriptor.raw >> 40 & 0xFF) | ACCESSED
    cpu.write(address_of(cpu, selector) + 5, bytes([access]), supervisor=True)
    return descriptor._replace(attr=descriptor.attr | ACCESSED)


def set_segment(cpu: Cpu, seg: int, selector: int, descriptor: Descriptor) -> None:
    r = cpu.state.seg[seg]
    r.selector, r.base, r.limit, r.attr = (
        selector,
        descriptor.base,
        descriptor.limit,
        descriptor.attr,
    )


def set_null(cpu: Cpu, seg: int, selector: int, dpl: int = 0) -> None:
    r = cpu.state.seg[seg]
    r.selector, r.base, r.limit, r.attr = selector, 0, 0, UNUSABLE | dpl << 5


def load_real(cpu: Cpu, seg: int, selector: int) -> None:
    """Real mode and virtual-8086 mode: the base is the selector times 16; limit and rights stay,
    but for VM86.
    """
    r = cpu.state.seg[seg]
    r.selector, r.base = selector, selector << 4
    if cpu.rflags & Flag.VM:
        r.limit, r.attr = 0xFFFF, 0xF3
    elif r.attr & UNUSABLE or seg == Seg.CS:
        r.attr = 0x93 if seg != Seg.CS else 0x9B
        r.limit = max(r.limit, 0xFFFF)


def is_real(cpu: Cpu) -> bool:
    """Real or virtual-8086 addressing."""
    return not cpu.state.cr0 & CR0_PE or bool(cpu.rflags & Flag.VM)


def load_data(cpu: Cpu, seg: int, selector: int) -> None:
    """MOV and POP to DS, ES, FS, GS or SS."""
    if is_real(cpu):
        load_real(cpu, seg, selector)
    elif seg == Seg.SS:
        load_stack(cpu, selector, cpu.cpl)
    elif not selector & 0xFFFC:
        set_null(cpu, seg, selector)
    else:
        _load_checked(cpu, seg, selector)


def _load_checked(cpu: Cpu, seg: int, selector: int) -> None:
    found = read_descriptor(cpu, selector)
    readable = not found.system and (not found.code or found.type & RW)
    privileged = found.conforming or max(cpu.cpl, selector & 3) <= found.dpl
    if not readable or not privileged:
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    set_segment(cpu, seg, selector, mark_accessed(cpu, selector, found))


def load_stack(cpu: Cpu, selector: int, cpl: int, *, vector: int = GP) -> None:
    """SS for privilege level `cpl`; `vector` is what a bad selector raises."""
    if not selector & 0xFFFC:
        if not cpu.state.mode & Mode.CODE64 or cpl == 3 or selector & 3 != cpl:
            raise GuestFault(vector, 0)
        set_null(cpu, Seg.SS, selector, cpl)
        return
    set_segment(cpu, Seg.SS, selector, check_stack(cpu, selector, cpl, vector=vector))


def check_stack(cpu: Cpu, selector: int, cpl: int, *, vector: int = GP) -> Descriptor:
    found = read_descriptor(cpu, selector, vector=vector)
    writable = not found.system and not found.code and found.type & RW
    if selector & 3 != cpl or not writable or found.dpl != cpl:
        raise GuestFault(vector, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(SS, selector & 0xFFFC)
    return mark_accessed(cpu, selector, found)


def set_code(cpu: Cpu, selector: int, descriptor: Descriptor, cpl: int) -> None:
    """CS with RPL = `cpl`; the privilege level is SS's, set where it changes."""
    set_segment(cpu, Seg.CS, selector & ~3 | cpl, descriptor)


def check_code_size(cpu: Cpu, selector: int, found: Descriptor) -> None:
    """L and D together mean nothing in IA-32e mode."""
    if cpu.state.mode & Mode.LONG and found.attr & LONG and found.attr & BIG:
        raise GuestFault(GP, selector & 0xFFFC)


def drop_outer_segments(cpu: Cpu, cpl: int) -> None:
    """On a return to privilege level `cpl`, data segments that it must not have become null."""
    for seg in (Seg.ES, Seg.DS, Seg.FS, Seg.GS):
        r = cpu.state.seg[seg]
        if r.attr & UNUSABLE:
            continue
        conforming = r.attr & 0x1C == 0x1C
        if (r.attr >> 5 & 3) < cpl and not conforming:
            set_null(cpu, seg, 0)
