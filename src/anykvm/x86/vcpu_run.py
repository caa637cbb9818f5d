"""KVM_RUN: enter the guest, deal with what it stops for, until userspace is needed.

arch/x86/kvm/x86.c: `kvm_arch_vcpu_ioctl_run`, `vcpu_run`, `vcpu_enter_guest`, `vcpu_block`. An exit
handler returns 1 to go on and 0 to return to userspace with `vcpu.run` filled in.
"""

from __future__ import annotations

from errno import EAGAIN, EINTR, EINVAL

from anykvm.fs.trace import enabled, trace
from anykvm.kvm.errors import fail
from anykvm.kvm.kvm_main import VcpuMode
from anykvm.uapi import kvm as uapi
from anykvm.x86.events import (
    inject_pending_events,
    interrupt_window_open,
    kvm_apic_accept_events,
    kvm_arch_vcpu_runnable,
    ready_for_interrupt_injection,
)
from anykvm.x86.exits import EXIT_HANDLERS
from anykvm.x86.kvm_host import MpState, Request, VcpuX86
from anykvm.x86.msrs import update_pvclock
from anykvm.x86.regs import get_cr8, set_cr8
from anykvm.x86.sync_regs import store_regs, sync_regs
from anykvm.x86.vapic import kvm_lapic_sync_from_vapic, kvm_lapic_sync_to_vapic


def kvm_arch_vcpu_ioctl_run(vcpu: VcpuX86) -> int:
    """KVM_RUN with signals held back, see kvm/sigset.py."""
    vcpu.sigset.activate()
    vcpu.cpu.memory_may_have_changed()
    try:
        vcpu.run.flags = 0
        if vcpu.run.kvm_valid_regs & ~uapi.KVM_SYNC_X86_VALID_FIELDS:
            raise fail(EINVAL, f"kvm_valid_regs is {vcpu.run.kvm_valid_regs:#x}")
        try:
            _run(vcpu)
        finally:
            if vcpu.run.kvm_valid_regs:
                store_regs(vcpu)
            _post_kvm_run_save(vcpu)
    finally:
        vcpu.sigset.deactivate()
    return 0


def _run(vcpu: VcpuX86) -> None:
    if vcpu.mp_state == MpState.UNINITIALIZED:
        _wait_for_init(vcpu)
    if vcpu.run.kvm_dirty_regs:
        sync_regs(vcpu)
    if vcpu.apic is None and not set_cr8(vcpu, vcpu.run.cr8):
        raise fail(EINVAL, f"kvm_run.cr8 is {vcpu.run.cr8:#x}")
    complete, vcpu.complete_userspace_io = vcpu.complete_userspace_io, None
    if complete is not None and not complete():
        return
    if vcpu.run.immediate_exit:
        raise _interrupted(vcpu)
    if vcpu.run.request_interrupt_window:
        vcpu.requests.add(Request.EVENT)
    vcpu_run(vcpu)


def _wait_for_init(vcpu: VcpuX86) -> None:
    """A processor that was not started yet: sleep for INIT, then let the caller come again."""
    if vcpu.run.immediate_exit:
        raise _interrupted(vcpu)
    vcpu_block(vcpu)
    if vcpu.sigset.signal_pending():
        raise _interrupted(vcpu)
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    raise fail(EAGAIN, "the processor waited for INIT")


def _interrupted(vcpu: VcpuX86) -> OSError:
    """EINTR, with an exit reason that is not mistaken for the last exit's."""
    vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
    return fail(EINTR, "KVM_RUN was interrupted")


def vcpu_run(vcpu: VcpuX86) -> None:
    """Until an exit for userspace; EINTR."""
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    while True:
        running = vcpu.mp_state == MpState.RUNNABLE
        if not (vcpu_enter_guest(vcpu) if running else vcpu_block(vcpu)):
            return
        if vcpu.run.request_interrupt_window and interrupt_window_open(vcpu):
            vcpu.run.exit_reason = uapi.KVM_EXIT_IRQ_WINDOW_OPEN
            return
        if vcpu.look_for_signals or not running:
            vcpu.look_for_signals = False
            if vcpu.sigset.signal_pending() or vcpu.run.immediate_exit:
                raise _interrupted(vcpu)


def vcpu_enter_guest(vcpu: VcpuX86) -> int:
    """One stay in the guest, with what is pending injected before and its exit handled after."""
    if vcpu.requests and not _handle_requests(vcpu):
        return 0
    if vcpu.mp_state != MpState.RUNNABLE:
        return 1
    # From here a kick reaches the processor, so what came before it is seen here.
    vcpu.mode = VcpuMode.IN_GUEST_MODE
    if vcpu.requests:
        vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        return 1
    exit_kind = vcpu.cpu.run()
    vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
    kvm_lapic_sync_from_vapic(vcpu)
    if enabled():
        trace("kvm_exit", vcpu_id=vcpu.vcpu_id, reason=exit_kind, rip=vcpu.state.rip)
    return EXIT_HANDLERS[exit_kind](vcpu)


def _handle_requests(vcpu: VcpuX86) -> int:
    requests = vcpu.requests
    if Request.CLOCK_UPDATE in requests:
        requests.discard(Request.CLOCK_UPDATE)
        update_pvclock(vcpu)
    if Request.IOAPIC_EOI_EXIT in requests:
        requests.discard(Request.IOAPIC_EOI_EXIT)
        vcpu.run.exit_reason = uapi.KVM_EXIT_IOAPIC_EOI
        vcpu.run.eoi.vector = vcpu.pending_ioapic_eoi
        return 0
    if Request.REPORT_TPR_ACCESS in requests:
        requests.discard(Request.REPORT_TPR_ACCESS)
        vcpu.run.exit_reason = uapi.KVM_EXIT_TPR_ACCESS
        return 0
    if Request.TRIPLE_FAULT in requests:
        requests.discard(Request.TRIPLE_FAULT)
        vcpu.run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
        return 0
    if Request.EVENT in requests:
        requests.discard(Request.EVENT)
        kvm_apic_accept_events(vcpu)
        if vcpu.mp_state == MpState.RUNNABLE:
            inject_pending_events(vcpu)
        kvm_lapic_sync_to_vapic(vcpu)
    return 1


def vcpu_block(vcpu: VcpuX86) -> int:
    """Sleep until there is something to run for, a signal, or `immediate_exit`; returns 1."""
    vcpu.mode = VcpuMode.BLOCKED
    if not kvm_arch_vcpu_runnable(vcpu) and not vcpu.run.immediate_exit:
        vcpu.sigset.wait()
    vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
    if kvm_arch_vcpu_runnable(vcpu):
        kvm_apic_accept_events(vcpu)
        if vcpu.mp_state == MpState.HALTED:
            vcpu.mp_state = MpState.RUNNABLE
    return 1


def _post_kvm_run_save(vcpu: VcpuX86) -> None:
    """`post_kvm_run_save`."""
    run = vcpu.run
    run.if_flag = vcpu.state.flags >> 9 & 1
    run.cr8 = get_cr8(vcpu)
    run.apic_base = vcpu.state.apic_base
    in_kernel = vcpu.kvm.pic_in_kernel()
    run.ready_for_interrupt_injection = in_kernel or ready_for_interrupt_injection(vcpu)
