"""Interrupt controllers and lines in the kernel (api.rst 4.24 to 4.26, 4.57, 4.75, 4.94)."""

from __future__ import annotations

import ctypes
import os
import select
import time
from errno import EBADF, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENXIO

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms
from .machine import BAD, Guest, Machine, errno_of, fails, flexible, get, ioctl

PIC, SLAVE, IOAPIC = (
    uapi.KVM_IRQCHIP_PIC_MASTER,
    uapi.KVM_IRQCHIP_PIC_SLAVE,
    uapi.KVM_IRQCHIP_IOAPIC,
)
LINE = uapi.KVM_IRQ_LINE
# What a guest does: take IRQ 1 at vector 0x21, note it at port 0x10 with EOI, and wait with HLT.
PIC_GUEST = bytes.fromhex(
    "b011e620"  # out 0x20: ICW1
    "b020e621"  # ICW2: vectors from 0x20
    "b004e621b001e621"  # ICW3, ICW4
    "b0fde621"  # only IRQ 1
    "c70684000011"  # vector 0x21 is at 0000:1100
    "c70686000000"
    "fb"  # sti
    "b001e610"  # out 0x10: ready
    "f4ebfd"  # again: hlt; jmp again
)
HANDLER = bytes.fromhex("b041e610b020e620cf")  # out 0x10, 'A'; EOI; iret


def level(irq: int, value: int) -> uapi.kvm_irq_level:
    return uapi.kvm_irq_level(irq=irq, level=value)


def chip(vm: int, number: int) -> uapi.kvm_irqchip:
    made = uapi.kvm_irqchip(chip_id=number)
    ioctl(vm, uapi.KVM_GET_IRQCHIP, made)
    return made


def eventfd(machine: Machine) -> int:
    return machine.keep(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))


def signalled(fd: int) -> bool:
    return bool(select.select([fd], [], [], 2)[0])


def pic_guest(machine: Machine, vm: int) -> Guest:
    """It has told that it is ready for IRQ 1."""
    guest = machine.guest(PIC_GUEST, vm=vm)
    guest.write(0x1100, HANDLER)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"\x01"
    return guest


@conforms("KVM_CREATE_IRQCHIP")
def test_there_is_one_irqchip_and_it_comes_before_the_vcpus(machine: Machine) -> None:
    vm, late = machine.create_vm(), machine.create_vm()
    assert ioctl(vm, uapi.KVM_CREATE_IRQCHIP) == 0
    fails(EEXIST, vm, uapi.KVM_CREATE_IRQCHIP)
    machine.create_vcpu(vm)
    fails(EEXIST, vm, uapi.KVM_CREATE_IRQCHIP)
    machine.create_vcpu(late)
    fails(EINVAL, late, uapi.KVM_CREATE_IRQCHIP)


@conforms("KVM_IRQ_LINE", "KVM_IRQ_LINE_STATUS")
@pytest.mark.parametrize("cmd", [uapi.KVM_IRQ_LINE, uapi.KVM_IRQ_LINE_STATUS])
def test_lines_need_an_irqchip(vm: int, irqchip_vm: int, cmd: int) -> None:
    fails(ENXIO, vm, cmd, level(1, 1))
    fails(EFAULT, vm, cmd, BAD)
    fails(EFAULT, irqchip_vm, cmd, BAD)
    assert ioctl(irqchip_vm, cmd, level(1, 1)) == 0


@conforms("KVM_IRQ_LINE_STATUS")
def test_the_status_of_a_line_takes_the_place_of_its_number(irqchip_vm: int) -> None:
    """-1 is ignored, 0 coalesced, above 0 the number of targets."""
    event = level(4, 1)
    ioctl(irqchip_vm, uapi.KVM_IRQ_LINE_STATUS, event)
    assert ctypes.c_int32(event.status).value in (-1, 0, 1)
    assert event.level == 1
    lost = level(4000, 1)
    ioctl(irqchip_vm, uapi.KVM_IRQ_LINE_STATUS, lost)
    assert ctypes.c_int32(lost.status).value == -1, "no route"


