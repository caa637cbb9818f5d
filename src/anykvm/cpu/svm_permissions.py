"""The permission maps of I/O ports and MSRs that L1 gives L2 (AMD APM vol. 2, 15.10 and 15.11).

They are looked at where an instruction needs them, so a change of L1's counts at once; unless L1
uses Hyper-V's enlightenment, with which it tells when it has changed the map of MSRs (the
hypervisor's top-level functional specification, chapter 16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from anykvm.cpu.memory import PAGE
from anykvm.cpu.vmcb import HV_CLEAN, HV_MSR_BITMAP, MSRPM_SIZE, VmcbControl

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

NOTHING_THERE = b"\xff"  # where a map is no memory everything is intercepted


class Permissions:
    """The maps that `control`, the control area in force, names."""

    def __init__(self, cpu: Cpu, control: VmcbControl) -> None:
        self.cpu, self.control = cpu, control
        self.knows_hyperv: Callable[[], bool] = lambda: False  # L1 uses Hyper-V's interface
        self._msr_map: bytes | None = None

    def begin(self) -> None:
        """L2 begins to run under the control area."""
        control = self.control
        control.msrpm_base_pa &= -PAGE
        control.iopm_base_pa &= -PAGE
        if not (control.hv_enlightenments & HV_MSR_BITMAP and self.knows_hyperv()):
            self._msr_map = None
        elif self._msr_map is None or not control.clean & HV_CLEAN:
            pages = range(control.msrpm_base_pa, control.msrpm_base_pa + MSRPM_SIZE, PAGE)
            found = (self.cpu.read_physical(at, PAGE) or NOTHING_THERE * PAGE for at in pages)
            self._msr_map = b"".join(found)

    def ports(self, first: int) -> int:
        """A bit a port, from `first` on, for as many as an access can have."""
        return self._bits(self.control.iopm_base_pa + first // 8, 2) >> first % 8

    def msr(self, bit: int) -> int:
        """A bit of the map of MSRs."""
        if self._msr_map is not None:
            return self._msr_map[bit // 8] >> bit % 8 & 1
        return self._bits(self.control.msrpm_base_pa + bit // 8, 1) >> bit % 8 & 1

    def _bits(self, pa: int, size: int) -> int:
        found = (self.cpu.read_physical(at, 1) or NOTHING_THERE for at in range(pa, pa + size))
        return int.from_bytes(b"".join(found), "little")
