"""The real-time clock: time in each format, setting it, update flag, interrupts, memory cells."""

from __future__ import annotations

import calendar

import pytest

from anykvm.vmm.rtc import Rtc, cmos_memory

SECOND = 1_000_000_000
A, B, C, D, CENTURY = 10, 11, 12, 13, 0x32
TIME = (0, 2, 4, 6, 7, 8, 9, CENTURY)
# A Thursday afternoon, a quarter of a second in.
MOMENT = (2026, 11, 19, 15, 4, 58)


class Clock:
    """A clock chip on a wall clock that the test moves."""

    def __init__(self, moment: tuple[int, int, int, int, int, int] = MOMENT) -> None:
        self.wall = calendar.timegm(moment) * SECOND + SECOND // 4
        self.start = self.wall
        self.levels: list[bool] = []
        self.moved = 0
        self.rtc = self.chip()

    def chip(self) -> Rtc:
        cells = cmos_memory(512 << 20, 0, 1)
        return Rtc(self.levels.append, self.monotonic, lambda: self.wall, self._moved, cells)

    def _moved(self) -> None:
        self.moved += 1

    def monotonic(self) -> int:
        return 5 * SECOND + self.wall - self.start

    def read(self, register: int) -> int:
        self.rtc.write(0, 1, register)
        return self.rtc.read(1, 1)

    def write(self, register: int, value: int) -> None:
        self.rtc.write(0, 1, register)
        self.rtc.write(1, 1, value)

    def time(self) -> list[int]:
        return [self.read(register) for register in TIME]

    def pass_to(self, deadline: int | None) -> None:
        """Let time pass until a deadline, and serve it."""
        assert deadline is not None
        self.wall += deadline - self.monotonic()
        self.rtc.tick()

    @property
    def level(self) -> bool:
        return bool(self.levels and self.levels[-1])


@pytest.mark.parametrize(
    ("reg_b", "expected"),
    [
        (0x02, [0x58, 0x04, 0x15, 0x05, 0x19, 0x11, 0x26, 0x20]),
        (0x06, [58, 4, 15, 5, 19, 11, 26, 20]),
        (0x00, [0x58, 0x04, 0x83, 0x05, 0x19, 0x11, 0x26, 0x20]),
        (0x04, [58, 4, 0x83, 5, 19, 11, 26, 20]),
    ],
)
def test_time_in_each_format(reg_b: int, expected: list[int]) -> None:
    clock = Clock()
    clock.write(B, reg_b)
    assert clock.time() == expected


@pytest.mark.parametrize(("hour", "register"), [(0, 0x12), (11, 0x11), (12, 0x92), (23, 0x91)])
def test_twelve_hour_clock(hour: int, register: int) -> None:
    clock = Clock((2026, 1, 2, hour, 0, 0))
    clock.write(B, 0x00)
    assert clock.read(4) == register
    clock.write(4, register)
    assert clock.rtc.state.offset == 0


def test_status_registers_after_reset() -> None:
    clock = Clock()
    assert [clock.read(register) for register in (A, B, C, D)] == [0x26, 0x02, 0x00, 0x80]
    clock.write(D, 0)
    clock.write(C, 0xFF)
    assert [clock.read(D), clock.read(C)] == [0x80, 0]


def test_update_in_progress_before_the_second_turns() -> None:
    clock = Clock()
    assert clock.read(A) & 0x80 == 0
    clock.wall += SECOND - SECOND // 4 - 244_000
    assert clock.read(A) & 0x80
    clock.wall += 244_000
    assert clock.read(A) & 0x80 == 0
    assert clock.read(0) == 0x59


def test_setting_the_time_as_linux_does() -> None:
    clock = Clock()
    clock.write(B, 0x82)
    for register, value in zip(TIME, (0x30, 0x59, 0x23, 1, 0x28, 0x02, 0x24, 0x20), strict=True):
        clock.write(register, value)
    clock.wall += 7 * SECOND
    assert clock.read(0) == 0x30
    clock.write(B, 0x02)
    clock.wall += 31 * SECOND
    assert clock.time()[:3] == [0x01, 0x00, 0x00]
    assert clock.time()[4:] == [0x29, 0x02, 0x24, 0x20]


@pytest.mark.parametrize(
    ("register", "value"), [(8, 0x13), (7, 0x31), (7, 0x00), (4, 0x24), (2, 0x60)]
)
def test_an_impossible_date_is_not_set(register: int, value: int) -> None:
    clock = Clock()
    clock.write(register, value)
    assert clock.rtc.state.offset == 0


