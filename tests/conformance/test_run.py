"""KVM_RUN and what can be injected into a vCPU (api.rst 4.10, 4.16, 4.24, 4.31, 4.38, 4.64, 5)."""

from __future__ import annotations

import ctypes
import signal
import struct
import threading
from errno import EEXIST, EFAULT, EINTR, EINVAL, ENXIO

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import BAD, Guest, Machine, errno_of, fails, flexible, get, ioctl

HLT = b"\xf4"
LOOP = b"\xeb\xfe"
# Vector 0x21 at 0000:1100, sti, out 0x10, 1; then hlt for ever.
TAKER = bytes.fromhex("c70684000011c70686000000fbb001e610f4ebfd")
HANDLER = bytes.fromhex("b041e610cf")  # out 0x10, 'A'; iret


# Exits.


@conforms("KVM_RUN")
@pytest.mark.parametrize(
    ("code", "size", "data"),
    [
        ("b044e610f4", 1, b"\x44"),  # out 0x10, al
        ("b84433e710f4", 2, b"\x44\x33"),  # out 0x10, ax
        ("66b84433221166e710f4", 4, b"\x44\x33\x22\x11"),  # out 0x10, eax
    ],
)
def test_writes_to_ports(machine: Machine, code: str, size: int, data: bytes) -> None:
    guest = machine.guest(bytes.fromhex(code))
    guest.run_until(uapi.KVM_EXIT_IO)
    io = guest.kvm_run.io
    assert (io.direction, io.port, io.size, io.count) == (uapi.KVM_EXIT_IO_OUT, 0x10, size, 1)
    assert guest.io() == data
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_RUN")
@pytest.mark.parametrize(
    ("code", "data", "rax"),
    [
        ("31c0e410f4", b"\x77", 0x77),
        ("31c0e510f4", b"\x77\x66", 0x6677),
        ("66e510f4", b"\x77\x66\x55\x44", 0x44556677),
    ],
)
def test_reads_of_ports(machine: Machine, code: str, data: bytes, rax: int) -> None:
    guest = machine.guest(bytes.fromhex(code))
    guest.run_until(uapi.KVM_EXIT_IO)
    assert (guest.kvm_run.io.direction, guest.kvm_run.io.size) == (uapi.KVM_EXIT_IO_IN, len(data))
    guest.answer(data)
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax == rax


@conforms("KVM_RUN")
def test_strings_to_a_port_arrive_whole_in_one_exit_or_more(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("fcbe0020ba1000b90500f36ef4"))  # rep outsb
    guest.write(0x2000, b"hello")
    seen = b""
    while guest.run_until(uapi.KVM_EXIT_IO, uapi.KVM_EXIT_HLT) == uapi.KVM_EXIT_IO:
        assert guest.kvm_run.io.port == 0x10
        seen += guest.io()
    assert seen == b"hello"
    assert guest.regs().rsi == 0x2005


@conforms("KVM_RUN")
def test_strings_from_a_port(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("fcbf0020ba1000b90400f36cf4"))  # rep insb
    given = iter(b"wxyz")
    while guest.run_until(uapi.KVM_EXIT_IO, uapi.KVM_EXIT_HLT) == uapi.KVM_EXIT_IO:
        guest.answer(bytes(next(given) for _ in range(guest.kvm_run.io.count)))
    assert guest.read(0x2000, 4) == b"wxyz"


@conforms("KVM_RUN")
def test_hlt_and_registers_shared_with_the_caller(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("b83412fbf4"))  # mov ax, 0x1234; sti; hlt
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFFFF == 0x1234
    assert guest.kvm_run.if_flag == 1
    assert guest.kvm_run.cr8 == 0
    assert guest.kvm_run.apic_base & ~0xFFF == 0xFEE00000
    assert guest.kvm_run.ready_for_interrupt_injection == 1


