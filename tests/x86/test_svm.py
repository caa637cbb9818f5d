"""What KVM has to do with a guest's guest: MSRs, events that end it, its state, and the rest of KVM
while it runs (arch/x86/kvm/svm/nested.c).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from ctypes import sizeof

import pytest
from tests.cpu.assembler import assemble

from anykvm.api import Vcpu
from anykvm.api.state import restore, save
from anykvm.cpu.vmcb import IntCtl, SvmExit, Vmcb, VmcbControl
from anykvm.uapi import kvm as uapi

from .long_guest import CODE, END_PORT, LongGuest, long_guest

X = SvmExit
VMCB, MAPS, HSAVE, L2, L2_STACK = 0x40000, 0x41000, 0x47000, 0x48000, 0x4A000
VMRUN, VMMCALL, VMCALL = (bytes.fromhex(code) for code in ("0f01d8", "0f01d9", "0f01c1"))
STGI, CLGI = bytes.fromhex("0f01dc"), bytes.fromhex("0f01dd")
EFER, VM_CR, VM_HSAVE_PA, TSC = 0xC0000080, 0xC0010114, 0xC0010117, 0x10
EFER_SVME, SVM_BIT = 1 << 12, 1 << 2
SVMDIS, LOCK = 1 << 4, 1 << 3
PORT = 0x51
IN = assemble(f"in al, {PORT}")


@pytest.fixture
def guest() -> Iterator[LongGuest]:
    with long_guest() as made:
        yield made


def _attrib(seg: uapi.kvm_segment) -> int:
    low = seg.type | seg.s << 4 | seg.dpl << 5 | seg.present << 7
    return low | (seg.avl | seg.l << 1 | seg.db << 2 | seg.g << 3) << 8


def vmcb_like_l1(vcpu: Vcpu) -> Vmcb:
    """L2 in the mode that L1 is in, at its code, with interrupts off."""
    sregs, vmcb = vcpu.get_sregs(), Vmcb()
    for name in ("es", "cs", "ss", "ds"):
        source, target = getattr(sregs, name), getattr(vmcb.save, name)
        target.selector, target.base, target.limit = source.selector, source.base, source.limit
        target.attrib = _attrib(source)
    for name in ("cr0", "cr3", "cr4"):
        setattr(vmcb.save, name, getattr(sregs, name))
    vmcb.save.efer = sregs.efer | EFER_SVME
    vmcb.save.rip, vmcb.save.rsp, vmcb.save.rflags = L2, L2_STACK, 2
    vmcb.save.dr6, vmcb.save.dr7 = 0xFFFF0FF0, 0x400
    vmcb.control.asid, vmcb.control.msrpm_base_pa, vmcb.control.iopm_base_pa = 1, MAPS, MAPS
    return vmcb


def start(
    guest: LongGuest,
    l2: bytes,
    *exits: int,
    vmcb: Vmcb | None = None,
    before: bytes = b"",
    l1: bytes = b"",
) -> int:
    """L1 executes `before`, VMRUN and then `l1`; why KVM_RUN came back."""
    vcpu = guest.vcpus[0]
    vmcb = vmcb or vmcb_like_l1(vcpu)
    for exit_ in (X.VMRUN, X.VMMCALL, *exits):
        vmcb.control.intercepts[exit_ >> 5] |= 1 << (exit_ & 31)
    guest.memory.write(VMCB, bytes(vmcb))
    guest.memory.write(L2, l2 + VMMCALL)
    sregs = vcpu.get_sregs()
    sregs.efer |= EFER_SVME
    vcpu.set_sregs(sregs)
    assert vcpu.set_msrs({VM_HSAVE_PA: HSAVE}) == 1
    return guest.start(before + VMRUN + l1, rax=VMCB, rflags=2)


def control(guest: LongGuest) -> VmcbControl:
    return VmcbControl.from_buffer_copy(guest.memory.read(VMCB, sizeof(VmcbControl)))


def at_end(guest: LongGuest) -> bool:
    """Whether L1 has come to its end."""
    run = guest.vcpus[0].kvm_run
    return run.exit_reason == uapi.KVM_EXIT_IO and run.io.port == END_PORT


def in_l2(guest: LongGuest, *exits: int, vmcb: Vmcb | None = None, l1: bytes = b"") -> Vcpu:
    """Stopped at L2's IN."""
    assert start(guest, IN + b"\x90", *exits, vmcb=vmcb, l1=l1) == uapi.KVM_EXIT_IO
    vcpu = guest.vcpus[0]
    assert vcpu.kvm_run.io.port == PORT
    return vcpu


# MSRs and CPUID.


