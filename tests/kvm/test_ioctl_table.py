"""The ioctl driver: copying in and out, tails, conditions, chains of tables."""

from __future__ import annotations

import ctypes
import errno

import pytest

from anykvm import fs
from anykvm.kvm.ioctl import (
    In,
    InOut,
    InOutTail,
    InTail,
    IoctlTable,
    Need,
    Out,
    OutTail,
    Tail,
    Value,
    drive,
)
from anykvm.uapi import kvm as uapi

BAD = 0x10


class Box:
    """What the handlers of these tests work on."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.ready = True


def address(value: object) -> int:
    return ctypes.addressof(value)  # type: ignore[arg-type]


def msrs(capacity: int, count: int) -> ctypes.Array[ctypes.c_ubyte]:
    raw = (ctypes.c_ubyte * (8 + 16 * capacity))()
    uapi.kvm_msrs.from_buffer(raw).nmsrs = count
    return raw


@pytest.fixture
def table() -> IoctlTable[Box]:
    return IoctlTable("box_ioctl")


def call(table: IoctlTable[Box], box: Box, number: int, arg: int = 0) -> int:
    return drive((table,), box, number, arg)


def failing(table: IoctlTable[Box], box: Box, number: int, arg: int = 0) -> int:
    with pytest.raises(OSError, match="Errno") as raised:
        call(table, box, number, arg)
    assert raised.value.errno is not None
    return raised.value.errno


def test_a_value_is_passed_and_the_result_returned(table):
    @table.row("KVM_CHECK_EXTENSION", Value())
    def check(box: Box, cap: int) -> int:
        box.seen.append(cap)
        return 7

    box = Box()
    assert call(table, box, uapi.KVM_CHECK_EXTENSION, 5) == 7
    assert box.seen == [5]


def test_an_unused_value_must_be_zero(table):
    table.row("KVM_GET_API_VERSION", Value(unused=True))(lambda box, _: 12)
    assert call(table, Box(), uapi.KVM_GET_API_VERSION) == 12
    assert failing(table, Box(), uapi.KVM_GET_API_VERSION, 1) == errno.EINVAL


def test_structs_move_as_the_row_says(table):
    @table.row("KVM_SET_MP_STATE", In(uapi.kvm_mp_state))
    def put(box: Box, state: uapi.kvm_mp_state) -> None:
        box.seen.append(state.mp_state)
        state.mp_state = 99

    @table.row("KVM_GET_MP_STATE", Out(uapi.kvm_mp_state))
    def get(box: Box, state: uapi.kvm_mp_state) -> None:
        box.seen.append(state.mp_state)
        state.mp_state = 3

    @table.row("KVM_IRQ_LINE_STATUS", InOut(uapi.kvm_irq_level))
    def exchange(box: Box, level: uapi.kvm_irq_level) -> None:
        level.status = level.irq + 1

    box, state = Box(), uapi.kvm_mp_state(mp_state=2)
    call(table, box, uapi.KVM_SET_MP_STATE, address(state))
    assert state.mp_state == 2
    call(table, box, uapi.KVM_GET_MP_STATE, address(state))
    assert (state.mp_state, box.seen) == (3, [2, 0])
    level = uapi.kvm_irq_level(irq=41, level=1)
    call(table, box, uapi.KVM_IRQ_LINE_STATUS, address(level))
    assert (level.status, level.level) == (42, 1)


@pytest.mark.parametrize("kind", [In, Out, InOut])
def test_bad_addresses_are_efault(table, kind):
    table.row("KVM_GET_MP_STATE", kind(uapi.kvm_mp_state))(lambda box, state: None)
    assert failing(table, Box(), uapi.KVM_GET_MP_STATE, BAD) == errno.EFAULT


def test_a_failing_handler_writes_nothing_back(table):
    @table.row("KVM_IRQ_LINE_STATUS", InOut(uapi.kvm_irq_level))
    def refuse(box: Box, level: uapi.kvm_irq_level) -> None:
        level.status = 5
        raise OSError(errno.EBUSY, "no")

    level = uapi.kvm_irq_level(irq=1)
    assert failing(table, Box(), uapi.KVM_IRQ_LINE_STATUS, address(level)) == errno.EBUSY
    assert level.irq == 1


def test_in_tail_reads_as_many_entries_as_counted(table):
    @table.row("KVM_SET_MSRS", InTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", 2))
    def put(box: Box, tail: Tail[uapi.kvm_msrs, uapi.kvm_msr_entry]) -> int:
        box.seen += [entry.index for entry in tail.entries]
        return len(tail.entries)

    raw = msrs(3, 2)
    ctypes.memmove(address(raw) + 8, bytes([1] + [0] * 15 + [2] + [0] * 15), 32)
    box = Box()
    assert call(table, box, uapi.KVM_SET_MSRS, address(raw)) == 2
    assert box.seen == [1, 2]
    assert call(table, box, uapi.KVM_SET_MSRS, address(msrs(0, 0))) == 0
    assert failing(table, box, uapi.KVM_SET_MSRS, address(msrs(3, 3))) == errno.E2BIG


def test_in_out_tail_writes_the_entries_back(table):
    @table.row("KVM_GET_MSRS", InOutTail(uapi.kvm_msrs, uapi.kvm_msr_entry, "nmsrs", 4))
    def get(box: Box, tail: Tail[uapi.kvm_msrs, uapi.kvm_msr_entry]) -> int:
        for entry in tail.entries:
            entry.data = 0x55
        return 1

    raw = msrs(2, 2)
    assert call(table, Box(), uapi.KVM_GET_MSRS, address(raw)) == 1
    assert bytes(raw)[16:24] == bytes([0x55] + [0] * 7)
    assert uapi.kvm_msrs.from_buffer(raw).nmsrs == 2


def test_out_tail_tells_the_count_where_the_ioctl_does(table):
    @table.row(
        "KVM_GET_MSR_INDEX_LIST",
        OutTail(uapi.kvm_msr_list, ctypes.c_uint32, "nmsrs", 9, tell_count=True),
    )
    def told(box: Box, tail: Tail[uapi.kvm_msr_list, ctypes.c_uint32]) -> None:
        tail.entries = [ctypes.c_uint32(n) for n in (7, 8, 9)]

    raw = (ctypes.c_uint32 * 4)(0)
    assert failing(table, Box(), uapi.KVM_GET_MSR_INDEX_LIST, address(raw)) == errno.E2BIG
    assert list(raw) == [3, 0, 0, 0]
    assert call(table, Box(), uapi.KVM_GET_MSR_INDEX_LIST, address(raw)) == 0
    assert list(raw) == [3, 7, 8, 9]


def test_out_tail_keeps_the_count_where_the_ioctl_does(table):
    @table.row(
        "KVM_GET_SUPPORTED_CPUID",
        OutTail(uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, "nent", 9, tell_count=False),
    )
    def quiet(box: Box, tail: Tail[uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2]) -> None:
        tail.entries = [uapi.kvm_cpuid_entry2(function=n) for n in (1, 2)]

    raw = (ctypes.c_ubyte * (8 + 80))()
    header = uapi.kvm_cpuid2.from_buffer(raw)
    header.nent = 1
    assert failing(table, Box(), uapi.KVM_GET_SUPPORTED_CPUID, address(raw)) == errno.E2BIG
    assert header.nent == 1
    header.nent = 40
    assert call(table, Box(), uapi.KVM_GET_SUPPORTED_CPUID, address(raw)) == 0
    assert header.nent == 2


def test_needs_are_looked_at_before_the_argument(table):
    ready: Need[Box] = Need(lambda box: box.ready, errno.ENXIO, "not ready")
    table.row("KVM_GET_MP_STATE", Out(uapi.kvm_mp_state), needs=(ready,))(lambda box, s: None)
    box = Box()
    box.ready = False
    assert failing(table, box, uapi.KVM_GET_MP_STATE, BAD) == errno.ENXIO


def test_chains_absent_rows_and_unknown_numbers(table):
    second: IoctlTable[Box] = IoctlTable("second")
    second.row("KVM_NMI", Value())(lambda box, _: 1)
    table.mark_absent(errno.EINVAL, "KVM_SMI", "KVM_NMI", why="test")
    assert drive((table, second), Box(), uapi.KVM_NMI, 0) == 1
    assert failing(table, Box(), uapi.KVM_SMI) == errno.EINVAL
    assert failing(table, Box(), 0xAEFE) == errno.ENOTTY


def test_a_number_has_one_row(table):
    table.row("KVM_NMI", Value())(lambda box, _: 0)
    with pytest.raises(AssertionError, match="two rows"):
        table.row("KVM_NMI", Value())(lambda box, _: 0)


def test_the_driver_traces_the_ioctl_by_name(table):
    table.row("KVM_NMI", Value())(lambda box, _: 4)
    events: list[fs.trace.Event] = []
    with fs.trace.attached(events.append):
        call(table, Box(), uapi.KVM_NMI)
    enter, leave = events
    assert (enter.name, enter.fields["cmd"]) == ("box_ioctl", "KVM_NMI")
    assert (leave.kind, leave.result) == ("exit", 4)
