"""From options to a machine that is ready to run."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from anykvm.vmm.boot import Boot, BootOptions, parse_kernel, read_file
from anykvm.vmm.bzimage import BootError

MIB = 1 << 20


def kernel_file(folder: Path) -> Path:
    """The least that passes for a 64-bit bzImage."""
    image = bytearray(2 * 512 + 4096)
    for offset, code, value in (
        (0x1F1, "B", 1),
        (0x1F4, "I", 256),
        (0x1FE, "H", 0xAA55),
        (0x201, "B", 0x6A),
        (0x202, "4s", b"HdrS"),
        (0x206, "H", 0x20F),
        (0x22C, "I", 0x7FFFFFFF),
        (0x236, "H", 1),
        (0x238, "I", 2047),
        (0x258, "Q", 16 * MIB),
        (0x260, "I", 4 * MIB),
    ):
        struct.pack_into("<" + code, image, offset, value)
    path = folder / "vmlinuz"
    path.write_bytes(image)
    return path


def test_command_line_has_the_defaults_first_so_that_the_user_wins(tmp_path: Path) -> None:
    options = BootOptions(tmp_path, append="console=tty0 single")
    words = options.command_line.split()
    assert words[0] == "console=ttyS0"
    assert words[-2:] == ["console=tty0", "single"]
    assert {"nokaslr", "panic=-1", "reboot=panic_warm", "quiet", "loglevel=1"} <= set(words)
    loud = BootOptions(tmp_path, quiet=False).command_line.split()
    assert {"quiet", "loglevel=1"}.isdisjoint(loud)


def test_a_boot_is_checked_before_there_is_a_machine(tmp_path: Path) -> None:
    path = kernel_file(tmp_path)
    initrd = tmp_path / "initrd"
    initrd.write_bytes(b"cpio")
    boot = Boot(BootOptions(path, initrd, cpus=3))
    assert (boot.initrd, boot.kernel.entry) == (b"cpio", 16 * MIB + 0x200)
    assert boot.acpi.image.count(b"ACPI0007") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory": 32 * MIB}, "32 MiB of memory is too little"),
        ({"append": "x" * 3000}, "command line has"),
        ({"initrd": Path("/nonexistent/initrd")}, "cannot read the initrd /nonexistent/initrd: No"),
        ({"kernel": Path("/nonexistent/k")}, "cannot read the kernel /nonexistent/k: No such"),
        ({"cpus": 0}, "0 CPUs: expected 1 or more"),
        ({"cpus": 4000}, "ACPI tables for 4000 processors"),
        ({"initrd": Path("/")}, "cannot read the initrd /: Is a directory"),
    ],
)
def test_what_cannot_be_booted_is_said(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    settings: dict[str, object] = {"kernel": kernel_file(tmp_path), **change}
    with pytest.raises(BootError, match=message):
        Boot(BootOptions(**settings))  # type: ignore[arg-type]


def test_a_file_that_is_no_kernel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no kernel at all\n" * 100)
    with pytest.raises(BootError, match=r"notes\.txt: not a bzImage"):
        parse_kernel(read_file(path, "kernel"), str(path))
