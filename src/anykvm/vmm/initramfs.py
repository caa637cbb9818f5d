"""The root file system that the guest boots into: busybox, `/init` (init.sh), one program of ours.

Without a command `/init` prints `MARKER` and gives an interactive shell on the serial line. With
one it runs the command, whose text lies in a file of the archive (any text works), and nothing else
is printed. Either way the exit status leaves the guest through the exit port. Debian's cloud kernel
has no /dev/port, so a static program of 200 bytes writes it. The archive is not compressed, since
the guest would spend longer unpacking it than the host saves; the same input makes the same bytes.
"""

from __future__ import annotations

import re
import shlex
import struct
from dataclasses import dataclass
from importlib.resources import files
from itertools import pairwise, takewhile

from anykvm.vmm.cpio import Cpio

MARKER = "anykvm: /init"
"""The first line that an interactive guest prints."""

FOLDERS = ("anykvm", "bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "usr", "var")
BINARY_FOLDERS = {"sbin": "bin", "usr/bin": "../bin", "usr/sbin": "../bin"}
NODES = {"dev/console": (5, 1), "dev/null": (1, 3), "dev/ttyS0": (4, 64)}
TEXTS = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
    "etc/group": b"root:x:0:\n",
    "etc/inittab": b"::once:/init shell\n::ctrlaltdel:reboot\n",
}
TABLE_OF_APPLETS = re.compile(rb"\[\x00\[\[\x00(?:[a-z0-9][a-z0-9._-]*\x00){20,}")

ELF_BASE = 0x400000
ELF_HEADERS_SIZE = 64 + 56
EXIT_BEFORE_PORT = bytes.fromhex(
    "bf01000000"  # mov edi, 1           standard output
    "be09540000"  # mov esi, 0x5409      TCSBRK: with 1, wait until the line has sent everything
    "ba01000000"  # mov edx, 1
    "b810000000"  # mov eax, 0x10        ioctl
    "0f05"  #       syscall
    "bf03000000"  # mov edi, 3
    "b8ac000000"  # mov eax, 0xac        iopl: this process may use ports
    "0f05"  #       syscall
    "488b742410"  # mov rsi, [rsp+0x10]  argv[1], a decimal number
    "31c0"  #       xor eax, eax
    "0fb60e"  #     movzx ecx, byte [rsi]
    "83e930"  #     sub ecx, 0x30
    "83f909"  #     cmp ecx, 9
    "770a"  #       ja +10               past its last digit
    "6bc00a"  #     imul eax, eax, 10
    "01c8"  #       add eax, ecx
    "48ffc6"  #     inc rsi
    "ebeb"  #       jmp -21              the next digit
    "ba"  #         mov edx, the port
)
EXIT_AFTER_PORT = bytes.fromhex(
    "ee"  #         out dx, al
    "bf01000000"  # mov edi, 1           still here: nobody listens at the port
    "b83c000000"  # mov eax, 0x3c        exit
    "0f05"  #       syscall
)


class BusyboxError(Exception):
    """The busybox given has no table of applets."""


@dataclass(frozen=True)
class Guest:
    """What `/init` is to do, and how its terminal is.

    command: shell text to run; None for an interactive shell.
    translate_newlines: whether the console sends CR LF for a newline, as a terminal wants it.
    rows, columns: the terminal's size, 0 where unknown.
    """

    exit_port: int
    command: str | None = None
    translate_newlines: bool = True
    term: str = "linux"
    rows: int = 0
    columns: int = 0

    def settings(self) -> bytes:
        """What `/init` reads first: shell assignments."""
        values = {
            "marker": MARKER,
            "translate_newlines": "yes" if self.translate_newlines else "no",
            "rows": str(self.rows),
            "columns": str(self.columns),
            "export PATH": "/bin",
            "export HOME": "/root",
            "export TERM": self.term,
        }
        return "".join(f"{name}={shlex.quote(text)}\n" for name, text in values.items()).encode()


def build(busybox: bytes, guest: Guest) -> bytes:
    """The archive, as the kernel takes it for its initrd. Raises BusyboxError."""
    archive = Cpio()
    for folder in FOLDERS:
        archive.directory(folder)
    for path, target in BINARY_FOLDERS.items():
        archive.symlink(path, target)
    for path, (major, minor) in NODES.items():
        archive.character_device(path, major, minor)
    for path, content in TEXTS.items():
        archive.file(path, content)
    archive.file("bin/busybox", busybox, 0o755)
    for applet in applets(busybox):
        archive.symlink(f"bin/{applet}", "busybox")
    archive.file("anykvm/exit", exit_program(guest.exit_port), 0o755)
    archive.file("anykvm/settings", guest.settings())
    if guest.command is not None:
        archive.file("anykvm/command", guest.command.encode())
    archive.file("init", files("anykvm.vmm").joinpath("init.sh").read_bytes(), 0o755)
    return archive.finish()


def applets(busybox: bytes) -> list[str]:
    """The names that a busybox answers to, read from the sorted table inside it.

    Asking it (`busybox --list`) would need a host that runs x86-64 Linux programs.
    """
    table = TABLE_OF_APPLETS.search(busybox)
    if table is None:
        raise BusyboxError("the busybox program has no table of applets")
    names = table.group().decode().split("\0")[:-1]
    ascending = (first < second for first, second in pairwise(names))
    length = 1 + sum(1 for _ in takewhile(bool, ascending))
    return [name for name in names[:length] if name != "busybox"]


def exit_program(port: int) -> bytes:
    """A static ELF program: waits until standard output is sent, writes argv[1] to `port`."""
    code = EXIT_BEFORE_PORT + struct.pack("<I", port) + EXIT_AFTER_PORT
    size = ELF_HEADERS_SIZE + len(code)
    identity = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64-bit, little endian, version 1
    entry = ELF_BASE + ELF_HEADERS_SIZE
    header = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, ELF_BASE, ELF_BASE, size, size, 0x1000)
    return identity + header + segment + code
