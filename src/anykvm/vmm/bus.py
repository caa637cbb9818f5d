"""An address space of device registers: who answers at a port or a guest-physical address.

The machine has two, one for `IN`/`OUT` and one for memory-mapped registers. An access that is
wider than a device's registers, or that runs over the end of its range, is split as an ISA bridge
splits it: into narrower accesses at rising addresses. What nobody claims reads as all ones and
ignores writes.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from dataclasses import dataclass
from typing import Protocol

OPEN_BUS = 0xFF


class Device(Protocol):
    """Registers: `offset` is the register's number, `size` the bytes of the access."""

    def read(self, offset: int, size: int) -> int: ...

    def write(self, offset: int, size: int, value: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Claim:
    """`size` addresses from `base` are the registers of `device` from number `offset` on.

    `width` is the widest access that the device takes, in bytes.
    """

    base: int
    size: int
    width: int
    device: Device
    name: str
    offset: int = 0

    @property
    def end(self) -> int:
        return self.base + self.size

    def takes(self, address: int, size: int) -> bool:
        return size <= self.width and self.base <= address and address + size <= self.end


class Bus:
    """Claims of one address space, in order of address."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._claims: list[Claim] = []
        # Accesses that some device takes whole, found once; there are only so many.
        self._taken: dict[tuple[int, int], Claim] = {}

    def claim(self, claim: Claim) -> None:
        """Add a range. Raises ValueError when it overlaps one that is there."""
        for other in self._claims:
            if claim.base < other.end and other.base < claim.end:
                raise ValueError(
                    f"{self.name} {claim.base:#x}-{claim.end - 1:#x} of {claim.name} "
                    f"overlaps {other.name}"
                )
        insort(self._claims, claim, key=lambda row: row.base)

    def at(self, address: int) -> Claim | None:
        """The claim that holds an address, if any."""
        index = bisect_right(self._claims, address, key=lambda row: row.base)
        if index and address < self._claims[index - 1].end:
            return self._claims[index - 1]
        return None

    def _taker(self, address: int, size: int) -> Claim | None:
        """The claim that takes an access as it is."""
        claim = self._taken.get((address, size))
        if claim is None:
            claim = self.at(address)
            if claim is None or not claim.takes(address, size):
                return None
            self._taken[address, size] = claim
        return claim

    def read(self, address: int, size: int) -> int:
        claim = self._taker(address, size)
        if claim is not None:
            return claim.device.read(address - claim.base + claim.offset, size)
        if size == 1:
            return OPEN_BUS
        low = size // 2
        return self.read(address, low) | self.read(address + low, size - low) << 8 * low

    def write(self, address: int, size: int, value: int) -> None:
        claim = self._taker(address, size)
        if claim is not None:
            claim.device.write(address - claim.base + claim.offset, size, value)
        elif size > 1:
            low = size // 2
            self.write(address, low, value & (1 << 8 * low) - 1)
            self.write(address + low, size - low, value >> 8 * low)
