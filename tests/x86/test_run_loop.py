"""KVM_RUN: exits and their completion, in-kernel devices, EINTR, HLT, INIT and SIPI."""

from __future__ import annotations

import ctypes
import errno
import signal
import threading
import time

import pytest

from anykvm import fs
from anykvm.api import Vcpu
from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi

from .fake_engine import load, port_in, port_out, rdmsr, sti, store, wrmsr
from .machine import Machine, machine
from .real_guest import real_guest

ICR, X2APIC_BASE = 0x830, 0x1B
SVR, LVT0 = 0xFEE000F0, 0xFEE00350
INIT_ALL_BUT_SELF, SIPI_ALL_BUT_SELF = 0xC4500, 0xC4600


def word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def run_errno(vcpu: Vcpu) -> int:
    """KVM_RUN's error, 0 for success."""
    try:
        fs.ioctl(vcpu.fd, uapi.KVM_RUN)
    except OSError as error:
        return error.errno or 0
    return 0


def test_out_exits_and_completes_at_the_next_run():
    with machine() as m:
        vcpu = m.add_vcpu(port_out(0x3F8, b"A"), Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_IO
        io = vcpu.kvm_run.io
        assert (io.direction, io.port, io.size, io.count) == (uapi.KVM_EXIT_IO_OUT, 0x3F8, 1, 1)
        assert (io.data_offset, bytes(vcpu.io_data())) == (4096, b"A")
        assert m.cpu().did() == []
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did() == [("out",)]


def test_string_input_takes_all_its_items_from_userspace():
    with machine() as m:
        vcpu = m.add_vcpu(port_in(0x1F0, size=2, count=3), Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert vcpu.kvm_run.io.count == 3
        vcpu.io_data()[:] = b"abcdef"
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did() == [("in", b"abcdef")]


def test_mmio_read_and_write():
    with machine() as m:
        vcpu = m.add_vcpu(load(0xD0000000, 4), store(0xD0000008, b"\x01\x02"), Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        mmio = vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xD0000000, 4, 0)
        vcpu.mmio_data()[:] = b"wxyz"
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xD0000008, 2, 1)
        assert bytes(vcpu.mmio_data()) == b"\x01\x02"
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did() == [("mmio_read", b"wxyz"), ("mmio_write",)]


def test_immediate_exit_completes_pending_io_first_and_leaves_the_reason():
    with machine() as m:
        vcpu = m.add_vcpu(port_in(0x60), Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_IO
        vcpu.io_data()[:] = b"\x5a"
        vcpu.kvm_run.immediate_exit = 1
        assert run_errno(vcpu) == errno.EINTR
        assert vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
        assert m.cpu().did() == [("in", b"\x5a")]
        vcpu.kvm_run.immediate_exit = 0
        assert vcpu.run() == uapi.KVM_EXIT_HLT


@pytest.mark.parametrize(("before", "after", "read"), [(2, 1, 1), (3, 8, 8), (3, 0, 0)])
def test_string_input_goes_by_the_count_that_the_vmm_leaves(before, after, read):
    """Items beyond it are dropped, those that are missing are asked for."""
    with real_guest() as guest:
        vcpu = guest.vcpu(b"\xf3\x6c\xf4")  # rep insb; hlt
        regs = vcpu.get_regs()
        regs.rcx, regs.rdi, regs.rdx = before, 0x3000, 0x80
        vcpu.set_regs(regs)
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert vcpu.kvm_run.io.count == before
        vcpu.io_data()[:] = b"\xaa" * before
        regs.rcx = after
        vcpu.set_regs(regs)
        while (reason := vcpu.run()) == uapi.KVM_EXIT_IO:
            vcpu.io_data()[:] = b"\xaa" * vcpu.kvm_run.io.count
        assert reason == uapi.KVM_EXIT_HLT
        assert vcpu.get_regs().rdi == 0x3000 + read
        assert guest.memory.read(0x3000, 9) == (b"\xaa" * read).ljust(9, b"\0")


def test_immediate_exit_through_another_mapping_of_a_duplicate():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        other = fs.dup(vcpu.fd)
        mapping = fs.mmap(other, 3 * 4096)
        mapping.view(uapi.kvm_run).immediate_exit = 1
        assert run_errno(vcpu) == errno.EINTR
        fs.close(other)
        mapping.view(uapi.kvm_run).immediate_exit = 0
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert mapping.view(uapi.kvm_run).exit_reason == uapi.KVM_EXIT_HLT


class Runner(threading.Thread):
    """Calls KVM_RUN once in a thread and keeps its errno."""

    def __init__(self, vcpu: Vcpu) -> None:
        super().__init__(daemon=True)
        self.vcpu, self.result = vcpu, -1
        self.start()

    def run(self) -> None:
        self.result = run_errno(self.vcpu)

    def outcome(self) -> int:
        self.join(10)
        assert not self.is_alive(), "KVM_RUN did not return"
        return self.result


@pytest.fixture
def handled():
    """SIGUSR1 with a handler that counts its calls."""
    calls: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))
    yield calls
    signal.signal(signal.SIGUSR1, before)