@conforms("KVM_IRQ_LINE", "KVM_CREATE_IRQCHIP", "KVM_RUN")
def test_a_line_interrupts_a_halted_guest(machine: Machine, irqchip_vm: int) -> None:
    guest = pic_guest(machine, irqchip_vm)
    for _ in range(2):
        ioctl(irqchip_vm, LINE, level(1, 1))
        guest.run_until(uapi.KVM_EXIT_IO)
        assert guest.io() == b"A"
        ioctl(irqchip_vm, LINE, level(1, 0))


@conforms("KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP")
@pytest.mark.parametrize("number", [PIC, SLAVE, IOAPIC])
def test_a_chips_state_round_trips(irqchip_vm: int, number: int) -> None:
    state = chip(irqchip_vm, number)
    if number == IOAPIC:
        assert state.chip.ioapic.base_address == 0xFEC00000
        state.chip.ioapic.redirtbl[5].bits = 0x10055
    else:
        state.chip.pic.imr, state.chip.pic.irq_base = 0xA5, 0x48
    ioctl(irqchip_vm, uapi.KVM_SET_IRQCHIP, state)
    assert bytes(chip(irqchip_vm, number)) == bytes(state)


@conforms("KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP")
@pytest.mark.parametrize("cmd", [uapi.KVM_GET_IRQCHIP, uapi.KVM_SET_IRQCHIP])
def test_chips_that_are_not_there(vm: int, irqchip_vm: int, cmd: int) -> None:
    fails(EINVAL, irqchip_vm, cmd, uapi.kvm_irqchip(chip_id=3))
    fails(ENXIO, vm, cmd, uapi.kvm_irqchip(chip_id=0))
    fails(EFAULT, vm, cmd, BAD)


# Routing.


def routing(*entries: uapi.kvm_irq_routing_entry, flags: int = 0) -> ctypes.Array[ctypes.c_ubyte]:
    return flexible(uapi.kvm_irq_routing(nr=len(entries), flags=flags), entries)


def chip_route(gsi: int, number: int, pin: int) -> uapi.kvm_irq_routing_entry:
    made = uapi.kvm_irq_routing_entry(gsi=gsi, type=uapi.KVM_IRQ_ROUTING_IRQCHIP)
    made.u.irqchip.irqchip, made.u.irqchip.pin = number, pin
    return made


def msi_route(gsi: int, address: int, data: int) -> uapi.kvm_irq_routing_entry:
    made = uapi.kvm_irq_routing_entry(gsi=gsi, type=uapi.KVM_IRQ_ROUTING_MSI)
    made.u.msi.address_lo, made.u.msi.data = address, data
    return made


@conforms("KVM_SET_GSI_ROUTING")
def test_a_route_leads_another_line_to_the_pin(machine: Machine, irqchip_vm: int) -> None:
    guest = pic_guest(machine, irqchip_vm)
    ioctl(irqchip_vm, uapi.KVM_SET_GSI_ROUTING, routing(chip_route(40, PIC, 1)))
    ioctl(irqchip_vm, LINE, level(40, 1))
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A"


@conforms("KVM_SET_GSI_ROUTING")
def test_routes_that_cannot_be(vm: int, irqchip_vm: int) -> None:
    cmd = uapi.KVM_SET_GSI_ROUTING
    unknown = uapi.kvm_irq_routing_entry(gsi=1, type=77)
    flagged = chip_route(1, PIC, 1)
    flagged.flags = 1
    for wrong in (
        routing(chip_route(4096, PIC, 1)),
        routing(chip_route(1, 3, 1)),
        routing(chip_route(1, IOAPIC, 24)),
        routing(unknown),
        routing(flagged),
        routing(flags=1),
        routing(chip_route(1, PIC, 1), chip_route(1, PIC, 2)),
        routing(msi_route(1, 0xFEE00000, 0x40), chip_route(1, PIC, 2)),
    ):
        fails(EINVAL, irqchip_vm, cmd, wrong)
    fails(EINVAL, irqchip_vm, cmd, uapi.kvm_irq_routing(nr=4097))
    fails(EFAULT, irqchip_vm, cmd, BAD)
    fails(EINVAL, vm, cmd, routing())
    assert ioctl(irqchip_vm, cmd, routing()) == 0
    both = routing(chip_route(1, PIC, 1), chip_route(1, IOAPIC, 1))
    assert ioctl(irqchip_vm, cmd, both) == 0


