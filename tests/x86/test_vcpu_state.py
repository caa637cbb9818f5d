"""vCPU state through ioctls: registers, FPU, XSAVE, MSRs, CPUID, events, clock; what is refused."""

from __future__ import annotations

import errno
import struct

import pytest

from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi
from anykvm.x86.capability import X86_CAPS
from anykvm.x86.clock import kvm_get_time_scale
from anykvm.x86.msrs import ARCH_CAPABILITIES

from .fake_engine import rdmsr, wrmsr
from .machine import machine

LONG_MODE = {"cr0": 0x80000011, "cr3": 0x1000, "cr4": 0x20, "efer": 0x500}


def refused(expected: int, function, *args) -> None:
    with pytest.raises(OSError, match=f"Errno {expected}]"):
        function(*args)


def test_power_on_state():
    with machine() as m:
        vcpu = m.add_vcpu()
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        assert (regs.rip, regs.rflags, regs.rdx, regs.rax) == (0xFFF0, 2, 0x600, 0)
        assert (sregs.cs.selector, sregs.cs.base, sregs.cs.limit) == (0xF000, 0xFFFF0000, 0xFFFF)
        assert (sregs.cs.type, sregs.cs.s, sregs.cs.present, sregs.cs.db) == (11, 1, 1, 0)
        assert (sregs.tr.type, sregs.tr.s, sregs.ldt.type) == (11, 0, 2)
        assert (sregs.cr0, sregs.efer, sregs.apic_base) == (0x60000010, 0, 0xFEE00900)
        assert vcpu.get_debugregs().dr6 == 0xFFFF0FF0
        assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE


def test_general_registers_round_trip():
    with machine() as m:
        vcpu = m.add_vcpu()
        names = [name for name, _ in uapi.kvm_regs._fields_ if name != "rflags"]
        regs = uapi.kvm_regs(**{name: 0x100 + n for n, name in enumerate(names)}, rflags=0x246)
        vcpu.set_regs(regs)
        assert bytes(vcpu.get_regs()) == bytes(regs)
        assert list(m.cpu().state.gpr)[:4] == [regs.rax, regs.rcx, regs.rdx, regs.rbx]


@pytest.mark.parametrize("suffix", ["", "2"])
def test_system_registers_round_trip(suffix):
    with machine() as m:
        vcpu = m.add_vcpu()
        sregs = getattr(vcpu, f"get_sregs{suffix}")()
        for name, value in LONG_MODE.items():
            setattr(sregs, name, value)
        sregs.cs.l, sregs.cs.g, sregs.cs.limit = 1, 1, 0xFFFFFFFF
        sregs.gdt.base, sregs.idt.limit = 0x5000, 0xFFF
        sregs.ldt.present, sregs.ldt.unusable = 0, 1
        getattr(vcpu, f"set_sregs{suffix}")(sregs)
        assert bytes(getattr(vcpu, f"get_sregs{suffix}")()) == bytes(sregs)
        assert ("mode_changed",) in m.cpu().log


@pytest.mark.parametrize(
    "wrong",
    [
        {"cr0": 0x80000010},
        {"cr0": 0x20000011},
        {"cr0": 1 << 40},
        {"cr4": 1 << 31},
        {"efer": 0x100},
        {"cr4": 0},
        {"efer": 0x400, "cr0": 0x11},
        {"apic_base": 0xFEE00800 | 1},
    ],
)
def test_impossible_system_registers(wrong):
    with machine() as m:
        vcpu = m.add_vcpu()
        sregs = vcpu.get_sregs()
        for name, value in {**LONG_MODE, **wrong}.items():
            setattr(sregs, name, value)
        refused(errno.EINVAL, vcpu.set_sregs, sregs)


def test_pdptes_travel_in_pae_mode():
    with machine() as m:
        vcpu = m.add_vcpu()
        sregs = vcpu.get_sregs2()
        sregs.cr0, sregs.cr4 = 0x80000011, 0x20
        sregs.flags = uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
        sregs.pdptrs[2] = 0x7001
        vcpu.set_sregs2(sregs)
        assert list(vcpu.get_sregs2().pdptrs) == [0, 0, 0x7001, 0]
        sregs.cr0 = 0x11
        refused(errno.EINVAL, vcpu.set_sregs2, sregs)


