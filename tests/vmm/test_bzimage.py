"""Linux's boot protocol: headers checked, what is put in memory read back, errors that tell."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from anykvm.uapi import kvm as abi
from anykvm.vmm.bzimage import (
    BootError,
    KernelImage,
    check_fit,
    get,
    load_linux,
    parse_bzimage,
    put,
)
from anykvm.vmm.long_mode import enter_long_mode, entry_regs, page_tables, segment, write_tables
from anykvm.vmm.memory_map import E820_ENTRY, e820_map, ram_ranges
from anykvm.vmm.vmlinux import parse_vmlinux

MIB = 1 << 20
CODE = b"\xf4" * 0x1000


def bzimage(code: bytes = CODE, setup_sects: int = 3, **fields: int) -> bytes:
    """A bzImage with a header as a kernel of today has it."""
    image = bytearray((max(setup_sects, 4 if not setup_sects else 1) + 1) * 512) + code
    image[0x201] = 0x6A
    image[0x202:0x206] = b"HdrS"
    values = {
        "boot_flag": 0xAA55,
        "version": 0x20F,
        "setup_sects": setup_sects,
        "syssize": len(code) // 16,
        "xloadflags": 0x7F,
        "initrd_addr_max": 0x7FFF_FFFF,
        "cmdline_size": 0x7FF,
        "kernel_alignment": 2 * MIB,
        "pref_address": 16 * MIB,
        "init_size": 4 * MIB,
        "loadflags": 0x01,
    }
    for name, value in {**values, **fields}.items():
        put(image, name, value)
    return bytes(image)


class Memory:
    """Memory as sparse as what is written to it."""

    def __init__(self) -> None:
        self.writes: dict[int, bytes] = {}

    def write(self, gpa: int, data: bytes) -> None:
        self.writes[gpa] = bytes(data)

    def read(self, gpa: int, size: int) -> bytes:
        return self.writes[gpa][:size]


def kernel(initrd_addr_max: int = 0x7FFF_FFFF) -> KernelImage:
    return parse_bzimage(bzimage(initrd_addr_max=initrd_addr_max), "vmlinuz")


def test_a_kernel_is_found_behind_its_setup_code() -> None:
    image = kernel()
    assert image.segments == ((16 * MIB, CODE),)
    assert (image.entry, image.start, image.end) == (16 * MIB + 0x200, 16 * MIB, 20 * MIB)
    assert len(image.header) == 0x26C
    assert image.header[:0x1F1] == bytes(0x1F1)


def test_no_setup_sectors_mean_four() -> None:
    assert parse_bzimage(bzimage(setup_sects=0), "old").segments[0][1] == CODE


def test_a_last_paragraph_may_be_part_empty() -> None:
    image = parse_bzimage(bzimage(CODE[:-5], syssize=0x100), "odd")
    assert len(image.segments[0][1]) == 0xFFB


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are less than a setup header"),
        (b"#!/bin/sh\n" * 100, "not a bzImage: expected 'HdrS'"),
        (bzimage(boot_flag=0), "not a bzImage"),
        (bzimage(version=0x20B), "protocol 2.11 and no 64-bit entry"),
        (bzimage(xloadflags=0x7E), "no 64-bit entry"),
        (bzimage()[:-16], "cut short: its header promises 6144 bytes, the file has 6128"),
    ],
)
def test_what_is_no_kernel_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        parse_bzimage(data, "file")


def test_everything_is_where_the_zero_page_says() -> None:
    memory, initrd = Memory(), b"cpio" * 3000
    loaded = load_linux(memory, 128 * MIB, kernel(), initrd, "console=ttyS0 quiet", 0xE0000)
    params = memory.writes[loaded.zero_page]
    assert len(params) == 4096
    assert (loaded.entry, loaded.zero_page) == (16 * MIB + 0x200, 0x7000)
    assert memory.writes[16 * MIB] == CODE
    assert memory.writes[get(params, "cmd_line_ptr")] == b"console=ttyS0 quiet\0"
    assert memory.writes[get(params, "ramdisk_image")] == initrd
    assert get(params, "ramdisk_image") == 128 * MIB - 12288
    expected = {
        "ramdisk_size": 12000,
        "type_of_loader": 0xFF,
        "loadflags": 0x21,
        "vid_mode": 0xFFFF,
        "acpi_rsdp_addr": 0xE0000,
        "boot_flag": 0xAA55,
        "version": 0x20F,
        "init_size": 4 * MIB,
    }
    assert {name: get(params, name) for name in expected} == expected


def test_without_initrd_and_quiet() -> None:
    memory = Memory()
    params = memory.writes[load_linux(memory, 128 * MIB, kernel(), b"", "", 0).zero_page]
    assert [get(params, name) for name in ("ramdisk_image", "ramdisk_size", "loadflags")] == [
        0,
        0,
        1,
    ]


def test_the_zero_page_has_the_e820_map() -> None:
    memory = Memory()
    params = memory.writes[load_linux(memory, 6 << 30, kernel(), b"", "", 0).zero_page]
    count = get(params, "e820_entries")
    raw = params[0x2D0 : 0x2D0 + 20 * count]
    assert [tuple(row) for row in E820_ENTRY.iter_unpack(raw)] == [
        (0, 0x9FC00, 1),
        (0x9FC00, 0x400, 2),
        (0xE0000, 0x20000, 2),
        (MIB, (3 << 30) - MIB, 1),
        (0xFFFBC000, 0x4000, 2),
        (4 << 30, 3 << 30, 1),
    ]


def test_the_initrd_stays_below_what_the_kernel_can_reach() -> None:
    memory = Memory()
    small = kernel(initrd_addr_max=64 * MIB - 1)
    load_linux(memory, 256 * MIB, small, bytes(5000), "", 0)
    assert 64 * MIB - 8192 in memory.writes


@pytest.mark.parametrize(
    ("image", "memory", "initrd", "command_line", "message"),
    [
        (kernel(), 40 * MIB, 0, "", r"40 MiB of memory is too little.* 52 MiB or more"),
        (kernel(), 64 * MIB, 30 * MIB, "", r"its initrd has 30 MiB.* 82 MiB or more"),
        (kernel(), MIB, 0, "", "expected a multiple of 4096, 2097152 at least"),
        (kernel(), 128 * MIB + 1, 0, "", "expected a multiple of 4096"),
        (kernel(), 128 * MIB, 0, "x" * 2048, "2048 bytes, this kernel takes 2047"),
        (kernel(), 128 * MIB, 0, "a\0b", "zero byte"),
        (kernel(initrd_addr_max=24 * MIB), 128 * MIB, 8 * MIB, "", "does not fit between"),
    ],
)
def test_what_does_not_fit_is_refused(
    image: KernelImage, memory: int, initrd: int, command_line: str, message: str
) -> None:
    with pytest.raises(BootError, match=message):
        check_fit(image, memory, initrd, command_line)


@pytest.mark.parametrize("size", [2 * MIB, 512 * MIB, 3 << 30, (3 << 30) + 4096, 64 << 30])
def test_memory_ranges_hold_all_memory_and_no_device(size: int) -> None:
    ranges = ram_ranges(size)
    assert sum(ram.size for ram in ranges) == size
    assert all(ram.end <= 3 << 30 or ram.base >= 4 << 30 for ram in ranges)
    entries = e820_map(size)
    ends = [entry.base + entry.size for entry in entries]
    assert all(end <= after.base for end, after in zip(ends, entries[1:], strict=False))


# Long mode


def walk(tables: bytes, base: int, address: int) -> int:
    """What a processor makes of a linear address, 2 MiB pages only."""
    table = base
    for shift in (39, 30, 21):
        index = address >> shift & 511
        entry = int.from_bytes(tables[table - base + 8 * index :][:8], "little")
        assert entry & 3 == 3
        if entry & 0x80:
            assert shift == 21
            return (entry & ~0x1FFFFF & (1 << 52) - 1) | address & 0x1FFFFF
        table = entry & ~0xFFF
    raise AssertionError("no page at the last level")


@pytest.mark.parametrize("address", [0, 0x7000, 0x1000200, 0x7FFFFFFF, 0xFEE00000, 0xFFFFFFFF])
def test_page_tables_map_the_first_4_gib_onto_themselves(address: int) -> None:
    tables = page_tables(0x9000)
    assert len(tables) == 6 * 4096
    assert walk(tables, 0x9000, address) == address


def test_processor_state_is_long_mode_with_flat_segments() -> None:
    memory, sregs = Memory(), abi.kvm_sregs()
    write_tables(memory)
    sregs.tr.type = 11
    enter_long_mode(sregs)
    assert (sregs.cr0 & 0x80000001, sregs.cr4 & 0x20, sregs.efer) == (0x80000001, 0x20, 0x500)
    assert memory.writes[sregs.cr3] == page_tables(sregs.cr3)
    gdt = memory.writes[sregs.gdt.base]
    assert sregs.gdt.limit == len(gdt) - 1 == 31
    assert (sregs.cs.selector, sregs.cs.l, sregs.cs.db, sregs.cs.type) == (0x10, 1, 0, 11)
    assert struct.unpack_from("<Q", gdt, 0x10)[0] >> 53 & 1 == 1
    for name in ("ds", "es", "fs", "gs", "ss"):
        data = getattr(sregs, name)
        found = (data.selector, data.base, data.limit, data.type, data.db, data.s, data.present)
        assert found == (0x18, 0, 0xFFFFFFFF, 3, 1, 1, 1)
    assert sregs.tr.type == 11


def test_entry_registers() -> None:
    regs = entry_regs(0x1000200, 0x7000)
    assert (regs.rip, regs.rsi, regs.rflags, regs.rbx) == (0x1000200, 0x7000, 2, 0)
    assert regs.rsp < 0x9000
    assert segment(0x10).dpl == 0


# ELF


def elf(machine: int = 62, entry: int = 16 * MIB, filesz: int = 0x200) -> bytes:
    """A vmlinux of one segment with as much .bss as code."""
    header = struct.pack(
        "<4sBBB9xHHIQQQIHHHHHH",
        b"\x7fELF", 2, 1, 1, 2, machine, 1, entry, 64, 0, 0, 64, 56, 1, 64, 0, 0,
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, 0x1000, 0, 16 * MIB, filesz, 0x400, 0x1000)
    return (header + load).ljust(0x1000, b"\0") + b"\x90" * 0x200


def test_vmlinux_is_loaded_by_its_program_headers() -> None:
    image = parse_vmlinux(elf(), "vmlinux")
    assert image.segments == ((16 * MIB, b"\x90" * 0x200),)
    assert (image.entry, image.end) == (16 * MIB, 16 * MIB + 0x400)
    memory = Memory()
    loaded = load_linux(memory, 128 * MIB, image, b"rd", "console=ttyS0", 0xE0000)
    params = memory.writes[loaded.zero_page]
    assert params[0x202:0x206] == b"HdrS"
    assert [get(params, name) for name in ("boot_flag", "ramdisk_size")] == [0xAA55, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (elf(machine=40), "this one is for EM_ARM"),
        (elf(entry=0x1000), "entered at 0x1000"),
        (elf(filesz=0x300), "cut short"),
        (elf()[:40], "damaged ELF file"),
    ],
)
def test_what_is_no_vmlinux_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(BootError, match=message):
        parse_vmlinux(data, "vmlinux")


def test_a_kernel_image_is_a_value() -> None:
    assert replace(kernel(), entry=1) != kernel()