@conforms("KVM_SIGNAL_MSI")
def test_a_message_sets_the_request_bit(machine: Machine, irqchip_vm: int) -> None:
    vcpu = machine.create_vcpu(irqchip_vm)
    message = uapi.kvm_msi(address_lo=0xFEE00000, data=0x45)
    assert ioctl(irqchip_vm, uapi.KVM_SIGNAL_MSI, message) == 0, "the APIC is not enabled"
    enable_lapic(vcpu)
    assert ioctl(irqchip_vm, uapi.KVM_SIGNAL_MSI, message) == 1
    assert lapic_word(vcpu, 0x200 + 0x45 // 32 * 16) == 1 << 0x45 % 32


@conforms("KVM_SIGNAL_MSI")
def test_messages_that_cannot_be_sent(vm: int, irqchip_vm: int) -> None:
    message = uapi.kvm_msi(address_lo=0xFEE00000, data=0x45)
    fails(EINVAL, vm, uapi.KVM_SIGNAL_MSI, message)
    message.flags = 8
    fails(EINVAL, irqchip_vm, uapi.KVM_SIGNAL_MSI, message)
    fails(EFAULT, irqchip_vm, uapi.KVM_SIGNAL_MSI, BAD)


# The local APIC.

LVTT, TMICT, TDCR = 0x320, 0x380, 0x3E0


def lapic_word(vcpu: int, offset: int) -> int:
    state = get(vcpu, uapi.KVM_GET_LAPIC, uapi.kvm_lapic_state)
    return int.from_bytes(bytes(state.regs)[offset : offset + 4], "little")


def set_lapic_word(vcpu: int, offset: int, value: int) -> None:
    state = get(vcpu, uapi.KVM_GET_LAPIC, uapi.kvm_lapic_state)
    ctypes.memmove(ctypes.addressof(state) + offset, value.to_bytes(4, "little"), 4)
    ioctl(vcpu, uapi.KVM_SET_LAPIC, state)


def enable_lapic(vcpu: int) -> None:
    """SVR's enable bit."""
    set_lapic_word(vcpu, 0xF0, 0x1FF)


@conforms("KVM_GET_LAPIC", "KVM_SET_LAPIC")
def test_the_local_apic_round_trips(machine: Machine, irqchip_vm: int) -> None:
    vcpu = machine.create_vcpu(irqchip_vm, 2)
    assert lapic_word(vcpu, 0x20) >> 24 == 2, "the ID"
    assert lapic_word(vcpu, 0x30) & 0xFF == 0x14, "the version"
    assert lapic_word(vcpu, 0xF0) == 0xFF
    for offset, value in ((0xF0, 0x1FF), (0x80, 0x30), (0x320, 0x10044), (0x350, 0x700)):
        set_lapic_word(vcpu, offset, value)
        assert lapic_word(vcpu, offset) == value
    assert get(vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs).cr8 == 3


@conforms("KVM_SET_LAPIC", "KVM_RUN")
def test_a_one_shot_counter_that_is_set_at_zero_has_just_run_out(
    machine: Machine, irqchip_vm: int
) -> None:
    """QEMU saves no current count: what it restores interrupts at once, or the guest would wait for
    ever.
    """
    guest = pic_guest(machine, irqchip_vm)
    enable_lapic(guest.vcpu)
    for register, value in ((LVTT, 0x21), (TDCR, 0xB), (TMICT, 4_000_000_000)):  # four seconds
        set_lapic_word(guest.vcpu, register, value)
    began = time.monotonic()
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A"
    assert time.monotonic() - began < 2


@conforms("KVM_GET_LAPIC", "KVM_SET_LAPIC")
@pytest.mark.parametrize("cmd", [uapi.KVM_GET_LAPIC, uapi.KVM_SET_LAPIC])
def test_no_local_apic_without_an_irqchip(machine: Machine, irqchip_vm: int, cmd: int) -> None:
    fails(EINVAL, machine.vcpu, cmd, uapi.kvm_lapic_state())
    fails(EINVAL, machine.vcpu, cmd, BAD)
    fails(EFAULT, machine.create_vcpu(irqchip_vm), cmd, BAD)


# The PIT.

PIT_IOCTLS = [
    (uapi.KVM_GET_PIT, uapi.kvm_pit_state),
    (uapi.KVM_SET_PIT, uapi.kvm_pit_state),
    (uapi.KVM_GET_PIT2, uapi.kvm_pit_state2),
    (uapi.KVM_SET_PIT2, uapi.kvm_pit_state2),
    (uapi.KVM_REINJECT_CONTROL, uapi.kvm_reinject_control),
]


@conforms("KVM_CREATE_PIT", "KVM_CREATE_PIT2")
def test_a_pit_needs_an_irqchip_and_there_is_one(machine: Machine, vm: int) -> None:
    config = uapi.kvm_pit_config(flags=uapi.KVM_PIT_SPEAKER_DUMMY)
    fails(ENOENT, vm, uapi.KVM_CREATE_PIT2, config)
    fails(ENOENT, vm, uapi.KVM_CREATE_PIT)
    fails(EFAULT, vm, uapi.KVM_CREATE_PIT2, BAD)
    machine.enable_cap(vm, uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
    fails(ENOENT, vm, uapi.KVM_CREATE_PIT2, config)
    assert ioctl(machine.irqchip_vm, uapi.KVM_CREATE_PIT2, config) == 0
    fails(EEXIST, machine.irqchip_vm, uapi.KVM_CREATE_PIT)
    fails(EEXIST, machine.irqchip_vm, uapi.KVM_CREATE_PIT2, config)


@conforms("KVM_GET_PIT", "KVM_SET_PIT", "KVM_GET_PIT2", "KVM_SET_PIT2", "KVM_REINJECT_CONTROL")
@pytest.mark.parametrize(("cmd", "kind"), PIT_IOCTLS)
def test_without_a_pit(irqchip_vm: int, cmd: int, kind: type[ctypes.Structure]) -> None:
    fails(ENXIO, irqchip_vm, cmd, kind())
    fails(ENXIO if cmd == uapi.KVM_GET_PIT2 else EFAULT, irqchip_vm, cmd, BAD)


@conforms("KVM_GET_PIT2", "KVM_SET_PIT2", "KVM_GET_PIT", "KVM_SET_PIT", "KVM_CREATE_PIT2")
def test_the_pits_state_round_trips(irqchip_vm: int) -> None:
    ioctl(irqchip_vm, uapi.KVM_CREATE_PIT2, uapi.kvm_pit_config())
    fails(EFAULT, irqchip_vm, uapi.KVM_GET_PIT2, BAD)
    state = get(irqchip_vm, uapi.KVM_GET_PIT2, uapi.kvm_pit_state2)
    state.channels[0].count, state.channels[0].mode = 0x1234, 2
    state.channels[2].count, state.channels[2].gate = 0x4321, 1
    ioctl(irqchip_vm, uapi.KVM_SET_PIT2, state)
    old = get(irqchip_vm, uapi.KVM_GET_PIT, uapi.kvm_pit_state)
    for found in (get(irqchip_vm, uapi.KVM_GET_PIT2, uapi.kvm_pit_state2), old):
        assert (found.channels[0].count, found.channels[0].mode) == (0x1234, 2)
        assert (found.channels[2].count, found.channels[2].gate) == (0x4321, 1)
    old.channels[0].count = 0x777
    ioctl(irqchip_vm, uapi.KVM_SET_PIT, old)
    assert get(irqchip_vm, uapi.KVM_GET_PIT2, uapi.kvm_pit_state2).channels[0].count == 0x777


@conforms("KVM_CREATE_PIT", "KVM_REINJECT_CONTROL")
def test_the_pits_first_form(irqchip_vm: int) -> None:
    assert ioctl(irqchip_vm, uapi.KVM_CREATE_PIT) == 0
    for value in (0, 1):
        control = uapi.kvm_reinject_control(pit_reinject=value)
        assert ioctl(irqchip_vm, uapi.KVM_REINJECT_CONTROL, control) == 0


@conforms("KVM_CREATE_PIT2", "KVM_RUN")
def test_the_pit_interrupts(machine: Machine, irqchip_vm: int) -> None:
    ioctl(irqchip_vm, uapi.KVM_CREATE_PIT2, uapi.kvm_pit_config())
    code = bytearray(PIC_GUEST)
    code[code.index(b"\xb0\xfd") + 1] = 0xFE  # only IRQ 0, at vector 0x20
    code[code.index(b"\xc7\x06\x84") + 2] = 0x80
    code[code.index(b"\xc7\x06\x86") + 2] = 0x82
    start = bytes.fromhex("b034e643b0ffe640b00fe640")  # counter 0, mode 2, 0x0fff: 3.4 ms
    guest = machine.guest(start + bytes(code), vm=irqchip_vm)
    keeps_ax = b"\x50" + HANDLER[:-1] + b"\x58\xcf"  # the first may come before the guest is ready
    guest.write(0x1100, keeps_ax)
    said = []
    for _ in range(4):
        guest.run_until(uapi.KVM_EXIT_IO)
        said.append(guest.io())
    assert sorted(said) == [b"\1", b"A", b"A", b"A"]


# irqfd.


def irqfd(fd: int, gsi: int, flags: int = 0, resample: int = 0) -> uapi.kvm_irqfd:
    return uapi.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resample)


@conforms("KVM_IRQFD")
def test_an_eventfd_raises_its_line(machine: Machine, irqchip_vm: int) -> None:
    guest = pic_guest(machine, irqchip_vm)
    event = eventfd(machine)
    ioctl(irqchip_vm, uapi.KVM_IRQFD, irqfd(event, 1))
    for _ in range(2):
        os.eventfd_write(event, 1)
        guest.run_until(uapi.KVM_EXIT_IO)
        assert guest.io() == b"A"
    ioctl(irqchip_vm, uapi.KVM_IRQFD, irqfd(event, 1, uapi.KVM_IRQFD_FLAG_DEASSIGN))
    os.eventfd_write(event, 1)
    assert os.eventfd_read(event) == 1, "nobody takes it any more"


@conforms("KVM_IRQFD")
def test_irqfds_that_cannot_be(machine: Machine, vm: int, irqchip_vm: int) -> None:
    event = eventfd(machine)
    none = machine.keep(os.open("/dev/null", os.O_RDONLY))
    cmd = uapi.KVM_IRQFD
    fails(EINVAL, vm, cmd, irqfd(event, 1))
    fails(EINVAL, irqchip_vm, cmd, irqfd(event, 1, flags=1 << 5))
    fails(EBADF, irqchip_vm, cmd, irqfd(9999, 1))
    fails(EINVAL, irqchip_vm, cmd, irqfd(none, 1))
    fails(EFAULT, irqchip_vm, cmd, BAD)
    ioctl(irqchip_vm, cmd, irqfd(event, 1))
    fails(EBUSY, irqchip_vm, cmd, irqfd(event, 2))
    deassign = uapi.KVM_IRQFD_FLAG_DEASSIGN
    assert ioctl(irqchip_vm, cmd, irqfd(eventfd(machine), 3, deassign)) == 0, "as if it was there"
    fails(EBADF, irqchip_vm, cmd, irqfd(9999, 1, deassign))


@conforms("KVM_IRQFD")
def test_a_level_is_resampled_at_the_end_of_interrupt(machine: Machine, irqchip_vm: int) -> None:
    machine.require(uapi.KVM_CAP_IRQFD_RESAMPLE)
    state = chip(irqchip_vm, PIC)
    state.chip.pic.elcr = 1 << 5  # a level line
    ioctl(irqchip_vm, uapi.KVM_SET_IRQCHIP, state)
    code = bytearray(PIC_GUEST)
    code[code.index(b"\xb0\xfd") + 1] = 0xDF  # IRQ 5, at vector 0x25
    code[code.index(b"\xc7\x06\x84") + 2] = 0x94
    code[code.index(b"\xc7\x06\x86") + 2] = 0x96
    guest = machine.guest(bytes(code), vm=irqchip_vm)
    guest.write(0x1100, bytes.fromhex("b020e620b041e610cf"))  # EOI first
    guest.run_until(uapi.KVM_EXIT_IO)
    trigger, resample = eventfd(machine), eventfd(machine)
    flags = uapi.KVM_IRQFD_FLAG_RESAMPLE
    fails(EBADF, irqchip_vm, uapi.KVM_IRQFD, irqfd(trigger, 5, flags, 9999))
    ioctl(irqchip_vm, uapi.KVM_IRQFD, irqfd(trigger, 5, flags, resample))
    for _ in range(2):
        os.eventfd_write(trigger, 1)
        guest.run_until(uapi.KVM_EXIT_IO)
        assert guest.io() == b"A"
        assert signalled(resample), "the guest's EOI lowered the line"
        assert os.eventfd_read(resample) == 1


# ioeventfd.

PIO = uapi.KVM_IOEVENTFD_FLAG_PIO
MATCH = uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
DEASSIGN = uapi.KVM_IOEVENTFD_FLAG_DEASSIGN


def ioeventfd(fd: int, addr: int, length: int, flags: int = 0, data: int = 0) -> uapi.kvm_ioeventfd:
    return uapi.kvm_ioeventfd(fd=fd, addr=addr, len=length, flags=flags, datamatch=data)


@conforms("KVM_IOEVENTFD", "KVM_RUN")
def test_a_write_to_a_port_becomes_an_event(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("b041e610b042e610f4"))
    event = eventfd(machine)
    ioctl(guest.vm, uapi.KVM_IOEVENTFD, ioeventfd(event, 0x10, 1, PIO | MATCH, 0x42))
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A", "the data do not match"
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert os.eventfd_read(event) == 1
    ioctl(guest.vm, uapi.KVM_IOEVENTFD, ioeventfd(event, 0x10, 1, PIO | MATCH | DEASSIGN, 0x42))
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_IO)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"B"


