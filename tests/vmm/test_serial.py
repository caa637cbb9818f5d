"""The 16550A: registers, FIFO, interrupts, loopback, flow of input, snapshots."""

from __future__ import annotations

import pytest

from anykvm.vmm.serial import Serial

RBR, THR, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = 0, 0, 1, 2, 2, 3, 4, 5, 6, 7
DLAB = 0x80
RTS_OUT2 = 0x0A


class Line:
    """A UART with everything around it recorded."""

    def __init__(self) -> None:
        self.now = 0
        self.levels: list[bool] = []
        self.sent = b""
        self.ready = 0
        self.moved = 0
        self.uart = Serial(
            self.levels.append, self._output, lambda: self.now, self._ready, self._deadline
        )

    def _output(self, data: bytes) -> None:
        self.sent += data

    def _ready(self) -> None:
        self.ready += 1

    def _deadline(self) -> None:
        self.moved += 1

    def read(self, register: int) -> int:
        return self.uart.read(register, 1)

    def write(self, register: int, value: int) -> None:
        self.uart.write(register, 1, value)

    @property
    def level(self) -> bool:
        return bool(self.levels and self.levels[-1])


@pytest.fixture
def line() -> Line:
    return Line()


def ready_line(line: Line, fcr: int = 0x81) -> Line:
    """As Linux leaves it when a terminal is open: FIFO on, RTS and OUT2 on."""
    line.write(FCR, fcr)
    line.write(MCR, RTS_OUT2)
    return line


def test_reset_values(line: Line) -> None:
    assert [line.read(register) for register in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]


@pytest.mark.parametrize(
    ("register", "written", "read"),
    [
        (IER, 0xFF, 0x0F),
        (LCR, 0x1B, 0x1B),
        (MCR, 0xFF, 0x1F),
        (SCR, 0xA5, 0xA5),
        (LSR, 0x00, 0x60),
        (MSR, 0xFF, 0xB0),
    ],
)
def test_register_keeps_its_bits(line: Line, register: int, written: int, read: int) -> None:
    line.write(register, written)
    assert line.read(register) == read


def test_divisor_is_behind_dlab(line: Line) -> None:
    line.write(LCR, DLAB)
    line.write(0, 0x34)
    line.write(1, 0x12)
    assert (line.read(0), line.read(1)) == (0x34, 0x12)
    line.write(LCR, 0x03)
    assert (line.read(RBR), line.read(IER), line.sent) == (0, 0, b"")


def test_transmission_takes_no_time(line: Line) -> None:
    for byte in b"hello":
        assert line.read(LSR) & 0x60 == 0x60
        line.write(THR, byte)
    assert line.sent == b"hello"


def test_fifo_bits_of_iir_follow_fcr(line: Line) -> None:
    line.write(FCR, 0x01)
    assert line.read(IIR) == 0xC1
    line.write(FCR, 0x00)
    assert line.read(IIR) == 0x01


def test_a_64_byte_fifo_is_not_claimed(line: Line) -> None:
    line.write(LCR, DLAB)
    line.write(FCR, 0x21)
    assert line.read(IIR) & 0x20 == 0


def test_thre_interrupt_is_raised_by_enabling_and_cleared_by_iir(line: Line) -> None:
    line.write(MCR, RTS_OUT2)
    line.write(IER, 0x02)
    assert line.level
    assert line.read(IIR) == 0x02
    assert not line.level
    assert line.read(IIR) == 0x01
    line.write(THR, 0x41)
    assert line.levels == [True, False, True]
    line.write(IER, 0x00)
    line.write(IER, 0x02)
    assert line.read(IIR) == 0x02


def test_out2_and_loopback_gate_the_interrupt(line: Line) -> None:
    line.write(IER, 0x02)
    assert line.levels == []
    line.write(MCR, 0x08)
    assert line.level
    line.write(MCR, 0x18)
    assert not line.level


