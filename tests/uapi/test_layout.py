"""Sizes and offsets of the structs that programs depend on, as literal numbers."""

from __future__ import annotations

import ctypes

import pytest

from anykvm.uapi import kvm as abi

SIZES = {
    "kvm_run": 2352,
    "kvm_run_io": 16,
    "kvm_run_mmio": 24,
    "kvm_run_internal": 136,
    "kvm_regs": 144,
    "kvm_sregs": 312,
    "kvm_sregs2": 320,
    "kvm_segment": 24,
    "kvm_dtable": 16,
    "kvm_fpu": 416,
    "kvm_xsave": 4096,
    "kvm_xcrs": 392,
    "kvm_debugregs": 128,
    "kvm_lapic_state": 1024,
    "kvm_vcpu_events": 64,
    "kvm_mp_state": 4,
    "kvm_cpuid2": 8,
    "kvm_cpuid_entry2": 40,
    "kvm_msrs": 8,
    "kvm_msr_entry": 16,
    "kvm_msr_list": 4,
    "kvm_msr_filter": 392,
    "kvm_signal_mask": 4,
    "kvm_userspace_memory_region": 32,
    "kvm_dirty_log": 16,
    "kvm_clear_dirty_log": 24,
    "kvm_coalesced_mmio_zone": 16,
    "kvm_coalesced_mmio": 24,
    "kvm_coalesced_mmio_ring": 8,
    "kvm_irqchip": 520,
    "kvm_pic_state": 16,
    "kvm_ioapic_state": 216,
    "kvm_pit_config": 64,
    "kvm_pit_state2": 112,
    "kvm_pit_channel_state": 24,
    "kvm_irq_level": 8,
    "kvm_irq_routing": 8,
    "kvm_irq_routing_entry": 48,
    "kvm_irqfd": 32,
    "kvm_ioeventfd": 64,
    "kvm_msi": 32,
    "kvm_clock_data": 48,
    "kvm_enable_cap": 104,
    "kvm_guest_debug": 72,
    "kvm_translation": 24,
    "kvm_device_attr": 24,
    "kvm_create_device": 12,
    "kvm_nested_state": 128,
    "kvm_dirty_gfn": 16,
    "kvm_stats_header": 24,
    "kvm_stats_desc": 16,
}

OFFSETS = {
    ("kvm_run", "immediate_exit"): 1,
    ("kvm_run", "exit_reason"): 8,
    ("kvm_run", "ready_for_interrupt_injection"): 12,
    ("kvm_run", "if_flag"): 13,
    ("kvm_run", "flags"): 14,
    ("kvm_run", "cr8"): 16,
    ("kvm_run", "apic_base"): 24,
    ("kvm_run", "io"): 32,
    ("kvm_run", "mmio"): 32,
    ("kvm_run", "kvm_valid_regs"): 288,
    ("kvm_run", "kvm_dirty_regs"): 296,
    ("kvm_run", "s"): 304,
    ("kvm_run_io", "data_offset"): 8,
    ("kvm_run_mmio", "len"): 16,
    ("kvm_run_mmio", "is_write"): 20,
    ("kvm_run_emulation_failure", "insn_size"): 16,
    ("kvm_sregs", "gdt"): 192,
    ("kvm_sregs", "cr0"): 224,
    ("kvm_sregs", "interrupt_bitmap"): 280,
    ("kvm_vcpu_events", "sipi_vector"): 16,
    ("kvm_vcpu_events", "exception_payload"): 56,
    ("kvm_ioeventfd", "fd"): 20,
    ("kvm_ioeventfd", "flags"): 24,
    ("kvm_irqchip", "chip"): 8,
    ("kvm_irq_routing_entry", "u"): 16,
    ("kvm_dirty_log", "dirty_bitmap"): 8,
}


@pytest.mark.parametrize(("name", "size"), SIZES.items(), ids=str)
def test_size(name: str, size: int) -> None:
    assert ctypes.sizeof(getattr(abi, name)) == size


@pytest.mark.parametrize(("field", "offset"), OFFSETS.items(), ids=str)
def test_offset(field: tuple[str, str], offset: int) -> None:
    kind, name = field
    assert getattr(getattr(abi, kind), name).offset == offset


def test_members_of_anonymous_unions_share_their_memory() -> None:
    level = abi.kvm_irq_level(irq=0xFFFFFFFF)
    assert level.status == -1
    run = abi.kvm_run()
    run.io.port = 0x3F8
    assert run.hw.hardware_exit_reason == 0x3F8 << 16


def test_bit_fields_of_a_redirection_entry() -> None:
    entry = abi.kvm_ioapic_state_redirtbl()
    entry.bits = 0x1200_0000_0001_A931
    fields = entry.fields
    assert (fields.vector, fields.delivery_mode, fields.dest_mode) == (0x31, 1, 1)
    assert (fields.polarity, fields.trig_mode, fields.mask, fields.dest_id) == (1, 1, 1, 0x12)


def test_constants_with_unsigned_arithmetic() -> None:
    assert abi.KVM_S390_STORE_STATUS_NOADDR == 2**64 - 1
    assert abi.KVM_IRQ_ROUTING_XEN_EVTCHN_PRIO_2LEVEL == 2**32 - 1
    assert abi.KVM_COALESCED_MMIO_MAX == 170


def test_macros_with_arguments_are_functions() -> None:
    assert abi.KVM_VM_TYPE_ARM_IPA_SIZE(0x1_30) == 0x30
    assert abi.KVM_S390_INT_IO(1, 2, 3, 4) == 1 << 26 | 2 << 18 | 3 << 16 | 4
