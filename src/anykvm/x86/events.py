"""What interrupts a vCPU: exceptions, NMIs, interrupts, INIT and SIPI, and in which order.

arch/x86/kvm/x86.c, `inject_pending_event`, and irq.c, `kvm_cpu_has_injectable_intr`,
`kvm_cpu_get_interrupt`.
"""

from __future__ import annotations

from anykvm.cpu.vmcb import SvmExit
from anykvm.fs.trace import trace
from anykvm.uapi import kvm as uapi
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.kvm_host import MpState, PendingException, VcpuX86
from anykvm.x86.reset import kvm_vcpu_reset, start_at_vector
from anykvm.x86.smm import inject_smi, smi_allowed
from anykvm.x86.svm import nested_svm_vmexit

SHADOW_MOV_SS = 2  # State.shadow


def kvm_cpu_has_extint(vcpu: VcpuX86) -> bool:
    """Whether the 8259s, or the VMM in their place, have an interrupt for this processor."""
    if vcpu.injected_vector is not None:
        return True
    apic, kvm = vcpu.apic, vcpu.kvm
    if apic is None or not kvm.pic_in_kernel():
        return False
    return kvm.irqchip.pic.output and apic.accept_pic_intr()


def kvm_cpu_has_interrupt(vcpu: VcpuX86) -> bool:
    """Whether some interrupt is to be delivered as soon as the processor takes it."""
    if kvm_cpu_has_extint(vcpu):
        return True
    return vcpu.apic is not None and vcpu.apic.has_interrupt() is not None


def kvm_cpu_get_interrupt(vcpu: VcpuX86) -> int:
    """Acknowledge the interrupt that `kvm_cpu_has_interrupt` told of: its vector."""
    if vcpu.injected_vector is not None:
        vector, vcpu.injected_vector = vcpu.injected_vector, None
        return vector
    if kvm_cpu_has_extint(vcpu):
        return vcpu.kvm.irqchip.pic.read_irq()
    assert vcpu.apic is not None
    return vcpu.apic.ack_interrupt()


def inject_pending_events(vcpu: VcpuX86) -> None:
    """Deliver what can be delivered now, and ask for the window for what cannot."""
    if vcpu.exception is not None:
        exception, vcpu.exception = vcpu.exception, None
        _inject_exception(vcpu, exception)
    check_nested_events(vcpu)
    if not vcpu.cpu.svm.gif:
        vcpu.cpu.svm.held = bool(vcpu.nmi_pending or vcpu.smm.pending or _init_pending(vcpu))
    if vcpu.guest_debug & uapi.KVM_GUESTDBG_BLOCKIRQ:
        vcpu.cpu.pending_interrupt(_wants_interrupt_window(vcpu))
        return
    smi = vcpu.smm.pending and inject_smi(vcpu)
    if vcpu.nmi_pending and not smi:
        _inject_nmi(vcpu)
    with vcpu.kvm.irqchip.lock:
        if kvm_cpu_has_interrupt(vcpu) and vcpu.cpu.can_take_interrupt():
            vector = kvm_cpu_get_interrupt(vcpu)
            trace("kvm_inj_virq", vcpu_id=vcpu.vcpu_id, vector=vector)
            vcpu.cpu.inject_interrupt(vector)
            vcpu.stat.irq_injections += 1
        pending = kvm_cpu_has_interrupt(vcpu)
    vcpu.cpu.pending_interrupt(pending or _wants_interrupt_window(vcpu))


def check_nested_events(vcpu: VcpuX86) -> None:
    """`svm_check_nested_events`: what would interrupt L2 goes to L1, if that wants it, as the
    reason of a #VMEXIT, and stays pending until L1 takes it.
    """
    svm = vcpu.cpu.svm
    if svm.guest_mode and not vcpu.cpu.mid_instruction():
        for pending, exit_ in NESTED_EVENTS:
            if svm.intercepts(exit_) and pending(vcpu):
                nested_svm_vmexit(vcpu, exit_)
                return


def _init_pending(vcpu: VcpuX86) -> bool:
    return vcpu.apic is not None and bool(vcpu.apic.pending_events >> reg.KVM_APIC_INIT & 1)


def _nmi_pending(vcpu: VcpuX86) -> bool:
    return vcpu.nmi_pending > 0 and vcpu.cpu.svm.gif


def _interrupt_pending(vcpu: VcpuX86) -> bool:
    with vcpu.kvm.irqchip.lock:
        return kvm_cpu_has_interrupt(vcpu) and vcpu.cpu.can_take_interrupt()


NESTED_EVENTS = (
    (_init_pending, SvmExit.INIT),
    (smi_allowed, SvmExit.SMI),
    (_nmi_pending, SvmExit.NMI),
    (_interrupt_pending, SvmExit.INTR),
)


