"""Kernels of a few instructions in a bzImage: what `anykvm boot` does around a guest, not Linux.

The file follows the Linux/x86 boot protocol (Documentation/arch/x86/boot.rst), 64-bit entry.
"""

from __future__ import annotations

import struct

SECTOR = 512
SETUP_SECTORS = 7
ENTRY = 0x200
PREF_ADDRESS = 16 << 20
INIT_SIZE = 4 << 20
XLF_KERNEL_64 = 1

SAY_READY = b"".join(
    b"\xb0" + bytes((byte,)) + b"\xee"  # mov al, byte; out dx, al
    for byte in b"ready\n"
)
READY = b"\x66\xba\xf8\x03" + SAY_READY  # mov dx, 0x3f8
SPIN = READY + b"\xeb\xfe"  # jmp $
TRIPLE_FAULT = READY + bytes.fromhex(
    "bc00008001"  # mov esp, 0x1800000
    "6a006a00"  #   push 0; push 0
    "0f011c24"  #   lidt [rsp]           no gate for any vector
    "0f0b"  #       ud2
)
NO_CODE = READY + b"\xb8\x00\x00\x00\xd0\xff\xe0"  # mov eax, 0xd0000000; jmp rax


def exit_with(status: int) -> bytes:
    """Code that writes `status` to the exit port."""
    return READY + b"\xb0" + bytes((status,)) + b"\xe6\xf4"  # mov al, status; out 0xf4, al


def bzimage(code: bytes) -> bytes:
    """A kernel that does nothing but `code`, in long mode with the first memory mapped as it is."""
    payload = bytes(ENTRY) + code
    payload += bytes(-len(payload) % 16)
    header = bytearray((SETUP_SECTORS + 1) * SECTOR)
    fields = (
        (0x1F1, "<B", SETUP_SECTORS),
        (0x1F4, "<I", len(payload) // 16),
        (0x1FE, "<H", 0xAA55),
        (0x200, "<H", 0x66EB),
        (0x202, "<4s", b"HdrS"),
        (0x206, "<H", 0x20F),
        (0x22C, "<I", 0x7FFFFFFF),
        (0x230, "<I", 2 << 20),
        (0x236, "<H", XLF_KERNEL_64),
        (0x238, "<I", 2047),
        (0x258, "<Q", PREF_ADDRESS),
        (0x260, "<I", INIT_SIZE),
    )
    for offset, code_of, value in fields:
        struct.pack_into(code_of, header, offset, value)
    return bytes(header) + payload