def kick(thread: threading.Thread) -> None:
    assert thread.ident is not None
    signal.pthread_kill(thread.ident, signal.SIGUSR1)


def test_a_signal_interrupts_a_running_guest(handled):
    with machine() as m:
        runner = Runner(m.add_vcpu())
        assert m.cpu().entered.wait(10)
        kick(runner)
        assert runner.outcome() == errno.EINTR
        assert m.vcpus[0].kvm_run.exit_reason == uapi.KVM_EXIT_INTR
        assert handled == [signal.SIGUSR1]


def test_a_signal_interrupts_a_halted_vcpu(handled):
    with machine(irqchip=True) as m:
        runner = Runner(m.add_vcpu(Exit.HLT))
        time.sleep(0.05)
        assert runner.is_alive()
        kick(runner)
        assert runner.outcome() == errno.EINTR
        assert handled == [signal.SIGUSR1]


def test_signals_in_the_mask_do_not_interrupt_and_others_stay_pending(handled):
    with machine() as m:
        vcpu = m.add_vcpu()
        vcpu.set_signal_mask({signal.SIGUSR1})
        runner = Runner(vcpu)
        assert m.cpu().entered.wait(10)
        kick(runner)
        time.sleep(0.05)
        assert runner.is_alive()
        assert runner.ident is not None
        signal.pthread_kill(runner.ident, signal.SIGURG)
        assert runner.outcome() == errno.EINTR


def test_a_blocked_signal_that_the_mask_lets_through_ends_the_run_and_stays_pending():
    with machine() as m:
        vcpu = m.add_vcpu()
        vcpu.set_signal_mask(set())
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
        try:
            signal.pthread_kill(threading.get_ident(), signal.SIGCHLD)
            assert run_errno(vcpu) == errno.EINTR
            assert signal.SIGCHLD in signal.sigpending()
            assert signal.sigwait({signal.SIGCHLD}) == signal.SIGCHLD
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def test_the_signal_mask_must_have_the_kernels_size():
    class Mask(ctypes.Structure):
        _fields_ = [("len", ctypes.c_uint32), ("bits", ctypes.c_uint8 * 8)]

    with machine() as m:
        vcpu = m.add_vcpu()
        with pytest.raises(OSError, match=r"8 bytes") as refused:
            vcpu.ioctl(uapi.KVM_SET_SIGNAL_MASK, Mask(4))
        assert refused.value.errno == errno.EINVAL
        vcpu.ioctl(uapi.KVM_SET_SIGNAL_MASK, Mask(8))


def test_hlt_sleeps_in_the_kernel_until_an_interrupt():
    with machine(irqchip=True) as m:
        runner = Runner(m.add_vcpu(sti(), Exit.SHUTDOWN))
        time.sleep(0.05)
        assert runner.is_alive()
        enable_lapic(m)
        msi = uapi.kvm_msi(address_lo=0xFEE00000, data=0x41)
        assert m.vm.signal_msi(msi) == 1
        assert runner.outcome() == 0
        assert m.vcpus[0].kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt") == [("interrupt", 0x41)]


def enable_lapic(m: Machine) -> None:
    """Set the software enable of vCPU 0's local APIC."""
    vcpu = internals(m)
    with vcpu.kvm.irqchip.lock:
        vcpu.apic.mmio_write(0xF0, 0x1FF)


