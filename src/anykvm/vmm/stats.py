"""What made the guest leave: counts of exits by reason, port and address."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from anykvm.uapi import kvm as abi
from anykvm.uapi.names import EXIT_REASONS

DIRECTIONS = {abi.KVM_EXIT_IO_IN: "in", abi.KVM_EXIT_IO_OUT: "out"}


@dataclass(slots=True)
class ExitStats:
    """Keys: exit reason; (port, KVM_EXIT_IO_*); (guest-physical address, is_write)."""

    reasons: Counter[int] = field(default_factory=Counter)
    ports: Counter[tuple[int, int]] = field(default_factory=Counter)
    mmio: Counter[tuple[int, int]] = field(default_factory=Counter)

    @classmethod
    def total(cls, parts: Iterable[ExitStats]) -> ExitStats:
        """The sum over vCPUs."""
        result = cls()
        for part in parts:
            result.reasons.update(part.reasons)
            result.ports.update(part.ports)
            result.mmio.update(part.mmio)
        return result

    def rows(self) -> list[tuple[str, str, int]]:
        """(kind, what, count), the most frequent of each kind first."""
        reasons = ((reason_name(reason), count) for reason, count in self.reasons.most_common())
        ports = (
            (f"{port:#06x} {DIRECTIONS[direction]}", count)
            for (port, direction), count in self.ports.most_common()
        )
        mmio = (
            (f"{address:#x} {'write' if write else 'read'}", count)
            for (address, write), count in self.mmio.most_common()
        )
        kinds = (("exit", reasons), ("port", ports), ("mmio", mmio))
        return [(kind, what, count) for kind, rows in kinds for what, count in rows]


def reason_name(reason: int) -> str:
    """KVM_EXIT_* as the header spells it."""
    return EXIT_REASONS.get(reason, f"exit reason {reason}")
