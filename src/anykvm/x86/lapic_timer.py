"""The local APIC timer: one-shot, periodic and TSC-deadline counting.

Intel SDM volume 3, "APIC Timer". The bus clock is KVM's: one cycle a nanosecond, before the
divider. As in KVM, periodic interrupts come at most every 200 us.
"""

from __future__ import annotations

from anykvm.x86.lapic_regs import LapicTime

APIC_BUS_CYCLE_NS = 1
MIN_TIMER_PERIOD_NS = 200_000

APIC_LVT_TIMER_SHIFT = 17
TIMER_ONESHOT, TIMER_PERIODIC, TIMER_TSCDEADLINE, TIMER_RESERVED = range(4)
COUNTING_MODES = (TIMER_ONESHOT, TIMER_PERIODIC)


def divide_count(tdcr: int) -> int:
    """The divider that bits 3, 1 and 0 of the divide configuration register select."""
    return 1 << (((tdcr & 3 | tdcr >> 1 & 4) + 1) & 7)


class LapicTimer:
    """Counts; the local APIC delivers. Deadlines are on the clock of `time`, in nanoseconds."""

    def __init__(self, time: LapicTime) -> None:
        self._clock = time.clock
        self._read_tsc = time.read_tsc
        self._tsc_khz = time.tsc_khz
        self.reset()

    def reset(self) -> None:
        """Stopped, one-shot, divided by two."""
        self.mode = TIMER_ONESHOT
        self.divide = divide_count(0)
        self.initial_count = 0
        self.tscdeadline = 0
        self.deadline: int | None = None

    @property
    def period_ns(self) -> int:
        """One run of the counter, in nanoseconds."""
        return self.initial_count * self.divide * APIC_BUS_CYCLE_NS

    def set_mode(self, mode: int) -> None:
        """The mode bits of the timer's LVT; only between one-shot and periodic it runs on."""
        if mode == self.mode:
            return
        if mode not in COUNTING_MODES or self.mode not in COUNTING_MODES:
            self.initial_count = 0
            self.tscdeadline = 0
            self.deadline = None
        self.mode = mode

    def set_initial_count(self, count: int) -> None:
        """Write the initial count: starts the counter, or stops it if zero."""
        if self.mode == TIMER_TSCDEADLINE:
            return
        self.initial_count = count
        self.deadline = None
        if count and self.mode in COUNTING_MODES:
            self.deadline = self._clock() + self._interval_ns()

    def set_divide(self, divide: int) -> None:
        """Change the divider; a running counter keeps its current count."""
        if divide == self.divide:
            return
        old, self.divide = self.divide, divide
        if self.deadline is not None and self.mode in COUNTING_MODES:
            now = self._clock()
            remaining = max(self.deadline - now, 0) * divide // old
            self.deadline = now + min(remaining, self._interval_ns())

    def current_count(self) -> int:
        """The current count register; zero when stopped and in TSC-deadline mode."""
        return min(self.remaining_count(), self.initial_count)

    def remaining_count(self) -> int:
        """Counts until the deadline: more than the initial count where the period is stretched."""
        if self.deadline is None or self.mode not in COUNTING_MODES or not self.initial_count:
            return 0
        remaining = self.deadline - self._clock()
        if self.mode == TIMER_PERIODIC and remaining <= 0:
            remaining = self._interval_ns() - -remaining % self._interval_ns()
        return -(-max(remaining, 0) // (self.divide * APIC_BUS_CYCLE_NS))

    def saved_count(self) -> int:
        """As `remaining_count`, for `resume`: 1 where the interrupt is due and not delivered."""
        due = self.deadline is not None and self.deadline <= self._clock()
        if due and self.mode in COUNTING_MODES and self.initial_count:
            return 1
        return self.remaining_count()

    def resume(self, initial_count: int, remaining_count: int) -> None:
        """Continue from a snapshot: the mode, divider and `tscdeadline` are already set.

        A one-shot counter at zero runs out now, though it may have before: QEMU saves no current
        count, and a guest that waits for the interrupt must get it.
        """
        self.initial_count = initial_count
        self.deadline = None
        if self.mode == TIMER_TSCDEADLINE:
            self.arm_tscdeadline()
        elif initial_count and self.mode in COUNTING_MODES:
            interval = self._interval_ns()
            remaining = min(remaining_count * self.divide * APIC_BUS_CYCLE_NS, interval)
            if not remaining and self.mode == TIMER_PERIODIC:
                remaining = interval
            self.deadline = self._clock() + remaining

    def set_tscdeadline(self, value: int) -> None:
        """Write IA32_TSC_DEADLINE: ignored in other modes; zero disarms."""
        if self.mode == TIMER_TSCDEADLINE:
            self.tscdeadline = value
            self.arm_tscdeadline()

    def arm_tscdeadline(self) -> None:
        """Translate the TSC deadline to the clock: after a write, or when the guest TSC moved."""
        if self.mode != TIMER_TSCDEADLINE:
            return
        khz = self._tsc_khz()
        if not self.tscdeadline or not khz:
            self.deadline = None
            return
        cycles = max(self.tscdeadline - self._read_tsc(), 0)
        # Rounded up, so that the guest never sees a TSC before its deadline.
        self.deadline = self._clock() + -(-cycles * 1_000_000 // khz)

    def expire(self, now: int) -> bool:
        """True if the counter ran out by `now`; a periodic one goes on, others stop."""
        if self.deadline is None or now < self.deadline:
            return False
        if self.mode == TIMER_PERIODIC:
            interval = self._interval_ns()
            self.deadline += interval * ((now - self.deadline) // interval + 1)
        else:
            self.deadline = None
            self.tscdeadline = 0
        return True

    def _interval_ns(self) -> int:
        if self.mode != TIMER_PERIODIC:
            return self.period_ns
        # Stretched to whole counts, so that a snapshot can tell where it was.
        cycle = self.divide * APIC_BUS_CYCLE_NS
        return max(self.period_ns, -(-MIN_TIMER_PERIOD_NS // cycle) * cycle)
