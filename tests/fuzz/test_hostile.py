"""Hostile callers; `tools/fuzz_ioctls.py` makes a million such calls."""

from __future__ import annotations

import time

from .hostile import hostile_calls

CALLS = 15_000


def test_hostile_callers_get_errors_that_linux_allows_and_nothing_else():
    seed = str(time.time_ns())
    report = hostile_calls(CALLS, seed, round_calls=CALLS // 3)
    assert report.wrong == [], f"seed {seed}"
    assert len({name.split()[0] for name in report.outcomes}) > 60  # most ioctls were reached
