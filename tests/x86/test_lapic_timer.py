"""The local APIC timer: divider, one-shot, periodic and TSC-deadline counting."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anykvm.x86.lapic_regs import LapicTime
from anykvm.x86.lapic_timer import (
    MIN_TIMER_PERIOD_NS,
    TIMER_ONESHOT,
    TIMER_PERIODIC,
    TIMER_RESERVED,
    TIMER_TSCDEADLINE,
    LapicTimer,
    divide_count,
)

TSC_KHZ = 2_500_000


class Bench:
    """A timer, its clock and a TSC of 2.5 GHz that started at zero with it."""

    def __init__(self, mode: int = TIMER_ONESHOT, divide: int = 1) -> None:
        self.now = 0
        self.tsc_offset = 0
        self.khz = TSC_KHZ
        self.timer = LapicTimer(LapicTime(lambda: self.now, self.tsc, lambda: self.khz))
        self.timer.set_mode(mode)
        self.timer.set_divide(divide)

    def tsc(self) -> int:
        return self.now * TSC_KHZ // 1_000_000 + self.tsc_offset


@pytest.mark.parametrize(
    ("tdcr", "divide"),
    [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1), (4, 2), (15, 1)],
)
def test_divide_configuration(tdcr: int, divide: int) -> None:
    assert divide_count(tdcr) == divide


def test_one_shot_counts_down_and_stops() -> None:
    bench = Bench(divide=16)
    bench.timer.set_initial_count(1000)
    assert bench.timer.deadline == 16_000
    counts = []
    for bench.now in (0, 15, 16, 8_000, 15_985, 15_999, 16_000, 20_000):
        counts.append(bench.timer.current_count())
    assert counts == [1000, 1000, 999, 500, 1, 1, 0, 0]
    assert not bench.timer.expire(15_999)
    assert bench.timer.expire(16_000)
    assert not bench.timer.expire(99_000)
    assert bench.timer.deadline is None


def test_periodic_reloads_without_drift() -> None:
    bench = Bench(TIMER_PERIODIC)
    bench.timer.set_initial_count(1_000_000)
    bench.now = 1_000_300
    assert bench.timer.current_count() == 999_700
    assert bench.timer.expire(bench.now)
    assert bench.timer.deadline == 2_000_000
    assert bench.timer.current_count() == 999_700
    bench.now = 7_400_000
    assert bench.timer.expire(bench.now)
    assert bench.timer.deadline == 8_000_000


def test_fast_periodic_timers_are_throttled_and_one_shots_are_not() -> None:
    bench = Bench(TIMER_PERIODIC)
    bench.timer.set_initial_count(100)
    assert bench.timer.deadline == MIN_TIMER_PERIOD_NS
    assert bench.timer.current_count() == 100
    bench.timer.set_mode(TIMER_ONESHOT)
    bench.timer.set_initial_count(100)
    assert bench.timer.deadline == 100


def test_zero_stops() -> None:
    bench = Bench()
    bench.timer.set_initial_count(100)
    bench.timer.set_initial_count(0)
    assert (bench.timer.deadline, bench.timer.current_count()) == (None, 0)


def test_rewriting_the_count_restarts() -> None:
    bench = Bench()
    bench.timer.set_initial_count(100)
    bench.now = 60
    bench.timer.set_initial_count(100)
    assert bench.timer.deadline == 160


def test_changing_the_divider_keeps_the_count() -> None:
    bench = Bench(divide=2)
    bench.timer.set_initial_count(1000)
    bench.now = 1000
    bench.timer.set_divide(8)
    assert bench.timer.current_count() == 500
    assert bench.timer.deadline == 1000 + 500 * 8


@pytest.mark.parametrize("mode", [TIMER_TSCDEADLINE, TIMER_RESERVED])
def test_modes_without_a_counter(mode: int) -> None:
    bench = Bench(mode)
    bench.timer.set_initial_count(100)
    assert (bench.timer.deadline, bench.timer.current_count()) == (None, 0)


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        (TIMER_ONESHOT, TIMER_PERIODIC, True),
        (TIMER_PERIODIC, TIMER_ONESHOT, True),
        (TIMER_ONESHOT, TIMER_ONESHOT, True),
        (TIMER_ONESHOT, TIMER_TSCDEADLINE, False),
        (TIMER_PERIODIC, TIMER_TSCDEADLINE, False),
        (TIMER_PERIODIC, TIMER_RESERVED, False),
    ],
)
def test_mode_changes_while_running(old: int, new: int, runs: bool) -> None:
    bench = Bench(old)
    bench.timer.set_initial_count(1_000_000)
    bench.timer.set_mode(new)
    assert (bench.timer.deadline is not None) is runs
    assert (bench.timer.initial_count != 0) is runs


def test_leaving_tsc_deadline_mode_disarms() -> None:
    bench = Bench(TIMER_TSCDEADLINE)
    bench.timer.set_tscdeadline(1000)
    bench.timer.set_mode(TIMER_ONESHOT)
    assert (bench.timer.deadline, bench.timer.tscdeadline) == (None, 0)


def test_tsc_deadline_in_other_modes_is_ignored() -> None:
    bench = Bench()
    bench.timer.set_tscdeadline(1000)
    assert (bench.timer.deadline, bench.timer.tscdeadline) == (None, 0)


@given(st.integers(0, 10**12), st.integers(1, 1 << 63))
def test_tsc_deadline_is_never_early_and_hardly_late(now: int, value: int) -> None:
    bench = Bench(TIMER_TSCDEADLINE)
    bench.now = now
    bench.timer.set_tscdeadline(value)
    deadline = bench.timer.deadline
    assert deadline is not None
    if value <= bench.tsc():
        assert deadline == now
    else:
        bench.now = deadline
        assert bench.tsc() >= value
        bench.now = deadline - 2
        assert bench.tsc() < value
    bench.now = deadline
    assert bench.timer.expire(deadline)
    assert (bench.timer.deadline, bench.timer.tscdeadline) == (None, 0)


def test_tsc_deadline_follows_the_tsc() -> None:
    bench = Bench(TIMER_TSCDEADLINE)
    bench.timer.set_tscdeadline(2_500_000)
    assert bench.timer.deadline == 1_000_000
    bench.tsc_offset = 1_250_000
    bench.timer.arm_tscdeadline()
    assert bench.timer.deadline == 500_000
    bench.khz = 0
    bench.timer.arm_tscdeadline()
    assert bench.timer.deadline is None


@given(
    mode=st.sampled_from([TIMER_ONESHOT, TIMER_PERIODIC]),
    shift=st.integers(0, 7),
    count=st.integers(1, 0xFFFFFFFF),
    ticks=st.integers(0, 1 << 33),
    later=st.integers(0, 1 << 40),
)
def test_resumed_timer_counts_on(mode: int, shift: int, count: int, ticks: int, later: int) -> None:
    original = Bench(mode, 1 << shift)
    original.timer.set_initial_count(count)
    original.now = ticks << shift
    original.timer.expire(original.now)
    resumed = Bench(mode, 1 << shift)
    resumed.now = original.now
    resumed.timer.resume(count, original.timer.remaining_count())
    if original.timer.deadline is None:  # whether its interrupt was taken, nobody knows any more
        assert resumed.timer.expire(resumed.now)
    assert resumed.timer.deadline == original.timer.deadline
    resumed.now = original.now = original.now + later
    assert resumed.timer.current_count() == original.timer.current_count()
    assert resumed.timer.expire(original.now) == original.timer.expire(original.now)
