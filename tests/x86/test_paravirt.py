"""Paravirtual features: what the VMM may take away, steal time, EOIs that are skipped."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi
from anykvm.x86 import kvm_para as para
from anykvm.x86.cpuid import KVM_FEATURES

from .fake_engine import FakeCpu, wrmsr
from .long_guest import LongGuest, long_guest
from .machine import Machine, machine

PV_MSRS = (
    para.MSR_KVM_SYSTEM_TIME,
    para.MSR_KVM_SYSTEM_TIME_NEW,
    para.MSR_KVM_WALL_CLOCK,
    para.MSR_KVM_WALL_CLOCK_NEW,
    para.MSR_KVM_ASYNC_PF_EN,
    para.MSR_KVM_STEAL_TIME,
    para.MSR_KVM_PV_EOI_EN,
    para.MSR_KVM_POLL_CONTROL,
    para.MSR_KVM_ASYNC_PF_INT,
    para.MSR_KVM_ASYNC_PF_ACK,
)
PV_CALLS = (para.KVM_HC_KICK_CPU, para.KVM_HC_SEND_IPI, para.KVM_HC_SCHED_YIELD)
RECORD, WORD = 0x3000, 0x4000
X2APIC_ENABLE, APIC_BASE, SPIV, EOI = 0xFEE00C00, 0x1B, 0x80F, 0x80B
LVT0, MASKED = 0x835, 1 << 16
VECTOR = 0x51


def without_kvm_features(guest: LongGuest) -> list[uapi.kvm_cpuid_entry2]:
    for entry in guest.cpuid:
        if entry.function == KVM_FEATURES:
            entry.eax = 0
    return guest.cpuid


def test_features_that_cpuid_lacks_are_refused_once_that_is_enforced() -> None:
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        vcpu.set_cpuid2(without_kvm_features(guest))
        assert guest.rdmsr(para.MSR_KVM_POLL_CONTROL) == 1
        assert guest.hypercall(para.KVM_HC_SCHED_YIELD, 0) == 0
        vcpu.enable_cap(uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID, 1)
        for call in PV_CALLS:
            assert guest.hypercall(call, 0, 0, 0, 0) == -para.KVM_ENOSYS
        for index in PV_MSRS:
            assert vcpu.get_msrs([index]) == {}
            assert vcpu.set_msrs({index: 0}) == 0
        assert guest.rdmsr(para.MSR_KVM_STEAL_TIME) is None


def test_all_of_them_are_listed_and_keep_what_they_are_given() -> None:
    with long_guest() as guest:
        listed = guest.kvm.msr_index_list()
        assert set(PV_MSRS) <= set(listed)
        values = {
            para.MSR_KVM_STEAL_TIME: RECORD | 1,
            para.MSR_KVM_PV_EOI_EN: WORD | 1,
            para.MSR_KVM_ASYNC_PF_EN: 0x5000 | 1 << 3 | 1,
            para.MSR_KVM_ASYNC_PF_INT: 0xEC,
            para.MSR_KVM_POLL_CONTROL: 0,
        }
        vcpu = guest.vcpus[0]
        assert vcpu.set_msrs(values) == len(values)
        assert vcpu.get_msrs(list(values)) == values


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (para.MSR_KVM_STEAL_TIME, RECORD | 1 | 1 << 5),
        (para.MSR_KVM_PV_EOI_EN, WORD | 2),
        (para.MSR_KVM_PV_EOI_EN, 1 << 40 | 1),
        (para.MSR_KVM_POLL_CONTROL, 2),
        (para.MSR_KVM_ASYNC_PF_EN, 0x5000 | 1 << 4),
        (para.MSR_KVM_ASYNC_PF_INT, 1 << 8),
    ],
)
def test_values_that_are_none(index: int, value: int) -> None:
    with long_guest() as guest:
        assert guest.vcpus[0].set_msrs({index: value}) == 0


def record(guest: LongGuest) -> tuple[int, int, int, int]:
    """Steal, version, flags, preempted."""
    found: tuple[int, int, int, int] = struct.unpack("<QIIB", guest.memory.read(RECORD, 17))
    return found


@contextmanager
def one_processor() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def test_steal_time_is_what_the_thread_has_waited() -> None:
    with long_guest() as guest, one_processor():
        assert guest.wrmsr(para.MSR_KVM_STEAL_TIME, RECORD | 1)
        guest.execute(b"\x90")
        before = record(guest)
        assert before[1] >= 2
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as rival:
            deadline = time.monotonic() + 20
            while record(guest)[0] - before[0] < 2_000_000 and time.monotonic() < deadline:
                guest.execute(b"\x90")
                sum(range(20_000))
            rival.kill()
        after = record(guest)
        assert after[0] - before[0] >= 2_000_000
        assert (after[1] % 2, after[2], after[3]) == (0, 0, 0)
        assert after[1] > before[1]


def test_a_vcpu_called_back_is_marked_and_flushes_when_asked() -> None:
    with machine(irqchip=True) as m:
        ram = m.ram()
        vcpu = m.add_vcpu(wrmsr(para.MSR_KVM_STEAL_TIME, RECORD | 1))
        vcpu.kvm_run.immediate_exit = 0

        def stop(cpu: FakeCpu) -> Exit:
            vcpu.kvm_run.immediate_exit = 1
            return Exit.REQUEST

        m.cpu().script.append(stop)
        while not vcpu.kvm_run.immediate_exit:
            vcpu.run()
        assert vcpu.run() == uapi.KVM_EXIT_INTR
        assert ram.read(RECORD + 16, 1) == b"\1"
        ram.write(RECORD + 16, b"\3")  # another vCPU wants a flush
        m.cpu().log.clear()
        vcpu.kvm_run.immediate_exit = 0
        m.cpu().script.append(Exit.SHUTDOWN)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert ("flush_tlb",) in m.cpu().log
        assert ram.read(RECORD + 16, 1) == b"\0"


def serving(m: Machine, vectors: tuple[int, ...]) -> None:
    """The vCPU's APIC is on, takes interrupts, and has these in service."""
    m.vcpus[0].set_msrs({APIC_BASE: X2APIC_ENABLE})
    m.vcpus[0].set_msrs({SPIV: 0x1FF, para.MSR_KVM_PV_EOI_EN: WORD | 1})
    m.vcpus[0].set_msrs({LVT0: MASKED})
    m.cpu().rflags |= 1 << 9
    for vector in vectors:
        m.vm.signal_msi(uapi.kvm_msi(address_lo=0xFEE00000, data=vector))


