"""KVM_SET_GUEST_DEBUG, KVM_EXIT_DEBUG and KVM_TRANSLATE (api.rst, 4; the kernel's debug_regs)."""

from __future__ import annotations

from errno import EBUSY, EFAULT

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import BAD, CODE_AT, Guest, Machine, fails, get, ioctl

ENABLE, STEP = uapi.KVM_GUESTDBG_ENABLE, uapi.KVM_GUESTDBG_SINGLESTEP
SW_BP, HW_BP = uapi.KVM_GUESTDBG_USE_SW_BP, uapi.KVM_GUESTDBG_USE_HW_BP
INJECT_DB, INJECT_BP = uapi.KVM_GUESTDBG_INJECT_DB, uapi.KVM_GUESTDBG_INJECT_BP
DEBUG, IO = uapi.KVM_EXIT_DEBUG, uapi.KVM_EXIT_IO
DB, BP = uapi.DB_VECTOR, uapi.BP_VECTOR
DR6, DR7, BS, TF = 0xFFFF0FF0, 0x400, 1 << 14, 1 << 8
VALUE, TABLES = 0x4000, 0x8000
END = b"\xe6\x80"  # out 0x80, al
NO_TRAPS = "without hardware virtualization it may not trap what a processor traps"


def debug(vcpu: int, control: int, *addresses: int, dr7: int = DR7) -> None:
    made = uapi.kvm_guest_debug(control=control)
    made.arch.debugreg[: len(addresses)] = addresses
    made.arch.debugreg[7] = dr7
    ioctl(vcpu, uapi.KVM_SET_GUEST_DEBUG, made)


def stop(guest: Guest) -> tuple[int, int]:
    """The vector and where in the code, of a KVM_EXIT_DEBUG that must come."""
    guest.run_until(DEBUG)
    arch = guest.kvm_run.debug.arch
    return arch.exception, arch.pc - CODE_AT


def dr6(guest: Guest) -> int:
    return guest.kvm_run.debug.arch.dr6


@conforms("KVM_SET_GUEST_DEBUG")
def test_every_control_is_taken(machine: Machine, vcpu: int) -> None:
    machine.require(uapi.KVM_CAP_SET_GUEST_DEBUG)
    assert machine.require(uapi.KVM_CAP_SET_GUEST_DEBUG2) & 0x1F0003 == 0x1F0003
    machine.require(uapi.KVM_CAP_X86_ROBUST_SINGLESTEP)
    for control in (0, ENABLE, STEP, ENABLE | STEP | 1 << 30, ENABLE | HW_BP | SW_BP, 0):
        debug(vcpu, control)
    fails(EFAULT, vcpu, uapi.KVM_SET_GUEST_DEBUG, BAD)


@conforms("KVM_SET_GUEST_DEBUG")
def test_one_exception_at_a_time_is_injected(vcpu: int) -> None:
    debug(vcpu, INJECT_DB)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events).exception
    assert (events.injected, events.nr, events.has_error_code) == (1, DB, 0)
    fails(EBUSY, vcpu, uapi.KVM_SET_GUEST_DEBUG, uapi.kvm_guest_debug(control=INJECT_DB))
    fails(EBUSY, vcpu, uapi.KVM_SET_GUEST_DEBUG, uapi.kvm_guest_debug(control=ENABLE | INJECT_BP))
    regs = get(vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs)
    ioctl(vcpu, uapi.KVM_SET_REGS, regs)  # drops what is pending
    debug(vcpu, INJECT_BP)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events).exception
    assert (events.injected, events.pending) == (0, 0)  # INT3 comes again by itself


@conforms("KVM_SET_GUEST_DEBUG", "KVM_GET_DEBUGREGS")
def test_the_guests_debug_registers_are_its_own(vcpu: int) -> None:
    debug(vcpu, ENABLE | HW_BP, 0x1000, 0x2000, 0x3000, 0x4000, dr7=DR7 | 0xAA)
    regs = get(vcpu, uapi.KVM_GET_DEBUGREGS, uapi.kvm_debugregs)
    assert (list(regs.db), regs.dr6, regs.dr7) == ([0] * 4, DR6, DR7)


@conforms("KVM_SET_GUEST_DEBUG")
@host_may_differ(NO_TRAPS)
def test_a_software_breakpoint_stops_at_int3(machine: Machine) -> None:
    guest = machine.guest(b"\x90\xcc\x90" + END)
    debug(guest.vcpu, ENABLE | SW_BP)
    assert stop(guest) == (BP, 1)
    assert guest.regs().rip == CODE_AT + 1
    guest.write(CODE_AT + 1, b"\x90")
    guest.run_until(IO)


