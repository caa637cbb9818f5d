"""16550A UART (PC16550D data sheet, chapter 8), as the PC wires it: COM1 at 0x3f8, IRQ 4.

Transmission takes no time: the transmitter is always empty, so a driver's polling ends at once.
Received bytes wait outside until the guest asserts RTS and the FIFO has room, so nothing typed
early is lost. The interrupt reaches the bus only while OUT2 is on and loopback is off.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

from anykvm.vmm.device_table import DeviceRow, IrqLine, Platform, Space, Window, register

COM1_BASE = 0x3F8
COM1_IRQ = 4

RBR_THR, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 0x01, 0x02, 0x04, 0x08
IIR_NO_INT, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_CTI = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO_ENABLED = 0xC0
FCR_ENABLE, FCR_CLEAR_RCVR = 0x01, 0x02
LCR_STOP, LCR_PARITY, LCR_BREAK, LCR_DLAB = 0x04, 0x08, 0x40, 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 0x01, 0x02, 0x04, 0x08, 0x10
LSR_DR, LSR_OE, LSR_BI, LSR_THRE, LSR_TEMT, LSR_FIFOE = 0x01, 0x02, 0x10, 0x20, 0x40, 0x80
LSR_ERRORS = 0x1E
MSR_DCTS, MSR_DDSR, MSR_TERI, MSR_DDCD = 0x01, 0x02, 0x04, 0x08
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80

FIFO_SIZE = 16
TRIGGER_LEVELS = (1, 4, 8, 14)
INPUT_CLOCK_BAUD = 115200
NS_PER_SECOND = 1_000_000_000

# In loopback RTS, DTR, OUT1 and OUT2 feed CTS, DSR, RI and DCD.
LOOPBACK_WIRES = (
    (MCR_RTS, MSR_CTS),
    (MCR_DTR, MSR_DSR),
    (MCR_OUT1, MSR_RI),
    (MCR_OUT2, MSR_DCD),
)
# RI tells of its trailing edge only.
BOTH_EDGES = ((MSR_CTS, MSR_DCTS), (MSR_DSR, MSR_DDSR), (MSR_DCD, MSR_DDCD))


@dataclass(slots=True)
class SerialState:
    """The registers behind the bus. `fifo` holds pairs of a byte and its LSR error bits."""

    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    lsr_overrun: int = 0
    msr: int = MSR_CTS | MSR_DSR | MSR_DCD
    scr: int = 0
    divisor: int = 12
    thre_pending: bool = False
    timeout_pending: bool = False
    timeout_at: int | None = None
    fifo: list[tuple[int, int]] = field(default_factory=list)


class Serial:
    """One UART. `output` takes transmitted bytes; `ready` is called when input has room again."""

    def __init__(
        self,
        irq: IrqLine,
        output: Callable[[bytes], None],
        clock: Callable[[], int],
        ready: Callable[[], None],
        deadline_changed: Callable[[], None],
    ) -> None:
        self.state = SerialState()
        self._irq = irq
        self._output = output
        self._clock = clock
        self._ready = ready
        self._deadline_changed = deadline_changed
        self._level = False
        self._readers = (
            self._read_rbr,
            lambda: self.state.ier,
            self._read_iir,
            lambda: self.state.lcr,
            lambda: self.state.mcr,
            self._read_lsr,
            self._read_msr,
            lambda: self.state.scr,
        )
        self._writers = (
            self._write_thr,
            self._write_ier,
            self._write_fcr,
            self._write_lcr,
            self._write_mcr,
            self._write_read_only,
            self._write_read_only,
            self._write_scr,
        )

    # The bus side

    def read(self, offset: int, size: int) -> int:
        if offset <= IER and self.state.lcr & LCR_DLAB:
            return self.state.divisor >> 8 * offset & 0xFF
        value = self._readers[offset]()
        self._update_irq()
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        if offset <= IER and self.state.lcr & LCR_DLAB:
            kept = self.state.divisor & ~(0xFF << 8 * offset)
            self.state.divisor = kept | value << 8 * offset
            return
        self._writers[offset](value)
        self._update_irq()

    # The console side

    @property
    def room(self) -> int:
        """How many bytes `receive` would take now."""
        if self.state.mcr & MCR_LOOP or not self.state.mcr & MCR_RTS:
            return 0
        return self._capacity - len(self.state.fifo)

    def receive(self, data: bytes) -> int:
        """Take bytes from the line; returns how many fitted."""
        taken = data[: self.room]
        for byte in taken:
            self._enqueue(byte, 0)
        self._update_irq()
        return len(taken)

    def receive_break(self) -> bool:
        """The line was held low for a character; False when there is no room."""
        if not self.room:
            return False
        self._enqueue(0, LSR_BI)
        self._update_irq()
        return True

    def set_modem_lines(self, lines: int) -> None:
        """CTS, DSR, RI and DCD as they stand at the connector, in MSR's upper half."""
        if not self.state.mcr & MCR_LOOP:
            self._set_msr_lines(lines)
            self._update_irq()

    # Time

    def next_deadline(self) -> int | None:
        return self.state.timeout_at

    def tick(self) -> None:
        """Raise the character timeout when four character times passed with no traffic."""
        due = self.state.timeout_at
        if due is not None and self._clock() >= due:
            self.state.timeout_at = None
            self.state.timeout_pending = True
            self._update_irq()

    def snapshot(self) -> SerialState:
        """`timeout_at` counts from now."""
        state = deepcopy(self.state)
        if state.timeout_at is not None:
            state.timeout_at -= self._clock()
        return state

    def restore(self, state: SerialState) -> None:
        self.state = deepcopy(state)
        if self.state.timeout_at is not None:
            self.state.timeout_at += self._clock()
        self._update_irq()
        self._deadline_changed()

    # Registers

    def _read_rbr(self) -> int:
        if not self.state.fifo:
            return 0
        had_room = self.room > 0
        byte, _ = self.state.fifo.pop(0)
        self.state.timeout_pending = False
        self._restart_timeout()
        if not had_room and self.room:
            self._ready()
        return byte

    def _read_iir(self) -> int:
        identity = self._interrupt()
        if identity == IIR_THRI:
            self.state.thre_pending = False
        return identity | (IIR_FIFO_ENABLED if self.state.fcr & FCR_ENABLE else 0)

    def _read_lsr(self) -> int:
        value = self._lsr()
        self.state.lsr_overrun = 0
        if self.state.fifo:
            self.state.fifo[0] = (self.state.fifo[0][0], 0)
        return value

    def _read_msr(self) -> int:
        value = self.state.msr
        self.state.msr &= 0xF0
        return value

    def _write_thr(self, value: int) -> None:
        if self.state.mcr & MCR_LOOP:
            self._enqueue(value, 0)
        else:
            self._output(bytes((value,)))
        self.state.thre_pending = True

    def _write_ier(self, value: int) -> None:
        if value & IER_THRI and not self.state.ier & IER_THRI:
            self.state.thre_pending = True
        self.state.ier = value & 0x0F

    def _write_fcr(self, value: int) -> None:
        toggled = (value ^ self.state.fcr) & FCR_ENABLE
        if toggled or value & FCR_CLEAR_RCVR:
            self._clear_receiver()
        self.state.fcr = value & 0xC9 if value & FCR_ENABLE else 0

    def _write_lcr(self, value: int) -> None:
        breaks = value & ~self.state.lcr & LCR_BREAK
        self.state.lcr = value
        if breaks and self.state.mcr & MCR_LOOP:
            self._enqueue(0, LSR_BI)

    def _write_mcr(self, value: int) -> None:
        had_room = self.room > 0
        was_looped = self.state.mcr & MCR_LOOP
        self.state.mcr = value & 0x1F
        if value & MCR_LOOP:
            self._set_msr_lines(sum(line for out, line in LOOPBACK_WIRES if value & out))
        elif was_looped:
            self._set_msr_lines(MSR_CTS | MSR_DSR | MSR_DCD)
        if not had_room and self.room:
            self._ready()

    def _write_scr(self, value: int) -> None:
        self.state.scr = value

    def _write_read_only(self, value: int) -> None:
        """LSR and MSR: writes are for factory tests and do nothing here."""

    # Inside

    @property
    def _capacity(self) -> int:
        return FIFO_SIZE if self.state.fcr & FCR_ENABLE else 1

    @property
    def _trigger(self) -> int:
        return TRIGGER_LEVELS[self.state.fcr >> 6] if self.state.fcr & FCR_ENABLE else 1

    def _enqueue(self, byte: int, errors: int) -> None:
        fifo = self.state.fifo
        if len(fifo) >= self._capacity:
            self.state.lsr_overrun = LSR_OE
            # Without a FIFO the new character replaces the old one; with one it is lost.
            if not self.state.fcr & FCR_ENABLE:
                fifo[-1] = (byte, errors)
        else:
            fifo.append((byte, errors))
        self._restart_timeout()

    def _clear_receiver(self) -> None:
        had_room = self.room > 0
        self.state.fifo.clear()
        self.state.timeout_pending = False
        self._restart_timeout()
        if not had_room and self.room:
            self._ready()

    def _restart_timeout(self) -> None:
        before = self.state.timeout_at
        waits = self.state.fcr & FCR_ENABLE and self.state.fifo
        self.state.timeout_at = self._clock() + self._character_timeout() if waits else None
        if self.state.timeout_at is not None and before is None:
            self._deadline_changed()

    def _character_timeout(self) -> int:
        """Nanoseconds of four frames, each with its start, data, parity and stop bits."""
        lcr = self.state.lcr
        bits = 1 + 5 + (lcr & 3) + (lcr & LCR_PARITY > 0) + 1 + (lcr & LCR_STOP > 0)
        return 4 * bits * max(self.state.divisor, 1) * NS_PER_SECOND // INPUT_CLOCK_BAUD

    def _lsr(self) -> int:
        fifo = self.state.fifo
        value = LSR_THRE | LSR_TEMT | self.state.lsr_overrun
        if fifo:
            value |= LSR_DR | fifo[0][1]
            if self.state.fcr & FCR_ENABLE and any(errors for _, errors in fifo):
                value |= LSR_FIFOE
        return value

    def _set_msr_lines(self, lines: int) -> None:
        changed = (self.state.msr ^ lines) & 0xF0
        deltas = sum(delta for line, delta in BOTH_EDGES if changed & line)
        if changed & MSR_RI and not lines & MSR_RI:
            deltas |= MSR_TERI
        self.state.msr = self.state.msr & 0x0F | deltas | lines

    def _interrupt(self) -> int:
        """The identity of the pending interrupt of highest priority."""
        state = self.state
        pending = (
            (IER_RLSI, self._lsr() & LSR_ERRORS, IIR_RLSI),
            (IER_RDI, len(state.fifo) >= self._trigger, IIR_RDI),
            (IER_RDI, state.timeout_pending, IIR_CTI),
            (IER_THRI, state.thre_pending, IIR_THRI),
            (IER_MSI, state.msr & 0x0F, IIR_MSI),
        )
        return next((iir for ier, cause, iir in pending if state.ier & ier and cause), IIR_NO_INT)

    def _update_irq(self) -> None:
        state = self.state
        wired = state.ier and state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2
        level = bool(wired) and self._interrupt() != IIR_NO_INT
        if level != self._level:
            self._level = level
            self._irq(level)


def _build(platform: Platform) -> Serial:
    return Serial(
        platform.irq_line(COM1_IRQ),
        platform.console_output,
        platform.clock,
        platform.console_ready,
        platform.deadline_changed,
    )


register(DeviceRow("serial", (Window(Space.PORT, COM1_BASE, 8),), 1, _build))
