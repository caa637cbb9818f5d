"""The debug console of Bochs and QEMU at port 0xe9, which reads as its own number."""

from __future__ import annotations

from collections.abc import Callable

from anykvm.vmm.device_table import DeviceRow, Platform, Space, Window, register

DEBUGCON_PORT = 0xE9


class Debugcon:
    """Has no state."""

    def __init__(self, output: Callable[[bytes], None]) -> None:
        self._output = output

    def read(self, offset: int, size: int) -> int:
        return DEBUGCON_PORT

    def write(self, offset: int, size: int, value: int) -> None:
        self._output(bytes((value,)))


def _build(platform: Platform) -> Debugcon:
    return Debugcon(platform.debug_output)


register(DeviceRow("debugcon", (Window(Space.PORT, DEBUGCON_PORT, 1),), 1, _build))
