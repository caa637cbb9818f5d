"""The 8254: waveforms of each mode, data-port access, channel 0's interrupts, the speaker port."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anykvm.uapi.kvm import (
    KVM_PIT_FLAGS_HPET_LEGACY,
    KVM_PIT_FLAGS_SPEAKER_DATA_ON,
    KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_state2,
)
from anykvm.x86.i8254 import MIN_TIMER_PERIOD_NS, Pit
from anykvm.x86.i8254_channel import from_bcd, ns_to_ticks, ticks_to_ns, to_bcd

CH0, CH2, CONTROL, SPEAKER = 0x40, 0x42, 0x43, 0x61


class Board:
    """A PIT with its clock in hand; `ticks` are the times of its interrupts."""

    def __init__(self, flags: int = 0) -> None:
        self.now = 1_000_000_000
        self.interrupts: list[int] = []
        self.levels: list[bool] = []
        self.rearmed = 0
        self.pit = Pit(lambda: self.now, self.set_irq, self.rearm, flags)

    def set_irq(self, level: bool) -> None:
        self.levels.append(level)
        if level:
            self.interrupts.append(self.now)

    def rearm(self) -> None:
        self.rearmed += 1

    def program(self, channel: int, mode: int, count: int, bcd: int = 0) -> None:
        self.pit.write(CONTROL, channel << 6 | 0x30 | mode << 1 | bcd)
        self.pit.write(CH0 + channel, count & 0xFF)
        self.pit.write(CH0 + channel, count >> 8)

    def run(self, ns: int, acknowledge: bool = True) -> None:
        """Let time pass as a host timer would, acknowledging every interrupt."""
        end = self.now + ns
        while (deadline := self.pit.next_deadline_ns()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            seen = len(self.interrupts)
            self.pit.advance(self.now)
            if acknowledge and len(self.interrupts) > seen:
                self.pit.ack_irq()
        self.now = end

    def count(self, channel: int) -> int:
        self.pit.write(CONTROL, channel << 6)
        return self.pit.read(CH0 + channel) | self.pit.read(CH0 + channel) << 8

    def out2(self) -> int:
        return self.pit.read(SPEAKER) >> 5 & 1


# mode, count, what the datasheet's timing diagrams show at each clock: counting element, OUT
WAVEFORMS = [
    (0, 4, [4, 3, 2, 1, 0, 0xFFFF, 0xFFFE], [0, 0, 0, 0, 1, 1, 1]),
    (1, 3, [3, 2, 1, 0, 0xFFFF], [0, 0, 0, 1, 1]),
    (2, 4, [4, 3, 2, 1, 4, 3, 2, 1, 4], [1, 1, 1, 0, 1, 1, 1, 0, 1]),
    (3, 4, [4, 2, 4, 2, 4], [1, 1, 0, 0, 1]),
    (3, 5, [4, 2, 0, 4, 2, 4], [1, 1, 1, 0, 0, 1]),
    (4, 3, [3, 2, 1, 0, 0xFFFF], [1, 1, 1, 0, 1]),
    (5, 3, [3, 2, 1, 0, 0xFFFF], [1, 1, 1, 0, 1]),
]


@pytest.mark.parametrize(("mode", "count", "values", "outs"), WAVEFORMS)
def test_waveforms(mode: int, count: int, values: list[int], outs: list[int]) -> None:
    board = Board()
    board.pit.write(SPEAKER, 0 if mode in (1, 5) else 1)
    board.program(2, mode, count)
    board.pit.write(SPEAKER, 1)
    start = board.now
    seen = []
    for tick in range(len(values)):
        board.now = start + ticks_to_ns(tick)
        seen.append((board.count(2), board.out2()))
    assert seen == list(zip(values, outs, strict=True))


@pytest.mark.parametrize(("mode", "out"), [(0, 0), (1, 1), (2, 1), (3, 1), (4, 1), (5, 1)])
def test_out_after_the_control_word(mode: int, out: int) -> None:
    board = Board()
    board.pit.write(SPEAKER, 1)
    board.program(2, 0, 1)
    board.now += 10_000
    assert board.out2() == 1
    board.pit.write(CONTROL, 0xB0 | mode << 1)
    board.now += 10_000
    assert board.out2() == out
    assert board.pit.channels[2].null_count


def test_modes_6_and_7_are_2_and_3() -> None:
    board = Board()
    for mode, alias in ((6, 2), (7, 3)):
        board.program(1, mode, 100)
        assert board.pit.channels[1].mode == alias


@pytest.mark.parametrize("mode", [0, 2, 3, 4])
def test_low_gate_holds_the_count(mode: int) -> None:
    board = Board()
    board.pit.write(SPEAKER, 1)
    board.program(2, mode, 1000)
    board.now += ticks_to_ns(100)
    board.pit.write(SPEAKER, 0)
    held = board.count(2)
    board.now += ticks_to_ns(333)
    assert board.count(2) == held == (800 if mode == 3 else 900)
    board.pit.write(SPEAKER, 1)
    # Modes 2 and 3 start over, 0 and 4 go on.
    assert board.count(2) == (1000 if mode in (2, 3) else held)
    board.now += ticks_to_ns(50) + 1
    assert board.count(2) in ({2: (950,), 3: (900,)}.get(mode, (850, 849)))


def test_mode_0_with_a_low_gate_waits_for_it() -> None:
    board = Board()
    board.pit.write(SPEAKER, 0)
    board.program(2, 0, 100)
    board.now += 1_000_000
    assert (board.count(2), board.out2()) == (100, 0)
    board.pit.write(SPEAKER, 1)
    board.now += ticks_to_ns(100)
    assert board.out2() == 1


def test_first_byte_of_a_count_stops_mode_0() -> None:
    board = Board()
    board.pit.write(SPEAKER, 1)
    board.program(2, 0, 10)
    board.now += ticks_to_ns(10)
    assert board.out2() == 1
    board.pit.write(CH2, 0x00)
    board.now += 1_000_000
    assert board.out2() == 0
    board.pit.write(CH2, 0x01)
    assert (board.count(2), board.out2()) == (0x100, 0)


def test_one_shot_retriggers() -> None:
    board = Board()
    board.program(2, 1, 100)
    assert board.out2() == 1
    for _ in range(2):
        board.pit.write(SPEAKER, 1)
        board.now += ticks_to_ns(99)
        assert board.out2() == 0
        board.pit.write(SPEAKER, 0)
    board.now += ticks_to_ns(1) + 1
    assert board.out2() == 1


@pytest.mark.parametrize(
    ("access", "written", "count"),
    [(1, [0x34], 0x34), (2, [0x12], 0x1200), (3, [0x34, 0x12], 0x1234), (3, [0, 0], 0x10000)],
)
def test_access_modes(access: int, written: list[int], count: int) -> None:
    board = Board()
    board.pit.write(CONTROL, 0x80 | access << 4 | 2 << 1)
    for byte in written:
        board.pit.write(CH2, byte)
    assert board.pit.channels[2].count == count
    expected = {1: [count & 0xFF] * 2, 2: [count >> 8] * 2, 3: [count & 0xFF, count >> 8 & 0xFF]}
    assert [board.pit.read(CH2), board.pit.read(CH2)] == expected[access]


def test_latched_count_is_held_and_not_overwritten() -> None:
    board = Board()
    board.program(0, 2, 0x8000)
    board.pit.write(CONTROL, 0x00)
    board.now += ticks_to_ns(0x123)
    board.pit.write(CONTROL, 0x00)
    assert board.pit.read(CH0) | board.pit.read(CH0) << 8 == 0x8000
    assert board.pit.read(CH0) | board.pit.read(CH0) << 8 == 0x8000 - 0x123


def test_read_back_latches_status_before_count() -> None:
    board = Board()
    board.program(0, 3, 0x1000)
    board.pit.write(CONTROL, 0xC2)
    assert board.pit.read(CH0) == 0x80 | 0x30 | 3 << 1
    assert board.pit.read(CH0) | board.pit.read(CH0) << 8 == 0x1000
    board.pit.write(CONTROL, 0x34)
    board.pit.write(CONTROL, 0xE2)
    assert board.pit.read(CH0) == 0x80 | 0x40 | 0x30 | 2 << 1


def test_read_back_of_several_channels_and_count_only() -> None:
    board = Board()
    board.program(0, 2, 0x1111)
    board.program(1, 2, 0x2222)
    board.pit.write(CONTROL, 0xD6)
    board.now += 1_000_000
    assert [board.pit.read(0x40), board.pit.read(0x40)] == [0x11, 0x11]
    assert [board.pit.read(0x41), board.pit.read(0x41)] == [0x22, 0x22]


def test_control_port_cannot_be_read() -> None:
    assert Board().pit.read(CONTROL) == 0


@pytest.mark.parametrize(("count", "ticks", "value"), [(0x1000, 1, 0x0999), (0, 1, 0x9999)])
def test_bcd(count: int, ticks: int, value: int) -> None:
    board = Board()
    board.program(0, 2, count, bcd=1)
    board.now += ticks_to_ns(ticks)
    assert board.count(0) == value


@given(st.integers(0, 9999))
def test_bcd_round_trip(value: int) -> None:
    assert from_bcd(to_bcd(value)) == value


@given(st.integers(0, 10**12))
def test_ticks_to_ns_is_the_first_nanosecond_of_a_tick(ticks: int) -> None:
    assert ns_to_ticks(ticks_to_ns(ticks)) == ticks
    assert ticks == 0 or ns_to_ticks(ticks_to_ns(ticks) - 1) == ticks - 1


@pytest.mark.parametrize("mode", [2, 3])
def test_periodic_interrupts_do_not_drift(mode: int) -> None:
    board = Board()
    start = board.now
    board.program(0, mode, 11932)
    board.run(10_000_000_000)
    assert len(board.interrupts) == 10_000_000_000 * 1193182 // 10**9 // 11932
    assert board.interrupts == [
        start + ticks_to_ns(11932 * k) for k in range(1, len(board.interrupts) + 1)
    ]
    assert board.levels == [True, False] * len(board.interrupts)


@pytest.mark.parametrize("mode", [0, 4])
def test_one_shot_interrupts_once(mode: int) -> None:
    board = Board()
    start = board.now
    board.program(0, mode, 1000)
    board.run(1_000_000_000)
    assert board.interrupts == [start + ticks_to_ns(1000)]
    assert board.pit.next_deadline_ns() is None
    board.pit.write(CH0, 0xE8)
    board.pit.write(CH0, 0x03)
    board.run(1_000_000_000)
    assert len(board.interrupts) == 2


@pytest.mark.parametrize("mode", [1, 5])
def test_triggered_modes_never_interrupt_on_channel_0(mode: int) -> None:
    board = Board()
    board.program(0, mode, 1000)
    assert board.pit.next_deadline_ns() is None


def test_control_word_and_first_byte_cancel_the_timer() -> None:
    board = Board()
    board.program(0, 2, 1000)
    assert board.pit.next_deadline_ns() is not None
    board.pit.write(CONTROL, 0x30)
    assert board.pit.next_deadline_ns() is None
    board.pit.write(CH0, 1)
    board.pit.write(CH0, 1)
    assert board.pit.next_deadline_ns() is not None
    rearmed = board.rearmed
    board.pit.write(CH0, 1)
    assert board.pit.next_deadline_ns() is None
    assert board.rearmed > rearmed


def test_fast_periodic_timers_are_throttled() -> None:
    board = Board()
    board.program(0, 2, 10)
    board.run(10_000_000)
    assert len(board.interrupts) == 49
    gaps = [b - a for a, b in zip(board.interrupts, board.interrupts[1:], strict=False)]
    assert min(gaps) >= MIN_TIMER_PERIOD_NS


def test_missed_ticks_are_reinjected_one_per_acknowledgement() -> None:
    board = Board()
    board.program(0, 2, 11932)
    board.run(ticks_to_ns(5 * 11932), acknowledge=False)
    assert len(board.interrupts) == 1
    assert board.pit.pending == 5
    for interrupts in (2, 3, 4, 5, 5):
        board.pit.ack_irq()
        assert len(board.interrupts) == interrupts
    board.run(ticks_to_ns(11932))
    assert len(board.interrupts) == 6


def test_a_late_host_counts_every_tick() -> None:
    board = Board()
    board.program(0, 2, 11932)
    start = board.now
    board.now = start + ticks_to_ns(7 * 11932) + 5
    board.pit.advance(board.now)
    assert (len(board.interrupts), board.pit.pending) == (1, 7)
    assert board.pit.next_deadline_ns() == start + ticks_to_ns(8 * 11932)


def test_without_reinjection_every_tick_pulses_and_none_is_kept() -> None:
    board = Board()
    board.pit.set_reinject(False)
    board.program(0, 2, 11932)
    board.run(ticks_to_ns(5 * 11932), acknowledge=False)
    assert len(board.interrupts) == 5
    board.pit.ack_irq()
    assert (len(board.interrupts), board.pit.pending) == (5, 0)


@pytest.mark.parametrize("how", ["unmask", "reload", "reinject"])
def test_missed_ticks_are_forgotten(how: str) -> None:
    board = Board()
    board.program(0, 2, 11932)
    board.run(ticks_to_ns(3 * 11932), acknowledge=False)
    board.pit.mask_changed(True)
    assert board.pit.pending == 3
    if how == "unmask":
        board.pit.mask_changed(False)
    elif how == "reload":
        board.program(0, 2, 11932)
    else:
        board.pit.set_reinject(False)
    assert board.pit.pending == 0
    board.run(ticks_to_ns(11932), acknowledge=False)
    assert len(board.interrupts) == 2


@pytest.mark.parametrize("start", [0, 1 << 14])
def test_speaker_port_bits(start: int) -> None:
    board = Board(KVM_PIT_SPEAKER_DUMMY)
    assert SPEAKER in board.pit.ports
    board.now = start
    board.pit.write(SPEAKER, 0xFF)
    assert board.pit.read(SPEAKER) & 0x1F == 0x03 | (0x10 if start else 0)
    assert board.pit.flags & KVM_PIT_FLAGS_SPEAKER_DATA_ON
    board.pit.write(SPEAKER, 0x01)
    assert board.pit.read(SPEAKER) & 0x03 == 0x01


def test_speaker_port_is_left_to_userspace_by_default() -> None:
    assert Board().pit.ports == (0x40, 0x41, 0x42, 0x43)


def test_linux_tsc_calibration_sees_out_after_its_count() -> None:
    board = Board()
    board.pit.write(SPEAKER, board.pit.read(SPEAKER) & ~0x02 | 0x01)
    board.program(2, 0, 59659)
    start = board.now
    while not board.out2():
        board.now += 1000
    assert 49_999_000 <= board.now - start <= 50_001_000


def test_hpet_legacy_replacement_silences_channel_0() -> None:
    board = Board()
    board.program(0, 2, 11932)
    state = board.pit.get_state()
    state.flags |= KVM_PIT_FLAGS_HPET_LEGACY
    board.pit.set_state(state)
    assert board.pit.next_deadline_ns() is None
    state.flags = 0
    board.pit.set_state(state)
    assert board.pit.next_deadline_ns() == board.now + ticks_to_ns(11932)


def test_reset_state_is_kvms() -> None:
    state = Board().pit.get_state()
    assert [(c.count, c.mode, c.gate) for c in state.channels] == [
        (0x10000, 0xFF, 1),
        (0x10000, 0xFF, 1),
        (0x10000, 0xFF, 0),
    ]
    assert Board().pit.next_deadline_ns() is None


WRITES = st.tuples(
    st.sampled_from([0x40, 0x41, 0x42, CONTROL, SPEAKER]),
    st.integers(0, 255),
    st.integers(0, 10**7),
)


def programmed(writes: list[tuple[int, int, int]]) -> Board:
    board = Board()
    for port, value, delay in writes:
        board.pit.write(port, value)
        board.now += delay
    return board


def without_load_times(state: kvm_pit_state2) -> bytes:
    for channel in state.channels:
        channel.count_load_time = 0
    return bytes(state)


@given(st.lists(WRITES, max_size=12), st.integers(0, 10**8))
def test_restored_timers_behave_alike_wherever_they_are(
    writes: list[tuple[int, int, int]], delay: int
) -> None:
    original = programmed(writes)
    state = original.pit.get_state()
    boards = [Board(), Board(), original]
    for board in boards:
        board.now = original.now + 12345
        board.pit.set_state(state)
        board.interrupts.clear()
        assert without_load_times(board.pit.get_state()) == without_load_times(
            kvm_pit_state2.from_buffer_copy(state)
        )
    for board in boards:
        board.run(delay)
    futures = [
        (b.interrupts, b.pit.read(SPEAKER), [b.pit.read(0x40 + i % 3) for i in range(6)])
        for b in boards
    ]
    assert futures[0] == futures[1] == futures[2]


@given(st.lists(WRITES, max_size=20))
def test_reads_are_bytes_and_deadlines_lie_ahead(writes: list[tuple[int, int, int]]) -> None:
    board = Board()
    for port, value, delay in writes:
        board.pit.write(port, value)
        board.now += delay
        board.pit.advance(board.now)
        deadline = board.pit.next_deadline_ns()
        assert deadline is None or deadline > board.now
        assert 0 <= board.pit.read(port) <= 255
