"""Capabilities of a VM that change its processors: quirks, exits, limits."""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi
from anykvm.vmm.memory_map import PAGE_TABLES_ADDRESS

from .fake_engine import FakeCpu, load, port_out, rdmsr, store, wrmsr
from .long_guest import CODE, RAM, LongGuest, long_guest
from .machine import machine

MONITOR, MWAIT, HLT, CPUID = b"\x0f\x01\xc8", b"\x0f\x01\xc9", b"\xf4", b"\x0f\xa2"
MISC_ENABLE, MISC_ENABLE_MWAIT, CPUID_MWAIT = 0x1A0, 1 << 18, 1 << 3
PLATFORM_INFO, MISC_FEATURES = 0xCE, 0x140
LAPIC_BASE = 0xFEE00000
ALL_QUIRKS = 0x7F
HALTING = 0x3000
USER = 3


def refused(function, *args) -> None:
    with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
        function(*args)


def user_mode(guest: LongGuest) -> None:
    """What runs from now on runs in ring 3."""
    for table in range(3):
        at = PAGE_TABLES_ADDRESS + 0x1000 * table
        guest.memory.write(at, bytes((guest.memory.read(at, 1)[0] | 4,)))
    sregs = guest.vcpus[0].get_sregs()
    sregs.ss.dpl = sregs.cs.dpl = USER
    sregs.ss.selector |= USER
    sregs.cs.selector |= USER
    guest.vcpus[0].set_sregs(sregs)


# Quirks.


def test_every_quirk_of_linux_can_be_disabled():
    with machine() as m:
        assert m.kvm.check_extension(uapi.KVM_CAP_DISABLE_QUIRKS2) == ALL_QUIRKS
        m.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, ALL_QUIRKS)
        refused(m.vm.enable_cap, uapi.KVM_CAP_DISABLE_QUIRKS2, 0x80)
        m.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS, 0xFFFF)


@pytest.mark.parametrize("insn", [MONITOR, MWAIT])
def test_monitor_and_mwait_do_nothing_or_are_undefined(insn):
    with long_guest() as guest:
        assert guest.execute(insn, rax=CODE) == CODE
        guest.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
        assert guest.start(insn, rax=CODE) == uapi.KVM_EXIT_SHUTDOWN  # no IDT


def test_monitor_in_user_mode_is_undefined():
    with long_guest() as guest:
        user_mode(guest)
        assert guest.start(MONITOR, rax=CODE) == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.parametrize("follows", [False, True])
def test_cpuids_mwait_follows_misc_enable_without_the_quirk(follows):
    with long_guest() as guest:
        quirks = uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
        if follows:
            quirks |= uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
        guest.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, quirks)
        before = guest.rdmsr(MISC_ENABLE)
        assert before is not None
        assert guest.wrmsr(MISC_ENABLE, before | MISC_ENABLE_MWAIT)
        guest.execute(CPUID, rax=1)
        assert bool(guest.vcpus[0].get_regs().rcx & CPUID_MWAIT) == follows
        ended = uapi.KVM_EXIT_IO if follows else uapi.KVM_EXIT_SHUTDOWN
        assert guest.start(MWAIT) == ended


@pytest.mark.parametrize("quirk", [True, False])
def test_the_page_of_an_apic_that_is_not_there(quirk):
    with machine(irqchip=True) as m:
        if not quirk:
            m.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, uapi.KVM_X86_QUIRK_LAPIC_MMIO_HOLE)
        vcpu = m.add_vcpu(load(LAPIC_BASE + 0x20, 4), store(LAPIC_BASE + 0x80, b"1234"))
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        vcpu.set_msrs({0x1B: LAPIC_BASE | 0xD00})  # x2APIC mode
        if quirk:
            m.cpu().script.append(port_out(0x80, b"e"))
            assert vcpu.run() == uapi.KVM_EXIT_IO
            expected = [("mmio_read", b"\xff" * 4), ("mmio_write",)]
            assert m.cpu().did("mmio_read", "mmio_write") == expected
        else:
            assert vcpu.run() == uapi.KVM_EXIT_MMIO
            assert vcpu.run() == uapi.KVM_EXIT_MMIO
            assert vcpu.kvm_run.mmio.is_write


@pytest.mark.parametrize(("port", "quirk"), [(0x7E, True), (0x7E, False), (0x7F, True)])
def test_rip_behind_an_out_to_port_7e(port, quirk):
    with long_guest() as guest:
        if not quirk:
            guest.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS, uapi.KVM_X86_QUIRK_OUT_7E_INC_RIP)
        assert guest.start(bytes((0xE6, port))) == uapi.KVM_EXIT_IO
        behind = quirk and port == 0x7E
        assert guest.vcpus[0].get_regs().rip == CODE + 2 * behind
        assert guest.vcpus[0].run() == uapi.KVM_EXIT_IO
        assert guest.vcpus[0].kvm_run.io.port == 0x80


# HLT without exits, polling.


