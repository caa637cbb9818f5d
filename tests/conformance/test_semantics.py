"""What clients rely on silently: shared memory, kicks, EINTR, routes, waiting processors."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EAGAIN, EINTR, EIO

import pytest

from anykvm import fs
from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import Guest, Machine, errno_of, fails, get, ioctl
from .test_irqchip import PIC, SLAVE, chip, lapic_word, level

LOOP = b"\xeb\xfe"
KICK = signal.SIGUSR1


@contextmanager
def kicks(*, restart: bool = False, then: object = None) -> Iterator[None]:
    """SIGUSR1 comes every 10 ms, to a handler that does nothing; `then` is called before each."""
    main, stop = threading.get_ident(), threading.Event()

    def kick() -> None:
        while not stop.wait(0.01):
            if callable(then):
                then()
            signal.pthread_kill(main, KICK)

    old = signal.signal(KICK, lambda number, frame: None)
    signal.siginterrupt(KICK, not restart)
    thread = threading.Thread(target=kick)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        signal.signal(KICK, old)


@conforms("KVM_RUN")
def test_all_mappings_of_all_descriptors_of_a_vcpu_are_the_same_memory(machine: Machine) -> None:
    guest = machine.guest(LOOP)
    twin = machine.keep(fs.dup(guest.vcpu))
    views = [guest.kvm_run, machine.kvm_run(guest.vcpu), machine.kvm_run(twin)]
    for number, view in enumerate(views):
        view.request_interrupt_window = 10 + number
        assert {v.request_interrupt_window for v in views} == {10 + number}
    guest.kvm_run.request_interrupt_window = 0
    views[2].immediate_exit = 1
    fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    fails(EINTR, twin, uapi.KVM_RUN)


@conforms("KVM_RUN")
def test_another_thread_ends_the_run_through_another_mapping(machine: Machine) -> None:
    guest = machine.guest(LOOP)
    other = machine.kvm_run(machine.keep(fs.dup(guest.vcpu)))

    def ask() -> None:
        other.immediate_exit = 1

    with kicks(then=ask):
        fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    assert guest.regs().rip == 0x1000


@conforms("KVM_RUN")
def test_eintr_leaves_the_reason_intr_and_not_the_last_exits(machine: Machine) -> None:
    guest = machine.guest(b"\xe6\x10" + LOOP)  # out 0x10, al; then for ever
    guest.run_until(uapi.KVM_EXIT_IO)
    with kicks():
        fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    assert guest.kvm_run.exit_reason == uapi.KVM_EXIT_INTR
    assert guest.regs().rip == 0x1002


@conforms("KVM_RUN")
def test_a_run_is_not_restarted_for_sa_restart(machine: Machine) -> None:
    guest = machine.guest(LOOP)
    with kicks(restart=True):
        for _ in range(3):
            fails(EINTR, guest.vcpu, uapi.KVM_RUN)


@conforms("KVM_RUN", "KVM_CREATE_IRQCHIP")
def test_with_a_local_apic_hlt_waits_in_the_kernel(machine: Machine, irqchip_vm: int) -> None:
    guest = machine.guest(b"\xf4\xf4\xf4", vm=irqchip_vm)
    with kicks():
        fails(EINTR, guest.vcpu, uapi.KVM_RUN)
    assert guest.regs().rip == 0x1001
    state = get(guest.vcpu, uapi.KVM_GET_MP_STATE, uapi.kvm_mp_state)
    assert state.mp_state == uapi.KVM_MP_STATE_HALTED


@conforms("KVM_RUN", "KVM_CREATE_VCPU", "KVM_SET_MP_STATE")
def test_other_processors_wait_to_be_started(machine: Machine, irqchip_vm: int) -> None:
    """KVM_RUN of one that is not started waits for INIT and SIPI; a kick is EINTR."""
    machine.create_vcpu(irqchip_vm, 0)
    second = machine.guest(b"\xf4", vm=irqchip_vm, vcpu_id=1)
    with kicks():
        fails(EINTR, second.vcpu, uapi.KVM_RUN)
    assert second.regs().rip == 0x1000


@conforms("KVM_CREATE_IRQCHIP", "KVM_IRQ_LINE", "KVM_GET_IRQCHIP")
@pytest.mark.parametrize(("gsi", "number", "bit"), [(3, PIC, 3), (7, PIC, 7), (10, SLAVE, 2)])
def test_lines_below_16_lead_to_the_pic(irqchip_vm: int, gsi: int, number: int, bit: int) -> None:
    ioctl(irqchip_vm, uapi.KVM_IRQ_LINE, level(gsi, 1))
    assert chip(irqchip_vm, number).chip.pic.irr >> bit & 1


@conforms("KVM_CREATE_IRQCHIP", "KVM_IRQ_LINE", "KVM_SET_IRQCHIP", "KVM_GET_LAPIC")
@pytest.mark.parametrize("gsi", [1, 9, 16, 23])
def test_lines_lead_to_the_ioapics_pin_of_their_number(
    machine: Machine, irqchip_vm: int, gsi: int
) -> None:
    vcpu = machine.create_vcpu(irqchip_vm)
    state = get(vcpu, uapi.KVM_GET_LAPIC, uapi.kvm_lapic_state)
    state.regs[0xF1] = 1  # SVR's enable bit
    ioctl(vcpu, uapi.KVM_SET_LAPIC, state)
    ioapic = chip(irqchip_vm, uapi.KVM_IRQCHIP_IOAPIC)
    ioapic.chip.ioapic.redirtbl[gsi].bits = 0x40 + gsi
    ioctl(irqchip_vm, uapi.KVM_SET_IRQCHIP, ioapic)
    ioctl(irqchip_vm, uapi.KVM_IRQ_LINE, level(gsi, 1))
    vector = 0x40 + gsi
    assert lapic_word(vcpu, 0x200 + vector // 32 * 16) == 1 << vector % 32


@conforms("KVM_CREATE_VM", "KVM_CREATE_VCPU")
def test_a_vm_is_of_the_process_that_made_it(machine: Machine, vm: int, vcpu: int) -> None:
    """To a child that inherited the descriptors every ioctl of a VM is EIO."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            found = [
                errno_of(vm, uapi.KVM_CHECK_EXTENSION, 0),
                errno_of(vcpu, uapi.KVM_GET_TSC_KHZ),
            ]
            os.write(writer, bytes(found))
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    assert list(os.read(reader, 2)) == [EIO, EIO]
    os.close(reader)


