"""ACPI fixed power management hardware (ACPI 6.5, section 4.8): events, sleep control and the PM
timer.

SMI_CMD is zero in our FADT, so ACPI mode is permanent and SCI_EN reads as one. S5 is the only
sleep state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from anykvm.vmm.device_table import DeviceRow, IrqLine, Platform, Space, Window, register
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended

PM_BASE = 0x600
PM1A_EVT = PM_BASE
PM1A_EVT_LEN = 4
PM1A_CNT = PM_BASE + 4
PM1A_CNT_LEN = 2
PM_TMR = PM_BASE + 8
PM_TMR_LEN = 4
SCI_GSI = 9
SLP_TYP_S5 = 5

PM1_STS, PM1_EN, PM1_CNT, TIMER = 0, 2, 4, 8
TMR_STS, BM_STS, GBL_STS, PWRBTN_STS, SLPBTN_STS, RTC_STS, WAK_STS = (
    1 << 0,
    1 << 4,
    1 << 5,
    1 << 8,
    1 << 9,
    1 << 10,
    1 << 15,
)
STATUS_BITS = TMR_STS | BM_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS | WAK_STS
ENABLE_BITS = TMR_STS | GBL_STS | PWRBTN_STS | SLPBTN_STS | RTC_STS
SCI_EN, BM_RLD, SLP_EN = 1 << 0, 1 << 1, 1 << 13
SLP_TYP_SHIFT, SLP_TYP_MASK = 10, 7
PM_TIMER_HZ = 3_579_545
HALF_WRAP = 1 << 31
NS_PER_SECOND = 1_000_000_000


@dataclass(slots=True)
class AcpiPmState:
    """`started` is the clock when the timer was zero, `halves` its half wraps seen so far."""

    status: int = 0
    enable: int = 0
    control: int = SCI_EN
    started: int = 0
    halves: int = 0


class AcpiPm:
    """The PM1a block and timer."""

    def __init__(
        self,
        sci: IrqLine,
        clock: Callable[[], int],
        request: Callable[[Outcome], None],
        deadline_changed: Callable[[], None],
    ) -> None:
        self._sci = sci
        self._clock = clock
        self._request = request
        self._deadline_changed = deadline_changed
        self._level = False
        self.state = AcpiPmState(started=clock())

    def read(self, offset: int, size: int) -> int:
        """Any aligned part of a register; bytes between the registers read as zero."""
        self._sync()
        registers = (
            self.state.status
            | self.state.enable << 8 * PM1_EN
            | self.state.control << 8 * PM1_CNT
            | self._ticks() % (1 << 32) << 8 * TIMER
        )
        return registers >> 8 * offset & (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Byte by byte, so that every width works; PM1_CNT acts once, after all of them."""
        self._sync()
        before = self.state.control
        for index in range(size):
            self._write_byte(offset + index, value >> 8 * index & 0xFF)
        if self.state.control != before:
            self._control_written()
        self._update_sci()
        self._deadline_changed()

    def press_power_button(self) -> None:
        """Ask the guest to shut down."""
        self.state.status |= PWRBTN_STS
        self._update_sci()

    def next_deadline(self) -> int | None:
        if not self.state.enable & TMR_STS or self.state.status & TMR_STS:
            return None
        ticks = (self.state.halves + 1) * HALF_WRAP
        return self.state.started + -(-ticks * NS_PER_SECOND // PM_TIMER_HZ)

    def tick(self) -> None:
        self._sync()
        self._update_sci()

    def snapshot(self) -> AcpiPmState:
        """`started` counts from now."""
        return replace(self.state, started=self.state.started - self._clock())

    def restore(self, state: AcpiPmState) -> None:
        self.state = replace(state, started=state.started + self._clock())
        self._update_sci()
        self._deadline_changed()

    def _ticks(self) -> int:
        return (self._clock() - self.state.started) * PM_TIMER_HZ // NS_PER_SECOND

    def _sync(self) -> None:
        halves = self._ticks() // HALF_WRAP
        if halves != self.state.halves:
            self.state.halves = halves
            self.state.status |= TMR_STS

    def _write_byte(self, offset: int, value: int) -> None:
        register_, shift = offset & ~1, 8 * (offset & 1)
        state = self.state
        if register_ == PM1_STS:
            state.status &= ~(value << shift)
        elif register_ == PM1_EN:
            state.enable = (state.enable & ~(0xFF << shift) | value << shift) & ENABLE_BITS
        elif register_ == PM1_CNT:
            state.control = state.control & ~(0xFF << shift) | value << shift

    def _control_written(self) -> None:
        """SLP_EN starts the sleep and is not kept; SCI_EN belongs to the platform."""
        control = self.state.control
        typ = control >> SLP_TYP_SHIFT & SLP_TYP_MASK
        self.state.control = control & (BM_RLD | SLP_TYP_MASK << SLP_TYP_SHIFT) | SCI_EN
        if control & SLP_EN and typ == SLP_TYP_S5:
            self._request(ended(OutcomeKind.POWER_OFF, "the guest powered off"))

    def _update_sci(self) -> None:
        level = bool(self.state.status & self.state.enable)
        if level != self._level:
            self._level = level
            self._sci(level)


def _build(platform: Platform) -> AcpiPm:
    return AcpiPm(
        platform.irq_line(SCI_GSI), platform.clock, platform.request, platform.deadline_changed
    )


register(DeviceRow("acpi_pm", (Window(Space.PORT, PM_BASE, 12),), 4, _build))