@contextmanager
def signal_in(seconds: float) -> Iterator[None]:
    """SIGUSR1 for this thread."""
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    this = threading.get_ident()
    sender = threading.Timer(seconds, signal.pthread_kill, (this, signal.SIGUSR1))
    sender.start()
    yield
    sender.join()
    signal.signal(signal.SIGUSR1, before)


def halt_after(event: threading.Event):
    """The guest halts; nothing can come too early for that once the event is set."""

    def step(cpu: FakeCpu) -> Exit:
        event.set()
        return Exit.HLT

    return step


def nmi_after(event: threading.Event, vm) -> None:
    assert event.wait(10)
    time.sleep(0.005)
    message(vm, 4)


def halt_polls(vcpu) -> int:
    with vcpu.stats_fd() as stats:
        return stats.read()["halt_successful_poll"].value


def message(vm, delivery_mode: int) -> None:
    """To the local APIC 0: 2 is an SMI, 4 an NMI."""
    assert vm.signal_msi(uapi.kvm_msi(address_lo=LAPIC_BASE, data=delivery_mode << 8)) == 1


def smi_after(guest: LongGuest) -> None:
    """Once the guest has written that it is about to halt, and a while later."""
    end = time.monotonic() + 10
    while guest.memory.read(HALTING, 1) == b"\0" and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(0.1)
    message(guest.vm, 2)


def test_hlt_without_exits_waits_inside():
    with long_guest() as guest:
        value = guest.kvm.check_extension(uapi.KVM_CAP_X86_DISABLE_EXITS)
        assert value == uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE
        refused(guest.vm.enable_cap, uapi.KVM_CAP_X86_DISABLE_EXITS, 1 << 4)
        guest.vm.enable_cap(uapi.KVM_CAP_X86_DISABLE_EXITS, 0xF)
        vcpu = guest.vcpus[0]
        guest.vm.set_user_memory_region(1 << 16, 0, RAM, guest.memory.userspace_addr)
        guest.memory.write(0x38000, b"\xe6\x41")  # where an SMI leads to
        guest._finish_last_exit(0)
        sender = threading.Thread(target=smi_after, args=(guest,))
        began = time.monotonic()
        sender.start()
        assert guest.start(b"\xc6\x07\x01" + HLT, rdi=HALTING) == uapi.KVM_EXIT_IO
        assert time.monotonic() - began > 0.1
        assert vcpu.kvm_run.io.port == 0x41
        assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
        sender.join()


def test_hlt_without_exits_nor_irqchip_goes_on_after_a_signal():
    with machine() as m:
        m.vm.enable_cap(uapi.KVM_CAP_X86_DISABLE_EXITS, uapi.KVM_X86_DISABLE_EXITS_HLT)
        vcpu = m.add_vcpu(Exit.HLT, port_out(0x80, b"e"))
        with signal_in(0.05):
            assert vcpu.run() == uapi.KVM_EXIT_INTR
        assert m.cpu().script  # the guest is where it was
        with signal_in(0.05):
            assert vcpu.run() == uapi.KVM_EXIT_INTR
        vcpu.nmi()
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert m.cpu().did("nmi") == [("nmi",)]


def test_halt_polling_grows_and_finds_work():
    with machine(irqchip=True) as m:
        assert m.kvm.check_extension(uapi.KVM_CAP_HALT_POLL) == 1
        refused(m.vm.enable_cap, uapi.KVM_CAP_HALT_POLL, 1 << 32)
        m.vm.enable_cap(uapi.KVM_CAP_HALT_POLL, 1_000_000_000)
        vcpu = m.add_vcpu()
        polled = []
        for _ in range(16):
            halting = threading.Event()
            m.cpu().script += [halt_after(halting), port_out(0x80, b"e")]
            sender = threading.Thread(target=nmi_after, args=(halting, m.vm))
            sender.start()
            assert vcpu.run() == uapi.KVM_EXIT_IO
            sender.join()
            polled.append(halt_polls(vcpu))
        assert polled[0] == 0
        assert polled[-1] > 0
        assert len(m.cpu().did("nmi")) == 16


# MSRs and CPUID.


def test_platform_info_can_be_kept_from_the_guest():
    with machine() as m:
        vcpu = m.add_vcpu(rdmsr(PLATFORM_INFO), port_out(0x80, b"e"))
        m.vm.enable_cap(uapi.KVM_CAP_MSR_PLATFORM_INFO, 0)
        vcpu.run()
        assert m.cpu().did("msr", "exception") == [("exception", 13, 0)]
        assert vcpu.get_msrs([PLATFORM_INFO]) == {PLATFORM_INFO: 1 << 31}
        m.vm.enable_cap(uapi.KVM_CAP_MSR_PLATFORM_INFO, 1)
        vcpu.set_msrs({PLATFORM_INFO: 1 << 31 | 0xFF00})
        m.cpu().script += [rdmsr(PLATFORM_INFO), wrmsr(PLATFORM_INFO, 0), port_out(0x80, b"e")]
        vcpu.run()
        expected = [("exception", 13, 0), ("msr", 1 << 31 | 0xFF00), ("exception", 13, 0)]
        assert m.cpu().did("msr", "exception") == expected