def in_service(m: Machine) -> int:
    page = bytes(m.vcpus[0].get_lapic().regs)
    return sum(int.from_bytes(page[0x100 + 16 * i :][:4], "little") << 32 * i for i in range(8))


def test_an_eoi_may_be_skipped_and_is_made_up_for() -> None:
    with machine(irqchip=True) as m:
        ram = m.ram()
        seen: list[bytes] = []

        def handler(cpu: FakeCpu) -> Exit:
            seen.append(ram.read(WORD, 1))
            ram.write(WORD, b"\0")
            return Exit.SHUTDOWN

        vcpu = m.add_vcpu(handler)
        cpuid = m.kvm.supported_cpuid()
        vcpu.set_cpuid2(cpuid)
        serving(m, (VECTOR,))
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert seen == [b"\1"]
        assert in_service(m) == 0


def test_an_eoi_that_was_not_skipped_must_be_told() -> None:
    with machine(irqchip=True) as m:
        ram = m.ram()
        vcpu = m.add_vcpu(Exit.SHUTDOWN, wrmsr(EOI, 0), Exit.SHUTDOWN)
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        serving(m, (VECTOR,))
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert ram.read(WORD, 1) == b"\0"
        assert in_service(m) == 1 << VECTOR
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert in_service(m) == 0


def test_no_eoi_is_skipped_while_another_interrupt_waits() -> None:
    with machine(irqchip=True) as m:
        ram = m.ram()
        vcpu = m.add_vcpu(Exit.SHUTDOWN)
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        ram.write(WORD, b"\0")
        serving(m, (VECTOR, VECTOR - 0x10))
        seen: list[bytes] = []

        def look(cpu: FakeCpu) -> Exit:
            seen.append(ram.read(WORD, 1))
            return Exit.SHUTDOWN

        m.cpu().script[:] = [look]
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert seen == [b"\0"]


def test_the_end_of_a_level_triggered_interrupt_is_always_told() -> None:
    with machine(irqchip=True) as m:
        ram = m.ram()
        seen: list[bytes] = []

        def look(cpu: FakeCpu) -> Exit:
            seen.append(ram.read(WORD, 1))
            return Exit.SHUTDOWN

        vcpu = m.add_vcpu(look)
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        chip = m.vm.get_irqchip(uapi.KVM_IRQCHIP_IOAPIC)
        chip.chip.ioapic.redirtbl[11].bits = 1 << 15 | VECTOR
        m.vm.set_irqchip(chip)
        serving(m, ())
        m.vm.irq_line(11, 1)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert seen == [b"\0"]
        assert in_service(m) == 1 << VECTOR
