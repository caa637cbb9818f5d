"""The PC's devices. Importing a device's file adds its row to the table; this imports them all."""

from anykvm.vmm import (
    acpi_pm,
    debugcon,
    exit_port,
    i8042,
    pci_config,
    post_port,
    rtc,
    serial,
)
from anykvm.vmm.device_table import DEVICES, DeviceRow

FILES = (serial, rtc, i8042, exit_port, debugcon, post_port, pci_config, acpi_pm)

PC: tuple[DeviceRow, ...] = tuple(DEVICES.values())
