"""The 8259A pair: initialisation, priorities, EOIs, polling, spurious interrupts, snapshots."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anykvm.x86.i8259 import PIC_ELCR1, PIC_ELCR2, PIC_PORTS, Pic

MASTER, SLAVE = 0x20, 0xA0
NONSPECIFIC_EOI, READ_IRR, READ_ISR, POLL = 0x20, 0x0A, 0x0B, 0x0C
SET_SPECIAL_MASK, CLEAR_SPECIAL_MASK = 0x68, 0x48


class Board:
    """A pair initialised as a PC's BIOS does, with everything it signals recorded."""

    def __init__(self, icw4: int = 0x01, accepts_intr: bool = True) -> None:
        self.intr: list[bool] = []
        self.acks: list[int] = []
        self.masks: list[tuple[int, bool]] = []
        self.pic = Pic(
            self.intr.append,
            self.acks.append,
            lambda pin, masked: self.masks.append((pin, masked)),
            lambda: accepts_intr,
        )
        for command, base, icw3 in ((MASTER, 0x30, 0x04), (SLAVE, 0x38, 0x02)):
            self.pic.write(command, 0x11)
            self.pic.write(command + 1, base)
            self.pic.write(command + 1, icw3)
            self.pic.write(command + 1, icw4)

    def pulse(self, *irqs: int) -> None:
        for irq in irqs:
            self.pic.set_irq(irq, True)
            self.pic.set_irq(irq, False)


@pytest.mark.parametrize("irq", [i for i in range(16) if i != 2])
def test_each_line_has_its_vector(irq: int) -> None:
    board = Board()
    board.pulse(irq)
    assert board.pic.output
    assert board.pic.read_irq() == 0x30 + irq
    assert not board.pic.output
    assert board.pic.isr == 1 << irq | (0x04 if irq >= 8 else 0)
    assert board.pic.irr & ~0x04 == 0


def test_set_irq_tells_delivered_coalesced_and_masked() -> None:
    pic = Board().pic
    assert pic.set_irq(3, True) == 1
    assert pic.set_irq(3, False) == 1
    assert pic.set_irq(3, True) == 0
    pic.write(MASTER + 1, 0x10)
    assert pic.set_irq(4, True) == -1
    assert not pic.isr
    assert pic.irr == 0x18


def test_masked_edge_is_kept_until_unmasked() -> None:
    board = Board()
    board.pic.write(MASTER + 1, 0xFF)
    board.pulse(1)
    assert not board.pic.output
    board.pic.write(MASTER + 1, 0xFD)
    assert board.pic.output
    assert board.pic.read_irq() == 0x31
    assert (1, False) in board.masks
    assert (0, True) in board.masks


def test_sources_are_wired_or() -> None:
    pic = Board().pic
    pic.write(PIC_ELCR1, 0x20)
    pic.set_irq(5, True, source_id=0)
    pic.set_irq(5, True, source_id=1)
    pic.set_irq(5, False, source_id=0)
    assert pic.irr == 0x20
    pic.set_irq(5, False, source_id=1)
    assert pic.irr == 0


def test_level_line_requests_again_until_it_drops() -> None:
    board = Board()
    board.pic.write(PIC_ELCR2, 0x02)
    board.pic.set_irq(9, True)
    assert board.pic.read_irq() == 0x39
    assert board.pic.irr & 0x200
    board.pic.write(SLAVE, NONSPECIFIC_EOI)
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.output
    assert board.pic.read_irq() == 0x39
    board.pic.set_irq(9, False)
    board.pic.write(SLAVE, NONSPECIFIC_EOI)
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert not board.pic.output
    assert board.acks == [9, 2, 9, 2]


def test_elcr_of_the_timer_keyboard_cascade_and_rtc_stays_edge() -> None:
    pic = Board().pic
    pic.write(PIC_ELCR1, 0xFF)
    pic.write(PIC_ELCR2, 0xFF)
    assert (pic.read(PIC_ELCR1), pic.read(PIC_ELCR2)) == (0xF8, 0xDE)