@pytest.mark.parametrize(("fcr", "trigger"), [(0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_received_data_interrupt_at_the_trigger_level(line: Line, fcr: int, trigger: int) -> None:
    ready_line(line, fcr)
    line.write(IER, 0x01)
    assert line.uart.receive(bytes(trigger - 1)) == trigger - 1
    assert not line.level
    line.uart.receive(b"x")
    assert line.level
    assert line.read(IIR) == 0xC4
    line.read(RBR)
    assert not line.level


def test_character_timeout_after_four_characters(line: Line) -> None:
    ready_line(line)
    line.write(LCR, 0x03)
    line.write(IER, 0x01)
    line.uart.receive(b"a")
    due = line.uart.next_deadline()
    # Ten bits a character at 9600 baud, four of them.
    assert due == 4 * 10 * 12 * 1_000_000_000 // 115200
    assert line.moved == 1
    line.now = due - 1
    line.uart.tick()
    assert not line.level
    line.now = due
    line.uart.tick()
    assert line.level
    assert line.read(IIR) == 0xCC
    assert line.read(RBR) == ord("a")
    assert line.read(IIR) == 0xC1
    assert line.uart.next_deadline() is None


def test_interrupts_come_in_order_of_priority(line: Line) -> None:
    ready_line(line, 0x01)
    line.uart.set_modem_lines(0x20)
    line.uart.receive_break()
    line.write(IER, 0x0F)
    assert line.read(IIR) & 0x0F == 0x06
    assert line.read(LSR) & 0x91 == 0x91
    assert line.read(IIR) & 0x0F == 0x04
    line.read(RBR)
    assert line.read(IIR) & 0x0F == 0x02
    assert line.read(IIR) & 0x0F == 0x00
    assert line.read(MSR) & 0x0F == 0x09
    assert line.read(IIR) & 0x0F == 0x01


def test_ring_indicator_tells_its_trailing_edge(line: Line) -> None:
    line.uart.set_modem_lines(0xF0)
    assert line.read(MSR) == 0xF0
    line.uart.set_modem_lines(0xB0)
    assert line.read(MSR) == 0xB4


def test_loopback_wires_modem_lines_and_data(line: Line) -> None:
    line.write(MCR, 0x1A)
    assert line.read(MSR) & 0xF0 == 0x90
    line.write(MCR, 0x1F)
    assert line.read(MSR) & 0xF0 == 0xF0
    line.write(THR, 0x5A)
    assert line.sent == b""
    assert line.read(LSR) & 0x01
    assert line.read(RBR) == 0x5A
    line.write(MCR, 0x03)
    assert line.read(MSR) & 0xF0 == 0xB0


@pytest.mark.parametrize(("fcr", "kept"), [(0x00, b"b"), (0x01, bytes(range(16)))])
def test_overrun_in_loopback(line: Line, fcr: int, kept: bytes) -> None:
    line.write(FCR, fcr)
    line.write(MCR, 0x10)
    for byte in b"ab" if not fcr else bytes(range(17)):
        line.write(THR, byte)
    assert line.read(LSR) & 0x02
    assert line.read(LSR) & 0x02 == 0
    assert bytes(line.read(RBR) for _ in kept) == kept
    assert line.read(LSR) & 0x01 == 0


def test_break_in_loopback(line: Line) -> None:
    line.write(MCR, 0x10)
    line.write(LCR, 0x43)
    assert line.read(LSR) & 0x11 == 0x11
    assert line.read(LSR) & 0x11 == 0x01


def test_input_waits_for_rts_and_for_room(line: Line) -> None:
    line.write(FCR, 0x01)
    assert line.uart.receive(b"early") == 0
    line.write(MCR, RTS_OUT2)
    assert line.ready == 1
    assert line.uart.receive(bytes(range(20))) == 16
    assert line.uart.room == 0
    assert not line.uart.receive_break()
    assert line.read(RBR) == 0
    assert line.ready == 2
    assert line.read(RBR) == 1
    assert line.ready == 2
    assert line.uart.room == 2


def test_without_fifo_there_is_room_for_one(line: Line) -> None:
    line.write(MCR, RTS_OUT2)
    line.write(IER, 0x01)
    assert line.uart.receive(b"xy") == 1
    assert line.read(IIR) == 0x04


def test_clearing_the_fifo_makes_room(line: Line) -> None:
    ready_line(line)
    line.uart.receive(bytes(16))
    before = line.ready
    line.write(FCR, 0x83)
    assert line.ready == before + 1
    assert line.read(LSR) == 0x60
    assert line.uart.next_deadline() is None


def test_snapshot_restores_registers_fifo_and_interrupt(line: Line) -> None:
    ready_line(line, 0x01)
    line.write(IER, 0x05)
    line.write(SCR, 0x77)
    line.uart.receive(b"pq")
    saved = line.uart.snapshot()
    line.read(RBR)
    line.write(SCR, 0)
    other = Line()
    other.uart.restore(saved)
    assert other.level
    assert other.uart.snapshot() == saved
    assert [other.read(RBR), other.read(RBR), other.read(SCR)] == [ord("p"), ord("q"), 0x77]
    assert saved.fifo == [(ord("p"), 0), (ord("q"), 0)]


def test_linux_autodetection_finds_a_16550a(line: Line) -> None:
    """The steps of the 8250 driver's probe, each with what it expects."""
    line.write(IER, 0)
    assert line.read(IER) == 0
    line.write(IER, 0x0F)
    assert line.read(IER) == 0x0F
    line.write(IER, 0)
    line.write(MCR, 0x1A)
    assert line.read(MSR) & 0xF0 == 0x90
    line.write(MCR, 0)
    line.write(LCR, 0xBF)
    line.write(FCR, 0)
    line.write(LCR, 0)
    line.write(FCR, 0x01)
    assert line.read(IIR) >> 6 == 3
    line.write(IER, 0x02)
    first = line.read(IIR)
    line.write(IER, 0)
    line.write(IER, 0x02)
    assert first & 1 == line.read(IIR) & 1 == 0
