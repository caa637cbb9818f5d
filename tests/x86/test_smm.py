"""System management mode: SMI, the save area in both layouts, RSM, what waits for its end."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from anykvm.api import GuestMemory
from anykvm.uapi import kvm as uapi
from anykvm.x86.smm import SmramState32, SmramState64

from .long_guest import CODE, LongGuest, long_guest

SMBASE, HANDLER, SAVE_AREA = 0x30000, 0x38000, 0x3FE00
SMRAM_SLOT = 1 << 16
LM = 1 << 29
RSM, NOP = b"\x0f\xaa", b"\x90"
SMM_PORT = 0x41
OUT_SMM = bytes((0xE6, SMM_PORT))
MSR_SMBASE, MSR_SMI_COUNT, X2APIC_ICR = 0x9E, 0x34, 0x830
ICR_SELF_SMI = 1 << 18 | 1 << 14 | 2 << 8


@dataclass
class SmmGuest:
    """`ram` is what the processor sees from SMBASE on in SMM alone."""

    guest: LongGuest
    ram: GuestMemory

    @property
    def vcpu(self):
        return self.guest.vcpus[0]

    def handler(self, code: bytes) -> None:
        self.ram.write(HANDLER - SMBASE, code)

    def area(self, kind: type = SmramState64):
        return kind.from_buffer_copy(self.ram.read(SAVE_AREA - SMBASE, 512))

    def change(self, area) -> None:
        self.ram.write(SAVE_AREA - SMBASE, bytes(area))

    def run(self) -> tuple[int, int]:
        return self.vcpu.run(), self.vcpu.kvm_run.io.port


@contextmanager
def smm_guest() -> Iterator[SmmGuest]:
    with long_guest() as guest:
        ram = GuestMemory(0x10000)
        guest.vm.set_user_memory_region(SMRAM_SLOT, SMBASE, 0x10000, ram.userspace_addr)
        made = SmmGuest(guest, ram)
        made.handler(OUT_SMM + RSM)
        yield made


def start(g: SmmGuest, code: bytes, **gpr: int) -> int:
    """As `LongGuest.start`, with the SMI queued behind the last exit."""
    g.guest._finish_last_exit(0)
    g.vcpu.smi()
    g.guest.memory.write(CODE, code + b"\xe6\x80")
    regs = g.vcpu.get_regs()
    regs.rip, regs.rsp = CODE, CODE + 0x1000
    for name, value in gpr.items():
        setattr(regs, name, value)
    g.vcpu.set_regs(regs)
    return g.vcpu.run()


def test_an_smi_goes_to_smbase_with_the_state_saved_and_rsm_brings_it_back():
    with smm_guest() as g:
        before = g.vcpu.get_sregs()
        assert start(g, NOP, rax=0x1122334455667788, r15=0xF15) == uapi.KVM_EXIT_IO
        run = g.vcpu.kvm_run
        assert run.io.port == SMM_PORT
        assert run.flags & uapi.KVM_RUN_X86_SMM
        inside, area = g.vcpu.get_sregs(), g.area()
        assert (inside.cs.selector, inside.cs.base, inside.cs.limit) == (0x3000, SMBASE, 0xFFFFFFFF)
        assert (inside.cr0 & 0x80000001, inside.cr4, inside.efer) == (0, 0, 0)
        assert (inside.ds.base, inside.ds.limit, inside.idt.limit) == (0, 0xFFFFFFFF, 0)
        assert (area.revision, area.smbase, area.rip) == (0x20064, SMBASE, CODE)
        assert (area.cr0, area.cr3, area.cr4) == (before.cr0, before.cr3, before.cr4)
        assert (area.efer, area.gpr[15], area.gpr[0]) == (before.efer, 0x1122334455667788, 0xF15)
        assert g.guest.memory.read(SAVE_AREA, 512) == bytes(512)
        events = g.vcpu.get_vcpu_events()
        assert (events.smi.smm, events.smi.pending, events.nmi.masked) == (1, 0, 1)

        assert g.run() == (uapi.KVM_EXIT_IO, 0x80)
        assert not g.vcpu.kvm_run.flags
        after, regs = g.vcpu.get_sregs(), g.vcpu.get_regs()
        assert bytes(after) == bytes(before)
        assert (regs.rax, regs.r15) == (0x1122334455667788, 0xF15)
        events = g.vcpu.get_vcpu_events()
        assert (events.smi.smm, events.nmi.masked) == (0, 0)
        assert g.vcpu.get_msrs([MSR_SMI_COUNT, MSR_SMBASE]) == {
            MSR_SMI_COUNT: 1,
            MSR_SMBASE: SMBASE,
        }
        assert g.guest.rdmsr(MSR_SMI_COUNT) == 1
        assert g.guest.rdmsr(MSR_SMBASE) is None


def test_the_local_apic_sends_smis():
    with smm_guest() as g:
        g.vcpu.set_msrs({0x1B: 0xFEE00C00 | 1 << 8})
        code = b"\x0f\x30"  # wrmsr
        assert g.guest.start(code, rax=ICR_SELF_SMI, rcx=X2APIC_ICR, rdx=0) == uapi.KVM_EXIT_IO
        assert g.vcpu.kvm_run.io.port == SMM_PORT
        assert g.area().rip == CODE + len(code)
        assert g.run() == (uapi.KVM_EXIT_IO, 0x80)


def test_the_save_area_may_be_changed_and_moved():
    with smm_guest() as g:
        start(g, NOP)
        area = g.area()
        area.gpr[15], area.smbase, area.rflags = 0x77, 0x28000, 0x202
        g.change(area)
        g.run()
        assert g.vcpu.get_regs().rax == 0x77
        assert g.vcpu.get_regs().rflags == 0x202
        assert g.vcpu.get_msrs([MSR_SMBASE])[MSR_SMBASE] == 0x28000
        g.ram.write(0, OUT_SMM + RSM)  # 0x28000 + 0x8000
        assert start(g, NOP) == uapi.KVM_EXIT_IO
        assert g.vcpu.get_sregs().cs.base == 0x28000
        assert g.vcpu.kvm_run.io.port == SMM_PORT


@pytest.mark.parametrize(
    ("field", "value"),
    [("cr0", 0x80000010), ("cr4", 1 << 40), ("dr7", 1 << 40), ("efer", 1 << 40), ("cr4", 0)],
)
def test_a_state_that_cannot_be_shuts_down(field, value):
    with smm_guest() as g:
        start(g, NOP)
        area = g.area()
        setattr(area, field, value)
        g.change(area)
        assert g.vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


def test_rsm_without_smm_is_undefined():
    with smm_guest() as g:
        assert g.guest.start(RSM) == uapi.KVM_EXIT_SHUTDOWN  # without an IDT


def test_smm_memory_is_seen_in_smm_alone():
    with smm_guest() as g:
        g.ram.write(0x100, b"\x5a")
        g.guest.memory.write(SMBASE + 0x100, b"\xa5")
        g.handler(b"\x2e\xa0\x00\x01" + OUT_SMM + RSM)  # mov al, cs:[0x100]
        start(g, NOP)
        assert g.vcpu.get_regs().rax & 0xFF == 0x5A
        g.run()
        load = b"\xa0" + (SMBASE + 0x100).to_bytes(8, "little")
        assert g.guest.execute(load) & 0xFF == 0xA5


def test_smis_and_nmis_and_init_wait_for_the_end():
    with smm_guest() as g:
        start(g, NOP)
        g.vcpu.smi()
        g.vcpu.nmi()
        events = g.vcpu.get_vcpu_events()
        assert (events.smi.smm, events.smi.pending, events.nmi.pending) == (1, 1, 1)
        assert g.run() == (uapi.KVM_EXIT_IO, SMM_PORT)  # the second SMI, before the NMI
        events = g.vcpu.get_vcpu_events()
        assert (events.smi.smm, events.smi.pending, events.nmi.pending) == (1, 0, 1)
        for state in (uapi.KVM_MP_STATE_INIT_RECEIVED, uapi.KVM_MP_STATE_SIPI_RECEIVED):
            with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
                g.vcpu.set_mp_state(state)
        events.smi.latched_init, events.nmi.pending = 1, 0
        g.vcpu.set_vcpu_events(events)
        assert g.vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
        assert g.vcpu.get_vcpu_events().smi.latched_init == 1
        g.vcpu.kvm_run.immediate_exit = 1
        g.vcpu.run()
        events = g.vcpu.get_vcpu_events()
        assert events.smi.smm == 1
        events.smi.smm = 0
        g.vcpu.set_vcpu_events(events)
        g.vcpu.get_mp_state()  # the INIT is acted on
        assert g.vcpu.get_regs().rip == 0xFFF0
        assert g.vcpu.get_vcpu_events().smi.latched_init == 0


def test_nmis_blocked_before_stay_so():
    with smm_guest() as g:
        events = g.vcpu.get_vcpu_events()
        events.nmi.masked = 1
        g.vcpu.set_vcpu_events(events)
        start(g, NOP)
        assert g.vcpu.get_vcpu_events().smi.smm_inside_nmi == 1
        g.run()
        events = g.vcpu.get_vcpu_events()
        assert (events.nmi.masked, events.smi.smm_inside_nmi) == (1, 0)


def test_an_smi_ends_hlt():
    with smm_guest() as g:
        g.guest._finish_last_exit(0)
        g.vcpu.set_mp_state(uapi.KVM_MP_STATE_HALTED)
        assert start(g, NOP) == uapi.KVM_EXIT_IO
        assert g.vcpu.kvm_run.io.port == SMM_PORT
        assert g.vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
        assert g.run() == (uapi.KVM_EXIT_IO, 0x80)


def test_a_guest_without_long_mode_has_the_32_bit_area():
    with smm_guest() as g:
        cpuid = [uapi.kvm_cpuid_entry2.from_buffer_copy(e) for e in g.guest.cpuid]
        next(e for e in cpuid if e.function == 0x80000001).edx &= ~LM
        g.vcpu.set_cpuid2(cpuid)
        sregs = g.vcpu.get_sregs()
        sregs.cr0, sregs.cr4, sregs.efer, sregs.cs.l, sregs.cs.db = 0x11, 0, 0, 0, 1
        sregs.es.selector, sregs.fs.base = 0x18, 0x1234
        g.vcpu.set_sregs(sregs)
        before = g.vcpu.get_sregs()
        assert start(g, NOP, rax=0x11223344, rdi=0x77) == uapi.KVM_EXIT_IO
        area = g.area(SmramState32)
        assert (area.revision, area.smbase, area.rip) == (0x20000, SMBASE, CODE)
        assert (area.cr0, area.gpr[0], area.gpr[7]) == (0x11, 0x11223344, 0x77)
        assert (area.selector[0], area.fs.base, area.cs.limit) == (0x18, 0x1234, 0xFFFFFFFF)
        area.gpr[0] = 0x55
        g.change(area)
        assert g.run() == (uapi.KVM_EXIT_IO, 0x80)
        assert bytes(g.vcpu.get_sregs()) == bytes(before)
        assert g.vcpu.get_regs().rax == 0x55


def test_the_state_of_smm_travels_by_events():
    with smm_guest() as g:
        events = g.vcpu.get_vcpu_events()
        events.smi.smm, events.smi.smm_inside_nmi = 1, 1
        g.vcpu.set_vcpu_events(events)
        back = g.vcpu.get_vcpu_events()
        assert (back.smi.smm, back.smi.smm_inside_nmi) == (1, 1)
        g.ram.write(0x100, b"\x5a")
        sregs = g.vcpu.get_sregs()
        sregs.cr0, sregs.efer, sregs.cs.l, sregs.cs.db = 0x11, 0, 0, 1
        g.vcpu.set_sregs(sregs)
        g.ram.write(0x8000, b"\xa0" + (SMBASE + 0x100).to_bytes(4, "little") + b"\xe6\x80")
        regs = g.vcpu.get_regs()
        regs.rip = SMBASE + 0x8000
        g.vcpu.set_regs(regs)
        assert g.run() == (uapi.KVM_EXIT_IO, 0x80)
        assert g.vcpu.get_regs().rax & 0xFF == 0x5A
