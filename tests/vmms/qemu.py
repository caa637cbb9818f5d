"""QEMU as Debian packages it: its command line, and what is asked of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .process import EXEC, Console

PROGRAM = "qemu-system-x86_64"
SEABIOS = "/usr/share/seabios/bios-microvm.bin"
"""Debian's microvm starts with qboot, which boots no disk."""
MEMORY = 256  # MiB
QUIET = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio")
MACHINES = ("pc", "q35", "microvm")
IRQCHIPS = ("on", "split", "off")
DISKS = {
    "pc": "virtio-blk-pci",
    "q35": "virtio-blk-pci",
    "microvm": "virtio-blk-device",
}
"""The virtio disk of each machine."""


def installed() -> bool:
    return shutil.which(PROGRAM) is not None


@dataclass(frozen=True)
class Machine:
    """A machine of QEMU's, where its interrupt controllers are, and its vCPUs."""

    machine: str = "pc"
    irqchip: str = "on"
    cpus: int = 1

    @property
    def name(self) -> str:
        return f"{self.machine}-{self.irqchip}-{self.cpus}"

    @property
    def hangs_in_qemu(self) -> bool:
        """QEMU 7.2 stays in its own APIC's start-up IPI for ever, on Linux's KVM as well."""
        return self.irqchip == "off" and self.cpus > 1

    def command(self, options: Sequence[str | Path], accel: str = "kvm") -> list[str]:
        """A command line; `accel` may be tcg, to see whether a case is at fault."""
        machine, wrapper = self.machine, EXEC
        if accel == "kvm":
            machine += f",kernel-irqchip={self.irqchip}"
        else:
            wrapper = ()
        where = ("-accel", accel, "-M", machine, "-m", str(MEMORY), "-smp", str(self.cpus))
        return [*wrapper, PROGRAM, *where, *QUIET, *map(str, options)]

    def start(self, options: Sequence[str | Path], limit: float, accel: str = "kvm") -> Console:
        return Console(self.command(options, accel), limit)


def virtio_disk(machine: str, image: Path, format: str = "raw") -> list[str]:
    drive = f"file={image},format={format},if=none,id=disk"
    return ["-drive", drive, "-device", f"{DISKS[machine]},drive=disk"]


def ide_disk(image: Path) -> list[str]:
    """On pc an IDE disk, on q35 one at its AHCI controller."""
    return ["-drive", f"file={image},format=raw,if=ide"]


def monitor(socket: Path) -> list[str]:
    return ["-qmp", f"unix:{socket},server=on,wait=off"]


def debugger(socket: Path) -> list[str]:
    chardev = f"socket,id=gdb,path={socket},server=on,wait=off"
    return ["-chardev", chardev, "-gdb", "chardev:gdb"]