def internals(m: Machine, index: int = 0):
    """The kernel's object behind a vCPU descriptor."""
    file = fs.fget(m.vcpus[index].fd)
    assert file is not None
    try:
        return file.private_data
    finally:
        fs.fput(file)


def test_pic_interrupt_reaches_the_guest_by_irq_line():
    with machine(irqchip=True) as m:
        init = [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0)]
        script = [port_out(port, bytes([value])) for port, value in init]
        runner = Runner(m.add_vcpu(*script, sti(), Exit.SHUTDOWN))
        time.sleep(0.05)
        m.vm.irq_line(4, 1)
        assert runner.outcome() == 0
        assert m.cpu().did("interrupt") == [("interrupt", 0x34)]


def test_irq_line_status_tells_what_became_of_it():
    with machine(irqchip=True) as m:
        m.add_vcpu()
        assert m.vm.irq_line_status(4, 1) == 1  # the 8259 took it; the IOAPIC's pin is masked
        m.vm.irq_line(4, 0)
        assert m.vm.irq_line_status(4, 1) == 0  # and has the first edge still
        assert m.vm.irq_line_status(2000, 1) == -1


def test_lapic_timer_wakes_a_halted_guest():
    with machine(irqchip=True) as m:
        lvtt, tmict, spiv = 0x320, 0x380, 0xF0
        script = [
            store(0xFEE00000 + spiv, (0x1FF).to_bytes(4, "little")),
            store(0xFEE00000 + lvtt, (0x99).to_bytes(4, "little")),
            store(0xFEE00000 + tmict, (5_000_000).to_bytes(4, "little")),
            sti(),
            Exit.SHUTDOWN,
        ]
        started = time.monotonic()
        assert m.add_vcpu(*script).run() == uapi.KVM_EXIT_SHUTDOWN
        assert time.monotonic() - started >= 0.010  # divided by two
        assert m.cpu().did("interrupt") == [("interrupt", 0x99)]


def test_tpr_accesses_are_reported_and_the_vapic_page_is_kept_in_step():
    tpr = 0xFEE00080
    with machine(irqchip=True) as m:
        memory = m.ram()

        def guest_lowers_it(cpu):
            memory.write(0x3000, b"\x20")
            return Exit.SHUTDOWN

        vcpu = m.add_vcpu(store(tpr, b"\x50\0\0\0"), Exit.REQUEST, guest_lowers_it)
        vcpu.tpr_access_reporting(uapi.kvm_tpr_access_ctl(enabled=1))
        assert vcpu.run() == uapi.KVM_EXIT_TPR_ACCESS
        assert vcpu.kvm_run.tpr_access.is_write
        vcpu.set_vapic_addr(uapi.kvm_vapic_addr(vapic_addr=0x3000))
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert vcpu.get_sregs().cr8 == 2
        vcpu.set_vapic_addr(uapi.kvm_vapic_addr(vapic_addr=0))
        with pytest.raises(OSError, match="KVM_SET_VAPIC_ADDR") as refused:
            vcpu.set_vapic_addr(uapi.kvm_vapic_addr(vapic_addr=0xD0000000))
        assert refused.value.errno == errno.EINVAL


def test_interrupts_that_cannot_be_taken_wait_for_the_window():
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu(sti(Exit.REQUEST), Exit.SHUTDOWN)
        enable_lapic(m)
        m.vm.signal_msi(uapi.kvm_msi(address_lo=0xFEE00000, data=0x51))
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt") == [("interrupt", 0x51)]


def test_userspace_irqchip_asks_for_a_window_and_injects():
    with machine() as m:
        vcpu = m.add_vcpu(sti(Exit.REQUEST), Exit.HLT)
        assert not vcpu.kvm_run.ready_for_interrupt_injection
        vcpu.kvm_run.request_interrupt_window = 1
        assert vcpu.run() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
        assert vcpu.kvm_run.ready_for_interrupt_injection
        assert vcpu.kvm_run.if_flag
        vcpu.kvm_run.request_interrupt_window = 0
        vcpu.interrupt(0x21)
        assert not vcpu.kvm_run.ready_for_interrupt_injection  # KVM_RUN may not get here at all
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did("interrupt") == [("interrupt", 0x21)]


