"""MC146818A real-time clock and CMOS memory of the PC: ports 0x70 (index) and 0x71 (data), IRQ 8.

Time is not counted but derived: the guest's clock is the host's plus an offset that changes when
the guest sets the time. The flags of register C are brought up to date from the time that passed
since they were last looked at, so nothing ticks unless the guest enabled an interrupt.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime

from anykvm.vmm.device_table import DeviceRow, IrqLine, Platform, Space, Window, register

RTC_PORT = 0x70
RTC_IRQ = 8
NS_PER_SECOND = 1_000_000_000
SECONDS_PER_DAY = 86400

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, REG_A, REG_B, REG_C, REG_D = range(6, 14)
CENTURY = 0x32
TIME_REGISTERS = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY)

A_UIP, A_DIVIDER_32768 = 0x80, 0x20
B_SET, B_PIE, B_AIE, B_UIE, B_BINARY, B_24H = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VRT = 0x80
HOUR_PM = 0x80
ALARM_ANY = 0xC0
UPDATE_WARNING_NS = 244_000
OSCILLATOR_HZ = 32768
INDEX_MASK = 0x7F

# Where firmware leaves the size of memory: (cell, width, unit, first byte counted, most units).
MEMORY_CELLS = (
    (0x15, 2, 1 << 10, 0, 640),
    (0x17, 2, 1 << 10, 1 << 20, 0xFC00),
    (0x30, 2, 1 << 10, 1 << 20, 0xFC00),
    (0x34, 2, 1 << 16, 16 << 20, 0xFFFF),
)
HIGH_MEMORY_CELL = 0x5B
CPU_COUNT_CELL = 0x5F


def cmos_memory(below_4g: int, above_4g: int, cpus: int) -> bytes:
    """The 128 cells as firmware leaves them, clock and status registers not filled in."""
    cells = bytearray(128)
    for cell, width, unit, first, limit in MEMORY_CELLS:
        units = min(max(below_4g - first, 0) // unit, limit)
        cells[cell : cell + width] = units.to_bytes(width, "little")
    cells[HIGH_MEMORY_CELL : HIGH_MEMORY_CELL + 3] = (above_4g >> 16 & 0xFFFFFF).to_bytes(
        3, "little"
    )
    cells[CPU_COUNT_CELL] = min(cpus - 1, 0xFF)
    return bytes(cells)


@dataclass(slots=True)
class RtcState:
    """`offset` is the guest's clock less the host's, `synced` the guest time of the last look."""

    index: int = 0
    cells: bytearray = field(default_factory=lambda: bytearray(128))
    offset: int = 0
    synced: int = 0


class Rtc:
    """The clock. `wall_clock` is host time in ns since 1970 UTC, `clock` the clock of deadlines."""

    def __init__(
        self,
        irq: IrqLine,
        clock: Callable[[], int],
        wall_clock: Callable[[], int],
        deadline_changed: Callable[[], None],
        cells: bytes,
    ) -> None:
        self._irq = irq
        self._clock = clock
        self._wall_clock = wall_clock
        self._deadline_changed = deadline_changed
        self._level = False
        self.state = RtcState(cells=bytearray(cells), synced=wall_clock())
        self.state.cells[REG_A] = A_DIVIDER_32768 | 6
        self.state.cells[REG_B] = B_24H
        self.state.cells[REG_D] = D_VRT
        self._writers = {REG_A: self._write_a, REG_B: self._write_b}

    def read(self, offset: int, size: int) -> int:
        """The data port; the index port cannot be read back on a PC."""
        if offset == 0:
            return 0xFF
        index = self.state.index
        if index in TIME_REGISTERS:
            self._latch()
        elif index == REG_A:
            return self.state.cells[REG_A] & ~A_UIP | self._update_in_progress()
        elif index == REG_C:
            return self._read_c()
        return self.state.cells[index]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 0:
            self.state.index = value & INDEX_MASK
            return
        index = self.state.index
        self._sync()
        if index in self._writers:
            self._writers[index](value)
        elif index in TIME_REGISTERS:
            self._latch()
            self.state.cells[index] = value
            self._set_time()
        elif index not in (REG_C, REG_D):
            self.state.cells[index] = value
        self._update_irq()
        self._deadline_changed()

    def next_deadline(self) -> int | None:
        """When the next enabled interrupt is due, None while one is pending or none is enabled."""
        cells = self.state.cells
        wanted = cells[REG_B] & ~cells[REG_C]
        if cells[REG_B] & cells[REG_C] & (C_PF | C_AF | C_UF):
            return None
        due = [at for flag, at in self._next_events() if wanted & flag and at is not None]
        return self._clock() + min(due) - self._now() if due else None

    def tick(self) -> None:
        self._sync()
        self._update_irq()

    def snapshot(self) -> RtcState:
        return deepcopy(self.state)

    def restore(self, state: RtcState) -> None:
        self.state = deepcopy(state)
        self._update_irq()
        self._deadline_changed()

    # Registers

    def _read_c(self) -> int:
        self._sync()
        value = self.state.cells[REG_C]
        if value & self.state.cells[REG_B] & (C_PF | C_AF | C_UF):
            value |= C_IRQF
        self.state.cells[REG_C] = 0
        self._update_irq()
        self._deadline_changed()
        return value

    def _write_a(self, value: int) -> None:
        self.state.cells[REG_A] = value & ~A_UIP

    def _write_b(self, value: int) -> None:
        cells = self.state.cells
        if value & B_SET:
            self._latch()
            value &= ~B_UIE
        was_set = cells[REG_B] & B_SET
        cells[REG_B] = value
        if was_set and not value & B_SET:
            self._set_time()

    # Time

    def _now(self) -> int:
        """The guest's clock, ns since 1970 in whatever zone the guest keeps it."""
        return self._wall_clock() + self.state.offset

    def _stopped(self) -> bool:
        return bool(self.state.cells[REG_B] & B_SET)

    def _update_in_progress(self) -> int:
        left = NS_PER_SECOND - self._now() % NS_PER_SECOND
        return A_UIP if left <= UPDATE_WARNING_NS and not self._stopped() else 0

    def _latch(self) -> None:
        """Copy the time into the registers, unless the guest holds them."""
        if self._stopped():
            return
        now = time.gmtime(self._now() // NS_PER_SECOND)
        # struct_time counts the week from Monday as 0; the chip counts it from Sunday as 1.
        week_day = (now.tm_wday + 1) % 7 + 1
        values = (now.tm_sec, now.tm_min, now.tm_hour, week_day, now.tm_mday, now.tm_mon)
        for register_, value in zip(TIME_REGISTERS, values, strict=False):
            self.state.cells[register_] = self._encode(value)
        self.state.cells[HOURS] = self._encode_hour(now.tm_hour)
        self.state.cells[YEAR] = self._encode(now.tm_year % 100)
        self.state.cells[CENTURY] = self._encode(now.tm_year // 100)

    def _set_time(self) -> None:
        """Take the time from the registers. An impossible one leaves the clock as it is."""
        if self._stopped():
            return
        cells, decode = self.state.cells, self._decode
        year = decode(cells[CENTURY]) * 100 + decode(cells[YEAR])
        date = (year, decode(cells[MONTH]), decode(cells[DAY_OF_MONTH]))
        hour = self._decode_hour(cells[HOURS])
        try:
            moment = datetime(*date, hour, decode(cells[MINUTES]), decode(cells[SECONDS]))
        except ValueError:
            return
        wall = self._wall_clock()
        within = (wall + self.state.offset) % NS_PER_SECOND
        self.state.offset = calendar.timegm(moment.timetuple()) * NS_PER_SECOND + within - wall
        self.state.synced = self._now()

    def _encode(self, value: int) -> int:
        return value if self.state.cells[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, value: int) -> int:
        return value if self.state.cells[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def _encode_hour(self, hour: int) -> int:
        if self.state.cells[REG_B] & B_24H:
            return self._encode(hour)
        return self._encode(hour % 12 or 12) | (HOUR_PM if hour >= 12 else 0)

    def _decode_hour(self, value: int) -> int:
        if self.state.cells[REG_B] & B_24H:
            return self._decode(value)
        return self._decode(value & ~HOUR_PM) % 12 + (12 if value & HOUR_PM else 0)

    # Events

    def _period(self) -> int | None:
        """Nanoseconds of the periodic interrupt; rates 1 and 2 stand for 256 and 128 Hz."""
        rate = self.state.cells[REG_A] & 0x0F
        if not rate:
            return None
        return (1 << (rate - 1 if rate > 2 else rate + 6)) * NS_PER_SECOND // OSCILLATOR_HZ

    def _next_events(self) -> Iterator[tuple[int, int | None]]:
        """For each flag, the first guest time after the last look at which it becomes set."""
        synced = self.state.synced
        period = self._period()
        yield C_PF, None if period is None else (synced // period + 1) * period
        if self._stopped():
            return
        yield C_UF, (synced // NS_PER_SECOND + 1) * NS_PER_SECOND
        yield C_AF, self._next_alarm(synced // NS_PER_SECOND)

    def _next_alarm(self, after: int) -> int | None:
        """The first second after `after` that matches the alarm, in ns; None if none ever does."""
        cells = self.state.cells
        fields = (
            _matching(cells[HOURS_ALARM], self._decode_hour, 24),
            _matching(cells[MINUTES_ALARM], self._decode, 60),
            _matching(cells[SECONDS_ALARM], self._decode, 60),
        )
        if not all(fields):
            return None
        midnight, second = divmod(after + 1, SECONDS_PER_DAY)
        found = _first_match(fields, second)
        if found is None:
            found = SECONDS_PER_DAY + 3600 * fields[0][0] + 60 * fields[1][0] + fields[2][0]
        return (midnight * SECONDS_PER_DAY + found) * NS_PER_SECOND

    def _sync(self) -> None:
        """Set the flags of all that happened since the last look."""
        now = self._now()
        for flag, at in self._next_events():
            if at is not None and at <= now:
                self.state.cells[REG_C] |= flag
        self.state.synced = now

    def _update_irq(self) -> None:
        cells = self.state.cells
        level = bool(cells[REG_B] & cells[REG_C] & (C_PF | C_AF | C_UF))
        if level != self._level:
            self._level = level
            self._irq(level)


def _matching(value: int, decode: Callable[[int], int], count: int) -> range:
    """The values that an alarm register matches."""
    if value & ALARM_ANY == ALARM_ANY:
        return range(count)
    decoded = decode(value)
    return range(decoded, decoded + 1) if decoded < count else range(0)


def _first(values: range, least: int) -> int | None:
    found = max(values.start, least)
    return found if found < values.stop else None


def _first_match(fields: tuple[range, range, range], second_of_day: int) -> int | None:
    """The first second of the day, from one on, whose hour, minute and second all match."""
    hours, minutes, seconds = fields
    hour, minute, second = second_of_day // 3600, second_of_day // 60 % 60, second_of_day % 60
    if hour in hours:
        at = _first(seconds, second) if minute in minutes else None
        if at is not None:
            return 3600 * hour + 60 * minute + at
        at = _first(minutes, minute + 1)
        if at is not None:
            return 3600 * hour + 60 * at + seconds[0]
    at = _first(hours, hour + 1)
    return None if at is None else 3600 * at + 60 * minutes[0] + seconds[0]


def _build(platform: Platform) -> Rtc:
    cells = cmos_memory(platform.memory_below_4g, platform.memory_above_4g, platform.cpus)
    return Rtc(
        platform.irq_line(RTC_IRQ),
        platform.clock,
        platform.wall_clock,
        platform.deadline_changed,
        cells,
    )


register(DeviceRow("rtc", (Window(Space.PORT, RTC_PORT, 2),), 1, _build))
