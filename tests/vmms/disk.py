"""Disk images: a boot sector that reads the second sector through the BIOS and sends what it says
over the serial line; the same disk is read by Linux.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

SECTOR = 512
SIZE = 4 << 20
TEXT = "the disk's second sector"
BOOT_ADDRESS = 0x7C00
BOOT_CODE = bytes.fromhex(
    "31c0"  #     xor ax, ax
    "8ed8"  #     mov ds, ax
    "8ec0"  #     mov es, ax
    "b80102"  #   mov ax, 0x0201        read one sector
    "bb007e"  #   mov bx, 0x7e00        to here
    "b90200"  #   mov cx, 2             cylinder 0, sector 2
    "b600"  #     mov dh, 0             head 0 of the drive that the BIOS named in dl
    "cd13"  #     int 0x13
    "be007e"  #   mov si, 0x7e00
    "baf803"  #   mov dx, 0x3f8         the first serial line
    "ac"  #       lodsb
    "84c0"  #     test al, al
    "7403"  #     jz +3
    "ee"  #       out dx, al
    "ebf8"  #     jmp -8                the next character
    "f4"  #       hlt
    "ebfd"  #     jmp -3
)
FIRST_INSTRUCTIONS = (0x7C00, 0x7C02, 0x7C04, 0x7C06)
READ_DONE = BOOT_ADDRESS + 19
"""Address of the instruction after int 0x13."""


def make_raw(path: Path) -> Path:
    """A raw image: boot sector, text, zeros."""
    boot = BOOT_CODE.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    path.write_bytes((boot + f"{TEXT}\n".encode()).ljust(SIZE, b"\0"))
    return path


def make_qcow2(path: Path, raw: Path) -> Path:
    """The same in QEMU's own format, which has room for snapshots. Needs qemu-img (qemu-utils)."""
    program = shutil.which("qemu-img")
    if program is None:
        raise FileNotFoundError("qemu-img is not installed (Debian: apt-get install qemu-utils)")
    command = [program, "convert", "-f", "raw", "-O", "qcow2", str(raw), str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path
