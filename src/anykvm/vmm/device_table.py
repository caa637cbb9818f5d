"""The table of devices that a PC is built from; each device's file adds its row.

A row says where the registers are, how wide, and how to build the device from the platform that
the machine injects: interrupt lines, clocks, outputs and the request to end the run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from anykvm.vmm.bus import Device
from anykvm.vmm.outcome import Outcome

IrqLine = Callable[[bool], None]


@dataclass(frozen=True, slots=True)
class Platform:
    """What a device may reach of the outside."""

    irq_line: Callable[[int], IrqLine]
    """The level of a global system interrupt, to be set on changes only."""
    clock: Callable[[], int]
    """Nanoseconds, monotonic."""
    wall_clock: Callable[[], int]
    """Nanoseconds since 1970, UTC."""
    console_output: Callable[[bytes], None]
    debug_output: Callable[[bytes], None]
    console_ready: Callable[[], None]
    """The console's device has room for input again."""
    deadline_changed: Callable[[], None]
    """The next deadline of a timed device may have moved."""
    request: Callable[[Outcome], None]
    """End the run."""
    memory_below_4g: int
    memory_above_4g: int
    cpus: int


@runtime_checkable
class Timed(Protocol):
    """A device with something to do at a time of its own."""

    def next_deadline(self) -> int | None:
        """When `tick` is due, in nanoseconds of the platform's clock."""

    def tick(self) -> None: ...


class Space(Enum):
    PORT = "port"
    MMIO = "mmio"


@dataclass(frozen=True, slots=True)
class Window:
    """A range of registers in one address space; `offset` is the number of its first register."""

    space: Space
    base: int
    size: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class DeviceRow:
    """One device of the PC: its windows into its registers, and their widest access in bytes."""

    name: str
    windows: tuple[Window, ...]
    width: int
    build: Callable[[Platform], Device]


DEVICES: dict[str, DeviceRow] = {}


def register(row: DeviceRow) -> None:
    """Add a row. Raises ValueError when the name is taken."""
    if row.name in DEVICES:
        raise ValueError(f"a device named {row.name} is in the table already")
    DEVICES[row.name] = row
