"""KVM_GET/SET_VCPU_EVENTS, MP_STATE, KVM_INTERRUPT and KVM_NMI: what is pending for a vCPU.

api.rst 4.31, 4.32, 4.38, 4.39, 4.16, 4.64.
"""

from __future__ import annotations

from dataclasses import replace
from errno import EEXIST, EINVAL, ENXIO

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, Out, Value
from anykvm.uapi import kvm as uapi
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.events import kvm_apic_accept_events
from anykvm.x86.kvm_host import IrqchipMode, MpState, PendingException, Request, VcpuX86
from anykvm.x86.smm import kvm_smm_changed
from anykvm.x86.tables import vcpu_ioctls

VALID_FLAGS = (
    uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    | uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | uapi.KVM_VCPUEVENT_VALID_SHADOW
    | uapi.KVM_VCPUEVENT_VALID_SMM
)
EXCEPTIONS, NMI_VECTOR = 31, 2
SOFTWARE_EXCEPTIONS = (uapi.BP_VECTOR, uapi.OF_VECTOR)
# State.shadow against KVM_X86_SHADOW_INT_*
SHADOW_STI, SHADOW_MOV_SS = 1, 2
TO_ABI = {
    0: 0,
    SHADOW_STI: uapi.KVM_X86_SHADOW_INT_STI,
    SHADOW_MOV_SS: uapi.KVM_X86_SHADOW_INT_MOV_SS,
}


