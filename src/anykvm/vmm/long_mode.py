"""The processor state that Linux's 64-bit boot protocol asks for: long mode on identity page
tables.

Flat __BOOT_CS (0x10) and __BOOT_DS (0x18) from a GDT in low memory, interrupts off, RSI at the
zero page (Documentation/arch/x86/boot.rst, "64-bit boot protocol"; SDM volume 3, chapters 3-5).
"""

from __future__ import annotations

import struct

from anykvm.uapi import kvm as uapi
from anykvm.vmm.memory_map import (
    BOOT_STACK,
    GDT_ADDRESS,
    GIB,
    PAGE_SIZE,
    PAGE_TABLES_ADDRESS,
    PhysicalMemory,
)

BOOT_CS, BOOT_DS = 0x10, 0x18
# Base 0, limit 4 GiB: 64-bit code; data. Accessed already, so nothing writes to the GDT.
GDT = (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF)

CR0_PE, CR0_MP, CR0_ET, CR0_NE, CR0_WP, CR0_AM, CR0_PG = (
    1 << 0,
    1 << 1,
    1 << 4,
    1 << 5,
    1 << 16,
    1 << 18,
    1 << 31,
)
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_FIXED = 1 << 1

PTE_PRESENT, PTE_WRITE, PTE_LARGE = 1 << 0, 1 << 1, 1 << 7
TABLE_ENTRIES = 512
LARGE_PAGE = 2 << 20
IDENTITY_MAPPED = 4 * GIB


def page_tables(base: int = PAGE_TABLES_ADDRESS, size: int = IDENTITY_MAPPED) -> bytes:
    """Page tables that map the first `size` bytes onto themselves, in pages of 2 MiB."""
    directories = size // GIB
    link = PTE_PRESENT | PTE_WRITE
    pml4 = [base + PAGE_SIZE | link]
    pdpt = [base + (2 + index) * PAGE_SIZE | link for index in range(directories)]
    pages = [index * LARGE_PAGE | link | PTE_LARGE for index in range(directories * TABLE_ENTRIES)]
    padded = [
        *pml4,
        *[0] * (TABLE_ENTRIES - 1),
        *pdpt,
        *[0] * (TABLE_ENTRIES - directories),
        *pages,
    ]
    return struct.pack(f"<{len(padded)}Q", *padded)


def segment(selector: int) -> uapi.kvm_segment:
    """The hidden part of a segment register as loading `selector` from the GDT leaves it."""
    descriptor = GDT[selector // 8]
    limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
    granular = descriptor >> 55 & 1
    return uapi.kvm_segment(
        base=0,
        limit=limit << 12 | 0xFFF if granular else limit,
        selector=selector,
        type=descriptor >> 40 & 15,
        s=descriptor >> 44 & 1,
        dpl=descriptor >> 45 & 3,
        present=descriptor >> 47 & 1,
        avl=descriptor >> 52 & 1,
        l=descriptor >> 53 & 1,
        db=descriptor >> 54 & 1,
        g=granular,
    )


def write_tables(memory: PhysicalMemory) -> None:
    """Put the GDT and the page tables where `enter_long_mode` points."""
    memory.write(GDT_ADDRESS, struct.pack(f"<{len(GDT)}Q", *GDT))
    memory.write(PAGE_TABLES_ADDRESS, page_tables())


def enter_long_mode(sregs: uapi.kvm_sregs) -> None:
    """Turn the system registers of a reset processor into those at the kernel's entry."""
    sregs.cs = segment(BOOT_CS)
    for name in ("ds", "es", "fs", "gs", "ss"):
        setattr(sregs, name, segment(BOOT_DS))
    sregs.gdt.base, sregs.gdt.limit = GDT_ADDRESS, 8 * len(GDT) - 1
    sregs.idt.base, sregs.idt.limit = 0, 0
    sregs.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_PG
    sregs.cr3 = PAGE_TABLES_ADDRESS
    sregs.cr4 = CR4_PAE
    sregs.efer = EFER_LME | EFER_LMA


def entry_regs(rip: int, rsi: int) -> uapi.kvm_regs:
    """The general registers at the kernel's entry."""
    return uapi.kvm_regs(rip=rip, rsi=rsi, rsp=BOOT_STACK, rbp=BOOT_STACK, rflags=RFLAGS_FIXED)