def test_pending_interrupts_of_sregs():
    with machine() as m:
        vcpu = m.add_vcpu()
        sregs = vcpu.get_sregs()
        sregs.interrupt_bitmap[1] = 1 << 3
        vcpu.set_sregs(sregs)
        assert vcpu.get_sregs().interrupt_bitmap[1] == 1 << 3


def fpu_state() -> uapi.kvm_fpu:
    """TOP is 6, and R6 and R7 are in use: ST0 and ST1."""
    fpu = uapi.kvm_fpu(fcw=0x27F, fsw=6 << 11, ftwx=0xC0, last_ip=0x1234)
    fpu.fpr[0][:10] = list(struct.pack("<QH", 1 << 63, 0x3FFF))
    fpu.fpr[1][:10] = list(struct.pack("<QH", 0, 0))
    for i in range(16):
        fpu.xmm[i][:] = [i] * 16
    return fpu


def test_fpu_round_trips_and_is_in_physical_order_inside():
    with machine() as m:
        vcpu, fpu = m.add_vcpu(), fpu_state()
        vcpu.set_fpu(fpu)
        assert bytes(vcpu.get_fpu()) == bytes(fpu)
        state = m.cpu().state
        assert struct.unpack_from("<QH", bytes(state.st[6])) == (1 << 63, 0x3FFF)
        assert state.fpu_tag == 0b01_00_11_11_11_11_11_11  # R7 zero, R6 valid, the rest empty


def test_xsave_shows_what_set_fpu_put_there_and_restores_it():
    with machine() as m:
        vcpu = m.add_vcpu()
        vcpu.set_fpu(fpu_state())
        area = vcpu.get_xsave()
        raw = bytes(area.region)
        assert struct.unpack_from("<HHB", raw) == (0x27F, 6 << 11, 0xC0)
        assert struct.unpack_from("<I", raw, 24) == (0x1F80,)
        assert raw[160 + 16 * 5 : 160 + 16 * 6] == bytes([5] * 16)
        assert struct.unpack_from("<Q", raw, 512)[0] & 3 == 3
        vcpu.set_fpu(uapi.kvm_fpu(fcw=0x37F))
        vcpu.set_xsave(area)
        assert bytes(vcpu.get_xsave().region) == raw
        assert vcpu.get_xsave2(4096) == raw


def test_components_that_xsave_does_not_hold_are_initialised():
    with machine() as m:
        vcpu = m.add_vcpu()
        vcpu.set_fpu(fpu_state())
        area = vcpu.get_xsave()
        area.region[128] = 0
        vcpu.set_xsave(area)
        fpu = vcpu.get_fpu()
        assert (fpu.fcw, fpu.ftwx) == (0x37F, 0)
        assert bytes(fpu.xmm[3]) == bytes(16)
        area.region[128] = 1 << 9
        refused(errno.EINVAL, vcpu.set_xsave, area)


def test_xcrs():
    with machine() as m:
        vcpu = m.add_vcpu()
        xcrs = vcpu.get_xcrs()
        assert (xcrs.nr_xcrs, xcrs.xcrs[0].value) == (1, 1)
        xcrs.xcrs[0].value = 3
        vcpu.set_xcrs(xcrs)
        assert vcpu.get_xcrs().xcrs[0].value == 3
        xcrs.xcrs[0].value = 2
        refused(errno.EINVAL, vcpu.set_xcrs, xcrs)


def test_debug_registers():
    with machine() as m:
        vcpu = m.add_vcpu()
        regs = vcpu.get_debugregs()
        regs.db[1], regs.dr7 = 0x1234, 0x402
        vcpu.set_debugregs(regs)
        assert bytes(vcpu.get_debugregs()) == bytes(regs)
        regs.dr7 = 1 << 33
        refused(errno.EINVAL, vcpu.set_debugregs, regs)


def test_every_listed_msr_round_trips():
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu()
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        listed = m.kvm.msr_index_list()
        values = vcpu.get_msrs(listed)
        assert list(values) == listed
        assert vcpu.set_msrs(values) == len(listed)
        tsc = {0x10, 0x6E0, 0x40000010, 0x40000020}  # what goes on counting
        again = vcpu.get_msrs(listed)
        assert {i: v for i, v in again.items() if i not in tsc} == {
            i: v for i, v in values.items() if i not in tsc
        }


