"""Ports 0xcf8-0xcff: PCI configuration mechanism #1 over an empty bus, and the reset control
register.

The address register latches, so a kernel finds a working mechanism, and every function reads as
all ones: there is none. A byte written to 0xcf9 is the reset control register of Intel's south
bridges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from anykvm.vmm.device_table import DeviceRow, Platform, Space, Window, register
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended

CONFIG_ADDRESS = 0xCF8
RESET_CONTROL = 0xCF9
CONFIG_DATA_OFFSET = 4
SYSTEM_RESET, RESET_CPU = 0x02, 0x04
RESET_VALUE = SYSTEM_RESET | RESET_CPU
ADDRESS_BITS = 0x80FFFFFC


@dataclass(slots=True)
class PciConfigState:
    address: int = 0
    reset_control: int = 0


class PciConfig:
    """The host bridge's two registers and the reset control register."""

    def __init__(self, request: Callable[[Outcome], None]) -> None:
        self.state = PciConfigState()
        self._request = request

    def read(self, offset: int, size: int) -> int:
        if offset == 0 and size == 4:
            return self.state.address
        if offset == 1 and size == 1:
            return self.state.reset_control
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0 and size == 4:
            self.state.address = value & ADDRESS_BITS
        elif offset == 1 and size == 1:
            self._write_reset_control(value)

    def snapshot(self) -> PciConfigState:
        return replace(self.state)

    def restore(self, state: PciConfigState) -> None:
        self.state = replace(state)

    def _write_reset_control(self, value: int) -> None:
        """A reset happens when RST_CPU goes from zero to one."""
        rises = value & ~self.state.reset_control & RESET_CPU
        self.state.reset_control = value & RESET_VALUE
        if rises:
            self._request(ended(OutcomeKind.RESET, "the guest reset the machine (port 0xcf9)"))


def _build(platform: Platform) -> PciConfig:
    return PciConfig(platform.request)


register(DeviceRow("pci_config", (Window(Space.PORT, CONFIG_ADDRESS, 8),), 4, _build))
