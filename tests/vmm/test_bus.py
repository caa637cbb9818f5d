"""Buses: who answers, how accesses are split, what overlaps."""

from __future__ import annotations

import pytest

from anykvm.vmm import devices
from anykvm.vmm.bus import Bus, Claim
from anykvm.vmm.device_table import DEVICES, DeviceRow, Space, register


class Registers:
    """Reads as 0x10 + register in each byte, and remembers what happened."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        self.log.append(("r", offset, size, 0))
        return int.from_bytes(bytes(0x10 + offset + index for index in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.log.append(("w", offset, size, value))


@pytest.fixture
def bus_with() -> tuple[Bus, Registers, Registers]:
    """Bytes at 0x100-0x103, words at 0x104-0x107."""
    bus, narrow, wide = Bus("port"), Registers(), Registers()
    bus.claim(Claim(0x104, 4, 2, wide, "wide"))
    bus.claim(Claim(0x100, 4, 1, narrow, "narrow", offset=4))
    return bus, narrow, wide


@pytest.mark.parametrize(
    ("address", "size", "value"),
    [
        (0x100, 1, 0x14),
        (0x100, 2, 0x1514),
        (0x104, 2, 0x1110),
        (0x104, 4, 0x13121110),
        (0x106, 4, 0xFFFF1312),
        (0x102, 4, 0x11101716),
        (0xFF, 1, 0xFF),
        (0xFE, 2, 0xFFFF),
        (0x108, 8, 0xFFFF_FFFF_FFFF_FFFF),
        (0x106, 3, 0xFF1312),
    ],
)
def test_reads(
    bus_with: tuple[Bus, Registers, Registers], address: int, size: int, value: int
) -> None:
    assert bus_with[0].read(address, size) == value


def test_a_wide_write_goes_to_each_device_in_its_own_width(
    bus_with: tuple[Bus, Registers, Registers],
) -> None:
    bus, narrow, wide = bus_with
    bus.write(0x102, 4, 0x44332211)
    bus.write(0x106, 4, 0x88776655)
    bus.write(0x200, 1, 1)
    assert narrow.log == [("w", 6, 1, 0x11), ("w", 7, 1, 0x22)]
    assert wide.log == [("w", 0, 2, 0x4433), ("w", 2, 2, 0x6655)]


@pytest.mark.parametrize(("base", "size"), [(0x100, 1), (0xFE, 3), (0x107, 8), (0x101, 2)])
def test_overlap_is_refused(
    bus_with: tuple[Bus, Registers, Registers], base: int, size: int
) -> None:
    with pytest.raises(ValueError, match="overlaps"):
        bus_with[0].claim(Claim(base, size, 1, Registers(), "third"))


def test_the_pc_has_its_devices_where_software_looks_for_them() -> None:
    found = {
        row.name: [(window.space, window.base, window.size) for window in row.windows]
        for row in devices.PC
    }
    assert found == {
        "serial": [(Space.PORT, 0x3F8, 8)],
        "rtc": [(Space.PORT, 0x70, 2)],
        "i8042": [(Space.PORT, 0x60, 1), (Space.PORT, 0x64, 1)],
        "exit_port": [(Space.PORT, 0xF4, 4), (Space.MMIO, 0xFEB00000, 4)],
        "debugcon": [(Space.PORT, 0xE9, 1)],
        "post_port": [(Space.PORT, 0x80, 1)],
        "pci_config": [(Space.PORT, 0xCF8, 8)],
        "acpi_pm": [(Space.PORT, 0x600, 12)],
    }


def test_a_name_is_registered_once() -> None:
    taken: DeviceRow = DEVICES["serial"]
    with pytest.raises(ValueError, match="serial"):
        register(taken)
