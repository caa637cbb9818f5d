"""The smaller devices: keyboard controller, exit port, debug console, POST, PCI ports, ACPI PM."""

from __future__ import annotations

import pytest

from anykvm.vmm.acpi_pm import PM_TIMER_HZ, AcpiPm
from anykvm.vmm.debugcon import Debugcon
from anykvm.vmm.exit_port import ExitPort
from anykvm.vmm.i8042 import I8042
from anykvm.vmm.outcome import Outcome, OutcomeKind
from anykvm.vmm.pci_config import PciConfig
from anykvm.vmm.post_port import PostPort

SECOND = 1_000_000_000
DATA, STATUS, COMMAND = 0, 4, 4


class Around:
    """What devices call, recorded."""

    def __init__(self) -> None:
        self.now = 0
        self.ends: list[Outcome] = []
        self.irqs: list[tuple[str, bool]] = []
        self.moved = 0

    def kinds(self) -> list[OutcomeKind]:
        return [end.kind for end in self.ends]

    def deadline(self) -> None:
        self.moved += 1

    def i8042(self) -> I8042:
        return I8042(
            lambda level: self.irqs.append(("kbd", level)),
            lambda level: self.irqs.append(("aux", level)),
            self.ends.append,
        )

    def pm(self) -> AcpiPm:
        return AcpiPm(
            lambda level: self.irqs.append(("sci", level)),
            lambda: self.now,
            self.ends.append,
            self.deadline,
        )


@pytest.fixture
def around() -> Around:
    return Around()


# 8042: what is written as (port, value), then what is read from the data port with its status.
I8042_ROWS = [
    ("self test", [(COMMAND, 0xAA)], 0x55, 0x01),
    ("keyboard line test", [(COMMAND, 0xAB)], 0x00, 0x01),
    ("aux line test", [(COMMAND, 0xA9)], 0x00, 0x01),
    ("command byte", [(COMMAND, 0x20)], 0x04, 0x01),
    ("write command byte", [(COMMAND, 0x60), (DATA, 0x47), (COMMAND, 0x20)], 0x47, 0x01),
    ("ram", [(COMMAND, 0x65), (DATA, 0x12), (COMMAND, 0x25)], 0x12, 0x01),
    ("aux off", [(COMMAND, 0xA7), (COMMAND, 0x20)], 0x24, 0x01),
    ("aux on", [(COMMAND, 0xA7), (COMMAND, 0xA8), (COMMAND, 0x20)], 0x04, 0x01),
    ("keyboard off", [(COMMAND, 0xAD), (COMMAND, 0x20)], 0x14, 0x01),
    ("data turns keyboard on", [(COMMAND, 0xAD), (DATA, 0xFF)], 0xFE, 0x41),
    ("output port", [(COMMAND, 0xD0)], 0x03, 0x01),
    ("keyboard loop", [(COMMAND, 0xD2), (DATA, 0x5A)], 0x5A, 0x01),
    ("aux loop", [(COMMAND, 0xD3), (DATA, 0x5A)], 0x5A, 0x21),
    ("no keyboard", [(DATA, 0xF2)], 0xFE, 0x41),
    ("no mouse", [(COMMAND, 0xD4), (DATA, 0xF2)], 0xFE, 0x61),
]


@pytest.mark.parametrize(
    ("writes", "value", "status"), [row[1:] for row in I8042_ROWS], ids=[r[0] for r in I8042_ROWS]
)
def test_i8042_replies(
    around: Around, writes: list[tuple[int, int]], value: int, status: int
) -> None:
    controller = around.i8042()
    assert controller.read(STATUS, 1) & 0x01 == 0
    for port, byte in writes:
        controller.write(port, 1, byte)
    assert controller.read(STATUS, 1) & 0x61 == status
    assert controller.read(DATA, 1) == value
    assert controller.read(STATUS, 1) & 0x01 == 0
    assert around.ends == []


@pytest.mark.parametrize(
    ("writes", "resets"),
    [
        ([(COMMAND, 0xFE)], 1),
        ([(COMMAND, 0xFF)], 0),
        ([(COMMAND, 0xFD)], 0),
        ([(COMMAND, 0xD1), (DATA, 0x02)], 1),
        ([(COMMAND, 0xD1), (DATA, 0x03)], 0),
    ],
)
def test_i8042_reset(around: Around, writes: list[tuple[int, int]], resets: int) -> None:
    controller = around.i8042()
    for port, byte in writes:
        controller.write(port, 1, byte)
    assert around.kinds() == [OutcomeKind.RESET] * resets


def test_i8042_a20_gate(around: Around) -> None:
    controller = around.i8042()
    assert controller.a20
    controller.write(COMMAND, 1, 0xD1)
    controller.write(DATA, 1, 0x01)
    assert not controller.a20


def test_i8042_interrupts_by_device(around: Around) -> None:
    controller = around.i8042()
    controller.write(COMMAND, 1, 0x60)
    controller.write(DATA, 1, 0x03)
    controller.write(DATA, 1, 0xFF)
    controller.read(DATA, 1)
    controller.write(COMMAND, 1, 0xD3)
    controller.write(DATA, 1, 0x01)
    controller.read(DATA, 1)
    assert around.irqs == [("kbd", True), ("kbd", False), ("aux", True), ("aux", False)]