def test_update_ended_interrupt_every_second() -> None:
    clock = Clock()
    clock.write(B, 0x12)
    assert clock.rtc.next_deadline() == 5 * SECOND + 3 * SECOND // 4
    clock.pass_to(clock.rtc.next_deadline())
    assert clock.level
    assert clock.rtc.next_deadline() is None
    assert clock.read(C) == 0xD0
    assert not clock.level
    assert clock.rtc.next_deadline() == 6 * SECOND + 3 * SECOND // 4


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (6, 1024), (15, 2)])
def test_periodic_interrupt(rate: int, hertz: int) -> None:
    clock = Clock()
    clock.write(A, 0x20 | rate)
    clock.write(B, 0x42)
    clock.pass_to(clock.rtc.next_deadline())
    first = clock.wall
    assert clock.read(C) & 0xC0 == 0xC0
    clock.pass_to(clock.rtc.next_deadline())
    assert clock.wall - first == SECOND // hertz


def test_rate_zero_never_fires() -> None:
    clock = Clock()
    clock.write(A, 0x20)
    clock.write(B, 0x42)
    assert clock.rtc.next_deadline() is None


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x59, 0x04, 0x15), 1),
        ((0x00, 0xFF, 0xFF), 2),
        ((0xC0, 0xC0, 0xC0), 1),
        ((0x00, 0x05, 0x15), 2),
        ((0x58, 0x04, 0x15), 86400),
        ((0x00, 0x00, 0x00), 8 * 3600 + 55 * 60 + 2),
        ((0x00, 0x00, 0xFF), 55 * 60 + 2),
        ((0x57, 0xFF, 0x15), 59),
        ((0x57, 0x03, 0xFF), 3600 - 61),
        ((0x57, 0x03, 0x15), 86400 - 61),
        ((0xFF, 0x04, 0x16), 3600 - 58),
    ],
)
def test_alarm_interrupt(alarm: tuple[int, int, int], seconds: int) -> None:
    clock = Clock()
    for register, value in zip((1, 3, 5), alarm, strict=True):
        clock.write(register, value)
    clock.write(B, 0x22)
    clock.pass_to(clock.rtc.next_deadline())
    assert clock.wall - clock.start == seconds * SECOND - SECOND // 4
    assert clock.level
    assert clock.read(C) & 0xA0 == 0xA0


def test_an_alarm_that_cannot_be_never_comes() -> None:
    clock = Clock()
    clock.write(5, 0x24)
    clock.write(B, 0x22)
    assert clock.rtc.next_deadline() is None


def test_flags_are_set_without_being_enabled() -> None:
    clock = Clock()
    clock.wall += 2 * SECOND
    assert clock.read(C) == 0x50
    assert clock.read(C) == 0
    assert clock.levels == []


def test_setting_stops_updates() -> None:
    clock = Clock()
    clock.write(B, 0x92)
    assert clock.read(B) == 0x82
    clock.wall += 2 * SECOND
    assert clock.read(C) & 0x10 == 0
    assert clock.read(A) & 0x80 == 0


def test_nvram_and_index_port() -> None:
    clock = Clock()
    clock.write(0x80 | 0x40, 0x99)
    assert clock.read(0x40) == 0x99
    assert clock.rtc.read(0, 1) == 0xFF


def test_memory_size_cells() -> None:
    cells = cmos_memory(3 << 30, 5 << 30, 4)
    word = [int.from_bytes(cells[cell : cell + 2], "little") for cell in (0x15, 0x30, 0x34)]
    assert word == [640, 0xFC00, ((3 << 30) - (16 << 20)) >> 16]
    assert int.from_bytes(cells[0x5B:0x5E], "little") << 16 == 5 << 30
    assert cells[0x5F] == 3
    small = cmos_memory(8 << 20, 0, 1)
    assert small[0x34:0x36] == b"\0\0"
    assert int.from_bytes(small[0x17:0x19], "little") == 7 << 10


def test_snapshot_keeps_time_flags_and_line() -> None:
    clock = Clock()
    clock.write(B, 0x12)
    clock.write(9, 0x27)
    clock.pass_to(clock.rtc.next_deadline())
    saved = clock.rtc.snapshot()
    clock.read(C)
    clock.rtc = clock.chip()
    clock.rtc.restore(saved)
    assert clock.level
    assert clock.rtc.snapshot() == saved
    assert clock.read(9) == 0x27
    assert clock.read(C) == 0xD0