@conforms("KVM_IOEVENTFD", "KVM_RUN")
@pytest.mark.parametrize("length", [0, 1])
def test_a_write_to_memory_becomes_an_event(machine: Machine, length: int) -> None:
    guest = machine.guest(bytes.fromhex("c60600c05af4"), ram=0x8000)  # mov byte [0xc000], 0x5a
    event = eventfd(machine)
    ioctl(guest.vm, uapi.KVM_IOEVENTFD, ioeventfd(event, 0xC000, length))
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert os.eventfd_read(event) == 1


@conforms("KVM_IOEVENTFD")
def test_ioeventfds_that_cannot_be(machine: Machine, vm: int) -> None:
    event = eventfd(machine)
    none = machine.keep(os.open("/dev/null", os.O_RDONLY))
    cmd = uapi.KVM_IOEVENTFD
    for wrong in (
        ioeventfd(event, 0x10, 3, PIO),
        ioeventfd(event, 0x10, 16, PIO),
        ioeventfd(event, (1 << 64) - 2, 4),
        ioeventfd(event, 0x10, 1, 1 << 7),
        ioeventfd(event, 0x10, 0, PIO | MATCH),
        ioeventfd(none, 0x10, 1, PIO),
    ):
        fails(EINVAL, vm, cmd, wrong)
    fails(EBADF, vm, cmd, ioeventfd(9999, 0x10, 1, PIO))
    fails(EFAULT, vm, cmd, BAD)
    fails(ENOENT, vm, cmd, ioeventfd(event, 0x10, 1, PIO | DEASSIGN))


@conforms("KVM_IOEVENTFD")
def test_ioeventfds_that_match_the_same_write_collide(machine: Machine, vm: int) -> None:
    event, other = eventfd(machine), eventfd(machine)
    cmd = uapi.KVM_IOEVENTFD
    ioctl(vm, cmd, ioeventfd(event, 0x10, 1, PIO | MATCH, 1))
    assert ioctl(vm, cmd, ioeventfd(event, 0x10, 1, PIO | MATCH, 2)) == 0
    assert ioctl(vm, cmd, ioeventfd(event, 0x10, 2, PIO | MATCH, 1)) == 0
    fails(EEXIST, vm, cmd, ioeventfd(other, 0x10, 1, PIO | MATCH, 1))
    fails(EEXIST, vm, cmd, ioeventfd(other, 0x10, 1, PIO))
    fails(ENOENT, vm, cmd, ioeventfd(other, 0x10, 1, PIO | MATCH | DEASSIGN, 1))
    assert errno_of(vm, cmd, ioeventfd(event, 0x10, 1, PIO | MATCH | DEASSIGN, 1)) == 0