def test_feature_msrs_of_dev_kvm():
    with machine() as m:
        features = m.kvm.msr_feature_index_list()
        assert m.kvm.get_msrs(features)[0x10A] == ARCH_CAPABILITIES
        assert 0x10A in features


def test_msr_counts_end_at_the_first_failure():
    with machine() as m:
        vcpu = m.add_vcpu()
        array = (uapi.kvm_msr_entry * 3)()
        for entry, index in zip(array, (0x174, 0xDEAD, 0x175), strict=True):
            entry.index, entry.data = index, 0x10
        raw = struct.pack("<II", 3, 0) + bytes(array)
        buffer = (uapi.u8 * len(raw)).from_buffer_copy(raw)
        assert vcpu.ioctl(uapi.KVM_SET_MSRS, buffer) == 1
        assert vcpu.ioctl(uapi.KVM_GET_MSRS, buffer) == 1
        assert m.cpu().state.sysenter_cs == 0x10
        assert m.cpu().state.sysenter_esp == 0


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0xC0000082, 1 << 47),  # LSTAR is an address
        (0xC0000100, 0x8000_0000_0000_0000),
        (0xC0000080, 1 << 1),
        (0x277, 0x0202020202020202),
        (0x2FF, 2),
        (0x10A, 1),
        (0x179, 1),
        (0x400, 5),
        (0xFE, 0),
    ],
)
def test_msr_values_that_fault(index, value):
    with machine() as m:
        vcpu = m.add_vcpu(wrmsr(index, value), Exit.HLT)
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        vcpu.run()
        assert m.cpu().did("exception", "msr") == [("exception", 13, 0)]


def test_the_guest_reads_and_writes_msrs():
    with machine() as m:
        vcpu = m.add_vcpu(wrmsr(0xC0000102, 0xFFFF888000000000), rdmsr(0xC0000102), Exit.HLT)
        vcpu.run()
        assert m.cpu().did() == [("msr", None), ("msr", 0xFFFF888000000000)]


def test_efer_lme_is_fixed_while_paging():
    with machine() as m:
        vcpu = m.add_vcpu(wrmsr(0xC0000080, 0x901), wrmsr(0xC0000080, 0x801), Exit.HLT)
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        sregs = vcpu.get_sregs()
        for name, value in LONG_MODE.items():
            setattr(sregs, name, value)
        vcpu.set_sregs(sregs)
        vcpu.run()
        assert m.cpu().did() == [("msr", None), ("exception", 13, 0)]
        assert m.cpu().state.efer == 0xD01


def test_a_filtered_msr_faults():
    bitmap = (uapi.u8 * 8)()
    kept = uapi.kvm_msr_filter()
    kept.ranges[0].flags = uapi.KVM_MSR_FILTER_READ
    kept.ranges[0].nmsrs, kept.ranges[0].base = 1, 0x174
    kept.ranges[0].bitmap = uapi_address(bitmap)
    with machine() as m:
        m.vm.set_msr_filter(kept)
        m.add_vcpu(rdmsr(0x174), wrmsr(0x174, 5), Exit.HLT).run()
        assert m.cpu().did() == [("exception", 13, 0), ("msr", None)]


def uapi_address(value: object) -> int:
    from ctypes import addressof

    return addressof(value)  # type: ignore[arg-type]


def test_tsc_adjust_and_tsc_move_together():
    with machine() as m:
        vcpu = m.add_vcpu(wrmsr(0x3B, 1 << 50), Exit.HLT, wrmsr(0x10, 0), Exit.HLT)
        before = vcpu.get_msrs([0x10])[0x10]
        vcpu.run()
        assert vcpu.get_msrs([0x10])[0x10] - before >= 1 << 50
        vcpu.run()
        assert vcpu.get_msrs([0x10])[0x10] < 1 << 40
        adjust = vcpu.get_msrs([0x3B])[0x3B]
        assert adjust >> 63  # the guest has set its clock back


def test_vcpus_whose_tsc_is_written_in_turn_agree():
    with machine() as m:
        first, second = m.add_vcpu(), m.add_vcpu()
        for start in (0, 10**15):
            first.set_msrs({0x10: start})
            second.set_msrs({0x10: start})
            offsets = {cpu.state.tsc_offset for cpu in m.engine.cpus}
            assert len(offsets) == 1
        assert 0 <= first.get_msrs([0x10])[0x10] - 10**15 < 10**10