@conforms("KVM_RUN")
@host_may_differ("a KVM without VT or SVM need not look at the IDT's limit in real mode")
def test_a_triple_fault_is_a_shutdown(machine: Machine) -> None:
    guest = machine.guest(b"\x0f\x0b")  # ud2
    sregs = get(guest.vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    sregs.idt.limit = 0
    ioctl(guest.vcpu, uapi.KVM_SET_SREGS, sregs)
    guest.run_until(uapi.KVM_EXIT_SHUTDOWN)


@conforms("KVM_RUN")
def test_the_argument_of_run_is_0(vcpu: int) -> None:
    fails(EINVAL, vcpu, uapi.KVM_RUN, 1)


@conforms("KVM_RUN", "KVM_SET_REGS")
def test_registers_travel_in_the_shared_page(machine: Machine) -> None:
    known = machine.require(uapi.KVM_CAP_SYNC_REGS)
    guest = machine.guest(bytes.fromhex("40f4"))  # inc ax; hlt
    run = guest.kvm_run
    run.kvm_valid_regs = uapi.KVM_SYNC_X86_REGS | uapi.KVM_SYNC_X86_SREGS
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert run.s.regs.regs.rax & 0xFFFF == 1
    assert run.s.regs.sregs.cr0 == get(guest.vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs).cr0
    run.s.regs.regs.rax, run.s.regs.regs.rip = 41, 0x1000
    run.kvm_dirty_regs = uapi.KVM_SYNC_X86_REGS
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert (run.s.regs.regs.rax, guest.regs().rax, run.kvm_dirty_regs) == (42, 42, 0)
    for name in ("kvm_valid_regs", "kvm_dirty_regs"):
        setattr(run, name, 1 << known.bit_length())
        fails(EINVAL, guest.vcpu, uapi.KVM_RUN)
        setattr(run, name, 0)


# Leaving.


@conforms("KVM_RUN")
def test_immediate_exit_is_eintr_before_any_instruction(machine: Machine) -> None:
    guest = machine.guest(LOOP)
    guest.kvm_run.immediate_exit = 1
    fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    assert guest.regs().rip == 0x1000


@conforms("KVM_RUN")
def test_immediate_exit_first_finishes_what_is_under_way(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("e41040f4"))  # in al, 0x10; inc ax; hlt
    guest.run_until(uapi.KVM_EXIT_IO)
    guest.answer(b"\x55")
    guest.kvm_run.immediate_exit = 1
    fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    regs = guest.regs()
    assert (regs.rax & 0xFF, regs.rip) == (0x55, 0x1002)
    assert guest.kvm_run.exit_reason == uapi.KVM_EXIT_IO  # the last exit's
    guest.kvm_run.immediate_exit = 0
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_RUN", "KVM_SET_SIGNAL_MASK")
def test_a_pending_signal_that_the_mask_lets_through_ends_the_run(machine: Machine) -> None:
    guest = machine.guest(LOOP)
    empty = uapi.kvm_signal_mask(len=8)
    assert ioctl(guest.vcpu, uapi.KVM_SET_SIGNAL_MASK, flexible(empty, [bytes(8)])) == 0
    blocked = {signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        fails(EINTR, guest.vcpu, uapi.KVM_RUN)
        assert guest.kvm_run.exit_reason == uapi.KVM_EXIT_INTR
        assert signal.SIGUSR1 in signal.sigpending(), "it stays pending"
    finally:
        signal.sigtimedwait(blocked, 0)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)


@conforms("KVM_SET_SIGNAL_MASK")
def test_signal_masks_that_are_none(vcpu: int) -> None:
    fails(EINVAL, vcpu, uapi.KVM_SET_SIGNAL_MASK, uapi.kvm_signal_mask(len=4))
    fails(EFAULT, vcpu, uapi.KVM_SET_SIGNAL_MASK, BAD)
    assert ioctl(vcpu, uapi.KVM_SET_SIGNAL_MASK, 0) == 0


# Injection.


def taker(machine: Machine) -> Guest:
    """With interrupts on, at the port write that says so."""
    guest = machine.guest(TAKER)
    guest.write(0x1100, HANDLER)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"\x01"
    return guest


@conforms("KVM_INTERRUPT", "KVM_RUN")
def test_the_vmms_interrupt_is_delivered(machine: Machine) -> None:
    guest = taker(machine)
    guest.run_until(uapi.KVM_EXIT_HLT)
    ioctl(guest.vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x21))
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A"
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_INTERRUPT", "KVM_RUN")
@host_may_differ("a KVM without VT or SVM need not see each instruction")
def test_the_vmm_can_wait_for_the_window(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("fab001e610fb90f4"))  # cli; out; sti; nop; hlt
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.kvm_run.ready_for_interrupt_injection == 0
    guest.kvm_run.request_interrupt_window = 1
    guest.run_until(uapi.KVM_EXIT_IRQ_WINDOW_OPEN)
    assert (guest.kvm_run.ready_for_interrupt_injection, guest.kvm_run.if_flag) == (1, 1)
    guest.kvm_run.request_interrupt_window = 0
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_INTERRUPT")
def test_interrupts_that_cannot_be(machine: Machine, vcpu: int, irqchip_vm: int) -> None:
    fails(EINVAL, vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=256))
    fails(EFAULT, vcpu, uapi.KVM_INTERRUPT, BAD)
    kernels = machine.create_vcpu(irqchip_vm)
    fails(ENXIO, kernels, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x21))


