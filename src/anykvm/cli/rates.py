"""Counters of a VM as rows: totals, and what came in a second between two samples."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from anykvm.api.stats import Stats, StatType, StatUnit
from anykvm.cli.counters import VmSample
from anykvm.uapi.names import exit_name

BY_EXIT_REASON = "userspace_exits"
EVERYTHING = re.compile("")


class Value(NamedTuple):
    """A statistic's value, whether it can only grow, and whether it is a time."""

    now: int
    grows: bool = True
    is_time: bool = False


NOTHING = Value(0)


@dataclass(frozen=True)
class Row:
    """A statistic of a VM and its vCPUs: `total` over all of them, `rate` a second.

    A rate is None for what only has a value at a moment, and where there is no earlier sample.
    A time is in nanoseconds.
    """

    name: str
    total: int
    rate: float | None
    vcpu_totals: tuple[int, ...] = ()
    vcpu_rates: tuple[float | None, ...] = ()
    is_time: bool = False


@dataclass(frozen=True)
class Period:
    """A sample, and the one before it with the seconds that passed, if there is one."""

    now: VmSample
    before: VmSample | None = None
    seconds: float = 0.0

    def rows(self, wanted: re.Pattern[str] = EVERYTHING) -> list[Row]:
        """The busiest first, times last; names that the pattern finds, and only what is not 0."""
        found = [row for row in self._all() if row.total and wanted.search(row.name)]
        return sorted(found, key=lambda row: (row.is_time, -(row.rate or 0), -row.total, row.name))

    def _all(self) -> Iterator[Row]:
        was = flat(self.before.stats) if self.before else {}
        for name, value in flat(self.now.stats).items():
            yield Row(name, value.now, self._rate(value, was.get(name)), is_time=value.is_time)
        yield from self._of_vcpus()

    def _of_vcpus(self) -> Iterator[Row]:
        now = [flat(stats) for stats in self.now.vcpus]
        earlier = {stats.id: flat(stats) for stats in self.before.vcpus} if self.before else {}
        before = [earlier.get(stats.id, {}) for stats in self.now.vcpus]
        for name in dict.fromkeys(name for values in now for name in values):
            cells = [values.get(name, NOTHING) for values in now]
            totals = tuple(value.now for value in cells)
            pairs = zip(cells, before, strict=True)
            rates = tuple(self._rate(value, was.get(name)) for value, was in pairs)
            known = [rate for rate in rates if rate is not None]
            is_time = any(value.is_time for value in cells)
            yield Row(name, sum(totals), sum(known) if known else None, totals, rates, is_time)

    def _rate(self, value: Value, before: Value | None) -> float | None:
        if not value.grows or not self.seconds:
            return None
        return (value.now - (before.now if before else 0)) / self.seconds


def flat(stats: Stats) -> dict[str, Value]:
    """Each value by name; exits to userspace by reason, and no other histogram."""
    values: dict[str, Value] = {}
    for name, stat in stats.items():
        desc = stat.descriptor
        if name == BY_EXIT_REASON:
            values[name] = Value(stat.value)
            values |= {_by_reason(n): Value(count) for n, count in enumerate(stat.values) if count}
        elif desc.size == 1:
            grows = desc.type is StatType.CUMULATIVE
            values[name] = Value(stat.value, grows, desc.unit is StatUnit.SECONDS)
    return values


def _by_reason(reason: int) -> str:
    return f"{BY_EXIT_REASON}[{exit_name(reason).removeprefix('KVM_EXIT_').lower()}]"