def test_machine_check_setup():
    with machine() as m:
        vcpu = m.add_vcpu()
        cap = m.kvm.mce_cap_supported()
        assert (cap & 0xFF, m.kvm.check_extension(uapi.KVM_CAP_MCE)) == (0, 32)
        vcpu.setup_mce(10 | 1 << 8)
        assert vcpu.get_msrs([0x179])[0x179] == 10 | 1 << 8
        for wrong in (0, 33, 1 << 40 | 10):
            refused(errno.EINVAL, vcpu.setup_mce, wrong)


def test_cpuid_is_kept_and_its_apic_bit_follows_the_apic():
    with machine() as m:
        vcpu = m.add_vcpu()
        offered = m.kvm.supported_cpuid()
        vcpu.set_cpuid2(offered)
        assert [bytes(e) for e in vcpu.get_cpuid2()] == [bytes(e) for e in offered]
        sregs = vcpu.get_sregs()
        sregs.apic_base &= ~(1 << 11)
        vcpu.set_sregs(sregs)
        leaf = next(e for e in vcpu.get_cpuid2() if e.function == 1)
        assert not leaf.edx >> 9 & 1


def test_vcpu_events_round_trip():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        events = vcpu.get_vcpu_events()
        events.exception.injected, events.exception.nr = 1, 14
        events.exception.has_error_code, events.exception.error_code = 1, 6
        events.nmi.pending = 1
        events.interrupt.shadow = uapi.KVM_X86_SHADOW_INT_STI
        vcpu.set_vcpu_events(events)
        assert bytes(vcpu.get_vcpu_events()) == bytes(events)
        vcpu.run()
        assert m.cpu().did() == [("exception", 14, 6), ("nmi",)]
        events.exception.nr = 2
        refused(errno.EINVAL, vcpu.set_vcpu_events, events)
        events.flags = 1 << 20
        refused(errno.EINVAL, vcpu.set_vcpu_events, events)


def test_a_pending_triple_fault_is_an_event_if_enabled():
    with machine() as m:
        vcpu = m.add_vcpu()
        m.vm.enable_cap(uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
        events = vcpu.get_vcpu_events()
        assert events.flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
        events.triple_fault.pending = 1
        vcpu.set_vcpu_events(events)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


def test_processor_states():
    with machine() as m:
        refused(errno.EINVAL, m.add_vcpu().set_mp_state, uapi.KVM_MP_STATE_HALTED)
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu()
        vcpu.set_mp_state(uapi.KVM_MP_STATE_HALTED)
        assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_HALTED
        refused(errno.EINVAL, vcpu.set_mp_state, 77)


def test_registers_travel_in_kvm_run():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT, Exit.HLT)
        run = vcpu.kvm_run
        run.kvm_valid_regs = uapi.KVM_SYNC_X86_VALID_FIELDS
        vcpu.set_regs(uapi.kvm_regs(rax=42, rflags=2))
        vcpu.run()
        assert run.s.regs.regs.rax == 42
        run.s.regs.regs.rax = 43
        run.kvm_dirty_regs = uapi.KVM_SYNC_X86_REGS
        vcpu.run()
        assert (vcpu.get_regs().rax, run.kvm_dirty_regs) == (43, 0)
        run.kvm_valid_regs = 1 << 60
        with pytest.raises(OSError, match="kvm_valid_regs") as raised:
            vcpu.run()
        assert raised.value.errno == errno.EINVAL


def pvclock(memory, gpa: int) -> tuple[int, int, int, int, int, int]:
    version, _, tsc, ns, mul, shift, flags = struct.unpack(
        "<IIQQIbB2x", bytes(memory.read(gpa, 32))
    )
    return version, tsc, ns, mul, shift, flags


def test_the_guest_computes_the_vms_clock():
    with machine() as m:
        memory = m.ram()
        vcpu = m.add_vcpu(wrmsr(0x4B564D01, 0x2001), Exit.REQUEST, Exit.HLT)
        vcpu.run()
        version, tsc, ns, mul, shift, flags = pvclock(memory, 0x2000)
        assert (version, flags) == (2, 1)
        now = m.vm.get_clock()
        delta = vcpu.get_msrs([0x10])[0x10] - tsc
        delta = delta << shift if shift >= 0 else delta >> -shift
        assert 0 <= ns + (delta * mul >> 32) - now.clock < 50_000_000