def test_cpuid_faulting():
    with long_guest() as guest:
        assert guest.wrmsr(MISC_FEATURES, 1)
        assert guest.start(CPUID, rax=0) == uapi.KVM_EXIT_IO  # at CPL 0
        user_mode(guest)
        assert guest.start(CPUID, rax=0) == uapi.KVM_EXIT_SHUTDOWN


# Emulation failures, bus locks.


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("ring", [0, USER])
def test_what_nobody_can_execute(ring, enabled):
    with machine() as m:
        if enabled:
            m.vm.enable_cap(uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1)
        vcpu = m.add_vcpu()
        sregs = vcpu.get_sregs()
        sregs.cr0 |= 1
        sregs.ss.dpl = ring
        vcpu.set_sregs(sregs)
        m.cpu().state.insn_len = 2
        m.cpu().state.insn_bytes[:2] = [0x0F, 0xFF]
        m.cpu().script += [Exit.EMULATION, port_out(0x80, b"e")]
        ud = [("exception", 6, None)]
        if ring and not enabled:
            assert vcpu.run() == uapi.KVM_EXIT_IO
            assert m.cpu().did("exception") == ud
            return
        assert vcpu.run() == uapi.KVM_EXIT_INTERNAL_ERROR
        failure = vcpu.kvm_run.emulation_failure
        assert (failure.suberror, failure.ndata, failure.insn_size) == (1, 3, 2)
        assert bytes(failure.insn_bytes) == b"\x0f\xff" + b"\x90" * 13
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert m.cpu().did("exception") == ([] if enabled else ud)
        refused(m.vm.enable_cap, uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 2)


LOCKED = {
    "across a line": (b"\xf0\x48\x01\x07", 0x303C, True),  # lock add [rdi], rax
    "inside a line": (b"\xf0\x48\x01\x07", 0x3038, False),
    "across a page": (b"\xf0\x48\x01\x07", 0x3FFC, True),
    "xchg": (b"\x48\x87\x07", 0x303E, True),
    "not locked": (b"\x48\x01\x07", 0x303C, False),
    "cmpxchg": (b"\xf0\x48\x0f\xb1\x1f", 0x303C, True),
}


@pytest.mark.parametrize("case", LOCKED)
def test_bus_locks_exit_when_they_are_done(case):
    code, address, locks = LOCKED[case]
    with long_guest() as guest:
        guest.vm.enable_cap(uapi.KVM_CAP_X86_BUS_LOCK_EXIT, uapi.KVM_BUS_LOCK_DETECTION_EXIT)
        vcpu = guest.vcpus[0]
        reason = guest.start(code, rdi=address, rax=0x11)
        if locks:
            assert reason == uapi.KVM_EXIT_X86_BUS_LOCK
            assert vcpu.kvm_run.flags == uapi.KVM_RUN_X86_BUS_LOCK
            assert vcpu.get_regs().rip == CODE + len(code)
            reason = vcpu.run()
        assert reason == uapi.KVM_EXIT_IO
        assert not vcpu.kvm_run.flags
        if case != "cmpxchg":
            assert guest.memory.read(address, 8) == (0x11).to_bytes(8, "little")


def test_bus_locks_are_nothing_special_by_default():
    with long_guest() as guest:
        cap = uapi.KVM_CAP_X86_BUS_LOCK_EXIT
        assert guest.kvm.check_extension(cap) == 3
        for wrong in (3, 4):
            refused(guest.vm.enable_cap, cap, wrong)
        guest.vm.enable_cap(cap, uapi.KVM_BUS_LOCK_DETECTION_OFF)
        code, address, _ = LOCKED["across a line"]
        assert guest.start(code, rdi=address, rax=1) == uapi.KVM_EXIT_IO


# Limits, PMU.


def test_vcpu_ids_can_be_limited_once():
    with machine() as m:
        cap = uapi.KVM_CAP_MAX_VCPU_ID
        most = m.kvm.check_extension(cap)
        refused(m.vm.enable_cap, cap, most + 1)
        m.vm.enable_cap(cap, 2)
        m.vm.enable_cap(cap, 2)
        refused(m.vm.enable_cap, cap, 3)
        refused(m.vm.create_vcpu, 2)
        m.vm.create_vcpu(1).close()
    with machine() as m:
        m.add_vcpu()
        refused(m.vm.enable_cap, cap, 2)


@pytest.mark.parametrize(
    ("cap", "wrong"),
    [(uapi.KVM_CAP_PMU_CAPABILITY, 2), (uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES, 1)],
)
def test_what_comes_before_any_vcpu(cap, wrong):
    right = 1 if cap == uapi.KVM_CAP_PMU_CAPABILITY else 0
    with machine() as m:
        refused(m.vm.enable_cap, cap, wrong)
        m.vm.enable_cap(cap, right)
        m.add_vcpu()
        refused(m.vm.enable_cap, cap, right)