def test_fixed_priority_and_nesting() -> None:
    board = Board()
    board.pulse(6)
    assert board.pic.read_irq() == 0x36
    board.pulse(7)
    assert not board.pic.output
    board.pulse(1)
    assert board.pic.read_irq() == 0x31
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.isr == 0x40
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.read_irq() == 0x37


def test_intr_is_pulsed_when_a_request_of_higher_priority_remains() -> None:
    board = Board(icw4=0x03)
    board.pulse(3, 4)
    board.intr.clear()
    assert board.pic.read_irq() == 0x33
    assert board.intr == [False, True]


@pytest.mark.parametrize("line", [2, 7])
def test_request_withdrawn_before_inta_is_spurious(line: int) -> None:
    board = Board()
    board.pic.write(PIC_ELCR1, 0x80)
    board.pic.write(PIC_ELCR2, 0x02)
    irq, spurious = (7, 0x37) if line == 7 else (9, 0x3F)
    board.pic.set_irq(irq, True)
    board.pic.set_irq(irq, False)
    assert board.pic.read_irq() == spurious
    # Only the master knows an interrupt in service, and only if it was the slave's.
    assert board.pic.isr == (0 if line == 7 else 0x04)


OCW2_CASES = [
    # command, ISR after it, line of highest priority after it
    (0x20, 0b0011_0000, 0),
    (0x60 | 4, 0b0010_1000, 0),
    (0xA0, 0b0011_0000, 4),
    (0xE0 | 5, 0b0001_1000, 6),
    (0xC0 | 2, 0b0011_1000, 3),
    (0x40 | 3, 0b0011_1000, 0),
]


@pytest.mark.parametrize(("command", "isr", "highest"), OCW2_CASES)
def test_ocw2(command: int, isr: int, highest: int) -> None:
    pic = Board().pic
    for irq in (5, 4, 3):
        pic.set_irq(irq, True)
        pic.read_irq()
    pic.write(MASTER, command)
    assert pic.isr == isr
    assert (pic.pics[0].priority_add & 7) == highest


def test_rotation_reorders_requests() -> None:
    board = Board()
    board.pic.write(MASTER, 0xC0 | 3)
    board.pulse(0, 3, 4)
    vectors = []
    while board.pic.output:
        vectors.append(board.pic.read_irq())
        board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert vectors == [0x34, 0x30, 0x33]


def test_automatic_eoi_with_rotation() -> None:
    board = Board(icw4=0x03)
    board.pic.write(MASTER, 0x80)
    board.pulse(2 + 1)
    assert board.pic.read_irq() == 0x33
    assert board.pic.isr == 0
    assert board.acks == [3]
    assert board.pic.pics[0].priority_add == 4
    board.pic.write(MASTER, 0x00)
    board.pulse(5)
    board.pic.read_irq()
    assert board.pic.pics[0].priority_add == 4


def test_special_mask_lets_lower_lines_through() -> None:
    board = Board()
    board.pulse(1)
    board.pic.read_irq()
    board.pulse(6)
    assert not board.pic.output
    board.pic.write(MASTER + 1, 0x02)
    board.pic.write(MASTER, SET_SPECIAL_MASK)
    assert board.pic.output
    assert board.pic.read_irq() == 0x36
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.isr == 0x02
    board.pic.write(MASTER, CLEAR_SPECIAL_MASK)
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.isr == 0


@pytest.mark.parametrize(("icw4", "nested"), [(0x01, False), (0x11, True)])
def test_special_fully_nested_master_takes_a_second_slave_request(icw4: int, nested: bool) -> None:
    board = Board(icw4)
    board.pulse(12)
    board.pic.read_irq()
    board.pulse(8)
    assert board.pic.output is nested


def test_poll_acknowledges_and_read_select_survives() -> None:
    board = Board()
    board.pic.write(MASTER, READ_ISR)
    board.pulse(4)
    board.pic.write(MASTER, POLL)
    assert board.pic.read(MASTER) == 0x84
    assert board.pic.read(MASTER) == 0x10
    board.pic.write(MASTER, POLL)
    assert board.pic.read(MASTER) & 0x80 == 0


