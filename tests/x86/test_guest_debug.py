"""KVM_SET_GUEST_DEBUG and KVM_TRANSLATE on the software processor, as the kernel's debug_regs test
and gdb stubs use them.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from anykvm.api import Vcpu
from anykvm.uapi import kvm as uapi
from anykvm.vmm.long_mode import entry_regs

from .long_guest import CODE, OUT_END, RAM, LongGuest, long_guest

ENABLE, STEP = uapi.KVM_GUESTDBG_ENABLE, uapi.KVM_GUESTDBG_SINGLESTEP
SW_BP, HW_BP = uapi.KVM_GUESTDBG_USE_SW_BP, uapi.KVM_GUESTDBG_USE_HW_BP
INJECT_DB, INJECT_BP = uapi.KVM_GUESTDBG_INJECT_DB, uapi.KVM_GUESTDBG_INJECT_BP
BLOCKIRQ = uapi.KVM_GUESTDBG_BLOCKIRQ
DEBUG, IO = uapi.KVM_EXIT_DEBUG, uapi.KVM_EXIT_IO
DB, BP = uapi.DB_VECTOR, uapi.BP_VECTOR
DR6, DR7, BD, BS = 0xFFFF0FF0, 0x400, 1 << 13, 1 << 14
VALUE, IDT, HANDLER = 0x40000, 0x41000, 0x42000  # the guest's
TF, IF = 1 << 8, 1 << 9


class Debugged:
    """A guest in long mode, and what a debugger does to it."""

    def __init__(self, guest: LongGuest) -> None:
        self.guest, self.vcpu = guest, guest.vcpus[0]

    def load(self, code: bytes, rflags: int = 2, **gpr: int) -> None:
        self.guest.memory.write(CODE, code + OUT_END)
        regs = entry_regs(CODE, 0)
        regs.rsp, regs.rflags = CODE + 0x1000, rflags
        for name, value in gpr.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def debug(self, control: int, *addresses: int, dr7: int = DR7) -> None:
        debug = uapi.kvm_guest_debug(control=control)
        debug.arch.debugreg[: len(addresses)] = addresses
        debug.arch.debugreg[7] = dr7
        self.vcpu.set_guest_debug(debug)

    def stop(self) -> tuple[int, int]:
        """The vector and where in the code, of a KVM_EXIT_DEBUG."""
        assert self.vcpu.run() == DEBUG
        arch = self.vcpu.kvm_run.debug.arch
        return arch.exception, arch.pc - CODE

    @property
    def dr6(self) -> int:
        return self.vcpu.kvm_run.debug.arch.dr6

    def offset(self) -> int:
        return self.vcpu.get_regs().rip - CODE

    def handlers(self) -> None:
        """An IDT whose handlers for interrupts and exceptions only return."""
        memory, sregs = self.guest.memory, self.vcpu.get_sregs()
        gate = HANDLER & 0xFFFF | sregs.cs.selector << 16 | 0x8E00 << 32 | (HANDLER >> 16) << 48
        memory.write(IDT, (gate.to_bytes(8, "little") + bytes(8)) * 256)
        memory.write(HANDLER, b"\x90\x48\xcf")  # nop; iretq
        sregs.idt.base, sregs.idt.limit = IDT, 0xFFF
        self.vcpu.set_sregs(sregs)


@pytest.fixture
def debugged() -> Iterator[Debugged]:
    with long_guest() as guest:
        yield Debugged(guest)


def test_software_breakpoints(debugged: Debugged) -> None:
    debugged.load(b"\x90\xcc\x90")
    debugged.debug(ENABLE | SW_BP)
    assert debugged.stop() == (BP, 1)
    assert debugged.offset() == 1
    debugged.load(b"\x90\x90\x90")
    assert debugged.vcpu.run() == IO


@pytest.mark.parametrize("n", range(4))
def test_hardware_breakpoints_on_instructions_and_data(debugged: Debugged, n: int) -> None:
    """The addresses and the expectations of debug_regs."""
    write = b"\x48\x89\x03"  # mov [rbx], rax
    debugged.load(b"\x90\x90" + write + b"\x90", rbx=VALUE)
    addresses = [0] * 4
    addresses[n] = CODE + 1
    debugged.debug(ENABLE | HW_BP, *addresses, dr7=DR7 | 1 << 2 * n + 1)
    assert (debugged.stop(), debugged.dr6) == ((DB, 1), DR6 | 1 << n)
    addresses[n] = VALUE
    dr7 = DR7 | 1 << 2 * n + 1 | 0x000D0000 << 4 * n
    debugged.debug(ENABLE | HW_BP, *addresses, dr7=dr7)
    assert (debugged.stop(), debugged.dr6) == ((DB, 5), DR6 | 1 << n)
    assert debugged.vcpu.kvm_run.debug.arch.dr7 == dr7
    assert debugged.vcpu.get_debugregs().dr6 == DR6  # the guest's own does not know
    assert debugged.vcpu.run() == IO


@pytest.mark.parametrize("rewritten", [False, True])
def test_a_debugger_goes_on_from_its_breakpoint(debugged: Debugged, rewritten: bool) -> None:
    """RF is set where it stopped, as VMX leaves it, also for who writes the registers back."""
    debugged.load(b"\x90\x90\x90\xeb\xfd")  # nop; nop; 1: nop; jmp 1b
    for control, at in ((ENABLE | HW_BP, 1), (ENABLE | HW_BP | STEP, 2)):
        debugged.debug(control, CODE + 1, dr7=DR7 | 2)
        if rewritten:
            debugged.vcpu.set_regs(debugged.vcpu.get_regs())
        assert debugged.stop() == (DB, at)
    debugged.debug(ENABLE | HW_BP, CODE + 2, dr7=DR7 | 2)
    assert [debugged.stop() for _ in range(3)] == [(DB, 2)] * 3  # each time round


def test_another_breakpoint_where_it_stands_is_met(debugged: Debugged) -> None:
    """debug_regs moves its breakpoint from DR0 to DR3."""
    debugged.load(b"\x90\x90\x90")
    for n in range(4):
        addresses = [0] * 4
        addresses[n] = CODE + 1
        debugged.debug(ENABLE | HW_BP, *addresses, dr7=DR7 | 1 << 2 * n + 1)
        assert (debugged.stop(), debugged.dr6) == ((DB, 1), DR6 | 1 << n)
    debugged.debug(0)
    assert debugged.vcpu.run() == IO


def test_single_steps_over_what_leaves(debugged: Debugged) -> None:
    """debug_regs' sequence with interrupts blocked, and a port the VMM has, a string, HLT."""
    vcpu = debugged.vcpu
    sequence = (
        b"\xfb", b"\x31\xc0", b"\x0f\xa2", b"\xb9\xa0\x01\x00\x00", b"\x0f\x32", b"\xfa",
        b"\xe6\x55", b"\x8b\x03",
    )  # fmt: skip
    debugged.handlers()
    debugged.load(b"".join(sequence), rbx=2 * RAM)
    lapic = vcpu.get_lapic()
    lapic.regs[0xF0] = 0xFF  # software enable
    lapic.regs[0xF1] = 1
    lapic.regs[0x210 + 0x40 // 32 * 16] = 1  # IRR: vector 0x40 waits
    vcpu.set_lapic(lapic)
    debugged.debug(ENABLE | STEP | BLOCKIRQ)
    at = 0
    for instruction in sequence:
        at += len(instruction)
        reason = vcpu.run()
        if instruction[0] == 0xE6:
            assert reason == IO
            reason = vcpu.run()
        elif instruction[0] == 0x8B:
            assert reason == uapi.KVM_EXIT_MMIO
            vcpu.mmio_data()[:] = b"\x78\x56\x34\x12"
            reason = vcpu.run()
        arch = vcpu.kvm_run.debug.arch
        assert (reason, arch.exception, arch.pc - CODE, arch.dr6) == (DEBUG, DB, at, DR6 | BS)
    assert vcpu.get_regs().rax == 0x12345678
    assert not vcpu.get_regs().rflags & TF
    debugged.debug(0)
    assert vcpu.run() == IO


def test_an_instruction_under_way_counts_as_the_first_step(debugged: Debugged) -> None:
    debugged.load(b"\xe6\x55\x90\x90")
    assert debugged.vcpu.run() == IO
    debugged.debug(ENABLE | STEP)
    assert debugged.stop() == (DB, 2)
    debugged.debug(0)
    assert debugged.vcpu.run() == IO
    assert debugged.vcpu.kvm_run.io.port == OUT_END[1]


def test_interrupts_wait_while_they_are_blocked(debugged: Debugged) -> None:
    vcpu = debugged.vcpu
    debugged.handlers()
    debugged.load(b"\xfb" + b"\x90" * 8)
    lapic = vcpu.get_lapic()
    lapic.regs[0xF0], lapic.regs[0xF1] = 0xFF, 1
    lapic.regs[0x210 + 0x40 // 32 * 16] = 1
    vcpu.set_lapic(lapic)
    debugged.debug(ENABLE | STEP | BLOCKIRQ)
    assert [debugged.stop()[1] for _ in range(4)] == [1, 2, 3, 4]
    debugged.debug(ENABLE | STEP)
    stopped = debugged.stop()[1]
    assert stopped + CODE == HANDLER + 1
    assert debugged.stop()[1] == 4


def test_hlt_is_stepped_over_and_waits_afterwards(debugged: Debugged) -> None:
    debugged.load(b"\xf4\x90")
    debugged.debug(ENABLE | STEP)
    assert debugged.stop() == (DB, 1)
    assert debugged.vcpu.get_mp_state() == uapi.KVM_MP_STATE_HALTED


def test_general_detect_of_the_debugger(debugged: Debugged) -> None:
    debugged.load(b"\x90\x0f\x21\xc0")  # mov rax, dr0
    debugged.debug(ENABLE | HW_BP, dr7=DR7 | 1 << 13)
    assert (debugged.stop(), debugged.dr6) == ((DB, 1), DR6 | BD)
    debugged.debug(0)
    assert debugged.vcpu.run() == IO


def test_the_guests_own_breakpoints_come_back_with_the_debugger_gone(debugged: Debugged) -> None:
    vcpu = debugged.vcpu
    debugged.handlers()
    regs = vcpu.get_debugregs()
    regs.db[2], regs.dr7 = VALUE, DR7 | 2 << 4 | 1 << 24
    vcpu.set_debugregs(regs)
    write = b"\x88\x03\x90"
    debugged.load(write, rbx=VALUE)
    debugged.debug(ENABLE | HW_BP, VALUE + 1, dr7=DR7 | 2 | 1 << 16)
    assert vcpu.run() == IO  # neither
    assert vcpu.get_debugregs().dr6 == DR6
    debugged.debug(0)
    debugged.load(write, rbx=VALUE)
    assert vcpu.run() == IO
    assert vcpu.get_debugregs().dr6 == DR6 | 4


def test_a_breakpoint_that_is_the_guests_is_given_back(debugged: Debugged) -> None:
    """KVM_GUESTDBG_INJECT_BP and _DB: the handler returns behind INT3, and to where #DB was."""
    debugged.handlers()
    debugged.load(b"\x90\xcc\x90")
    debugged.debug(ENABLE | SW_BP)
    assert debugged.stop() == (BP, 1)
    debugged.debug(ENABLE | SW_BP | INJECT_BP)
    with pytest.raises(OSError, match="pending") as failure:
        debugged.debug(ENABLE | SW_BP | INJECT_DB)
    assert failure.value.errno == errno.EBUSY
    assert debugged.vcpu.run() == IO
    pushed = debugged.guest.memory.read(CODE + 0x1000 - 40, 8)
    assert int.from_bytes(pushed, "little") == CODE + 2
    debugged.load(b"\x90")
    debugged.debug(INJECT_DB)
    assert debugged.vcpu.run() == IO


def test_a_pending_trap_is_part_of_the_state(debugged: Debugged) -> None:
    """TF over a port access that was finished with immediate_exit: #DB is in the events."""
    vcpu, vm = debugged.vcpu, debugged.guest.vm
    debugged.handlers()
    vm.enable_cap(uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    debugged.load(b"\xe6\x55\x90", rflags=2 | TF)
    assert vcpu.run() == IO
    vcpu.kvm_run.immediate_exit = 1
    assert vcpu.run() == uapi.KVM_EXIT_INTR
    vcpu.kvm_run.immediate_exit = 0
    events = vcpu.get_vcpu_events()
    exception = events.exception
    assert (exception.pending, exception.injected, exception.nr) == (1, 0, DB)
    assert (events.exception_has_payload, events.exception_payload) == (1, BS)
    assert vcpu.get_debugregs().dr6 == DR6
    events.flags |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    vcpu.set_vcpu_events(events)
    debugged.debug(ENABLE | HW_BP, HANDLER, dr7=DR7 | 2)
    assert debugged.stop()[1] + CODE == HANDLER
    assert vcpu.get_debugregs().dr6 == DR6 | BS


PAGE_TABLES = 0x50000


def translate(vcpu: Vcpu, address: int) -> int | None:
    found = vcpu.translate(address)
    assert (found.writeable, found.usermode) == (1, 0)
    assert found.valid or found.physical_address == 2**64 - 1
    return found.physical_address if found.valid else None


def test_translate_without_paging(debugged: Debugged) -> None:
    with debugged.guest.vm.create_vcpu(1) as vcpu:
        assert translate(vcpu, 0x1234_5678_9ABC) == 0x1234_5678_9ABC


def test_translate_four_levels(debugged: Debugged) -> None:
    memory, vcpu = debugged.guest.memory, debugged.vcpu
    sregs = vcpu.get_sregs()
    sregs.cr3 = PAGE_TABLES
    vcpu.set_sregs(sregs)
    for level in range(3):
        table = PAGE_TABLES + 0x1000 * level
        memory.write(table + 8 * (0x1FF, 3, 5)[level], (table + 0x1000 | 3).to_bytes(8, "little"))
    memory.write(PAGE_TABLES + 0x2000, (0x40000000 | 0x83).to_bytes(8, "little"))
    memory.write(PAGE_TABLES + 0x3000 + 8 * 7, (0xABCDE000 | 1).to_bytes(8, "little"))
    base = 0xFFFFFF8000000000 | 3 << 30
    assert translate(vcpu, base | 5 << 21 | 7 << 12 | 0x123) == 0xABCDE123
    assert translate(vcpu, base | 0x12345) == 0x40012345
    assert translate(vcpu, base | 5 << 21 | 8 << 12) is None
    assert translate(vcpu, 0) is None


def test_translate_32_bit_and_pae(debugged: Debugged) -> None:
    memory = debugged.guest.memory
    with debugged.guest.vm.create_vcpu(1) as vcpu:
        memory.write(PAGE_TABLES + 4 * 1, (PAGE_TABLES + 0x1000 | 3).to_bytes(4, "little"))
        memory.write(PAGE_TABLES + 4 * 2, (0x00800000 | 0x83).to_bytes(4, "little"))
        memory.write(PAGE_TABLES + 0x1000 + 4 * 9, (0x77000 | 3).to_bytes(4, "little"))
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4 = 0x80000011, PAGE_TABLES, 0x10
        vcpu.set_sregs(sregs)
        assert translate(vcpu, 1 << 22 | 9 << 12 | 0x45) == 0x77045
        assert translate(vcpu, 2 << 22 | 0x12345) == 0x00812345
        assert translate(vcpu, 3 << 22) is None
        for at, value in ((8, PAGE_TABLES + 0x2000 | 1), (0x2000, 0x1_0020_0083)):
            memory.write(PAGE_TABLES + at, value.to_bytes(8, "little"))
        sregs.cr4 = 0x20
        vcpu.set_sregs(sregs)
        assert translate(vcpu, 1 << 30 | 0x1F0) == 0x1_0020_01F0


def test_capabilities(debugged: Debugged) -> None:
    kvm = debugged.guest.kvm
    assert kvm.check_extension(uapi.KVM_CAP_SET_GUEST_DEBUG) == 1
    assert kvm.check_extension(uapi.KVM_CAP_SET_GUEST_DEBUG2) == 0x1F0003
    assert kvm.check_extension(uapi.KVM_CAP_X86_ROBUST_SINGLESTEP) == 1
