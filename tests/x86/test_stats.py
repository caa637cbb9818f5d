"""What a vCPU and a VM count: each statistic by the event that it stands for."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, StatType, StatUnit, Vcpu, Vm
from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi
from anykvm.x86.stats import EXIT_REASONS, count_userspace_exit

from .fake_engine import load, port_in, port_out, sti, store
from .machine import machine

NMI_MESSAGE = 4 << 8

# Linux 6.1's, by hand.
VM_STATISTICS = """remote_tlb_flush remote_tlb_flush_requests mmu_shadow_zapped mmu_pte_write
mmu_pde_zapped mmu_flooded mmu_recycled mmu_cache_miss mmu_unsync pages_4k pages_2m pages_1g
nx_lpage_splits max_mmu_rmap_size max_mmu_page_hash_collisions""".split()
VCPU_STATISTICS = """halt_successful_poll halt_attempted_poll halt_poll_invalid halt_wakeup
halt_poll_success_ns halt_poll_fail_ns halt_wait_ns halt_poll_success_hist halt_poll_fail_hist
halt_wait_hist blocking pf_taken pf_fixed pf_emulate pf_spurious pf_fast pf_mmio_spte_created
pf_guest tlb_flush invlpg exits io_exits mmio_exits signal_exits irq_window_exits nmi_window_exits
l1d_flush halt_exits request_irq_exits irq_exits host_state_reload fpu_reload insn_emulation
insn_emulation_fail hypercalls irq_injections nmi_injections req_event nested_run
directed_yield_attempted directed_yield_successful preemption_reported preemption_other guest_mode
notify_window_exits""".split()


def counted(vcpu: Vcpu) -> dict[str, int]:
    """The statistics of a vCPU that are not 0."""
    return {name: stat.value for name, stat in vcpu.stats().items() if stat.value}


def test_linuxs_statistics_come_first_in_its_order_and_ours_behind():
    with machine() as m:
        assert list(m.vm.stats())[: len(VM_STATISTICS)] == VM_STATISTICS
        ours = list(m.add_vcpu().stats())
        assert ours[: len(VCPU_STATISTICS)] == VCPU_STATISTICS
        assert ours[len(VCPU_STATISTICS) :] == ["instructions", "exceptions", "userspace_exits"]


def test_types_units_and_exponents_are_linuxs():
    with machine() as m:
        stats = m.add_vcpu().stats()
        described = {
            name: (d.type, d.unit, d.exponent, d.size, d.bucket_size)
            for name in ("exits", "halt_wait_ns", "halt_wait_hist", "blocking")
            for d in [stats[name].descriptor]
        }
        assert described == {
            "exits": (StatType.CUMULATIVE, StatUnit.NONE, 0, 1, 0),
            "halt_wait_ns": (StatType.CUMULATIVE, StatUnit.SECONDS, -9, 1, 0),
            "halt_wait_hist": (StatType.LOG_HIST, StatUnit.SECONDS, -9, 32, 0),
            "blocking": (StatType.INSTANT, StatUnit.BOOLEAN, 0, 1, 0),
        }
        vm = m.vm.stats()
        assert vm["pages_4k"].descriptor.type is StatType.INSTANT
        assert vm["max_mmu_rmap_size"].descriptor.type is StatType.PEAK


def test_exits_by_kind_and_returns_to_userspace_by_reason():
    script = (
        port_out(0x3F8, b"A"),
        port_in(0x3FD),
        load(0xD0000000, 4),
        store(0xD0000008, b"\x01"),
        Exit.CPUID,
        Exit.HLT,
    )
    with machine() as m:
        vcpu = m.add_vcpu(*script)
        reasons = [vcpu.run() for _ in range(5)]
        stats = counted(vcpu)
        assert (stats["exits"], stats["io_exits"], stats["mmio_exits"]) == (6, 2, 2)
        assert (stats["halt_exits"], stats["userspace_exits"]) == (1, 5)
        by_reason = vcpu.stats()["userspace_exits"].values
        assert {n: count for n, count in enumerate(by_reason) if count} == {
            uapi.KVM_EXIT_IO: 2,
            uapi.KVM_EXIT_MMIO: 2,
            uapi.KVM_EXIT_HLT: 1,
        }
        assert len(by_reason) > max(reasons)


def test_what_the_processor_counts_is_there_when_kvm_run_returns():
    def work(cpu):
        s = cpu.state
        s.insn_count, s.count_exception, s.count_page_fault = 1000, 7, 3
        s.count_tlb_fill, s.count_tlb_filled, s.count_flush = 50, 40, 6
        s.count_invlpg, s.count_assist = 5, 9
        return Exit.HLT

    with machine() as m:
        vcpu = m.add_vcpu(work)
        vcpu.run()
        stats = counted(vcpu)
        assert (stats["instructions"], stats["exceptions"], stats["pf_guest"]) == (1000, 7, 3)
        assert (stats["pf_taken"], stats["pf_fixed"], stats["tlb_flush"]) == (50, 40, 6)
        assert (stats["invlpg"], stats["insn_emulation"]) == (5, 9)


def test_injected_interrupts_and_the_window_for_them():
    with machine() as m:
        vcpu = m.add_vcpu(sti(then=Exit.IRQ_WINDOW), Exit.HLT)
        vcpu.interrupt(0x20)
        vcpu.run()
        stats = counted(vcpu)
        assert (stats["irq_injections"], stats["irq_window_exits"]) == (1, 1)
        assert stats["req_event"] >= 2


def test_a_window_for_userspace_is_a_request_irq_exit():
    with machine() as m:
        vcpu = m.add_vcpu(sti(then=Exit.IRQ_WINDOW))
        vcpu.kvm_run.request_interrupt_window = 1
        assert vcpu.run() == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
        assert counted(vcpu)["request_irq_exits"] == 1


def test_an_nmi():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        vcpu.nmi()
        vcpu.run()
        assert counted(vcpu)["nmi_injections"] == 1


def test_an_instruction_that_cannot_be_emulated():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.EMULATION)
        assert vcpu.run() == uapi.KVM_EXIT_INTERNAL_ERROR
        assert counted(vcpu)["insn_emulation_fail"] == 1


def test_a_signal_that_ends_kvm_run_but_not_immediate_exit():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with machine() as m:
            vcpu = m.add_vcpu(Exit.REQUEST, Exit.REQUEST)
            vcpu.kvm_run.immediate_exit = 1
            assert vcpu.run() == uapi.KVM_EXIT_INTR
            assert "signal_exits" not in counted(vcpu)
            vcpu.kvm_run.immediate_exit = 0
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
            signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
            vcpu.set_signal_mask([])
            assert vcpu.run() == uapi.KVM_EXIT_INTR
            stats = counted(vcpu)
            assert (stats["signal_exits"], stats["userspace_exits"]) == (1, 2)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
        signal.signal(signal.SIGUSR1, before)


def test_a_halted_vcpu_blocks_and_the_time_is_counted():
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu(Exit.HLT, port_out(0x80, b"\0"))
        with vcpu.stats_fd() as stats:
            thread = threading.Thread(target=vcpu.run)
            thread.start()
            _until(lambda: stats.read()["blocking"].value)
            time.sleep(0.02)
            m.vm.signal_msi(uapi.kvm_msi(address_lo=0xFEE00000, data=NMI_MESSAGE))
            thread.join(20)
            assert not thread.is_alive()
            found = stats.read()
        assert (found["blocking"].value, found["halt_exits"].value) == (0, 1)
        assert found["halt_wakeup"].value >= 1
        assert found["halt_wait_ns"].scaled >= 0.02
        assert found["halt_wait_hist"].value == found["halt_wakeup"].value


def _until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_an_exit_reason_that_userspace_overwrites_is_counted_somewhere():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        file = fs.fget(vcpu.fd)
        assert file is not None
        vcpu.kvm_run.exit_reason = 0xFFFFFFFF
        count_userspace_exit(file.private_data)
        fs.fput(file)
        assert vcpu.stats()["userspace_exits"].values[EXIT_REASONS - 1] == 1


def test_slots_are_pages_and_flushes_of_every_tlb():
    with machine() as m:
        m.vm.add_memory(0, GuestMemory(0x10000))
        m.vm.add_memory(1, GuestMemory(0x4000, addr=0x100000))
        stats = m.vm.stats()
        assert (stats["pages_4k"].value, stats["remote_tlb_flush"].value) == (20, 2)
        m.vm.remove_memory(0)
        stats = m.vm.stats()
        assert (stats["pages_4k"].value, stats["remote_tlb_flush_requests"].value) == (4, 3)


COUNT_AND_FAULT = bytes.fromhex(
    "b9 e8 03"  # mov cx, 1000
    "49 75 fd"  # dec cx; jnz
    "0f 01 3e 00 30"  # invlpg [0x3000]
    "cd 80"  # int 0x80, to the hlt
    "f4"
)
HLT_AT = 0x1000 + len(COUNT_AND_FAULT) - 1
FOREVER = b"\xeb\xfe"


@contextmanager
def real_mode(code: bytes) -> Iterator[tuple[Vm, Vcpu]]:
    """A vCPU of the software processor at `code`; interrupt 0x80 leads to its end."""
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm, vm.create_vcpu() as vcpu:
        memory = GuestMemory(0x10000)
        memory.write(0x1000, code)
        memory.write(0x80 * 4, HLT_AT.to_bytes(4, "little"))
        vm.add_memory(0, memory)
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        regs = vcpu.get_regs()
        regs.rip, regs.rsp, regs.rflags = 0x1000, 0x8000, 2
        vcpu.set_regs(regs)
        yield vm, vcpu


def test_the_software_processor_counts():
    with real_mode(COUNT_AND_FAULT) as (vm, vcpu):
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        stats, translated = vcpu.stats(), vm.stats()
        assert stats["instructions"].value == 1 + 2 * 1000 + 3
        assert stats["invlpg"].value == 1
        assert stats["pf_taken"].value >= stats["pf_fixed"].value > 0
        assert translated["instructions_translated"].value >= 6
        assert translated["units_translated"].value > 0


def test_live_values_while_the_guest_runs():
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    with real_mode(FOREVER) as (_, vcpu), vcpu.stats_fd() as stats:
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        try:
            _until(lambda: stats.read()["instructions"].value > 1000)
            seen = stats.read()["instructions"].value
            _until(lambda: stats.read()["instructions"].value > seen)
        finally:
            vcpu.kvm_run.immediate_exit = 1
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join(20)
            signal.signal(signal.SIGUSR1, before)
        assert not thread.is_alive()
