"""The table of a conformance run: what each ioctl's tests gave on soft and on the host."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from .framework import Statement
from .host_process import Outcome
from .machine import PROVOKED

SIDES = ("soft", "host")


@dataclass
class Report:
    """Outcomes by test and side. `host_note` says why there is no host."""

    host_note: str = ""
    outcomes: dict[str, dict[str, Outcome]] = field(default_factory=dict)
    ioctls: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def add(self, test: str, side: str, made: Statement, outcome: Outcome) -> None:
        self.ioctls[test] = made.ioctls
        self.outcomes.setdefault(test, {})[side] = outcome

    def cell(self, tests: list[str], side: str) -> str:
        """`3 passed, 1 not available`."""
        found = Counter(
            self.outcomes[test][side].status for test in tests if side in self.outcomes[test]
        )
        return ", ".join(f"{count} {status}" for status, count in sorted(found.items())) or "-"

    def by_ioctl(self) -> dict[str, list[str]]:
        rows: dict[str, list[str]] = {}
        for test, names in self.ioctls.items():
            for name in names:
                rows.setdefault(name, []).append(test)
        return dict(sorted(rows.items(), key=lambda row: row[0].rpartition(":")[2]))

    def table(self) -> Iterator[str]:
        """A line per ioctl."""
        rows = [("ioctl", *SIDES)]
        rows += [
            (name, *(self.cell(tests, side) for side in SIDES))
            for name, tests in self.by_ioctl().items()
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        for name, soft, host in rows:
            yield f"{name:{widths[0]}}  {soft:{widths[1]}}  {host}".rstrip()

    def remarks(self) -> Iterator[str]:
        """A line for each test that did something else than pass, but for what is not there."""
        for test, sides in self.outcomes.items():
            for side, outcome in sides.items():
                if outcome.status not in ("passed", "not available"):
                    yield f"{side}: {outcome.status}: {test}: {outcome.text}"

    def unavailable(self) -> Iterator[str]:
        """What the host cannot do, each reason once."""
        reasons = Counter(
            sides["host"].text
            for sides in self.outcomes.values()
            if "host" in sides and sides["host"].status == "not available"
        )
        for reason, count in sorted(reasons.items()):
            yield f"host: not available: {reason} ({count} tests)"

    def unprovoked(self) -> Iterator[str]:
        """Errnos that rows state and no test has provoked."""
        from anykvm.kvm.tables import rows

        for kind, row in rows():
            stated = {code for code, _ in row.all_errors()}
            missing = sorted(stated - {e for k, n, e in PROVOKED if (k, n) == (kind, row.name)})
            if missing:
                names = ", ".join(errno.errorcode[code] for code in missing)
                yield f"soft: not provoked: {row.name} ({kind}): {names}"

    def summary(self) -> Iterator[str]:
        """A line per side."""
        tests = list(self.outcomes)
        for side in SIDES:
            if side == "host" and self.host_note:
                yield f"host: {self.host_note}"
            else:
                yield f"{side}: {self.cell(tests, side)}"
