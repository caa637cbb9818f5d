"""Linux/x86's boot protocol, the 64-bit way (Documentation/arch/x86/boot.rst).

A bzImage is a setup header inside 16-bit setup code, and the protected-mode kernel after it. Its
64-bit entry is 0x200 into that; it takes the address of the "zero page" (struct boot_params) in
RSI.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from anykvm.vmm.memory_map import (
    COMMAND_LINE_ADDRESS,
    COMMAND_LINE_LIMIT,
    MIB,
    PAGE_SIZE,
    ZERO_PAGE_ADDRESS,
    PhysicalMemory,
    RamRange,
    e820_map,
    ram_ranges,
)

SECTOR = 512
HEADER_START = 0x1F1
BOOT_FLAG_AT, BOOT_FLAG = 0x1FE, 0xAA55
MAGIC_AT, MAGIC = 0x202, b"HdrS"
VERSION_AT = 0x206
HEADER_END_MIN = 0x268
MIN_VERSION = 0x20C
XLF_KERNEL_64 = 1 << 0
ENTRY_64_OFFSET = 0x200
LOADER_UNDEFINED = 0xFF
LOADED_HIGH, QUIET_FLAG = 1 << 0, 1 << 5
VID_MODE_NORMAL = 0xFFFF
E820_AT, E820_MAX = 0x2D0, 128
# What a kernel needs beside itself and its initrd to reach a first process.
WORKING_MEMORY = 32 * MIB

# struct boot_params and its setup_header: name to (offset, struct code).
FIELDS = {
    "acpi_rsdp_addr": (0x070, "Q"),
    "e820_entries": (0x1E8, "B"),
    "setup_sects": (0x1F1, "B"),
    "syssize": (0x1F4, "I"),
    "vid_mode": (0x1FA, "H"),
    "boot_flag": (0x1FE, "H"),
    "version": (0x206, "H"),
    "type_of_loader": (0x210, "B"),
    "loadflags": (0x211, "B"),
    "ramdisk_image": (0x218, "I"),
    "ramdisk_size": (0x21C, "I"),
    "cmd_line_ptr": (0x228, "I"),
    "initrd_addr_max": (0x22C, "I"),
    "kernel_alignment": (0x230, "I"),
    "xloadflags": (0x236, "H"),
    "cmdline_size": (0x238, "I"),
    "pref_address": (0x258, "Q"),
    "init_size": (0x260, "I"),
}


class BootError(Exception):
    """The guest cannot be started as asked; the message says what was expected and what came."""


def get(params: bytes | bytearray, name: str) -> int:
    """A field of a setup header or zero page."""
    offset, code = FIELDS[name]
    (value,) = struct.unpack_from("<" + code, params, offset)
    return int(value)


def put(params: bytearray, name: str, value: int) -> None:
    offset, code = FIELDS[name]
    struct.pack_into("<" + code, params, offset, value)


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel ready to be placed: what the loader must know, whichever file it came from."""

    header: bytes
    """The zero page's start, with the setup header in it."""
    segments: tuple[tuple[int, bytes], ...]
    """Pairs of a guest-physical address and what is loaded there."""
    entry: int
    start: int
    end: int
    """The memory that the kernel takes before it manages memory itself."""
    initrd_addr_max: int
    cmdline_size: int


@dataclass(frozen=True, slots=True)
class LoadedKernel:
    """Where the processor starts."""

    entry: int
    zero_page: int


def parse_bzimage(data: bytes, name: str) -> KernelImage:
    """Read and check a bzImage. Raises BootError when it is none, is damaged, or is too old."""
    _check_magic(data, name)
    version = get(data, "version")
    has_entry = version >= MIN_VERSION and get(data, "xloadflags") & XLF_KERNEL_64
    if not has_entry:
        raise BootError(
            f"{name}: expected a 64-bit kernel with boot protocol 2.12 or later; this one has "
            f"protocol {version >> 8}.{version & 0xFF:02} and no 64-bit entry"
        )
    code_at = ((get(data, "setup_sects") or 4) + 1) * SECTOR
    size = get(data, "syssize") * 16
    # syssize counts paragraphs, so the last one may be part empty.
    if len(data) - code_at <= size - 16:
        raise BootError(
            f"{name}: the kernel is cut short: its header promises {code_at + size} bytes, "
            f"the file has {len(data)}"
        )
    header_end = MAGIC_AT + data[0x201]
    start = get(data, "pref_address")
    return KernelImage(
        header=bytes(HEADER_START) + data[HEADER_START:header_end],
        segments=((start, data[code_at : code_at + size]),),
        entry=start + ENTRY_64_OFFSET,
        start=start,
        end=start + max(get(data, "init_size"), size),
        initrd_addr_max=get(data, "initrd_addr_max"),
        cmdline_size=get(data, "cmdline_size"),
    )