@conforms("KVM_CREATE_VM", "KVM_CREATE_VCPU")
def test_nothing_is_left_of_machines_that_are_closed(machine: Machine) -> None:
    ioctl(machine.kvm, uapi.KVM_GET_API_VERSION)
    machine.close(machine.create_vm())
    with machine.open_files():
        for _ in range(10):
            vm = machine.create_vm()
            vcpus = [machine.create_vcpu(vm, n) for n in range(2)]
            machine.close(vm)
            for vcpu in vcpus:
                machine.close(vcpu)


def run_io(guest: Guest) -> bytes:
    guest.run_until(uapi.KVM_EXIT_IO)
    return guest.io()


@conforms("KVM_RUN", "KVM_CREATE_VM")
def test_two_machines_do_not_see_each_other(machine: Machine) -> None:
    code = bytes.fromhex("b00043e610ebfb")  # again: inc bx; out 0x10, al; jmp again
    one = machine.guest(b"\xb0A" + code[2:], vm=machine.create_vm())
    two = machine.guest(b"\xb0B" + code[2:], vm=machine.create_vm())
    assert [run_io(one), run_io(two), run_io(one), run_io(one)] == [b"A", b"B", b"A", b"A"]
    run_io(two)
    assert (one.regs().rbx & 0xFFFF, two.regs().rbx & 0xFFFF) == (3, 2)


def message(vm: int, data: int) -> None:
    """An MSI to the processor with APIC ID 1."""
    ioctl(vm, uapi.KVM_SIGNAL_MSI, uapi.kvm_msi(address_lo=0xFEE01000, data=data))


@conforms("KVM_RUN", "KVM_SIGNAL_MSI", "KVM_GET_MP_STATE")
@host_may_differ("INIT does not reach the processors of a KVM without VT or SVM")
def test_init_and_sipi_start_a_processor(machine: Machine, irqchip_vm: int) -> None:
    """The run in which INIT arrives is EAGAIN; after SIPI it starts at the vector's page."""
    machine.create_vcpu(irqchip_vm, 0)
    guest = machine.guest(bytes.fromhex("e610f4"), vm=irqchip_vm, vcpu_id=1)

    def state() -> int:
        return get(guest.vcpu, uapi.KVM_GET_MP_STATE, uapi.kvm_mp_state).mp_state

    assert state() == uapi.KVM_MP_STATE_UNINITIALIZED
    message(irqchip_vm, 0x500)  # INIT
    fails(EAGAIN, guest.vcpu, uapi.KVM_RUN)
    assert state() == uapi.KVM_MP_STATE_INIT_RECEIVED
    message(irqchip_vm, 0x601)  # SIPI to page 1
    guest.run_until(uapi.KVM_EXIT_IO)
    assert state() == uapi.KVM_MP_STATE_RUNNABLE
    sregs = get(guest.vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    assert (sregs.cs.selector, sregs.cs.base) == (0x100, 0x1000)