@conforms("KVM_INTERRUPT")
def test_a_split_irqchip_takes_one_interrupt_at_a_time(machine: Machine) -> None:
    vm = machine.create_vm()
    machine.enable_cap(vm, uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
    vcpu = machine.create_vcpu(vm)
    assert ioctl(vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x21)) == 0
    fails(EEXIST, vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x22))


@conforms("KVM_NMI", "KVM_RUN")
def test_an_nmi_is_delivered_even_with_interrupts_off(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("fac70608000011c7060a000000b001e610ebfe"))
    guest.write(0x1100, HANDLER)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert ioctl(guest.vcpu, uapi.KVM_NMI) == 0
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A"


@conforms("KVM_GET_VCPU_EVENTS", "KVM_SET_VCPU_EVENTS", "KVM_NMI")
def test_pending_events_are_seen(vcpu: int) -> None:
    first = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (first.nmi.pending, first.interrupt.injected, first.exception.injected) == (0, 0, 0)
    assert first.flags & uapi.KVM_VCPUEVENT_VALID_SHADOW
    ioctl(vcpu, uapi.KVM_NMI)
    ioctl(vcpu, uapi.KVM_INTERRUPT, uapi.kvm_interrupt(irq=0x30))
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (events.nmi.pending, events.interrupt.injected, events.interrupt.nr) == (1, 1, 0x30)
    first.flags = uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    ioctl(vcpu, uapi.KVM_SET_VCPU_EVENTS, first)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (events.nmi.pending, events.interrupt.injected) == (0, 0)