def _check_magic(data: bytes, name: str) -> None:
    if len(data) < HEADER_END_MIN:
        raise BootError(
            f"{name}: not a Linux kernel: {len(data)} bytes are less than a setup header"
        )
    if get(data, "boot_flag") != BOOT_FLAG or data[MAGIC_AT : MAGIC_AT + 4] != MAGIC:
        raise BootError(
            f"{name}: not a bzImage: expected 'HdrS' at {MAGIC_AT:#x} and the boot flag 0x55aa, "
            f"found {data[MAGIC_AT : MAGIC_AT + 4]!r}"
        )


def load_linux(
    memory: PhysicalMemory,
    size: int,
    kernel: KernelImage,
    initrd: bytes,
    command_line: str,
    rsdp: int,
) -> LoadedKernel:
    """Place kernel, initrd, command line and zero page into a machine with `size` bytes of RAM.

    Raises BootError when they do not fit.
    """
    initrd_at = place_initrd(size, kernel, len(initrd))
    params = zero_page(kernel, size, rsdp)
    put(params, "ramdisk_image", initrd_at)
    put(params, "ramdisk_size", len(initrd))
    put(params, "cmd_line_ptr", COMMAND_LINE_ADDRESS)
    if "quiet" in command_line.split():
        put(params, "loadflags", get(params, "loadflags") | QUIET_FLAG)
    memory.write(COMMAND_LINE_ADDRESS, encode_command_line(kernel, command_line))
    for address, data in kernel.segments:
        memory.write(address, data)
    if initrd:
        memory.write(initrd_at, initrd)
    memory.write(ZERO_PAGE_ADDRESS, bytes(params))
    return LoadedKernel(kernel.entry, ZERO_PAGE_ADDRESS)


def check_fit(kernel: KernelImage, memory: int, initrd: int, command_line: str) -> None:
    """Raise BootError if `load_linux` would, before there is a machine."""
    try:
        ram_ranges(memory)
    except ValueError as error:
        raise BootError(str(error)) from error
    place_initrd(memory, kernel, initrd)
    encode_command_line(kernel, command_line)


def encode_command_line(kernel: KernelImage, text: str) -> bytes:
    data = text.encode()
    limit = min(kernel.cmdline_size, COMMAND_LINE_LIMIT - 1)
    if len(data) > limit:
        raise BootError(f"the command line has {len(data)} bytes, this kernel takes {limit}")
    if 0 in data:
        raise BootError("the command line has a zero byte, which would end it early")
    return data + b"\x00"


def zero_page(kernel: KernelImage, memory: int, rsdp: int) -> bytearray:
    """struct boot_params: the kernel's setup header, the loader's part of it, the e820 map."""
    params = bytearray(kernel.header.ljust(PAGE_SIZE, b"\x00"))
    put(params, "type_of_loader", LOADER_UNDEFINED)
    put(params, "loadflags", get(params, "loadflags") & ~QUIET_FLAG | LOADED_HIGH)
    put(params, "vid_mode", VID_MODE_NORMAL)
    put(params, "acpi_rsdp_addr", rsdp)
    entries = e820_map(memory)
    put(params, "e820_entries", len(entries))
    packed = b"".join(entry.pack() for entry in entries)
    params[E820_AT : E820_AT + len(packed)] = packed
    return params


def place_initrd(memory: int, kernel: KernelImage, size: int) -> int:
    """As high as RAM and the kernel allow, clear of the kernel; 0 when there is none."""
    low = ram_ranges(memory)[0]
    _check_memory(low, kernel, size)
    if not size:
        return 0
    top = min(low.end, kernel.initrd_addr_max + 1)
    address = (top - size) & ~(PAGE_SIZE - 1)
    if address < kernel.end:
        raise BootError(
            f"the initrd of {_mib(size)} does not fit between the kernel's end at {kernel.end:#x} "
            f"and {top:#x}, the highest address at which this kernel takes it"
        )
    return address


def _check_memory(low: RamRange, kernel: KernelImage, initrd: int) -> None:
    needed = kernel.end + initrd + WORKING_MEMORY
    if low.size < needed:
        raise BootError(
            f"{_mib(low.size)} of memory is too little: the kernel ends at {_mib(kernel.end)}, its "
            f"initrd has {_mib(initrd)}, and it needs {_mib(WORKING_MEMORY)} to work in; "
            f"give it {_mib(needed)} or more"
        )


def _mib(size: int) -> str:
    return f"{-(-size // MIB)} MiB"