def test_svm_is_offered(guest: LongGuest) -> None:
    leaves = {e.function: e for e in guest.kvm.supported_cpuid()}
    assert leaves[0x80000001].ecx & SVM_BIT
    assert leaves[0x80000000].eax == 0x8000000A
    assert (leaves[0x8000000A].eax, leaves[0x8000000A].ebx) == (1, 8)
    assert leaves[0x8000000A].edx == 1 << 0 | 1 << 3 | 1 << 5  # NP, NRIPS, VmcbClean


def test_efer_svme_follows_cpuid(guest: LongGuest) -> None:
    efer = guest.rdmsr(EFER)
    assert efer is not None
    assert guest.wrmsr(EFER, efer | EFER_SVME)
    assert guest.vcpus[0].get_sregs().efer & EFER_SVME
    cpuid = guest.kvm.supported_cpuid()
    for entry in cpuid:
        if entry.function == 0x80000001:
            entry.ecx &= ~SVM_BIT
    with long_guest(cpuid=cpuid) as without:
        assert not without.wrmsr(EFER, efer | EFER_SVME)


def test_vm_cr(guest: LongGuest) -> None:
    """Once disabled SVM stays so; it cannot be disabled while EFER.SVME is set."""
    vcpu = guest.vcpus[0]
    assert not guest.wrmsr(VM_CR, 1 << 5)
    with long_guest() as other:
        assert other.wrmsr(VM_CR, SVMDIS | LOCK)
        assert other.wrmsr(VM_CR, 0)
        assert other.rdmsr(VM_CR) == SVMDIS | LOCK
    assert vcpu.set_msrs({EFER: 0x500 | EFER_SVME}) == 1
    assert vcpu.set_msrs({VM_CR: SVMDIS}) == 0


def test_vm_hsave_pa(guest: LongGuest) -> None:
    """The guest writes addresses of pages; the VMM what it likes."""
    assert guest.wrmsr(VM_HSAVE_PA, 0x5000)
    assert guest.rdmsr(VM_HSAVE_PA) == 0x5000
    assert guest.vcpus[0].set_msrs({VM_HSAVE_PA: 0x6123}) == 1
    assert guest.rdmsr(VM_HSAVE_PA) == 0x6000
    assert VM_HSAVE_PA in guest.kvm.msr_index_list()
    assert not guest.wrmsr(VM_HSAVE_PA, 0x5001)


# Exits.


def test_hypercalls_of_l2_are_vmmcall(guest: LongGuest) -> None:
    """VMCALL is the other vendor's, and rewritten, whatever CPUID says of the vendor."""
    assert start(guest, VMCALL) == uapi.KVM_EXIT_IO
    assert at_end(guest)
    assert control(guest).exit_code == X.VMMCALL
    assert guest.memory.read(L2, 3) == VMMCALL


def test_a_port_of_l2s_goes_to_the_vmm(guest: LongGuest) -> None:
    vcpu = in_l2(guest)
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert at_end(guest)
    assert control(guest).exit_code == X.VMMCALL


def test_a_triple_fault_of_l2s(guest: LongGuest) -> None:
    """Without an IDT any exception is one."""
    assert start(guest, b"\x0f\x0b", X.SHUTDOWN) == uapi.KVM_EXIT_IO
    assert control(guest).exit_code == X.SHUTDOWN
    assert start(guest, b"\x0f\x0b") == uapi.KVM_EXIT_SHUTDOWN


# Events.


def test_an_nmi_ends_l2_and_stays_pending(guest: LongGuest) -> None:
    vcpu = in_l2(guest, X.NMI)
    vcpu.nmi()
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert (at_end(guest), control(guest).exit_code) == (True, X.NMI)
    assert vcpu.get_vcpu_events().nmi.pending == 1


def test_stgi_lets_it_through(guest: LongGuest) -> None:
    """Into an IDT that is not there."""
    vcpu = in_l2(guest, X.NMI, l1=STGI)
    vcpu.nmi()
    assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


def test_an_smi_ends_l2(guest: LongGuest) -> None:
    vcpu = in_l2(guest, X.SMI)
    vcpu.smi()
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert (at_end(guest), control(guest).exit_code) == (True, X.SMI)
    assert vcpu.get_vcpu_events().smi.pending == 1


def test_an_init_ends_l2(guest: LongGuest) -> None:
    vcpu = in_l2(guest, X.INIT)
    events = vcpu.get_vcpu_events()
    events.smi.latched_init = 1
    vcpu.set_vcpu_events(events)
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert (at_end(guest), control(guest).exit_code) == (True, X.INIT)


