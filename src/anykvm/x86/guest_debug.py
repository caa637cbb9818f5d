"""KVM_SET_GUEST_DEBUG, KVM_EXIT_DEBUG and KVM_TRANSLATE: what a debugger in the VMM needs.

arch/x86/kvm/x86.c: `kvm_arch_vcpu_ioctl_set_guest_debug`, `kvm_vcpu_do_singlestep`,
`kvm_arch_vcpu_ioctl_translate`. A single step here is one instruction always; it needs no RFLAGS.TF
behind the guest's back, so that is the guest's own.
"""

from __future__ import annotations

from errno import EBUSY

from anykvm.cpu.debug import Debugger
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOut
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import MASK64, PendingException, Request, VcpuX86
from anykvm.x86.tables import vcpu_ioctls

# The bits of `control` that KVM_CAP_SET_GUEST_DEBUG2 tells of. Others are ignored, as in Linux.
KVM_GUESTDBG_VALID_MASK = (
    uapi.KVM_GUESTDBG_ENABLE
    | uapi.KVM_GUESTDBG_SINGLESTEP
    | uapi.KVM_GUESTDBG_USE_HW_BP
    | uapi.KVM_GUESTDBG_USE_SW_BP
    | uapi.KVM_GUESTDBG_INJECT_BP
    | uapi.KVM_GUESTDBG_INJECT_DB
    | uapi.KVM_GUESTDBG_BLOCKIRQ
)
INJECT = uapi.KVM_GUESTDBG_INJECT_DB | uapi.KVM_GUESTDBG_INJECT_BP
DR6_ACTIVE_LOW = 0xFFFF0FF0
INVALID_GPA = MASK64


def handle_debug(vcpu: VcpuX86) -> int:
    """The debugger is to be told. DR6 has only what happened now, and is not the guest's."""
    found, arch = vcpu.cpu.debug.exit, vcpu.run.debug.arch
    vcpu.run.exit_reason = uapi.KVM_EXIT_DEBUG
    arch.exception, arch.pc = found.vector, found.pc
    if found.vector == uapi.DB_VECTOR:
        arch.dr6, arch.dr7 = found.dr6 | DR6_ACTIVE_LOW, found.dr7
    return 0


def stepped_over_halt(vcpu: VcpuX86) -> int:
    """`kvm_vcpu_do_singlestep` of a processor that does not go on: 0 if userspace is to be told."""
    return handle_debug(vcpu) if vcpu.cpu.debug.take_step() else 1


def _inject(vcpu: VcpuX86, control: int) -> None:
    """An exception that the debugger found not to be its own."""
    waiting = vcpu.exception is not None and not vcpu.exception.injected
    if waiting or Request.TRIPLE_FAULT in vcpu.requests:
        raise fail(EBUSY, "KVM_SET_GUEST_DEBUG: an exception is pending")
    is_db = control & uapi.KVM_GUESTDBG_INJECT_DB
    vcpu.exception = PendingException(uapi.DB_VECTOR if is_db else uapi.BP_VECTOR)
    vcpu.requests.add(Request.EVENT)


def _debugger(debug: uapi.kvm_guest_debug) -> Debugger:
    control, registers = debug.control, debug.arch.debugreg
    if not control & uapi.KVM_GUESTDBG_ENABLE:
        return Debugger()
    own = (*registers[:4], registers[7]) if control & uapi.KVM_GUESTDBG_USE_HW_BP else None
    return Debugger(
        single_step=bool(control & uapi.KVM_GUESTDBG_SINGLESTEP),
        breakpoints=bool(control & uapi.KVM_GUESTDBG_USE_SW_BP),
        registers=own,
    )


@vcpu_ioctls.row(
    "KVM_SET_GUEST_DEBUG",
    In(uapi.kvm_guest_debug),
    uapi.KVM_CAP_SET_GUEST_DEBUG,
    errors={EBUSY: "KVM_GUESTDBG_INJECT_*, and an exception is pending already"},
)
def kvm_arch_vcpu_ioctl_set_guest_debug(vcpu: VcpuX86, debug: uapi.kvm_guest_debug) -> None:
    """What KVM_EXIT_DEBUG is for, in place of what was set before."""
    if debug.control & INJECT:
        _inject(vcpu, debug.control)
    enabled = debug.control & uapi.KVM_GUESTDBG_ENABLE
    vcpu.guest_debug = debug.control if enabled else 0
    finishing = vcpu.complete_userspace_io is not None
    vcpu.cpu.debug.attach(_debugger(debug), finishing=finishing)
    vcpu.requests.add(Request.EVENT)  # interrupts may have been blocked


@vcpu_ioctls.row("KVM_TRANSLATE", InOut(uapi.kvm_translation))
def kvm_arch_vcpu_ioctl_translate(vcpu: VcpuX86, tr: uapi.kvm_translation) -> None:
    """As the guest's supervisor reads; whether it may write, and the user, is not looked at."""
    gpa = vcpu.cpu.translate(tr.linear_address)
    tr.physical_address = INVALID_GPA if gpa is None else gpa
    tr.valid, tr.writeable, tr.usermode = gpa is not None, 1, 0
