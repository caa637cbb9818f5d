"""The local APIC: modes, register access, priorities, acceptance, IPIs, destinations, snapshots."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anykvm.uapi.kvm import kvm_lapic_state
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.lapic import (
    ApicFault,
    Lapic,
    LapicIrq,
    LapicMode,
    LapicOptions,
    LapicOutputs,
    LapicTime,
)

BASE, BSP = reg.APIC_DEFAULT_PHYS_BASE, reg.MSR_IA32_APICBASE_BSP
EN, EXTD = reg.MSR_IA32_APICBASE_ENABLE, reg.X2APIC_ENABLE
EDGE, LEVEL = reg.IOAPIC_EDGE_TRIG, reg.IOAPIC_LEVEL_TRIG
PHYSICAL, LOGICAL = reg.APIC_DEST_PHYSICAL, reg.APIC_DEST_LOGICAL
NMI, INIT, SIPI, EXTINT = (
    reg.APIC_DM_NMI,
    reg.APIC_DM_INIT,
    reg.APIC_DM_STARTUP,
    reg.APIC_DM_EXTINT,
)
MASKED = reg.APIC_LVT_MASKED
TSC_KHZ = 1_000_000
SVR_ENABLED = 0x1FF


class Cpu:
    """A local APIC with its clock in hand and its outputs recorded."""

    def __init__(
        self,
        apic_id: int = 0,
        *,
        x2apic: bool = False,
        enabled: bool = True,
        smi: bool = False,
        options: LapicOptions | None = None,
    ) -> None:
        self.now = 0
        self.events: list[tuple[object, ...]] = []
        self.kicks = 0
        self.timer_changes = 0
        self.map_changes = 0
        self.smi = smi
        outputs = LapicOutputs(
            deliver=self.deliver,
            kick=self.kick,
            nmi=lambda: self.events.append(("nmi",)),
            eoi=lambda vector, trig_mode: self.events.append(("eoi", vector, trig_mode)),
            smi=lambda: self.smi,
            timer_changed=self.timer_changed,
            map_changed=self.map_changed,
        )
        time = LapicTime(lambda: self.now, lambda: self.now, lambda: TSC_KHZ)
        self.apic = Lapic(apic_id, outputs, time, options)
        self.apic.set_cpuid(x2apic=True, tsc_deadline=True, maxphyaddr=40)
        if x2apic:
            self.apic.set_base(self.apic.apic_base | EXTD)
        if enabled:
            self.write(reg.APIC_SPIV, SVR_ENABLED)
        self.kicks = 0

    def deliver(self, irq: LapicIrq) -> int:
        self.events.append(("ipi", irq))
        return 1

    def kick(self) -> None:
        self.kicks += 1

    def timer_changed(self) -> None:
        self.timer_changes += 1

    def map_changed(self) -> None:
        self.map_changes += 1

    def write(self, offset: int, value: int) -> None:
        if self.apic.x2apic_mode:
            self.apic.write_msr(reg.APIC_BASE_MSR + (offset >> 4), value)
        else:
            self.apic.mmio_write(offset, value)

    def read(self, offset: int) -> int:
        if self.apic.x2apic_mode:
            return self.apic.read_msr(reg.APIC_BASE_MSR + (offset >> 4))
        return self.apic.mmio_read(offset)

    def take(self) -> list[tuple[object, ...]]:
        events, self.events = self.events, []
        return events


# IA32_APIC_BASE and modes


def test_reset_state() -> None:
    cpu = Cpu(5, enabled=False)
    assert cpu.apic.apic_base == BASE | EN
    assert cpu.apic.mode == LapicMode.XAPIC
    expected = {
        reg.APIC_ID: 5 << 24,
        reg.APIC_LVR: 0x00050014,
        reg.APIC_TASKPRI: 0,
        reg.APIC_PROCPRI: 0,
        reg.APIC_LDR: 0,
        reg.APIC_DFR: 0xFFFFFFFF,
        reg.APIC_SPIV: 0xFF,
        reg.APIC_ESR: 0,
        reg.APIC_ICR: 0,
        reg.APIC_TMICT: 0,
        reg.APIC_TMCCT: 0,
        reg.APIC_TDCR: 0,
        **dict.fromkeys(reg.LVT_REGS, MASKED),
    }
    assert {offset: cpu.read(offset) for offset in expected} == expected


@pytest.mark.parametrize(("quirk", "lvt0"), [(True, 0x700), (False, MASKED)])
def test_boot_processor_takes_the_pic_at_reset(quirk: bool, lvt0: int) -> None:
    cpu = Cpu(options=LapicOptions(bsp=True, lint0_reenabled=quirk))
    assert cpu.apic.apic_base & BSP
    assert cpu.read(reg.APIC_LVT0) == lvt0
    assert cpu.apic.accept_pic_intr() is quirk


def test_constructor_options_show_in_the_version() -> None:
    cpu = Cpu(options=LapicOptions(cmci=True, directed_eoi=True))
    assert cpu.read(reg.APIC_LVR) == 0x01060014
    assert cpu.read(reg.APIC_LVTCMCI) == MASKED


MODES = {"disabled": 0, "invalid": EXTD, "xapic": EN, "x2apic": EN | EXTD}
TRANSITIONS = [
    ("xapic", "xapic", True),
    ("xapic", "x2apic", True),
    ("xapic", "disabled", True),
    ("xapic", "invalid", False),
    ("x2apic", "x2apic", True),
    ("x2apic", "xapic", False),
    ("x2apic", "disabled", True),
    ("x2apic", "invalid", False),
    ("disabled", "disabled", True),
    ("disabled", "xapic", True),
    ("disabled", "x2apic", False),
    ("disabled", "invalid", False),
]


@pytest.mark.parametrize(("old", "new", "legal"), TRANSITIONS)
def test_mode_transitions(old: str, new: str, legal: bool) -> None:
    cpu = Cpu()
    cpu.apic.set_base(BASE | MODES[old], host_initiated=True)
    if legal:
        cpu.apic.set_base(BASE | MODES[new])
        assert cpu.apic.mode == MODES[new]
    else:
        with pytest.raises(ApicFault):
            cpu.apic.set_base(BASE | MODES[new])
        assert cpu.apic.mode == MODES[old]
    if new == "invalid":
        with pytest.raises(ApicFault):
            cpu.apic.set_base(BASE | EXTD, host_initiated=True)
    else:
        cpu.apic.set_base(BASE | MODES[new], host_initiated=True)
        assert cpu.apic.mode == MODES[new]


@pytest.mark.parametrize("bit", [0, 7, 9, 40, 63])
def test_apic_base_reserved_bits(bit: int) -> None:
    with pytest.raises(ApicFault):
        Cpu().apic.set_base(BASE | EN | 1 << bit)


def test_x2apic_needs_cpuid() -> None:
    cpu = Cpu()
    cpu.apic.set_cpuid(x2apic=False, tsc_deadline=True, maxphyaddr=40)
    with pytest.raises(ApicFault):
        cpu.apic.set_base(BASE | EN | EXTD)


def test_page_can_be_moved() -> None:
    cpu = Cpu()
    cpu.apic.set_base(0x12_3456_7000 | EN | BSP)
    assert cpu.apic.base_address == 0x12_3456_7000
    assert cpu.apic.mmio_enabled


def test_reenabling_starts_from_reset_values() -> None:
    cpu = Cpu(3)
    cpu.write(reg.APIC_TASKPRI, 0x50)
    cpu.apic.set_base(BASE)
    assert not cpu.apic.mmio_enabled
    cpu.apic.set_base(BASE | EN)
    assert cpu.read(reg.APIC_TASKPRI) == 0
    assert cpu.read(reg.APIC_ID) == 3 << 24
    assert not cpu.apic.sw_enabled


def test_x2apic_id_and_ldr_are_derived() -> None:
    cpu = Cpu(0x123, x2apic=True)
    assert cpu.read(reg.APIC_ID) == 0x123
    assert cpu.read(reg.APIC_LDR) == 0x12 << 16 | 1 << 3


# Register access


def test_software_disable_masks_every_lvt_and_keeps_them_masked() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVT1, 0x400)
    cpu.write(reg.APIC_SPIV, 0xFF)
    cpu.write(reg.APIC_LVTERR, 0x40)
    for lvt in reg.LVT_REGS:
        assert cpu.read(lvt) & MASKED
    cpu.write(reg.APIC_SPIV, SVR_ENABLED)
    cpu.write(reg.APIC_LVTERR, 0x40)
    assert cpu.read(reg.APIC_LVTERR) == 0x40


XAPIC_WRITES = [
    (reg.APIC_ID, 0xFF000000),
    (reg.APIC_LVR, 0x00050014),
    (reg.APIC_TASKPRI, 0xFF),
    (reg.APIC_PROCPRI, 0),
    (reg.APIC_LDR, 0xFF000000),
    (reg.APIC_DFR, 0xFFFFFFFF),
    (reg.APIC_SPIV, 0x3FF),
    (reg.APIC_ISR, 0),
    (reg.APIC_ICR2, 0xFF000000),
    (reg.APIC_LVTT, 0x710FF),
    (reg.APIC_LVTTHMR, 0x117FF),
    (reg.APIC_LVTPC, 0x117FF),
    (reg.APIC_LVT0, 0x1F7FF),
    (reg.APIC_LVT1, 0x1F7FF),
    (reg.APIC_LVTERR, 0x110FF),
    (reg.APIC_TMICT, 0xFFFFFFFF),
    (reg.APIC_TDCR, 0xB),
    (reg.APIC_SELF_IPI, 0),
    (reg.APIC_LVTCMCI, 0),
]


@pytest.mark.parametrize(("offset", "value"), XAPIC_WRITES)
def test_xapic_keeps_the_writable_bits(offset: int, value: int) -> None:
    cpu = Cpu()
    cpu.write(offset, 0xFFFFFFFF)
    assert cpu.read(offset) == value


def test_tsc_deadline_mode_needs_cpuid() -> None:
    cpu = Cpu()
    cpu.apic.set_cpuid(x2apic=True, tsc_deadline=False, maxphyaddr=40)
    cpu.write(reg.APIC_LVTT, 0xFFFFFFFF)
    assert cpu.read(reg.APIC_LVTT) == 0x310FF


def test_xapic_icr_keeps_reserved_bits_but_not_busy() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_ICR, 0xFFFFF8FF)
    assert cpu.read(reg.APIC_ICR) == 0xFFFFF8FF & ~reg.APIC_ICR_BUSY


@pytest.mark.parametrize(
    ("offset", "length", "value"),
    [
        (0x30, 1, 0x14),
        (0x30, 2, 0x14),
        (0x32, 1, 0x05),
        (0x32, 2, 0x05),
        (0x33, 2, 0),
        (0x34, 4, 0),
    ],
)
def test_xapic_narrow_reads(offset: int, length: int, value: int) -> None:
    assert Cpu().apic.mmio_read(offset, length) == value


@pytest.mark.parametrize(("offset", "length"), [(0x80, 1), (0x80, 2), (0x80, 8), (0x84, 4)])
def test_xapic_ignores_other_than_aligned_32_bit_writes(offset: int, length: int) -> None:
    cpu = Cpu()
    cpu.apic.mmio_write(offset, 0x20, length)
    assert cpu.apic.tpr == 0


X2APIC_FAULTING_READS = [0x80B, 0x80E, 0x809, 0x831, 0x83F, 0x82F, 0x800, 0x8FF, 0x840]
X2APIC_FAULTING_WRITES = [
    (0x802, 0),
    (0x803, 0),
    (0x80A, 0),
    (0x80D, 0),
    (0x80E, 0),
    (0x810, 0),
    (0x820, 0),
    (0x831, 0),
    (0x839, 0),
    (0x808, 0x100),
    (0x808, 1 << 32),
    (0x80B, 1),
    (0x80F, 0x1000),
    (0x828, 1),
    (0x830, 1 << 20),
    (0x830, 1 << 13),
    (0x832, 1 << 8),
    (0x832, 1 << 19),
    (0x837, 1 << 8),
    (0x838, 1 << 32),
    (0x83E, 4),
    (0x83F, 0x100),
    (0x8FF, 0),
]


@pytest.mark.parametrize("msr", X2APIC_FAULTING_READS)
def test_x2apic_faulting_reads(msr: int) -> None:
    with pytest.raises(ApicFault):
        Cpu(x2apic=True).apic.read_msr(msr)


@pytest.mark.parametrize(("msr", "value"), X2APIC_FAULTING_WRITES)
def test_x2apic_faulting_writes(msr: int, value: int) -> None:
    cpu = Cpu(x2apic=True)
    before = bytes(cpu.apic.get_state())
    with pytest.raises(ApicFault):
        cpu.apic.write_msr(msr, value)
    assert bytes(cpu.apic.get_state()) == before
    assert cpu.take() == []


@pytest.mark.parametrize("msr", [0x802, 0x808, 0x80F, 0x830])
def test_x2apic_msrs_fault_in_xapic_mode(msr: int) -> None:
    cpu = Cpu()
    with pytest.raises(ApicFault):
        cpu.apic.read_msr(msr)
    with pytest.raises(ApicFault):
        cpu.apic.write_msr(msr, 0)


def test_x2apic_icr_is_one_64_bit_register() -> None:
    cpu = Cpu(x2apic=True)
    cpu.write(reg.APIC_ICR, 0x1234_5678_0000_10FD)
    assert cpu.read(reg.APIC_ICR) == 0x1234_5678_0000_00FD
    assert cpu.take() == [("ipi", LapicIrq(0xFD, level=0, dest_id=0x12345678))]


def test_cr8_and_tpr_are_one_register() -> None:
    cpu = Cpu()
    cpu.apic.cr8 = 0xA
    assert cpu.read(reg.APIC_TASKPRI) == 0xA0
    cpu.write(reg.APIC_TASKPRI, 0x57)
    assert cpu.apic.cr8 == 5


# Priorities


def test_highest_vector_goes_first_and_nests() -> None:
    apic = Cpu().apic
    for vector in (0x31, 0x80, 0x45):
        assert apic.accept_irq(reg.APIC_DM_FIXED, vector) == 1
    assert apic.ack_interrupt() == 0x80
    assert apic.has_interrupt() is None
    apic.accept_irq(reg.APIC_DM_FIXED, 0x8F)
    assert apic.has_interrupt() is None
    apic.accept_irq(reg.APIC_DM_FIXED, 0x90)
    assert apic.ack_interrupt() == 0x90
    apic.eoi()
    apic.eoi()
    assert apic.ack_interrupt() == 0x8F
    apic.eoi()
    assert apic.ack_interrupt() == 0x45


@pytest.mark.parametrize(
    ("tpr", "in_service", "ppr"),
    [
        (0x00, None, 0),
        (0x35, None, 0x35),
        (0x35, 0x31, 0x35),
        (0x35, 0x47, 0x40),
        (0x50, 0x47, 0x50),
    ],
)
def test_ppr(tpr: int, in_service: int | None, ppr: int) -> None:
    cpu = Cpu()
    if in_service is not None:
        cpu.apic.accept_irq(reg.APIC_DM_FIXED, in_service)
        cpu.apic.ack_interrupt()
    cpu.write(reg.APIC_TASKPRI, tpr)
    assert cpu.read(reg.APIC_PROCPRI) == ppr


@pytest.mark.parametrize(("vector", "tpr", "passes"), [(0x40, 0x3F, True), (0x4F, 0x40, False)])
def test_tpr_blocks_its_own_class(vector: int, tpr: int, passes: bool) -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_TASKPRI, tpr)
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, vector)
    assert (cpu.apic.has_interrupt() is not None) is passes
    cpu.kicks = 0
    cpu.write(reg.APIC_TASKPRI, 0)
    assert cpu.kicks == 1
    assert cpu.apic.has_interrupt() == vector


def test_withdrawn_interrupt_is_the_spurious_vector() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_SPIV, 0x1EF)
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x31)
    cpu.write(reg.APIC_TASKPRI, 0xF0)
    assert cpu.apic.ack_interrupt() == 0xEF
    assert (cpu.apic.isr, cpu.apic.irr) == (0, 1 << 0x31)


def test_bitmaps_appear_in_their_registers() -> None:
    cpu = Cpu()
    for vector, trig_mode in ((0x31, LEVEL), (0xFF, EDGE), (0x80, LEVEL)):
        cpu.apic.accept_irq(reg.APIC_DM_FIXED, vector, 1, trig_mode)
    cpu.apic.ack_interrupt()
    assert cpu.read(reg.APIC_ISR + 0x70) == 1 << 31
    assert cpu.read(reg.APIC_IRR + 0x10) == 1 << 17
    assert cpu.read(reg.APIC_IRR + 0x40) == 1
    assert cpu.read(reg.APIC_TMR + 0x10) == 1 << 17
    assert cpu.read(reg.APIC_TMR + 0x70) == 0


def test_eoi_broadcasts_with_the_trigger_mode() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_EOI, 0)
    for vector, trig_mode in ((0x31, LEVEL), (0x41, EDGE)):
        cpu.apic.accept_irq(reg.APIC_DM_FIXED, vector, 1, trig_mode)
        cpu.apic.ack_interrupt()
    cpu.write(reg.APIC_EOI, 0xFFFFFFFF)
    cpu.write(reg.APIC_EOI, 0)
    assert cpu.take() == [("eoi", 0x41, EDGE), ("eoi", 0x31, LEVEL)]


@pytest.mark.parametrize(("trig_mode", "told"), [(LEVEL, []), (EDGE, [("eoi", 0x31, EDGE)])])
def test_directed_eoi_suppresses_the_broadcast_of_levels(
    trig_mode: int, told: list[object]
) -> None:
    cpu = Cpu(options=LapicOptions(directed_eoi=True), x2apic=True)
    cpu.write(reg.APIC_SPIV, SVR_ENABLED | reg.APIC_SPIV_DIRECTED_EOI)
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x31, 1, trig_mode)
    cpu.apic.ack_interrupt()
    cpu.write(reg.APIC_EOI, 0)
    assert cpu.take() == told


# Acceptance


@pytest.mark.parametrize(
    ("vector", "level", "trig_mode", "taken"),
    [
        (0x31, 1, EDGE, 1),
        (0x31, 0, EDGE, 1),
        (0x31, 1, LEVEL, 1),
        (0x31, 0, LEVEL, 0),
        (15, 1, 0, 0),
    ],
)
@pytest.mark.parametrize("mode", [reg.APIC_DM_FIXED, reg.APIC_DM_LOWEST])
def test_fixed(mode: int, vector: int, level: int, trig_mode: int, taken: int) -> None:
    cpu = Cpu()
    assert cpu.apic.accept_irq(mode, vector, level, trig_mode) == taken
    assert cpu.apic.irr == (1 << vector if taken else 0)
    assert cpu.kicks == taken
    assert cpu.apic.arb_prio == (mode == reg.APIC_DM_LOWEST)


ALWAYS_ACCEPTED = {NMI: 1, INIT: 1, SIPI: 1, reg.APIC_DM_REMRD: 1, EXTINT: 0, reg.APIC_DM_SMI: 0}


@pytest.mark.parametrize(("mode", "taken"), ALWAYS_ACCEPTED.items())
@pytest.mark.parametrize("enabled", [True, False])
def test_other_modes_do_not_need_the_software_enable(mode: int, taken: int, enabled: bool) -> None:
    cpu = Cpu(enabled=enabled)
    assert cpu.apic.accept_irq(mode, 0x31) == taken
    assert cpu.apic.irr == 0
    assert cpu.kicks == taken


def test_software_disabled_apic_keeps_but_does_not_take_fixed() -> None:
    cpu = Cpu()
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x31)
    cpu.write(reg.APIC_SPIV, 0xFF)
    assert cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x41) == 0
    assert cpu.apic.ack_interrupt() == 0x31


def test_hardware_disabled_apic_delivers_nothing() -> None:
    cpu = Cpu()
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x31)
    cpu.apic.set_base(BASE)
    assert cpu.apic.has_interrupt() is None
    assert cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x41) == 0
    assert cpu.apic.local_deliver(reg.APIC_LVT0) == 0
    assert cpu.apic.accept_pic_intr()


def test_smi_is_taken_by_a_processor_that_has_it() -> None:
    cpu = Cpu(smi=True)
    assert cpu.apic.accept_irq(reg.APIC_DM_SMI, 0) == 1
    assert cpu.kicks == 1


def test_init_then_sipi() -> None:
    apic = Cpu().apic
    apic.accept_irq(SIPI, 0x55)
    apic.accept_irq(INIT, 0, 1, LEVEL)
    assert apic.accept_irq(INIT, 0, 0, LEVEL) == 0
    assert apic.pending_events == 1 << reg.KVM_APIC_INIT
    apic.accept_irq(SIPI, 0x9A)
    assert (apic.take_init(), apic.take_init()) == (True, False)
    apic.reset(init=True)
    assert (apic.take_sipi(), apic.take_sipi()) == (0x9A, None)


def test_init_keeps_mode_id_and_pending_sipi() -> None:
    for x2apic in (False, True):
        cpu = Cpu(7, x2apic=x2apic)
        if not x2apic:
            cpu.write(reg.APIC_ID, 9 << 24)
        cpu.write(reg.APIC_TASKPRI, 0x20)
        cpu.apic.accept_irq(reg.APIC_DM_FIXED, 0x31)
        cpu.write(reg.APIC_TMICT, 1000)
        base = cpu.apic.apic_base
        cpu.apic.reset(init=True)
        assert cpu.apic.apic_base == base
        assert cpu.read(reg.APIC_ID) == (7 if x2apic else 9 << 24)
        assert cpu.read(reg.APIC_LDR) == (1 << 7 if x2apic else 0)
        assert (cpu.apic.tpr, cpu.apic.irr, cpu.apic.next_deadline_ns()) == (0, 0, None)
        cpu.apic.reset(init=False)
        assert cpu.apic.mode == LapicMode.XAPIC
        assert cpu.read(reg.APIC_ID) == 7 << 24


# LVT


@pytest.mark.parametrize(
    ("lvt0", "accepts"),
    [(0x700, True), (0x700 | MASKED, False), (0x400, False), (0x31, False)],
)
def test_pic_reaches_the_processor_through_lint0(lvt0: int, accepts: bool) -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVT0, lvt0)
    assert cpu.apic.accept_pic_intr() is accepts


def test_nmi_through_lint1_and_watchdog_through_lint0() -> None:
    cpu = Cpu()
    assert cpu.apic.local_deliver(reg.APIC_LVT1) == 0
    cpu.write(reg.APIC_LVT1, 0x400)
    assert cpu.apic.local_deliver(reg.APIC_LVT1) == 1
    assert not cpu.apic.lvt0_in_nmi_mode
    cpu.write(reg.APIC_LVT0, 0x400)
    assert cpu.apic.lvt0_in_nmi_mode
    assert cpu.take() == [("nmi",)]


def test_level_triggered_lint_sets_tmr() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVT0, 0x8031)
    cpu.apic.local_deliver(reg.APIC_LVT0)
    assert cpu.apic.tmr == cpu.apic.irr == 1 << 0x31


def test_performance_counter_entry_masks_itself() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVTPC, 0x400)
    assert cpu.apic.local_deliver(reg.APIC_LVTPC) == 1
    assert cpu.read(reg.APIC_LVTPC) == 0x400 | MASKED
    assert cpu.apic.local_deliver(reg.APIC_LVTPC) == 0


# Errors


def test_errors_show_after_a_write_and_interrupt_once_until_then() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVTERR, 0xFE)
    cpu.apic.accept_irq(reg.APIC_DM_FIXED, 5)
    cpu.write(reg.APIC_ICR, 0x05)
    assert cpu.take() == []
    assert cpu.read(reg.APIC_ESR) == 0
    assert (cpu.apic.ack_interrupt(), cpu.apic.irr) == (0xFE, 0)
    cpu.write(reg.APIC_ESR, 0xFFFFFFFF)
    assert cpu.read(reg.APIC_ESR) == reg.APIC_ESR_RECVILL | reg.APIC_ESR_SENDILL
    cpu.write(reg.APIC_ESR, 0)
    assert cpu.read(reg.APIC_ESR) == 0
    cpu.apic.mmio_write(0x20 * 0x10, 0)
    cpu.apic.mmio_read(0x40)
    assert cpu.apic.irr == 1 << 0xFE
    cpu.write(reg.APIC_ESR, 0)
    assert cpu.read(reg.APIC_ESR) == reg.APIC_ESR_ILLREGA


def test_error_entry_with_an_illegal_vector_does_not_recurse() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVTERR, 0x01)
    cpu.apic.mmio_read(0x40)
    cpu.write(reg.APIC_ESR, 0)
    assert cpu.read(reg.APIC_ESR) == reg.APIC_ESR_ILLREGA | reg.APIC_ESR_RECVILL


# IPIs


def test_xapic_ipi_fields() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_ICR2, 0x0F000000)
    cpu.write(reg.APIC_ICR, 0xFD | 1 << 8 | 1 << 11 | 1 << 14)
    cpu.write(reg.APIC_ICR, 0x000C4500)
    cpu.write(reg.APIC_ICR, 0x000C8500)
    cpu.write(reg.APIC_ICR, 0x0000069A)
    assert cpu.take() == [
        ("ipi", LapicIrq(0xFD, 1, LOGICAL, 1, EDGE, 0, 0x0F)),
        ("ipi", LapicIrq(0, INIT, PHYSICAL, 1, EDGE, reg.APIC_DEST_ALLBUT, 0x0F)),
        ("ipi", LapicIrq(0, INIT, PHYSICAL, 0, LEVEL, reg.APIC_DEST_ALLBUT, 0x0F)),
        ("ipi", LapicIrq(0x9A, SIPI, PHYSICAL, 0, EDGE, 0, 0x0F)),
    ]


@pytest.mark.parametrize("x2apic", [False, True])
def test_self_shorthand_stays_inside(x2apic: bool) -> None:
    cpu = Cpu(x2apic=x2apic)
    cpu.write(reg.APIC_ICR, 0x000400F1)
    assert (cpu.take(), cpu.apic.has_interrupt()) == ([], 0xF1)


def test_self_ipi_register() -> None:
    cpu = Cpu(x2apic=True)
    cpu.write(reg.APIC_SELF_IPI, 0x77)
    assert (cpu.take(), cpu.apic.ack_interrupt()) == ([], 0x77)


# Destinations


@pytest.mark.parametrize(
    ("apic_id", "x2apic", "dest", "matches"),
    [
        (3, False, 3, True),
        (3, False, 4, False),
        (3, False, 0xFF, True),
        (3, False, 0xFFFFFFFF, False),
        (0x103, False, 0x103, True),
        (0x103, False, 0x03, True),
        (3, True, 3, True),
        (0x103, True, 0x103, True),
        (0x103, True, 0x03, False),
        (3, True, 0xFFFFFFFF, True),
    ],
)
def test_physical_destinations(apic_id: int, x2apic: bool, dest: int, matches: bool) -> None:
    cpu = Cpu(apic_id, x2apic=x2apic)
    assert cpu.apic.match_dest(dest, PHYSICAL) is matches


@pytest.mark.parametrize(
    ("quirk", "ipi", "matches"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_8_bit_broadcast_reaches_x2apics_by_a_quirk(quirk: bool, ipi: bool, matches: bool) -> None:
    cpu = Cpu(3, x2apic=True, options=LapicOptions(x2apic_broadcast_quirk=quirk))
    source = Cpu(4).apic if ipi else None
    assert cpu.apic.match_dest(0xFF, PHYSICAL, source=source) is matches


@pytest.mark.parametrize(
    ("dfr", "ldr", "dest", "matches"),
    [
        (0xFFFFFFFF, 0x04, 0x04, True),
        (0xFFFFFFFF, 0x04, 0x0C, True),
        (0xFFFFFFFF, 0x04, 0x08, False),
        (0xFFFFFFFF, 0x00, 0xFF, True),
        (0x0FFFFFFF, 0x24, 0x24, True),
        (0x0FFFFFFF, 0x24, 0x2F, True),
        (0x0FFFFFFF, 0x24, 0x34, False),
        (0x0FFFFFFF, 0x24, 0x28, False),
        (0x0FFFFFFF, 0x24, 0xFF, True),
        (0x7FFFFFFF, 0x24, 0x24, False),
    ],
)
def test_xapic_logical_destinations(dfr: int, ldr: int, dest: int, matches: bool) -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_DFR, dfr)
    cpu.write(reg.APIC_LDR, ldr << 24)
    assert cpu.apic.match_dest(dest, LOGICAL) is matches


@pytest.mark.parametrize(
    ("apic_id", "dest", "matches"),
    [
        (0x12, 0x0001_0004, True),
        (0x12, 0x0001_FFFF, True),
        (0x12, 0x0002_0004, False),
        (0x12, 0x0001_0008, False),
        (0x12, 0xFFFFFFFF, True),
        (0x02, 0x0000_0004, True),
    ],
)
def test_x2apic_logical_destinations(apic_id: int, dest: int, matches: bool) -> None:
    assert Cpu(apic_id, x2apic=True).apic.match_dest(dest, LOGICAL) is matches


@pytest.mark.parametrize(
    ("shorthand", "to_self", "to_other"),
    [
        (reg.APIC_DEST_SELF, True, False),
        (reg.APIC_DEST_ALLINC, True, True),
        (reg.APIC_DEST_ALLBUT, False, True),
    ],
)
def test_shorthands(shorthand: int, to_self: bool, to_other: bool) -> None:
    one, other = Cpu(1).apic, Cpu(2).apic
    assert one.match_dest(9, PHYSICAL, shorthand, one) is to_self
    assert other.match_dest(9, PHYSICAL, shorthand, one) is to_other


def test_whoever_keeps_a_map_is_told_of_changes() -> None:
    cpu = Cpu()
    for offset, value in (
        (reg.APIC_ID, 1 << 24),
        (reg.APIC_LDR, 1 << 24),
        (reg.APIC_DFR, 0),
        (reg.APIC_SPIV, 0xFF),
    ):
        before = cpu.map_changes
        cpu.write(offset, value)
        assert cpu.map_changes == before + 1
    before = cpu.map_changes
    cpu.apic.set_base(BASE | EN | EXTD)
    assert cpu.map_changes == before + 1


# Timer


def test_timer_interrupt_and_masking() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_TDCR, 0xB)
    cpu.write(reg.APIC_LVTT, 0xEC)
    cpu.write(reg.APIC_TMICT, 1000)
    assert cpu.timer_changes
    assert cpu.apic.next_deadline_ns() == 1000
    cpu.now = 400
    assert cpu.read(reg.APIC_TMCCT) == 600
    assert not cpu.apic.expire(cpu.now)
    cpu.now = 1000
    assert cpu.apic.expire(cpu.now)
    assert (cpu.apic.ack_interrupt(), cpu.kicks) == (0xEC, 1)
    cpu.write(reg.APIC_LVTT, 0xEC | MASKED)
    cpu.write(reg.APIC_TMICT, 1000)
    cpu.now = 3000
    assert cpu.apic.expire(cpu.now)
    assert cpu.apic.irr == 0


def test_tsc_deadline_msr() -> None:
    cpu = Cpu()
    cpu.apic.write_tscdeadline(5000)
    assert cpu.apic.read_tscdeadline() == 0
    cpu.write(reg.APIC_LVTT, 2 << 17 | 0xEC)
    cpu.apic.write_tscdeadline(5000)
    cpu.write(reg.APIC_TMICT, 77)
    assert (cpu.apic.read_tscdeadline(), cpu.read(reg.APIC_TMICT)) == (5000, 0)
    assert cpu.apic.next_deadline_ns() == 5000
    cpu.now = 5001
    assert cpu.apic.read_tscdeadline() == 0
    assert cpu.apic.ack_interrupt() == 0xEC


def test_tsc_deadline_in_the_past_fires_at_once_and_zero_disarms() -> None:
    cpu = Cpu()
    cpu.now = 100
    cpu.write(reg.APIC_LVTT, 2 << 17 | 0xEC)
    cpu.apic.write_tscdeadline(99)
    assert cpu.apic.has_interrupt() == 0xEC
    cpu.apic.write_tscdeadline(1000)
    cpu.apic.write_tscdeadline(0)
    assert cpu.apic.next_deadline_ns() is None


def test_moving_the_tsc_past_the_deadline_fires() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_LVTT, 2 << 17 | 0xEC)
    cpu.apic.write_tscdeadline(1000)
    cpu.now = 2000
    cpu.apic.tsc_changed()
    assert cpu.apic.has_interrupt() == 0xEC


# Snapshots


@pytest.mark.parametrize(
    ("x2apic", "x2apic_format", "apic_id", "shown"),
    [(False, False, 5, 5 << 24), (True, False, 5, 5 << 24), (True, True, 0x105, 0x105)],
)
def test_id_formats(x2apic: bool, x2apic_format: bool, apic_id: int, shown: int) -> None:
    cpu = Cpu(apic_id, x2apic=x2apic)
    state = cpu.apic.get_state(x2apic_format)
    assert int.from_bytes(bytes(state)[0x20:0x24], "little") == shown
    cpu.apic.set_state(state, x2apic_format)
    assert cpu.read(reg.APIC_ID) == (apic_id if x2apic else apic_id << 24)


def test_foreign_x2apic_id_is_refused_only_in_that_format() -> None:
    state = Cpu(5, x2apic=True).apic.get_state(True)
    other = Cpu(6, x2apic=True)
    with pytest.raises(OSError, match="x2APIC ID is 6") as error:
        other.apic.set_state(state, x2apic_format=True)
    assert error.value.errno == errno.EINVAL
    other.apic.set_state(state)
    assert (other.read(reg.APIC_ID), other.read(reg.APIC_LDR)) == (6, 1 << 6)


def test_x2apic_icr_is_split_in_the_page() -> None:
    cpu = Cpu(x2apic=True)
    cpu.write(reg.APIC_ICR, 0x1234_5678_0000_00FD)
    page = bytes(cpu.apic.get_state())
    assert page[0x300:0x304] == b"\xfd\0\0\0"
    assert page[0x310:0x314] == b"\x78\x56\x34\x12"


def test_page_shows_live_priority_and_count_and_zero_padding() -> None:
    cpu = Cpu()
    cpu.write(reg.APIC_TASKPRI, 0x20)
    cpu.write(reg.APIC_TDCR, 0xB)
    cpu.write(reg.APIC_TMICT, 1000)
    cpu.now = 1
    page = bytes(cpu.apic.get_state())
    assert page[0xA0] == 0x20
    assert int.from_bytes(page[0x390:0x394], "little") == 999
    assert not any(page[i] for i in range(1024) if i % 16 >= 4)


def test_snapshot_does_not_lose_a_timer_that_ran_out() -> None:
    cpu, restored = Cpu(), Cpu()
    cpu.write(reg.APIC_LVTT, 0xEC)
    cpu.write(reg.APIC_TMICT, 1000)
    cpu.now = restored.now = 5000
    restored.apic.set_state(cpu.apic.get_state())
    assert restored.apic.has_interrupt() == 0xEC
    assert restored.apic.next_deadline_ns() is None


def test_kvmtool_style_lint_setup() -> None:
    cpu = Cpu(enabled=False)
    page = bytearray(bytes(cpu.apic.get_state()))
    page[0x350:0x354] = (0x700).to_bytes(4, "little")
    page[0x360:0x364] = (0x400).to_bytes(4, "little")
    cpu.apic.set_state(kvm_lapic_state.from_buffer_copy(page))
    assert cpu.apic.accept_pic_intr()
    assert cpu.apic.local_deliver(reg.APIC_LVT1) == 1


VECTORS = st.integers(16, 255)
WRITABLE = st.sampled_from(
    [
        reg.APIC_TASKPRI,
        reg.APIC_EOI,
        reg.APIC_SPIV,
        reg.APIC_ICR,
        reg.APIC_LVTT,
        reg.APIC_LVT0,
        reg.APIC_TMICT,
        reg.APIC_TDCR,
    ]
)
OPERATIONS = st.one_of(
    st.tuples(st.just("accept"), VECTORS, st.sampled_from([EDGE, LEVEL])),
    st.tuples(st.just("write"), WRITABLE, st.integers(0, 0xFFFFFFFF)),
    st.tuples(st.just("ack"), st.just(0), st.just(0)),
    st.tuples(st.just("wait"), st.integers(0, 1 << 24), st.just(0)),
    st.tuples(st.just("deadline"), st.integers(0, 1 << 34), st.just(0)),
)


def step(cpu: Cpu, operation: tuple[str, int, int]) -> tuple[object, ...]:
    kind, first, second = operation
    result: object = None
    if kind == "accept":
        result = cpu.apic.accept_irq(reg.APIC_DM_FIXED, first, 1, second)
    elif kind == "write":
        # Legal vectors and writable bits, so that neither mode faults or records an error.
        mask = {reg.APIC_EOI: 0, reg.APIC_ICR: reg.X2APIC_ICR_LOW, reg.APIC_TMICT: 0xFFFFFFFF}
        value = second & mask.get(first, cpu.apic._access[first].writable)
        vectored = first in (reg.APIC_ICR, reg.APIC_LVTT, reg.APIC_LVT0)
        cpu.write(first, value | 0x10 if vectored else value)
    elif kind == "ack":
        result = cpu.apic.ack_interrupt()
    elif kind == "deadline":
        cpu.apic.write_tscdeadline(first)
    else:
        # The page holds whole counts, and 128 is the coarsest divider.
        cpu.now += first << 7
        result = cpu.apic.expire(cpu.now)
    return result, cpu.apic.has_interrupt(), cpu.read(reg.APIC_TMCCT), cpu.take()


@given(st.booleans(), st.lists(OPERATIONS, max_size=20), st.lists(OPERATIONS, max_size=20))
def test_restored_apic_behaves_as_the_original(
    x2apic: bool, before: list[tuple[str, int, int]], after: list[tuple[str, int, int]]
) -> None:
    cpu, restored = Cpu(3, x2apic=x2apic), Cpu(3)
    for operation in before:
        step(cpu, operation)
    if cpu.apic.timer.deadline is None:  # a counter that has run out starts when restored
        cpu.write(reg.APIC_TMICT, 0)
    restored.now = cpu.now
    restored.apic.set_base(cpu.apic.apic_base, host_initiated=True)
    restored.apic.set_state(cpu.apic.get_state())
    restored.apic.write_tscdeadline(cpu.apic.read_tscdeadline())
    restored.take()
    cpu.take()
    assert [step(restored, op) for op in after] == [step(cpu, op) for op in after]
    assert bytes(restored.apic.get_state()) == bytes(cpu.apic.get_state())


@given(st.lists(OPERATIONS, max_size=50))
def test_delivered_vectors_always_outrank_the_processor(
    operations: list[tuple[str, int, int]],
) -> None:
    cpu = Cpu()
    for operation in operations:
        ppr, ready = cpu.apic.ppr, cpu.apic.has_interrupt()
        assert ready is None or ready >> 4 > ppr >> 4
        step(cpu, operation)
        if operation[0] == "ack" and ready is not None:
            assert cpu.apic.isr.bit_length() - 1 == ready
            assert cpu.apic.ppr >> 4 == ready >> 4
