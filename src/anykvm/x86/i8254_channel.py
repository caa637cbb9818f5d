"""One counter of the 8254: counting element, OUT, GATE, latches and data port.

8254 datasheet: modes 0-5, binary and BCD, LSB/MSB access, NULL COUNT. The counting element is not
stepped; it is computed from the time since it was loaded, as arch/x86/kvm/i8254.c does. As there, a
count written while counting takes effect at once.
"""

from __future__ import annotations

KVM_PIT_FREQ = 1193182
NSEC_PER_SEC = 1_000_000_000

RW_LATCH, RW_LSB, RW_MSB, RW_WORD0, RW_WORD1 = range(5)
MODE_RESET = 0xFF
ONE_SHOT_TIMER_MODES = (0, 4)
PERIODIC_MODES = (2, 3)
TRIGGERED_MODES = (1, 5)
GATED_MODES = (0, 2, 3, 4)


def ticks_to_ns(ticks: int) -> int:
    """The first nanosecond at which `ticks` input clocks have passed."""
    return -(-ticks * NSEC_PER_SEC // KVM_PIT_FREQ)


def ns_to_ticks(ns: int) -> int:
    """Input clocks completed after `ns` nanoseconds."""
    return ns * KVM_PIT_FREQ // NSEC_PER_SEC


def from_bcd(value: int) -> int:
    """Four BCD digits as a number."""
    return sum((value >> 4 * i & 0xF) * 10**i for i in range(4))


def to_bcd(value: int) -> int:
    """A number modulo 10000 as four BCD digits."""
    return sum(value // 10**i % 10 << 4 * i for i in range(4))


class PitChannel:
    """One counter.

    `count` is the count register as written (0 is stored as 0x10000); `running` is false between a
    control word and its count, and in modes 1 and 5 until the gate triggers; `held` is the number
    of clocks counted when a low gate stopped the counter.
    """

    def __init__(self, gate: bool) -> None:
        self.count = 0x10000
        self.latched_count = 0
        self.count_latched = 0
        self.status_latched = 0
        self.status = 0
        self.read_state = 0
        self.write_state = 0
        self.write_latch = 0
        self.rw_mode = 0
        self.mode = MODE_RESET
        self.bcd = 0
        self.gate = int(gate)
        self.count_load_time = 0
        self.running = False
        self.null_count = False
        self.held: int | None = None

    @property
    def modulus(self) -> int:
        """The initial count in input clocks: 1 to 65536, or to 10000 in BCD."""
        if not self.bcd:
            return self.count
        return from_bcd(self.count & 0xFFFF) or 10000

    def program(self, access: int, mode: int, bcd: int) -> None:
        """A control word: the counter waits for its count."""
        self.rw_mode = self.read_state = self.write_state = access
        self.mode = mode - 4 if mode > 5 else mode
        self.bcd = bcd
        self.running = False
        self.null_count = True

    def load(self, count: int, now: int) -> None:
        """A complete count: starts counting, or in modes 1 and 5 waits for the trigger."""
        self.count = count or 0x10000
        self.null_count = False
        if self.mode in TRIGGERED_MODES:
            return
        self.start(now)
        if self.mode in GATED_MODES and not self.gate:
            self.held = 0

    def set_gate(self, level: bool, now: int) -> None:
        """Drive GATE: an edge triggers modes 1 and 5, reloads 2 and 3; low stops 0, 2, 3 and 4."""
        rising, falling = level and not self.gate, self.gate and not level
        self.gate = int(level)
        triggered = self.mode in TRIGGERED_MODES and not self.null_count
        reloaded = self.mode in PERIODIC_MODES and self.running
        if rising and (triggered or reloaded):
            self.start(now)
        elif rising and self.held is not None:
            self.count_load_time = now - ticks_to_ns(self.held)
            self.held = None
        elif falling and self.running and self.mode in GATED_MODES:
            self.held = self.ticks(now)

    def ticks(self, now: int) -> int:
        """Input clocks counted since the counter was loaded or triggered."""
        if self.held is not None:
            return self.held
        return ns_to_ticks(now - self.count_load_time) if self.running else 0

    def value(self, now: int) -> int:
        """The counting element as a read would show it."""
        n, ticks = self.modulus, self.ticks(now)
        if self.mode == 2:
            value = n - ticks % n
        elif self.mode == 3:
            value = self._square_wave_value(n, ticks % n)
        else:
            value = n - ticks
        return to_bcd(value % 10000) if self.bcd else value & 0xFFFF

    def out(self, now: int) -> bool:
        """The OUT pin."""
        n, ticks = self.modulus, self.ticks(now)
        if self.mode in (0, MODE_RESET):
            return self.running and ticks >= n
        if not self.running or (self.mode in PERIODIC_MODES and not self.gate):
            return True
        if self.mode == 1:
            return ticks >= n
        if self.mode == 2:
            return ticks % n != n - 1
        if self.mode == 3:
            return ticks % n < (n + 1) // 2
        return ticks != n

    def read(self, now: int) -> int:
        """Read a data port: a latched status, else a latched count, else the live count."""
        if self.status_latched:
            self.status_latched = 0
            return self.status
        if self.count_latched:
            value, state = self.latched_count, self.count_latched
            self.count_latched = RW_MSB if state == RW_WORD0 else 0
        else:
            value, state = self.value(now), self.read_state
            self.read_state = {RW_WORD0: RW_WORD1, RW_WORD1: RW_WORD0}.get(state, state)
        return value >> 8 if state in (RW_MSB, RW_WORD1) else value & 0xFF

    def write(self, value: int, now: int) -> bool:
        """Write a data port; true when that completed a count."""
        if self.write_state == RW_WORD0:
            self.write_latch = value
            self.write_state = RW_WORD1
            if self.mode == 0:
                # The first byte of a new count stops mode 0 and drops OUT at once.
                self.running = False
                self.held = None
            return False
        count = value << 8 if self.write_state == RW_MSB else value
        if self.write_state == RW_WORD1:
            count = self.write_latch | value << 8
            self.write_state = RW_WORD0
        self.load(count, now)
        return True

    def latch_count(self, now: int) -> None:
        """Hold the count for reading; further latches before the read are ignored."""
        if not self.count_latched:
            self.latched_count = self.value(now)
            self.count_latched = self.rw_mode

    def latch_status(self, now: int) -> None:
        """Hold OUT, NULL COUNT and the control word for the next read."""
        if not self.status_latched:
            self.status = (
                self.out(now) << 7
                | self.null_count << 6
                | self.rw_mode << 4
                | (self.mode & 7) << 1
                | self.bcd
            ) & 0xFF
            self.status_latched = 1

    def start(self, now: int) -> None:
        """Begin counting from the initial count."""
        self.count_load_time = now
        self.running = True
        self.held = None

    @staticmethod
    def _square_wave_value(n: int, phase: int) -> int:
        # Mode 3 counts by twos from the even part of n, once per half period.
        high = (n + 1) // 2
        return (n & ~1) - 2 * (phase if phase < high else phase - high)