@conforms("KVM_SET_GUEST_DEBUG")
@host_may_differ(NO_TRAPS)
@pytest.mark.parametrize("n", range(4))
def test_breakpoints_in_debug_registers(machine: Machine, n: int) -> None:
    guest = machine.guest(b"\x90\x90\xa2\x00\x40\x90" + END)  # mov [0x4000], al
    addresses = [0] * 4
    addresses[n] = CODE_AT + 1
    debug(guest.vcpu, ENABLE | HW_BP, *addresses, dr7=DR7 | 2 << 2 * n)
    assert (stop(guest), dr6(guest)) == ((DB, 1), DR6 | 1 << n)
    addresses[n] = VALUE
    debug(guest.vcpu, ENABLE | HW_BP, *addresses, dr7=DR7 | 2 << 2 * n | 0xD0000 << 4 * n)
    assert (stop(guest), dr6(guest)) == ((DB, 5), DR6 | 1 << n)
    guest.run_until(IO)
    assert get(guest.vcpu, uapi.KVM_GET_DEBUGREGS, uapi.kvm_debugregs).dr6 == DR6


@conforms("KVM_SET_GUEST_DEBUG")
@host_may_differ(NO_TRAPS)
def test_single_steps(machine: Machine) -> None:
    """Also over what KVM does itself, and over an instruction of which it asks the VMM."""
    sequence = (b"\x31\xc0", b"\x0f\xa2", b"\x66\xb9\xa0\x01\x00\x00", b"\x0f\x32", b"\xe6\x80")
    guest, at = machine.guest(b"".join(sequence) + b"\x90\x90"), 0
    debug(guest.vcpu, ENABLE | STEP | uapi.KVM_GUESTDBG_BLOCKIRQ)
    for instruction in sequence:
        at += len(instruction)
        if instruction == END:
            guest.run_until(IO)
        assert (stop(guest), dr6(guest)) == ((DB, at), DR6 | BS)
        assert not guest.regs().rflags & TF


@conforms("KVM_SET_GUEST_DEBUG")
@host_may_differ(NO_TRAPS)
def test_general_detect(machine: Machine) -> None:
    guest = machine.guest(b"\x90\x0f\x21\xc0" + END)  # mov eax, dr0
    debug(guest.vcpu, ENABLE | HW_BP, dr7=DR7 | 1 << 13)
    assert (stop(guest), dr6(guest)) == ((DB, 1), DR6 | 1 << 13)
    debug(guest.vcpu, 0)
    guest.run_until(IO)


def translate(vcpu: int, address: int) -> int | None:
    """The physical address; None where there is none."""
    made = uapi.kvm_translation(linear_address=address)
    ioctl(vcpu, uapi.KVM_TRANSLATE, made)
    assert (made.writeable, made.usermode) == (1, 0)
    assert made.valid or made.physical_address == 2**64 - 1
    return made.physical_address if made.valid else None


@conforms("KVM_TRANSLATE")
def test_without_paging_addresses_are_physical(vcpu: int) -> None:
    assert translate(vcpu, 0x12345678) == 0x12345678
    fails(EFAULT, vcpu, uapi.KVM_TRANSLATE, BAD)


def paged(machine: Machine, cr0: int, cr4: int, efer: int) -> Guest:
    """A vCPU with these control registers and page tables at TABLES."""
    guest = machine.guest(b"\xf4")
    sregs = get(guest.vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = cr0, TABLES, cr4, efer
    ioctl(guest.vcpu, uapi.KVM_SET_SREGS, sregs)
    return guest


def entry(guest: Guest, table: int, index: int, value: int, size: int = 8) -> None:
    guest.write(TABLES + 0x1000 * table + size * index, value.to_bytes(size, "little"))


@conforms("KVM_TRANSLATE")
def test_translation_by_four_levels(machine: Machine) -> None:
    guest = paged(machine, 0x80000011, 0x20, 0x500)
    for table, index in enumerate((0x1FF, 3, 5)):
        entry(guest, table, index, TABLES + 0x1000 * (table + 1) | 3)
    entry(guest, 2, 6, 0x40000000 | 0x83)
    entry(guest, 3, 7, 0xABCDE000 | 1)
    base = 0xFFFFFF80_00000000 | 3 << 30 | 5 << 21
    assert translate(guest.vcpu, base | 7 << 12 | 0x123) == 0xABCDE123
    assert translate(guest.vcpu, base + (1 << 21) | 0x12345) == 0x40012345
    assert translate(guest.vcpu, base | 8 << 12) is None
    assert translate(guest.vcpu, 0) is None


@conforms("KVM_TRANSLATE")
@host_may_differ("without hardware virtualization it may not know 32-bit paging")
def test_translation_by_two_levels(machine: Machine) -> None:
    guest = paged(machine, 0x80000011, 0x10, 0)
    entry(guest, 0, 1, TABLES + 0x1000 | 3, 4)
    entry(guest, 0, 2, 0x00800000 | 0x83, 4)
    entry(guest, 1, 9, 0x77000 | 3, 4)
    assert translate(guest.vcpu, 1 << 22 | 9 << 12 | 0x45) == 0x77045
    assert translate(guest.vcpu, 2 << 22 | 0x12345) == 0x00812345
    assert translate(guest.vcpu, 3 << 22) is None