def test_i8042_snapshot(around: Around) -> None:
    controller = around.i8042()
    for port, byte in ((COMMAND, 0x60), (DATA, 0x03), (COMMAND, 0xD3), (DATA, 0x99)):
        controller.write(port, 1, byte)
    saved = controller.snapshot()
    other = Around()
    restored = other.i8042()
    restored.restore(saved)
    assert other.irqs == [("aux", True)]
    assert restored.snapshot() == saved
    assert restored.read(DATA, 1) == 0x99
    assert saved.replies == [(0x99, 0x20)]


@pytest.mark.parametrize(("value", "status"), [(0, 0), (7, 7), (255, 255), (0x107, 7)])
def test_exit_port(around: Around, value: int, status: int) -> None:
    port = ExitPort(around.ends.append)
    assert port.read(0, 1) == 0
    port.write(1, 1, 9)
    assert around.ends == []
    port.write(0, 4, value)
    assert [(end.kind, end.status) for end in around.ends] == [(OutcomeKind.EXIT, status)]


def test_debugcon() -> None:
    written: list[bytes] = []
    port = Debugcon(written.append)
    port.write(0, 1, 0x48)
    assert (port.read(0, 1), written) == (0xE9, [b"H"])


def test_post_port() -> None:
    port = PostPort()
    port.write(0, 1, 0x31)
    saved = port.snapshot()
    port.write(0, 1, 0x32)
    assert port.read(0, 1) == 0x32
    port.restore(saved)
    assert port.read(0, 1) == 0x31


def test_pci_mechanism_1_works_and_the_bus_is_empty(around: Around) -> None:
    bridge = PciConfig(around.ends.append)
    bridge.write(3, 1, 0x01)
    bridge.write(0, 4, 0x8000_0000)
    assert bridge.read(0, 4) == 0x8000_0000
    assert [bridge.read(4, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]
    bridge.write(4, 4, 0)
    assert bridge.read(4, 4) == 0xFFFF_FFFF
    assert around.ends == []


def test_reset_control_acts_on_the_rising_edge(around: Around) -> None:
    bridge = PciConfig(around.ends.append)
    bridge.write(1, 1, 0x02)
    assert around.ends == []
    saved = bridge.snapshot()
    bridge.write(1, 1, 0x06)
    bridge.write(1, 1, 0x06)
    assert around.kinds() == [OutcomeKind.RESET]
    assert bridge.read(1, 1) == 0x06
    bridge.restore(saved)
    assert bridge.read(1, 1) == 0x02


def test_pm_control_powers_off_on_s5(around: Around) -> None:
    pm = around.pm()
    assert pm.read(4, 2) == 1
    pm.write(4, 2, 5 << 10 | 1)
    assert around.ends == []
    pm.write(4, 2, 5 << 10 | 1 << 13 | 1)
    assert around.kinds() == [OutcomeKind.POWER_OFF]
    assert pm.read(4, 2) == 5 << 10 | 1


def test_pm_other_sleep_types_do_nothing(around: Around) -> None:
    pm = around.pm()
    pm.write(4, 2, 1 << 13 | 3 << 10)
    assert around.ends == []
    assert pm.read(4, 2) == 3 << 10 | 1


def test_pm_power_button_raises_the_sci_while_enabled(around: Around) -> None:
    pm = around.pm()
    pm.press_power_button()
    assert around.irqs == []
    assert pm.read(0, 2) == 0x100
    pm.write(2, 2, 0x100)
    assert around.irqs == [("sci", True)]
    pm.write(0, 2, 0x100)
    assert around.irqs == [("sci", True), ("sci", False)]
    assert pm.read(0, 4) == 0x100 << 16


@pytest.mark.parametrize(("seconds", "ticks"), [(0, 0), (1, PM_TIMER_HZ), (10, 10 * PM_TIMER_HZ)])
def test_pm_timer_counts(around: Around, seconds: int, ticks: int) -> None:
    pm = around.pm()
    around.now += seconds * SECOND
    assert pm.read(8, 4) == ticks
    assert pm.read(10, 1) == ticks >> 16 & 0xFF


def test_pm_timer_interrupt_at_the_half_wrap(around: Around) -> None:
    pm = around.pm()
    assert pm.next_deadline() is None
    pm.write(2, 2, 0x01)
    due = pm.next_deadline()
    assert due is not None
    assert due == -(-(1 << 31) * SECOND // PM_TIMER_HZ)
    around.now = due - SECOND
    pm.tick()
    assert around.irqs == []
    around.now = due
    pm.tick()
    assert around.irqs == [("sci", True)]
    assert pm.read(8, 4) == 1 << 31
    assert pm.next_deadline() is None
    pm.write(0, 1, 0x01)
    assert around.irqs[-1] == ("sci", False)
    assert pm.next_deadline() == -(-(1 << 32) * SECOND // PM_TIMER_HZ)


def test_pm_snapshot(around: Around) -> None:
    pm = around.pm()
    pm.write(2, 2, 0x120)
    pm.press_power_button()
    saved = pm.snapshot()
    other = Around()
    restored = other.pm()
    restored.restore(saved)
    assert other.irqs == [("sci", True)]
    assert restored.snapshot() == saved
    assert restored.read(0, 4) == 0x120 << 16 | 0x100