@pytest.mark.parametrize("l2", [b"\xeb\xfe", b"\xf4"], ids=["loop", "hlt"])
def test_an_interrupt_ends_l2(guest: LongGuest, l2: bytes) -> None:
    """The vector stays with the local APIC. L1 raises it, and then its IF, before VMRUN."""
    vcpu, lapic = guest.vcpus[0], guest.vcpus[0].get_lapic()
    lapic.regs[0xF0:0xF4] = [0xFF, 1, 0, 0]
    lapic.regs[0x212] = 1  # IRR: vector 0x30
    vcpu.set_lapic(lapic)
    vmcb = vmcb_like_l1(vcpu)
    vmcb.control.int_ctl = int(IntCtl.V_INTR_MASKING)
    before = CLGI + assemble("sti; nop")
    assert start(guest, l2, X.INTR, vmcb=vmcb, before=before) == uapi.KVM_EXIT_IO
    assert (at_end(guest), control(guest).exit_code) == (True, X.INTR)
    assert vcpu.get_lapic().regs[0x212] == 1


def test_an_exception_of_the_vmms(guest: LongGuest) -> None:
    """One that is pending can be intercepted, one that was on its way cannot."""
    guest.vm.enable_cap(uapi.KVM_CAP_EXCEPTION_PAYLOAD, 1)
    for injected, expected in ((False, uapi.KVM_EXIT_IO), (True, uapi.KVM_EXIT_SHUTDOWN)):
        vcpu = in_l2(guest, X.EXCP_BASE + 12)
        events = vcpu.get_vcpu_events()
        events.exception.pending, events.exception.injected = not injected, injected
        events.exception.nr, events.exception.has_error_code = 12, 1
        events.exception.error_code = 0x123
        vcpu.set_vcpu_events(events)
        assert vcpu.run() == expected
    found = control(guest)
    assert found.exit_code == 0  # of the second run, which had none


def test_a_triple_fault_of_the_vmms(guest: LongGuest) -> None:
    """Stays where userspace sees it until the guest runs, and then is L1's if that wants it."""
    guest.vm.enable_cap(uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1)
    vcpu = in_l2(guest, X.SHUTDOWN)
    events = vcpu.get_vcpu_events()
    events.triple_fault.pending = 1
    vcpu.set_vcpu_events(events)
    vcpu.kvm_run.immediate_exit = 1
    assert vcpu.run() == uapi.KVM_EXIT_INTR
    vcpu.kvm_run.immediate_exit = 0
    assert vcpu.get_vcpu_events().triple_fault.pending == 1
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert (at_end(guest), control(guest).exit_code) == (True, X.SHUTDOWN)


# State.


def test_l2_goes_on_in_another_vm(guest: LongGuest) -> None:
    """All that the GET ioctls give, taken in the middle of L2."""
    vmcb = vmcb_like_l1(guest.vcpus[0])
    vmcb.control.tsc_offset, vmcb.save.rax = 1 << 50, 0x77
    vcpu = in_l2(guest, X.EXCP_BASE + 6, vmcb=vmcb)
    vcpu.kvm_run.immediate_exit = 1
    assert vcpu.run() == uapi.KVM_EXIT_INTR
    vcpu.kvm_run.immediate_exit = 0
    state = save(guest.kvm, guest.vm, guest.vcpus)
    with long_guest() as other:
        other.memory.write(0, guest.memory.read(0, 0x100000))
        restore(other.vm, other.vcpus, state)
        assert (
            save(other.kvm, other.vm, other.vcpus).vcpus[0].parts["nested"]
            == (state.vcpus[0].parts["nested"])
        )
        assert other.vcpus[0].run() == uapi.KVM_EXIT_IO
        assert (at_end(other), control(other).exit_code) == (True, X.VMMCALL)
        saved = Vmcb.from_buffer_copy(other.memory.read(VMCB, 4096))
        assert saved.save.rip == L2 + len(IN) + 1
        regs = other.vcpus[0].get_regs()
        assert (regs.rip, regs.rax) == (CODE + 3, VMCB)


def test_the_vmms_tsc_is_l1s(guest: LongGuest) -> None:
    vmcb = vmcb_like_l1(guest.vcpus[0])
    vmcb.control.tsc_offset = 1 << 60
    vcpu = in_l2(guest, vmcb=vmcb)
    assert vcpu.get_msrs((TSC,))[TSC] < 1 << 60
    assert vcpu.set_msrs({TSC: 5000 << 30}) == 1
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert 5000 << 30 <= vcpu.get_msrs((TSC,))[TSC] < 6000 << 30


def test_guest_mode_ends_with_svme(guest: LongGuest) -> None:
    vcpu = in_l2(guest)
    sregs = vcpu.get_sregs()
    sregs.efer &= ~EFER_SVME
    vcpu.set_sregs(sregs)
    area = bytearray(4224)
    struct.pack_into("<I", area, 4, len(area))
    state = uapi.kvm_nested_state.from_buffer(area)
    vcpu.ioctl(uapi.KVM_GET_NESTED_STATE, state)
    assert state.flags == uapi.KVM_STATE_NESTED_GIF_SET


def test_runs_are_counted(guest: LongGuest) -> None:
    with in_l2(guest).stats_fd() as stats:
        found = stats.read()
        assert (found["nested_run"].value, found["guest_mode"].value) == (1, 1)