def test_setting_the_clock_updates_the_page():
    with machine() as m:
        memory = m.ram()
        vcpu = m.add_vcpu(wrmsr(0x4B564D01, 0x2001), Exit.REQUEST, Exit.HLT, Exit.HLT)
        vcpu.run()
        m.vm.set_clock(uapi.kvm_clock_data(clock=10**15))
        vcpu.run()
        assert pvclock(memory, 0x2000)[2] == 10**15
        assert m.vm.get_clock().clock >= 10**15
        refused(errno.EINVAL, m.vm.set_clock, uapi.kvm_clock_data(flags=1 << 9))


def test_the_guest_is_told_that_it_was_paused():
    with machine() as m:
        memory = m.ram()
        vcpu = m.add_vcpu(wrmsr(0x4B564D01, 0x2001), Exit.REQUEST, Exit.HLT, Exit.HLT)
        refused(errno.EINVAL, vcpu.kvmclock_ctrl)
        vcpu.run()
        vcpu.kvmclock_ctrl()
        vcpu.run()
        assert pvclock(memory, 0x2000)[5] == 3


@pytest.mark.parametrize("hz", [1_000_000, 999_999_999, 1_000_000_000, 2_499_995_000, 5 * 10**9])
def test_time_scale_converts(hz):
    shift, mul = kvm_get_time_scale(10**9, hz)
    assert mul < 1 << 32
    ticks = 3 * hz
    shifted = ticks << shift if shift >= 0 else ticks >> -shift
    assert shifted * mul >> 32 == pytest.approx(3 * 10**9, rel=1e-6)


def test_tsc_frequency():
    with machine() as m:
        vcpu = m.add_vcpu()
        khz = vcpu.get_tsc_khz()
        vcpu.set_tsc_khz(0)
        vcpu.set_tsc_khz(khz + khz // 100_000)
        assert m.cpu().state.tsc_ratio == 1 << 48  # within what clocks differ by
        vcpu.set_tsc_khz(khz * 2)
        assert vcpu.get_tsc_khz() == khz * 2
        refused(errno.EINVAL, vcpu.set_tsc_khz, 1 << 31)


def test_addresses_that_vmx_needed():
    with machine() as m:
        m.vm.set_tss_addr(0xFFFBD000)
        refused(errno.EINVAL, m.vm.set_tss_addr, 0xFFFFE000)
        m.vm.set_identity_map_addr(0xFFFBC000)
        m.add_vcpu()
        refused(errno.EINVAL, m.vm.set_identity_map_addr, 0xFFFBC000)
        refused(errno.EBUSY, m.vm.set_boot_cpu_id, 1)


def test_capabilities_are_the_same_on_both_descriptors():
    with machine() as m:
        for cap, value in X86_CAPS.items():
            assert m.kvm.check_extension(cap) == m.vm.check_extension(cap) == value
        refused(errno.EINVAL, m.vm.enable_cap, uapi.KVM_CAP_HYPERV_SYNIC)
        refused(errno.EINVAL, m.vm.enable_cap, uapi.KVM_CAP_X86_USER_SPACE_MSR, 1 << 9)


def test_tsc_offset_is_an_attribute():
    value = uapi.u64(0)
    attr = uapi.kvm_device_attr(
        group=uapi.KVM_VCPU_TSC_CTRL, attr=uapi.KVM_VCPU_TSC_OFFSET, addr=uapi_address(value)
    )
    with machine() as m:
        vcpu = m.add_vcpu()
        vcpu.ioctl(uapi.KVM_HAS_DEVICE_ATTR, attr)
        value.value = 0x1234
        vcpu.ioctl(uapi.KVM_SET_DEVICE_ATTR, attr)
        value.value = 0
        vcpu.ioctl(uapi.KVM_GET_DEVICE_ATTR, attr)
        assert value.value == m.cpu().state.tsc_offset == 0x1234
        attr.attr = 9
        refused(errno.ENXIO, vcpu.ioctl, uapi.KVM_HAS_DEVICE_ATTR, attr)
