"""8042 keyboard controller (IBM PS/2 hardware interface reference) with nothing plugged in.

Ports 0x60 (data) and 0x64 (status, command). It answers what a driver asks of the controller
itself; a byte sent to either device port comes back as the time-out of an absent device. Pulsing
output line 0 resets the machine, the output port's bit 1 is the A20 gate.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

from anykvm.vmm.device_table import DeviceRow, IrqLine, Platform, Space, Window, register
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended

DATA_PORT, COMMAND_PORT = 0x60, 0x64
KBD_IRQ, AUX_IRQ = 1, 12

STR_OBF, STR_SYSFLAG, STR_CMDDAT, STR_KEYLOCK, STR_AUXDATA, STR_TIMEOUT = (
    0x01,
    0x04,
    0x08,
    0x10,
    0x20,
    0x40,
)
CTR_KBDINT, CTR_AUXINT, CTR_SYSFLAG, CTR_KBDDIS, CTR_AUXDIS = 0x01, 0x02, 0x04, 0x10, 0x20
OUTPUT_RESET, OUTPUT_A20 = 0x01, 0x02
RESEND = 0xFE
SELF_TEST_PASSED = 0x55
LINE_TEST_PASSED = 0x00

READ_RAM, WRITE_RAM = 0x20, 0x60
WRITE_OUTPUT, WRITE_KBD_BUFFER, WRITE_AUX_BUFFER, WRITE_AUX = 0xD1, 0xD2, 0xD3, 0xD4
PULSE_OUTPUT = 0xF0
PULSE_NOTHING = 0xFF


@dataclass(slots=True)
class I8042State:
    """`ram` is the controller's 32 bytes, the first of which is the command byte (CTR)."""

    ram: bytearray = field(default_factory=lambda: bytearray([CTR_SYSFLAG, *bytes(31)]))
    output_port: int = OUTPUT_RESET | OUTPUT_A20
    waiting_for: int | None = None
    last_was_command: bool = False
    replies: list[tuple[int, int]] = field(default_factory=list)


class I8042:
    """The controller. Replies are pairs of a byte and the status bits that come with it."""

    def __init__(
        self, kbd_irq: IrqLine, aux_irq: IrqLine, request: Callable[[Outcome], None]
    ) -> None:
        self.state = I8042State()
        self._irqs = (kbd_irq, aux_irq)
        self._levels = [False, False]
        self._request = request
        # Command: (bits of CTR to clear, bits to set, reply)
        self._commands: dict[int, tuple[int, int, int | None]] = {
            0xA7: (0, CTR_AUXDIS, None),
            0xA8: (CTR_AUXDIS, 0, None),
            0xA9: (0, 0, LINE_TEST_PASSED),
            0xAA: (0, CTR_KBDDIS | CTR_AUXDIS, SELF_TEST_PASSED),
            0xAB: (0, 0, LINE_TEST_PASSED),
            0xAD: (0, CTR_KBDDIS, None),
            0xAE: (CTR_KBDDIS, 0, None),
            0xC0: (0, 0, 0x80),
        }
        self._takes_data: dict[int, Callable[[int], None]] = {
            WRITE_OUTPUT: self._write_output,
            WRITE_KBD_BUFFER: lambda value: self._reply(value),
            WRITE_AUX_BUFFER: lambda value: self._reply(value, STR_AUXDATA),
            WRITE_AUX: lambda value: self._reply(RESEND, STR_AUXDATA | STR_TIMEOUT),
        }

    @property
    def a20(self) -> bool:
        """Whether the A20 gate is open. Memory here never wraps, so nothing follows from it."""
        return bool(self.state.output_port & OUTPUT_A20)

    def read(self, offset: int, size: int) -> int:
        return self._status() if offset else self._read_data()

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.last_was_command = bool(offset)
        if offset:
            self._command(value)
        else:
            self._data(value)
        self._update_irqs()

    def snapshot(self) -> I8042State:
        return deepcopy(self.state)

    def restore(self, state: I8042State) -> None:
        self.state = deepcopy(state)
        self._update_irqs()

    def _status(self) -> int:
        status = STR_KEYLOCK | self.state.ram[0] & STR_SYSFLAG
        status |= STR_CMDDAT if self.state.last_was_command else 0
        if self.state.replies:
            status |= STR_OBF | self.state.replies[0][1]
        return status

    def _read_data(self) -> int:
        if not self.state.replies:
            return 0
        value, _ = self.state.replies.pop(0)
        self._update_irqs()
        return value

    def _command(self, value: int) -> None:
        self.state.waiting_for = None
        if value >= PULSE_OUTPUT:
            self._pulse(value)
        elif value & 0xE0 == READ_RAM:
            self._reply(self.state.ram[value & 0x1F])
        elif value & 0xE0 == WRITE_RAM or value in self._takes_data:
            self.state.waiting_for = value
        elif value == 0xD0:
            self._reply(self.state.output_port)
        elif value in self._commands:
            clear, set_, reply = self._commands[value]
            self.state.ram[0] = self.state.ram[0] & ~clear | set_
            if reply is not None:
                self._reply(reply)

    def _data(self, value: int) -> None:
        command, self.state.waiting_for = self.state.waiting_for, None
        if command is None:
            self.state.ram[0] &= ~CTR_KBDDIS
            self._reply(RESEND, STR_TIMEOUT)
        elif command in self._takes_data:
            self._takes_data[command](value)
        else:
            self.state.ram[command & 0x1F] = value

    def _reply(self, value: int, status: int = 0) -> None:
        self.state.replies.append((value, status))

    def _pulse(self, value: int) -> None:
        """Zeros in the low nibble are the lines pulsed low; line 0 is the processor's reset."""
        if value != PULSE_NOTHING and not value & OUTPUT_RESET:
            self._reset()

    def _write_output(self, value: int) -> None:
        self.state.output_port = value
        if not value & OUTPUT_RESET:
            self._reset()

    def _reset(self) -> None:
        self._request(ended(OutcomeKind.RESET, "the guest reset the machine (keyboard controller)"))

    def _update_irqs(self) -> None:
        replies, ctr = self.state.replies, self.state.ram[0]
        aux = bool(replies and replies[0][1] & STR_AUXDATA)
        wanted = (bool(replies and not aux and ctr & CTR_KBDINT), aux and bool(ctr & CTR_AUXINT))
        for index, level in enumerate(wanted):
            if level != self._levels[index]:
                self._levels[index] = level
                self._irqs[index](level)


def _build(platform: Platform) -> I8042:
    return I8042(platform.irq_line(KBD_IRQ), platform.irq_line(AUX_IRQ), platform.request)


WINDOWS = (Window(Space.PORT, DATA_PORT, 1, 0), Window(Space.PORT, COMMAND_PORT, 1, 4))

register(DeviceRow("i8042", WINDOWS, 1, _build))
