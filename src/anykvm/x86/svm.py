"""What belongs to KVM of nested virtualization with SVM: its MSRs, events from outside that end a
guest's guest, and system management mode entered from there.

arch/x86/kvm/svm/nested.c, `svm_check_nested_events`; svm.c, `svm_enter_smm`, `svm_leave_smm` and
the MSRs. The processor's side is anykvm.cpu.svm.
"""

from __future__ import annotations

from ctypes import sizeof
from errno import EFAULT
from typing import Protocol

from anykvm.cpu.vmcb import SAVE_OFFSET, SvmExit, VmcbControl, VmcbSave
from anykvm.fs.trace import trace
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.msrs import EFER_SVME, Msr, enter

MSR_VM_CR, MSR_VM_IGNNE, MSR_VM_HSAVE_PA = 0xC0010114, 0xC0010115, 0xC0010117
VM_CR_VALID, VM_CR_LOCK, VM_CR_DIS = 0x1F, 1 << 3, 1 << 4


class SmramSvm(Protocol):
    """The fields of SMM's 64-bit save area for a guest that ran a guest."""

    svm_guest_flag: int
    svm_guest_vmcb_gpa: int
    efer: int


def page_address_valid(vcpu: VcpuX86, gpa: int) -> bool:
    return not gpa % PAGE_SIZE and not gpa >> vcpu.maxphyaddr()


# MSRs.


def _read_vm_cr(vcpu: VcpuX86) -> int:
    return vcpu.cpu.svm.vm_cr


def _write_vm_cr(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """SVM that is disabled stays so, and cannot be disabled while it is in use."""
    svm = vcpu.cpu.svm
    if value & ~VM_CR_VALID:
        return False
    changes = VM_CR_VALID
    if svm.vm_cr & VM_CR_DIS:
        changes &= ~(VM_CR_LOCK | VM_CR_DIS)
    svm.vm_cr = svm.vm_cr & ~changes | value & changes
    return not (svm.vm_cr & VM_CR_DIS and vcpu.state.efer & EFER_SVME)


def _read_hsave_pa(vcpu: VcpuX86) -> int:
    return vcpu.cpu.svm.hsave_pa


def _write_hsave_pa(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if not host and not page_address_valid(vcpu, value):
        return False
    vcpu.cpu.svm.hsave_pa = value & -PAGE_SIZE
    return True


enter(MSR_VM_CR, Msr("vm_cr", _read_vm_cr, _write_vm_cr, listed=False))
enter(MSR_VM_HSAVE_PA, Msr("vm_hsave_pa", _read_hsave_pa, _write_hsave_pa))
enter(MSR_VM_IGNNE, Msr("vm_ignne", lambda vcpu: 0, lambda vcpu, value, host: True, listed=False))


# Events.


def nested_svm_vmexit(vcpu: VcpuX86, code: SvmExit) -> None:
    """L1 goes on in L2's place."""
    trace("kvm_nested_vmexit", vcpu_id=vcpu.vcpu_id, exit_code=int(code), rip=vcpu.state.rip)
    vcpu.cpu.svm.exit(code)


def nested_triple_fault(vcpu: VcpuX86) -> bool:
    """Whether L1 takes a shutdown of L2's."""
    wanted = vcpu.cpu.svm.intercepts(SvmExit.SHUTDOWN)
    if wanted:
        nested_svm_vmexit(vcpu, SvmExit.SHUTDOWN)
    return wanted


# System management mode.


def svm_enter_smm(vcpu: VcpuX86, area: SmramSvm) -> bool:
    """L2 is left for L1, with a note in SMRAM. What L1 returns to goes to its host save area, for
    `VMRUN` in SMM would overwrite it; false where that is no memory.
    """
    svm = vcpu.cpu.svm
    if not svm.guest_mode:
        return True
    area.svm_guest_flag, area.svm_guest_vmcb_gpa = 1, svm.vmcb_pa
    nested_svm_vmexit(vcpu, SvmExit.SW)
    try:
        vcpu.kvm.kvm_write_guest(svm.hsave_pa + SAVE_OFFSET, bytes(svm.host))
    except OSError as problem:
        if problem.errno != EFAULT:
            raise
        return False
    return True


def svm_leave_smm(vcpu: VcpuX86, area: SmramSvm) -> bool:
    """Back to L2 if that was left; false where what L1 has of it is not there any more."""
    svm, kvm = vcpu.cpu.svm, vcpu.kvm
    if not area.svm_guest_flag:
        return True
    if not vcpu.cpuid.has("svm"):
        return False
    if not area.efer & EFER_SVME:
        return False
    pa = area.svm_guest_vmcb_gpa
    try:
        host = kvm.kvm_read_guest(svm.hsave_pa + SAVE_OFFSET, sizeof(VmcbSave))
        control = kvm.kvm_read_guest(pa, sizeof(VmcbControl))
    except OSError as problem:
        if problem.errno != EFAULT:
            raise
        return False
    svm.host = VmcbSave.from_buffer_copy(host)
    svm.enter(pa, VmcbControl.from_buffer_copy(control))
    return True