def test_polling_the_slave_withdraws_its_request() -> None:
    board = Board()
    board.pulse(10)
    board.pic.write(SLAVE, POLL)
    assert board.pic.read(SLAVE + 1) == 0x82
    assert not board.pic.output
    assert board.pic.isr == 0x400


def test_registers_read_back() -> None:
    board = Board()
    board.pic.write(SLAVE + 1, 0x5A)
    board.pulse(3)
    assert board.pic.read(SLAVE + 1) == 0x5A
    assert board.pic.imr == 0x5A00
    board.pic.write(MASTER, READ_IRR)
    assert board.pic.read(MASTER) == 0x08


@pytest.mark.parametrize("listening", [True, False])
def test_icw1_drops_edges_and_acknowledges_them_if_someone_listened(listening: bool) -> None:
    board = Board(accepts_intr=listening)
    board.pic.write(PIC_ELCR1, 0x20)
    board.pic.write(MASTER + 1, 0xFF)
    board.pulse(0)
    board.pic.set_irq(5, True)
    board.pic.write(MASTER, 0x10)
    assert board.acks == ([0] if listening else [])
    assert (board.pic.irr, board.pic.imr) == (0x20, 0)


def test_three_byte_initialisation_clears_icw4_features() -> None:
    board = Board(icw4=0x13)
    for port, value in ((MASTER, 0x10), (MASTER + 1, 0x47), (MASTER + 1, 0x04)):
        board.pic.write(port, value)
    board.pic.write(MASTER + 1, 0xEF)
    assert board.pic.imr & 0xFF == 0xEF
    board.pulse(4)
    assert board.pic.read_irq() == 0x44
    assert board.pic.isr == 0x10


def test_notifier_may_raise_the_line_again() -> None:
    board = Board()
    missed = [0]

    def ack(pin: int) -> None:
        if missed and missed.pop() == pin:
            board.pulse(pin)

    board.pic._ack = ack
    board.pulse(0)
    assert board.pic.read_irq() == 0x30
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert board.pic.output
    assert board.pic.read_irq() == 0x30
    board.pic.write(MASTER, NONSPECIFIC_EOI)
    assert not board.pic.output


OPERATIONS = st.one_of(
    st.tuples(st.just("irq"), st.integers(0, 15), st.booleans()),
    st.tuples(st.just("write"), st.sampled_from(PIC_PORTS), st.integers(0, 255)),
    st.tuples(st.just("read"), st.sampled_from(PIC_PORTS), st.just(0)),
    st.tuples(st.just("inta"), st.just(0), st.just(0)),
)


def run(pic: Pic, operation: tuple[str, int, int]) -> tuple[int | None, bool]:
    kind, where, value = operation
    result = None
    if kind == "irq":
        result = pic.set_irq(where, bool(value))
    elif kind == "write":
        pic.write(where, value)
    elif kind == "read":
        result = pic.read(where)
    else:
        result = pic.read_irq()
    return result, pic.output


@given(st.lists(OPERATIONS, max_size=30), st.lists(OPERATIONS, max_size=30))
def test_restored_pair_behaves_as_the_original(
    before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    pic, restored = Board().pic, Pic()
    for operation in before:
        run(pic, operation)
    for chip in (0, 1):
        restored.set_state(chip, pic.get_state(chip))
    assert restored.output == pic.output
    # The wires belong to the devices, which restore their own.
    restored._lines = pic._lines.copy()
    assert [run(restored, op) for op in after] == [run(pic, op) for op in after]
    for chip in (0, 1):
        assert bytes(restored.get_state(chip)) == bytes(pic.get_state(chip))


@given(st.lists(OPERATIONS, max_size=60))
def test_inta_never_takes_a_masked_line(operations: list[tuple[str, int, int]]) -> None:
    pic = Board().pic
    for operation in operations:
        before, masks = pic.isr, pic.imr
        run(pic, operation)
        if operation[0] == "inta":
            assert pic.isr & ~before & masks == 0
