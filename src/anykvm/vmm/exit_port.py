"""The exit port: a guest that writes v to it ends the run with exit status v.

One register at port 0xf4 (where QEMU's isa-debug-exit is usually put) and at an address in the
hole below 4 GiB, for guests without port access from user space (busybox: `devmem 0xfeb00000 8
STATUS`). It reads as zero.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.vmm.device_table import DeviceRow, Platform, Space, Window, register
from anykvm.vmm.outcome import Outcome, exited

EXIT_PORT = 0xF4
EXIT_ADDRESS = 0xFEB0_0000


class ExitPort:
    """Has no state: the first write ends the machine."""

    def __init__(self, request: Callable[[Outcome], None]) -> None:
        self._request = request

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self._request(exited(value))


WINDOWS = (Window(Space.PORT, EXIT_PORT, 4), Window(Space.MMIO, EXIT_ADDRESS, 4))


def _build(platform: Platform) -> ExitPort:
    return ExitPort(platform.request)


register(DeviceRow("exit_port", WINDOWS, 4, _build))