def _get_exception(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    """Without KVM_CAP_EXCEPTION_PAYLOAD pending is injected, and DR6 says already what the payload
    would. INT3 and INTO happen again by themselves and are not told of.
    """
    if vcpu.exception is None and (dr6 := vcpu.cpu.debug.take_trap()):
        vcpu.exception = PendingException(uapi.DB_VECTOR, payload=dr6)
        vcpu.requests.add(Request.EVENT)
    found, shown = vcpu.exception, events.exception
    if found is None:
        return
    if found.payload is not None and not vcpu.kvm.exception_payload_enabled:
        vcpu.cpu.debug.entered(found.payload)
        found = vcpu.exception = replace(found, payload=None)
    if found.vector not in SOFTWARE_EXCEPTIONS:
        shown.injected = found.injected or not vcpu.kvm.exception_payload_enabled
        shown.pending = not found.injected
    shown.nr, shown.has_error_code = found.vector, found.error_code is not None
    shown.error_code = found.error_code or 0
    events.exception_has_payload = found.payload is not None
    events.exception_payload = found.payload or 0


def _set_exception(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    shown, payload = events.exception, None
    pending = shown.pending and events.flags & uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    if pending and events.exception_has_payload:
        payload = events.exception_payload
    vcpu.exception = None
    if shown.injected or pending:
        code = shown.error_code if shown.has_error_code else None
        vcpu.exception = PendingException(shown.nr, code, payload, injected=not pending)


def get_vcpu_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    _get_exception(vcpu, events)
    if vcpu.injected_vector is not None:
        events.interrupt.injected, events.interrupt.nr = 1, vcpu.injected_vector
    events.interrupt.shadow = TO_ABI[vcpu.state.shadow if vcpu.cpu.in_shadow() else 0]
    events.nmi.pending, events.nmi.masked = vcpu.nmi_pending, vcpu.state.nmi_blocked
    events.flags = (
        uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
        | uapi.KVM_VCPUEVENT_VALID_SHADOW
        | uapi.KVM_VCPUEVENT_VALID_SMM
    )
    events.smi.smm, events.smi.pending = vcpu.smm.active, vcpu.smm.pending
    events.smi.smm_inside_nmi = vcpu.smm.inside_nmi
    if vcpu.apic is not None:
        events.smi.latched_init = vcpu.apic.pending_events >> reg.KVM_APIC_INIT & 1
    if vcpu.kvm.triple_fault_event:
        events.triple_fault.pending = Request.TRIPLE_FAULT in vcpu.requests
        events.flags |= uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    if vcpu.kvm.exception_payload_enabled:
        events.flags |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD


def _check_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    allowed = VALID_FLAGS
    if vcpu.kvm.triple_fault_event:
        allowed |= uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT
    if vcpu.kvm.exception_payload_enabled:
        allowed |= uapi.KVM_VCPUEVENT_VALID_PAYLOAD
    exception = events.exception
    raised = exception.injected or (
        events.flags & uapi.KVM_VCPUEVENT_VALID_PAYLOAD and exception.pending
    )
    if events.flags & ~allowed:
        raise fail(EINVAL, f"KVM_SET_VCPU_EVENTS: flags {events.flags:#x}")
    if raised and (exception.nr > EXCEPTIONS or exception.nr == NMI_VECTOR):
        raise fail(EINVAL, f"KVM_SET_VCPU_EVENTS: {exception.nr} is no exception")
    smm = events.flags & uapi.KVM_VCPUEVENT_VALID_SMM and (events.smi.smm or events.smi.pending)
    if smm and vcpu.mp_state == MpState.INIT_RECEIVED:
        raise fail(EINVAL, "KVM_SET_VCPU_EVENTS: INIT waits for the end of SMM")


def set_vcpu_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    _check_events(vcpu, events)
    flags = events.flags
    _set_exception(vcpu, events)
    vcpu.injected_vector = events.interrupt.nr if events.interrupt.injected else None
    if flags & uapi.KVM_VCPUEVENT_VALID_SHADOW:
        _set_shadow(vcpu, events.interrupt.shadow)
    # One that was on its way is delivered although it blocks others already.
    vcpu.state.nmi_blocked = int(bool(events.nmi.masked and not events.nmi.injected))
    vcpu.nmi_pending = int(bool(events.nmi.injected))
    if flags & uapi.KVM_VCPUEVENT_VALID_NMI_PENDING:
        vcpu.nmi_pending += events.nmi.pending
    if flags & uapi.KVM_VCPUEVENT_VALID_SMM:
        _set_smm(vcpu, events)
    if vcpu.apic is not None:
        _set_apic_events(vcpu, events)
    vcpu.requests.discard(Request.TRIPLE_FAULT)
    if flags & uapi.KVM_VCPUEVENT_VALID_TRIPLE_FAULT and events.triple_fault.pending:
        vcpu.requests.add(Request.TRIPLE_FAULT)
    vcpu.requests.add(Request.EVENT)


def _set_smm(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    if vcpu.smm.active != bool(events.smi.smm):
        vcpu.cpu.svm.leave()
        kvm_smm_changed(vcpu, bool(events.smi.smm))
    vcpu.smm.pending = bool(events.smi.pending)
    if vcpu.smm.active:
        vcpu.smm.inside_nmi = bool(events.smi.smm_inside_nmi)


def _set_shadow(vcpu: VcpuX86, shadow: int) -> None:
    """Hold interrupts off until the next instruction is done."""
    state = vcpu.state
    mov_ss = shadow & uapi.KVM_X86_SHADOW_INT_MOV_SS
    state.shadow = SHADOW_MOV_SS if mov_ss else SHADOW_STI * bool(shadow)
    state.shadow_rip, state.shadow_count = state.rip, state.insn_count


def _set_apic_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    assert vcpu.apic is not None
    if events.flags & uapi.KVM_VCPUEVENT_VALID_SIPI_VECTOR:
        vcpu.apic.sipi_vector = events.sipi_vector
    if events.flags & uapi.KVM_VCPUEVENT_VALID_SMM:
        with vcpu.kvm.irqchip.lock:
            if events.smi.latched_init:
                vcpu.apic.pending_events |= 1 << reg.KVM_APIC_INIT
            else:
                vcpu.apic.take_init()


@vcpu_ioctls.row("KVM_GET_VCPU_EVENTS", Out(uapi.kvm_vcpu_events), uapi.KVM_CAP_VCPU_EVENTS)
def kvm_vcpu_ioctl_x86_get_vcpu_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    """Exceptions, interrupts, NMIs and SMIs that are pending or being injected."""
    get_vcpu_events(vcpu, events)


@vcpu_ioctls.row(
    "KVM_SET_VCPU_EVENTS",
    In(uapi.kvm_vcpu_events),
    uapi.KVM_CAP_VCPU_EVENTS,
    errors={EINVAL: "unknown flags, an exception that is none, or what the vCPU cannot have"},
)
def kvm_vcpu_ioctl_x86_set_vcpu_events(vcpu: VcpuX86, events: uapi.kvm_vcpu_events) -> None:
    """Load them; parts count only where the flags say so."""
    set_vcpu_events(vcpu, events)


@vcpu_ioctls.row("KVM_GET_MP_STATE", Out(uapi.kvm_mp_state), uapi.KVM_CAP_MP_STATE)
def kvm_arch_vcpu_ioctl_get_mpstate(vcpu: VcpuX86, state: uapi.kvm_mp_state) -> None:
    """Whether it runs, is halted, or waits for INIT or SIPI."""
    kvm_apic_accept_events(vcpu)
    kicked = vcpu.apic is not None and vcpu.apic.pv_unhalted
    halted = vcpu.mp_state == MpState.HALTED
    state.mp_state = MpState.RUNNABLE if kicked and halted else vcpu.mp_state


@vcpu_ioctls.row(
    "KVM_SET_MP_STATE",
    In(uapi.kvm_mp_state),
    uapi.KVM_CAP_MP_STATE,
    errors={EINVAL: "an unknown state, or one that needs an in-kernel local APIC"},
)
def kvm_arch_vcpu_ioctl_set_mpstate(vcpu: VcpuX86, state: uapi.kvm_mp_state) -> None:
    """SIPI_RECEIVED is INIT_RECEIVED with the SIPI still to be acted on."""
    if state.mp_state not in list(MpState):
        raise fail(EINVAL, f"there is no processor state {state.mp_state}")
    wanted = MpState(state.mp_state)
    if vcpu.apic is None and wanted != MpState.RUNNABLE:
        raise fail(EINVAL, f"{wanted.name} needs an in-kernel local APIC")
    waits = wanted in (MpState.INIT_RECEIVED, MpState.SIPI_RECEIVED)
    if waits and (vcpu.smm.active or vcpu.smm.pending):
        raise fail(EINVAL, f"{wanted.name} cannot be in system management mode")
    if vcpu.apic is not None and wanted == MpState.SIPI_RECEIVED:
        vcpu.mp_state = MpState.INIT_RECEIVED
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.pending_events |= 1 << reg.KVM_APIC_SIPI
    else:
        vcpu.mp_state = wanted
    vcpu.requests.add(Request.EVENT)


@vcpu_ioctls.row(
    "KVM_INTERRUPT",
    In(uapi.kvm_interrupt),
    errors={
        EINVAL: "a vector above 255",
        ENXIO: "interrupts are the in-kernel irqchip's",
        EEXIST: "one is pending",
    },
)
def kvm_vcpu_ioctl_interrupt(vcpu: VcpuX86, interrupt: uapi.kvm_interrupt) -> None:
    """Deliver an external interrupt; ENXIO where the 8259s are here, EEXIST for a second."""
    if interrupt.irq > 255:
        raise fail(EINVAL, f"there is no vector {interrupt.irq}")
    if vcpu.kvm.irqchip_mode is IrqchipMode.KERNEL:
        raise fail(ENXIO, "interrupts are the in-kernel irqchip's")
    if vcpu.injected_vector is not None and vcpu.kvm.irqchip_in_kernel():
        raise fail(EEXIST, f"vector {vcpu.injected_vector} is pending")
    vcpu.injected_vector = interrupt.irq
    # A signal may take the caller out of its next KVM_RUN before we hear of that call. It would
    # then find room for one more interrupt, which would take this one's place.
    vcpu.run.ready_for_interrupt_injection = 0
    vcpu.requests.add(Request.EVENT)


@vcpu_ioctls.row("KVM_NMI", Value(), uapi.KVM_CAP_USER_NMI)
def kvm_vcpu_ioctl_nmi(vcpu: VcpuX86, _: int) -> None:
    """Queue an NMI; two at most are pending."""
    vcpu.inject_nmi()
