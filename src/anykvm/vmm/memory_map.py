"""Where things lie in guest-physical memory, and how the guest is told (the e820 map).

RAM below the hole for memory-mapped devices ends at 3 GiB at most; the rest begins at 4 GiB.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

PAGE_SIZE = 4096
MIB = 1 << 20
GIB = 1 << 30

GDT_ADDRESS = 0x500
ZERO_PAGE_ADDRESS = 0x7000
BOOT_STACK = 0x8FF0
PAGE_TABLES_ADDRESS = 0x9000
COMMAND_LINE_ADDRESS = 0x20000
COMMAND_LINE_LIMIT = 0x10000
EBDA_ADDRESS = 0x9FC00
VGA_ADDRESS = 0xA0000
BIOS_ADDRESS = 0xE0000
HIGH_MEMORY = 0x100000
MMIO_HOLE = 3 * GIB
ABOVE_4G = 4 * GIB
# Pages that KVM on Intel keeps for itself in the hole: the identity map and the real-mode TSS.
KVM_IDENTITY_MAP_ADDRESS = 0xFFFB_C000
KVM_TSS_ADDRESS = 0xFFFB_D000
KVM_PRIVATE_SIZE = 4 * PAGE_SIZE

MIN_MEMORY = 2 * MIB
# What Linux can map with four levels of page tables.
MAX_MEMORY = 64 << 40
E820_ENTRY = struct.Struct("<QQI")


class PhysicalMemory(Protocol):
    """Guest RAM, by guest-physical address."""

    def read(self, gpa: int, size: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...


class E820Type(IntEnum):
    RAM = 1
    RESERVED = 2
    ACPI = 3


@dataclass(frozen=True, slots=True)
class E820Entry:
    base: int
    size: int
    type: E820Type

    def pack(self) -> bytes:
        return E820_ENTRY.pack(self.base, self.size, self.type)


@dataclass(frozen=True, slots=True)
class RamRange:
    """RAM that is one memory slot."""

    base: int
    size: int

    @property
    def end(self) -> int:
        return self.base + self.size


def ram_ranges(memory: int) -> tuple[RamRange, ...]:
    """How `memory` bytes are laid around the hole. Raises ValueError for sizes that make no PC."""
    if memory % PAGE_SIZE or not MIN_MEMORY <= memory <= MAX_MEMORY:
        raise ValueError(
            f"memory of {memory} bytes: expected a multiple of {PAGE_SIZE}, {MIN_MEMORY} at least, "
            f"{MAX_MEMORY} at most"
        )
    low = RamRange(0, min(memory, MMIO_HOLE))
    if memory <= MMIO_HOLE:
        return (low,)
    return (low, RamRange(ABOVE_4G, memory - MMIO_HOLE))


def e820_map(memory: int) -> tuple[E820Entry, ...]:
    """The map that firmware of this machine would report."""
    low, *high = ram_ranges(memory)
    return (
        E820Entry(0, EBDA_ADDRESS, E820Type.RAM),
        E820Entry(EBDA_ADDRESS, VGA_ADDRESS - EBDA_ADDRESS, E820Type.RESERVED),
        E820Entry(BIOS_ADDRESS, HIGH_MEMORY - BIOS_ADDRESS, E820Type.RESERVED),
        E820Entry(HIGH_MEMORY, low.size - HIGH_MEMORY, E820Type.RAM),
        E820Entry(KVM_IDENTITY_MAP_ADDRESS, KVM_PRIVATE_SIZE, E820Type.RESERVED),
        *(E820Entry(ram.base, ram.size, E820Type.RAM) for ram in high),
    )
