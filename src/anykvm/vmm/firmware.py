"""Boot firmware: an image that ends at 4 GiB, where a reset processor begins.

Its last 128 KiB are seen below 1 MiB as well, as on a PC, and there they are RAM (SDM volume 3,
9.1.4; `-bios` of QEMU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anykvm.api import GuestMemory
from anykvm.vmm.machine import Machine, MachineConfig, loaded
from anykvm.vmm.memory_map import (
    ABOVE_4G,
    BIOS_ADDRESS,
    HIGH_MEMORY,
    KVM_IDENTITY_MAP_ADDRESS,
    KVM_PRIVATE_SIZE,
    MIN_MEMORY,
    PAGE_SIZE,
)

SLOT = 2
LARGEST = ABOVE_4G - (KVM_IDENTITY_MAP_ADDRESS + KVM_PRIVATE_SIZE)


class FirmwareError(Exception):
    """The image is no firmware; the message says why."""


@dataclass(frozen=True, slots=True)
class FirmwareOptions:
    """`memory` in bytes; `backend` as for `anykvm.api.Kvm`."""

    image: bytes
    memory: int = 128 << 20
    cpus: int = 1
    backend: str | None = None


class Firmware:
    """Checked before a machine exists. Raises FirmwareError."""

    def __init__(self, options: FirmwareOptions) -> None:
        self.options = options
        size = len(options.image)
        if not 0 < size <= LARGEST or size % PAGE_SIZE:
            raise FirmwareError(
                f"an image of {size} bytes: expected whole pages, {LARGEST} bytes at most"
            )
        if options.memory < MIN_MEMORY:
            raise FirmwareError(f"memory of {options.memory} bytes: expected {MIN_MEMORY} or more")

    def load(self, machine: Machine) -> None:
        """Put the image where a reset finds it, and below 1 MiB."""
        image = self.options.image
        rom = GuestMemory(len(image), ABOVE_4G - len(image))
        rom.write(rom.addr, image)
        machine.vm.add_memory(SLOT, rom)
        low = image[BIOS_ADDRESS - HIGH_MEMORY :]
        machine.memory.write(HIGH_MEMORY - len(low), low)

    def machine(
        self,
        console_output: Callable[[bytes], None],
        debug_output: Callable[[bytes], None] | None = None,
    ) -> Machine:
        """The machine with the firmware in it, ready to run."""
        options = self.options
        config = MachineConfig(options.memory, options.cpus, options.backend)
        return loaded(Machine(config, console_output, debug_output), self.load)
