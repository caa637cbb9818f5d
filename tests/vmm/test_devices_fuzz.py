"""No guest can break a device: any accesses at any time, and a snapshot in the middle."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.vmm import devices
from anykvm.vmm.bus import Bus, Claim
from anykvm.vmm.device_table import DeviceRow, Platform, Space, Timed
from anykvm.vmm.outcome import Outcome

SECOND = 1_000_000_000
START = 1_800_000_000 * SECOND

PORTS = [
    port
    for row in devices.PC
    for window in row.windows
    if window.space is Space.PORT
    for port in range(window.base - 1, window.base + window.size + 1)
]
LATER = st.sampled_from([0, 1000, SECOND // 1000, SECOND, 100_000 * SECOND])
VALUES = st.one_of(st.none(), st.integers(0, 2**32 - 1))
# A word written to port 0x70 selects a register of the clock and sets it.
CLOCK = st.builds(
    lambda register, value: register | value << 8,
    st.sampled_from([*range(14), 0x32]),
    st.integers(0, 255),
)
ACCESSES = st.one_of(
    st.tuples(st.sampled_from(PORTS), st.sampled_from([1, 2, 4]), VALUES, LATER),
    st.tuples(st.just(0x70), st.just(2), CLOCK, LATER),
)


class Pc:
    """All devices on one bus, on a clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0
        self.lines: dict[int, bool] = {}
        self.ends: list[Outcome] = []
        self.bus = Bus("port")
        self.devices = {row.name: self._add(row) for row in devices.PC}
        self.timed = [device for device in self.devices.values() if isinstance(device, Timed)]

    def _add(self, row: DeviceRow) -> object:
        platform = Platform(
            irq_line=lambda gsi: lambda level: self._line(gsi, level),
            clock=lambda: self.now,
            wall_clock=lambda: START + self.now,
            console_output=lambda data: None,
            debug_output=lambda data: None,
            console_ready=lambda: None,
            deadline_changed=lambda: None,
            request=self.ends.append,
            memory_below_4g=1 << 30,
            memory_above_4g=0,
            cpus=1,
        )
        device = row.build(platform)
        for window in row.windows:
            if window.space is Space.PORT:
                place = (window.base, window.size, row.width, device, row.name, window.offset)
                self.bus.claim(Claim(*place))
        return device

    def _line(self, gsi: int, level: bool) -> None:
        assert self.lines.get(gsi, False) != level, f"GSI {gsi} was set to {level} twice"
        self.lines[gsi] = level

    def step(self, port: int, size: int, value: int | None, later: int) -> int | None:
        """Time passes, timers fire, the guest accesses a port."""
        self.now += later
        for device in self.timed:
            device.tick()
            deadline = device.next_deadline()
            assert deadline is None or deadline > self.now
        if value is not None:
            self.bus.write(port, size, value % (1 << 8 * size))
            return None
        result = self.bus.read(port, size)
        assert 0 <= result < 1 << 8 * size
        return result


@settings(max_examples=150, deadline=None)
@given(before=st.lists(ACCESSES, max_size=40), after=st.lists(ACCESSES, max_size=20))
def test_devices_survive_anything_and_go_on_after_a_snapshot(
    before: list[tuple[int, int, int | None, int]],
    after: list[tuple[int, int, int | None, int]],
) -> None:
    one, other = Pc(), Pc()
    for access in before:
        one.step(*access)
    other.now = one.now
    for name, device in one.devices.items():
        if hasattr(device, "snapshot"):
            other.devices[name].restore(device.snapshot())  # type: ignore[attr-defined]
    assert {gsi for gsi, level in one.lines.items() if level} == {
        gsi for gsi, level in other.lines.items() if level
    }
    assert [one.step(*access) for access in after] == [other.step(*access) for access in after]