@conforms("KVM_SET_VCPU_EVENTS", "KVM_GET_VCPU_EVENTS")
def test_an_exception_can_be_injected(machine: Machine) -> None:
    guest = machine.guest(HLT)
    guest.write(0x1100, HANDLER)
    guest.write(6 * 4, struct.pack("<HH", 0x1100, 0))  # #UD
    events = get(guest.vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    events.exception.injected, events.exception.nr = 1, 6
    ioctl(guest.vcpu, uapi.KVM_SET_VCPU_EVENTS, events)
    found = get(guest.vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    assert (found.exception.injected, found.exception.nr) == (1, 6)
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.io() == b"A"
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_SET_VCPU_EVENTS")
def test_events_that_cannot_be(vcpu: int) -> None:
    for nr in (2, 32):
        events = uapi.kvm_vcpu_events()
        events.exception.injected, events.exception.nr = 1, nr
        fails(EINVAL, vcpu, uapi.KVM_SET_VCPU_EVENTS, events)
    fails(EINVAL, vcpu, uapi.KVM_SET_VCPU_EVENTS, uapi.kvm_vcpu_events(flags=1 << 20))


@conforms("KVM_GET_MP_STATE", "KVM_SET_MP_STATE")
def test_the_states_of_a_processor(machine: Machine, vcpu: int, irqchip_vm: int) -> None:
    first, second = machine.create_vcpu(irqchip_vm, 0), machine.create_vcpu(irqchip_vm, 1)
    states = [get(v, uapi.KVM_GET_MP_STATE, uapi.kvm_mp_state).mp_state for v in (first, second)]
    assert states == [uapi.KVM_MP_STATE_RUNNABLE, uapi.KVM_MP_STATE_UNINITIALIZED]
    for state in (
        uapi.KVM_MP_STATE_HALTED,
        uapi.KVM_MP_STATE_INIT_RECEIVED,
        uapi.KVM_MP_STATE_RUNNABLE,
    ):
        ioctl(second, uapi.KVM_SET_MP_STATE, uapi.kvm_mp_state(state))
        assert get(second, uapi.KVM_GET_MP_STATE, uapi.kvm_mp_state).mp_state == state
    fails(EINVAL, second, uapi.KVM_SET_MP_STATE, uapi.kvm_mp_state(77))
    halted = uapi.kvm_mp_state(uapi.KVM_MP_STATE_HALTED)
    assert errno_of(vcpu, uapi.KVM_SET_MP_STATE, halted) == EINVAL, "no local APIC here"
    assert errno_of(vcpu, uapi.KVM_SET_MP_STATE, uapi.kvm_mp_state(0)) == 0


# The virtual APIC page.


@conforms("KVM_SET_VAPIC_ADDR")
def test_the_virtual_apic_page_is_guest_memory(
    machine: Machine, vcpu: int, irqchip_vm: int
) -> None:
    guest = machine.guest(HLT, vm=irqchip_vm)
    address = uapi.kvm_vapic_addr(vapic_addr=0x3000)
    assert ioctl(guest.vcpu, uapi.KVM_SET_VAPIC_ADDR, address) == 0
    assert ioctl(guest.vcpu, uapi.KVM_SET_VAPIC_ADDR, uapi.kvm_vapic_addr(0)) == 0
    fails(EFAULT, guest.vcpu, uapi.KVM_SET_VAPIC_ADDR, BAD)
    fails(EINVAL, guest.vcpu, uapi.KVM_SET_VAPIC_ADDR, uapi.kvm_vapic_addr(1 << 40))
    fails(EINVAL, vcpu, uapi.KVM_SET_VAPIC_ADDR, BAD)


@conforms("KVM_TPR_ACCESS_REPORTING")
def test_reporting_of_tpr_accesses(vcpu: int) -> None:
    control = uapi.kvm_tpr_access_ctl(enabled=1)
    assert ioctl(vcpu, uapi.KVM_TPR_ACCESS_REPORTING, control) == 0
    control.flags = 1
    fails(EINVAL, vcpu, uapi.KVM_TPR_ACCESS_REPORTING, control)
    fails(EFAULT, vcpu, uapi.KVM_TPR_ACCESS_REPORTING, BAD)


# The descriptor's memory.


@conforms("KVM_RUN", "KVM_GET_VCPU_MMAP_SIZE")
def test_nothing_is_behind_the_area(machine: Machine, vcpu: int) -> None:
    size = ioctl(machine.kvm, uapi.KVM_GET_VCPU_MMAP_SIZE)
    area = machine.map(vcpu)
    assert ctypes.sizeof(uapi.kvm_run) < size == len(area)
    assert area.view(uapi.kvm_run).exit_reason == 0