def test_a_split_irqchip_gives_no_window_while_lint0_is_masked():
    """QEMU's 8259s ask for as long as Linux leaves them unserved: the guest goes on meanwhile."""
    with machine() as m:
        m.vm.enable_cap(uapi.KVM_CAP_SPLIT_IRQCHIP, 24)
        masked = store(SVR, word(0x1FF)), store(LVT0, word(0x10700))
        unmasked = store(LVT0, word(0x700))
        vcpu = m.add_vcpu(*masked, sti(Exit.REQUEST), port_out(0x80, b"a"), unmasked)
        vcpu.kvm_run.request_interrupt_window = 1
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert not m.cpu().window
        assert not vcpu.kvm_run.ready_for_interrupt_injection
        assert vcpu.run() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN


def test_interrupt_is_the_irqchips_where_it_is_in_the_kernel():
    with machine(irqchip=True) as m, pytest.raises(OSError, match="irqchip") as refused:
        m.add_vcpu().interrupt(0x21)
    assert refused.value.errno == errno.ENXIO


def test_nmi_is_injected():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        vcpu.nmi()
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did() == [("nmi",)]


def test_init_and_sipi_start_a_second_processor():
    with machine(irqchip=True) as m:
        enable = [
            wrmsr(0x1B, 0xFEE00D00),
            wrmsr(0x80F, 0x1FF),
            wrmsr(ICR, INIT_ALL_BUT_SELF),
            wrmsr(ICR, SIPI_ALL_BUT_SELF | 0x9A),
        ]
        boot = m.add_vcpu(*enable, Exit.SHUTDOWN)
        boot.set_cpuid2(m.kvm.supported_cpuid())
        second = m.add_vcpu(Exit.SHUTDOWN)
        assert second.get_mp_state() == uapi.KVM_MP_STATE_UNINITIALIZED
        waiting = Runner(second)
        assert boot.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu(0).did("exception") == []
        assert waiting.outcome() == errno.EAGAIN
        assert run_errno(second) == 0
        assert second.kvm_run.exit_reason == uapi.KVM_EXIT_SHUTDOWN
        state = m.cpu(1).state
        assert (state.seg[1].selector, state.seg[1].base, state.rip) == (0x9A00, 0x9A000, 0)


def test_cpuid_answers_what_it_was_given():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.CPUID, Exit.HLT)
        vcpu.set_cpuid2([uapi.kvm_cpuid_entry2(function=0, eax=1, ebx=2, ecx=3, edx=4)])
        vcpu.run()
        assert m.cpu().did() == [("cpuid", 1, 2, 3, 4)]


def test_unknown_msrs_are_general_protection_faults():
    with machine() as m:
        m.add_vcpu(rdmsr(0xDEAD), wrmsr(0xDEAD, 1), Exit.HLT).run()
        assert m.cpu().did() == [("exception", 13, 0)] * 2


def test_unknown_msrs_exit_where_the_vmm_asked_for_them():
    with machine() as m:
        m.vm.enable_cap(uapi.KVM_CAP_X86_USER_SPACE_MSR, uapi.KVM_MSR_EXIT_REASON_UNKNOWN)
        vcpu = m.add_vcpu(rdmsr(0xDEAD), wrmsr(0xBEEF, 5), Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_X86_RDMSR
        vcpu.kvm_run.msr.data = 77
        assert vcpu.run() == uapi.KVM_EXIT_X86_WRMSR
        assert (vcpu.kvm_run.msr.index, vcpu.kvm_run.msr.data) == (0xBEEF, 5)
        vcpu.kvm_run.msr.error = 1
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert m.cpu().did() == [("msr", 77), ("exception", 13, 0)]


def test_an_instruction_that_is_not_there_is_named_and_shown(caplog):
    def fails(cpu):
        cpu.state.insn_bytes[:3] = [0x0F, 0xFF, 0xC0]
        cpu.state.insn_len = 3
        return Exit.EMULATION

    with machine() as m:
        vcpu = m.add_vcpu(fails)
        assert vcpu.run() == uapi.KVM_EXIT_INTERNAL_ERROR
        failure = vcpu.kvm_run.emulation_failure
        assert failure.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
        assert (failure.insn_size, list(failure.insn_bytes[:3])) == (3, [0x0F, 0xFF, 0xC0])
    assert "ud0 eax, eax" in caplog.text