def _inject_exception(vcpu: VcpuX86, exception: PendingException) -> None:
    if exception.vector == uapi.DB_VECTOR:
        vcpu.cpu.inject_debug(exception.payload)
    elif exception.vector == uapi.BP_VECTOR:
        vcpu.cpu.inject_breakpoint()
    else:
        vcpu.cpu.inject_exception(
            exception.vector, exception.error_code, injected=exception.injected
        )


def _inject_nmi(vcpu: VcpuX86) -> None:
    """Now, or after the instruction that follows a MOV SS, or after the last NMI's IRET.

    The processor does not tell of that IRET: the next time it is back here is soon enough. With
    GIF clear it waits for STGI.
    """
    if vcpu.state.nmi_blocked or not vcpu.cpu.svm.gif:
        return
    after_mov_ss = vcpu.state.shadow == SHADOW_MOV_SS and vcpu.cpu.in_shadow()
    if after_mov_ss or vcpu.cpu.mid_instruction() or vcpu.cpu.debug.trap_pending():
        vcpu.cpu.finish_instruction()
        return
    vcpu.nmi_pending -= 1
    vcpu.cpu.inject_nmi()
    vcpu.stat.nmi_injections += 1
    trace("kvm_inj_nmi", vcpu_id=vcpu.vcpu_id)


def _wants_interrupt_window(vcpu: VcpuX86) -> bool:
    """`dm_request_for_irq_injection` and `kvm_cpu_accept_dm_intr`: the VMM, which has the 8259s,
    wants to inject, and the local APIC lets it.
    """
    return (
        bool(vcpu.run.request_interrupt_window)
        and not vcpu.kvm.pic_in_kernel()
        and (vcpu.apic is None or vcpu.apic.accept_pic_intr())
    )


def interrupt_window_open(vcpu: VcpuX86) -> bool:
    """Whether the window that the VMM asked for is there."""
    return _wants_interrupt_window(vcpu) and ready_for_interrupt_injection(vcpu)


def ready_for_interrupt_injection(vcpu: VcpuX86) -> bool:
    """`kvm_vcpu_ready_for_interrupt_injection`: KVM_INTERRUPT would be delivered at once."""
    return (
        vcpu.injected_vector is None
        and vcpu.exception is None
        and vcpu.cpu.can_take_interrupt()
        and (vcpu.apic is None or vcpu.apic.accept_pic_intr())
    )


def kvm_apic_accept_events(vcpu: VcpuX86) -> None:
    """INIT resets the processor, which the boot processor survives; SIPI starts one that waits."""
    apic = vcpu.apic
    if apic is None or not apic.pending_events:
        return
    check_nested_events(vcpu)
    # INIT waits for the end of SMM, or for GIF; SIPI is lost.
    if vcpu.smm.active or not vcpu.cpu.svm.gif:
        with vcpu.kvm.irqchip.lock:
            apic.take_sipi()
        return
    with vcpu.kvm.irqchip.lock:
        init, sipi = apic.take_init(), apic.take_sipi()
    if init:
        kvm_vcpu_reset(vcpu, init_event=True)
        vcpu.mp_state = MpState.RUNNABLE if vcpu.is_bsp else MpState.INIT_RECEIVED
    if sipi is not None and vcpu.mp_state == MpState.INIT_RECEIVED:
        trace("kvm_apic_sipi", vcpu_id=vcpu.vcpu_id, vector=sipi)
        start_at_vector(vcpu.cpu, sipi)
        vcpu.mp_state = MpState.RUNNABLE


def is_halted(vcpu: VcpuX86) -> bool:
    """By HLT, as KVM_GET_MP_STATE shows it or, with HLT's exits disabled, does not."""
    return vcpu.mp_state == MpState.HALTED or vcpu.halted_in_guest


def kvm_vcpu_unhalt(vcpu: VcpuX86) -> None:
    """A halted processor goes on; the kick that may have been for it is used up."""
    vcpu.mp_state, vcpu.halted_in_guest = MpState.RUNNABLE, False
    if vcpu.apic is not None:
        vcpu.apic.pv_unhalted = False


def kvm_arch_vcpu_runnable(vcpu: VcpuX86) -> bool:
    """Whether a halted or waiting processor has something to do now."""
    if vcpu.mp_state == MpState.RUNNABLE and not vcpu.halted_in_guest:
        return True
    if vcpu.apic is not None and vcpu.apic.pending_events and not vcpu.smm.active:
        return True
    if not is_halted(vcpu):
        return False
    if smi_allowed(vcpu):
        return True
    if (vcpu.apic is not None and vcpu.apic.pv_unhalted) or vcpu.hv.stimers_due:
        return True
    if vcpu.nmi_pending or vcpu.exception is not None or vcpu.cpu.svm.virtual_flag():
        return True
    with vcpu.kvm.irqchip.lock:
        return vcpu.cpu.can_take_interrupt() and kvm_cpu_has_interrupt(vcpu)
