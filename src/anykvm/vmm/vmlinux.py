"""A kernel as an ELF file (vmlinux): loaded by its program headers, entered at startup_64 in long
mode.

It has no setup header, so the zero page gets the few fields of one that a kernel looks at.
"""

from __future__ import annotations

import io

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from anykvm.vmm.bzimage import (
    BOOT_FLAG,
    FIELDS,
    HEADER_END_MIN,
    MAGIC,
    MAGIC_AT,
    MIN_VERSION,
    BootError,
    KernelImage,
    put,
)
from anykvm.vmm.memory_map import HIGH_MEMORY

ELF_MAGIC = b"\x7fELF"
INITRD_ADDR_MAX = 0x7FFF_FFFF
COMMAND_LINE_SIZE = 2047
KERNEL_ALIGNMENT = 2 << 20


def _header() -> bytes:
    assert FIELDS["init_size"][0] < HEADER_END_MIN
    params = bytearray(HEADER_END_MIN)
    params[MAGIC_AT : MAGIC_AT + 4] = MAGIC
    put(params, "boot_flag", BOOT_FLAG)
    put(params, "version", MIN_VERSION)
    put(params, "kernel_alignment", KERNEL_ALIGNMENT)
    put(params, "initrd_addr_max", INITRD_ADDR_MAX)
    put(params, "cmdline_size", COMMAND_LINE_SIZE)
    return bytes(params)


def parse_vmlinux(data: bytes, name: str) -> KernelImage:
    """Read and check an ELF kernel for x86-64. Raises BootError when it is none."""
    try:
        elf = ELFFile(io.BytesIO(data))
        machine, entry = elf["e_machine"], elf["e_entry"]
        loads = [segment for segment in elf.iter_segments() if segment["p_type"] == "PT_LOAD"]
        segments = tuple((load["p_paddr"], load.data()) for load in loads if load["p_filesz"])
    except ELFError as error:
        raise BootError(f"{name}: a damaged ELF file: {error}") from error
    if machine != "EM_X86_64":
        raise BootError(f"{name}: expected an ELF kernel for EM_X86_64, this one is for {machine}")
    if any(len(part) != load["p_filesz"] for (_, part), load in zip(segments, loads, strict=False)):
        raise BootError(f"{name}: the ELF file is cut short")
    start = min((load["p_paddr"] for load in loads), default=0)
    end = max((load["p_paddr"] + load["p_memsz"] for load in loads), default=0)
    if not (HIGH_MEMORY <= start <= entry < end):
        raise BootError(
            f"{name}: expected a kernel that loads above 1 MiB and is entered where it is loaded; "
            f"this one loads at {start:#x}-{end:#x} and is entered at {entry:#x}"
        )
    return KernelImage(
        header=_header(),
        segments=segments,
        entry=entry,
        start=start,
        end=end,
        initrd_addr_max=INITRD_ADDR_MAX,
        cmdline_size=COMMAND_LINE_SIZE,
    )
