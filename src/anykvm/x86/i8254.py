"""8254 programmable interval timer with the PC's speaker port.

Follows the 8254 datasheet (control words, read-back; the counters are in `i8254_channel.py`) and
arch/x86/kvm/i8254.c: channel 0 interrupts, periodic periods are kept above 200 us, missed ticks are
reinjected as the guest acknowledges them, loading a snapshot restarts the counters.

Pure state: callers serialise every call. Time is the injected `clock`, in nanoseconds. Whoever owns
the host's timer asks `next_deadline_ns` and calls `advance` when it has passed.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.uapi.kvm import (
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_channel_state,
    kvm_pit_state2,
)
from anykvm.x86.i8254_channel import (
    ONE_SHOT_TIMER_MODES,
    PERIODIC_MODES,
    RW_LATCH,
    TRIGGERED_MODES,
    PitChannel,
    ns_to_ticks,
    ticks_to_ns,
)

MIN_TIMER_PERIOD_NS = 200_000
MIN_PERIOD_TICKS = ns_to_ticks(MIN_TIMER_PERIOD_NS) + 1

PIT_PORTS = (0x40, 0x41, 0x42, 0x43)
PIT_CONTROL = 0x43
SPEAKER_PORT = 0x61
SPEAKER_GATE = 0x01
SPEAKER_DATA = 0x02
REFRESH_SHIFT = 14

CHANNEL_FIELDS = tuple(field[0] for field in kvm_pit_channel_state._fields_)


class Pit:
    """The chip: three channels, channel 0's interrupt, and port 0x61 on channel 2.

    `set_irq(level)` is channel 0's line, pulsed at each tick; `rearm()` says that
    `next_deadline_ns` changed. `flags` are those of KVM_CREATE_PIT2: with KVM_PIT_SPEAKER_DUMMY the
    speaker port is among `ports`, otherwise it is left to userspace.
    """

    def __init__(
        self,
        clock: Callable[[], int],
        set_irq: Callable[[bool], None],
        rearm: Callable[[], None] = lambda: None,
        flags: int = 0,
    ) -> None:
        self._clock = clock
        self._set_irq = set_irq
        self._rearm = rearm
        self.ports = (*PIT_PORTS, SPEAKER_PORT) if flags & KVM_PIT_SPEAKER_DUMMY else PIT_PORTS
        self.channels = tuple(PitChannel(gate=i != 2) for i in range(3))
        self.flags = 0
        self.reinject = True
        self.pending = 0
        self.irq_ack = True
        self._deadline_ticks: int | None = None

    def read(self, port: int) -> int:
        """Read one byte of port 0x40-0x43 or 0x61."""
        now = self._clock()
        if port == SPEAKER_PORT:
            return self._read_speaker(now)
        if port == PIT_CONTROL:
            return 0
        return self.channels[port & 3].read(now)

    def write(self, port: int, value: int) -> None:
        """Write one byte to port 0x40-0x43 or 0x61."""
        now = self._clock()
        if port == SPEAKER_PORT:
            self._write_speaker(value, now)
        elif port != PIT_CONTROL:
            channel = self.channels[port & 3]
            complete = channel.write(value, now)
            if port == PIT_PORTS[0] and (complete or channel.mode == 0):
                self._start_timer(now)
        elif value >> 6 == 3:
            self._read_back(value, now)
        else:
            self._control_word(value, now)

    def next_deadline_ns(self) -> int | None:
        """When channel 0 interrupts next, or None."""
        if self._deadline_ticks is None:
            return None
        return self.channels[0].count_load_time + ticks_to_ns(self._deadline_ticks)

    def advance(self, now: int) -> None:
        """Deliver channel 0's ticks due at `now`: several that were missed count as one pulse."""
        channel, due = self.channels[0], self._deadline_ticks
        if due is None or now < channel.count_load_time + ticks_to_ns(due):
            return
        expired = 1
        if channel.mode in PERIODIC_MODES:
            step = max(channel.modulus, MIN_PERIOD_TICKS)
            expired += (ns_to_ticks(now - channel.count_load_time) - due) // step
            self._deadline_ticks = due + expired * step
        else:
            self._deadline_ticks = None
        self._rearm()
        if self.reinject:
            self.pending += expired
        self._inject()

    def ack_irq(self) -> None:
        """The guest acknowledged GSI 0: the next missed tick, if any, is injected."""
        if not self.reinject:
            return
        self.irq_ack = True
        if self.pending:
            self.pending -= 1
            if self.pending:
                self._inject()

    def mask_changed(self, masked: bool) -> None:
        """A controller masked or unmasked GSI 0: unmasking forgets missed ticks."""
        if not masked:
            self._reset_reinject()

    def set_reinject(self, reinject: bool) -> None:
        """KVM_REINJECT_CONTROL: keep missed ticks for the guest, or drop them."""
        if reinject != self.reinject:
            self.reinject = reinject
            self._reset_reinject()

    def get_state(self) -> kvm_pit_state2:
        """Snapshot for KVM_GET_PIT2."""
        state = kvm_pit_state2(flags=self.flags)
        for channel, saved in zip(self.channels, state.channels, strict=True):
            for name in CHANNEL_FIELDS:
                setattr(saved, name, getattr(channel, name))
            if not channel.running:
                saved.count_load_time = 0
        return state

    def set_state(self, state: kvm_pit_state2) -> None:
        """KVM_SET_PIT2: take the registers and restart every counter from its initial count.

        A `count_load_time` of zero marks a mode 1 or 5 counter that was never triggered.
        """
        now = self._clock()
        self.flags = state.flags
        for channel, saved in zip(self.channels, state.channels, strict=True):
            for name in CHANNEL_FIELDS:
                setattr(channel, name, getattr(saved, name))
            triggered = channel.mode in TRIGGERED_MODES and saved.count_load_time != 0
            channel.running = False
            channel.held = None
            channel.load(saved.count, now)
            if triggered:
                channel.start(now)
        self._start_timer(now)

    def _control_word(self, value: int, now: int) -> None:
        channel = self.channels[value >> 6]
        access = value >> 4 & 3
        if access == RW_LATCH:
            channel.latch_count(now)
            return
        channel.program(access, value >> 1 & 7, value & 1)
        if value >> 6 == 0:
            self._start_timer(now)

    def _read_back(self, value: int, now: int) -> None:
        for i, channel in enumerate(self.channels):
            if value & (2 << i):
                if not value & 0x20:
                    channel.latch_count(now)
                if not value & 0x10:
                    channel.latch_status(now)

    def _read_speaker(self, now: int) -> int:
        channel = self.channels[2]
        data = SPEAKER_DATA if self.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON else 0
        refresh = now >> REFRESH_SHIFT & 1
        return data | channel.gate | refresh << 4 | channel.out(now) << 5

    def _write_speaker(self, value: int, now: int) -> None:
        self.flags &= ~KVM_PIT_FLAGS_SPEAKER_DATA_ON
        if value & SPEAKER_DATA:
            self.flags |= KVM_PIT_FLAGS_SPEAKER_DATA_ON
        self.channels[2].set_gate(bool(value & SPEAKER_GATE), now)

    def _start_timer(self, now: int) -> None:
        """Channel 0 was programmed, loaded or stopped: set or cancel its interrupt."""
        channel = self.channels[0]
        timed = channel.mode in ONE_SHOT_TIMER_MODES or channel.mode in PERIODIC_MODES
        if channel.running and timed and not self.flags & KVM_PIT_FLAGS_HPET_LEGACY:
            self._deadline_ticks = channel.modulus
            if channel.mode in PERIODIC_MODES:
                self._deadline_ticks = max(self._deadline_ticks, MIN_PERIOD_TICKS)
            self._reset_reinject()
        else:
            self._deadline_ticks = None
        self._rearm()

    def _reset_reinject(self) -> None:
        self.pending = 0
        self.irq_ack = True

    def _inject(self) -> None:
        if self.reinject and not self.irq_ack:
            return
        self.irq_ack = False
        self._set_irq(True)
        self._set_irq(False)
