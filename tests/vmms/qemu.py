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
QUIET = ("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
WRAPPERS: dict[str, Sequence[str]] = {"kvm": EXEC, "tcg": ()}
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

    @property
    def spared(self) -> str:
        """QEMU's second IOAPIC, which microvm's disks are at, never hears of EOIs that the kernel's
        APICs keep to themselves; kernel-irqchip=on needs it gone, on Linux's KVM as well.
        """
        both = self.machine == "microvm" and self.irqchip == "on"
        return ",ioapic2=off" if both else ""

    def command(self, options: Sequence[str | Path], accel: str = "kvm") -> list[str]:
        """QEMU's own command line."""
        machine = self.machine
        if accel == "kvm":
            machine += f",kernel-irqchip={self.irqchip}{self.spared}"
        where = ("-accel", accel, "-M", machine, "-m", str(MEMORY), "-smp", str(self.cpus))
        return [PROGRAM, *where, *QUIET, *map(str, options)]

    def start(self, options: Sequence[str | Path], limit: float, accel: str = "kvm") -> Console:
        """`accel` may be tcg, to see whether a case is at fault."""
        return Console(
            [*WRAPPERS[accel], *self.command(("-serial", "stdio", *options), accel)], limit
        )


def virtio_disk(machine: str, image: Path, format: str = "raw") -> list[str]:
    drive = f"file={image},format={format},if=none,id=disk"
    return ["-drive", drive, "-device", f"{DISKS[machine]},drive=disk"]


def ide_disk(image: Path) -> list[str]:
    """On pc an IDE disk, on q35 one at its AHCI controller."""
    return ["-drive", f"file={image},format=raw,if=ide"]


def boot_disk(machine: str, image: Path) -> list[str]:
    """A disk that the BIOS boots from."""
    if machine == "microvm":
        return [*virtio_disk(machine, image), "-bios", SEABIOS]
    return ide_disk(image)


def monitor(socket: Path) -> list[str]:
    return ["-qmp", f"unix:{socket},server=on,wait=off"]


def debugger(socket: Path) -> list[str]:
    chardev = f"socket,id=gdb,path={socket},server=on,wait=off"
    return ["-chardev", chardev, "-gdb", "chardev:gdb"]
