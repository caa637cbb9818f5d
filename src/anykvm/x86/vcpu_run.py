"""KVM_RUN: enter the guest, deal with what it stops for, until userspace is needed.

arch/x86/kvm/x86.c: `kvm_arch_vcpu_ioctl_run`, `vcpu_run`, `vcpu_enter_guest`, `vcpu_block`. An exit
handler returns 1 to go on and 0 to return to userspace with `vcpu.run` filled in.
"""

from __future__ import annotations

import time
from errno import EAGAIN, EINTR, EINVAL

from anykvm.cpu.state import Exit
from anykvm.fs.trace import enabled, trace
from anykvm.kvm.errors import fail
from anykvm.kvm.kvm_main import VcpuMode
from anykvm.uapi import kvm as uapi
from anykvm.x86.events import (
    inject_pending_events,
    interrupt_window_open,
    is_halted,
    kvm_apic_accept_events,
    kvm_arch_vcpu_runnable,
    kvm_vcpu_unhalt,
    ready_for_interrupt_injection,
)
from anykvm.x86.exits import EXIT_HANDLERS, handle_dirty_ring_full
from anykvm.x86.fastpath import DONE, INSIDE, LEFT, OUTSIDE, VcpuFastpath
from anykvm.x86.halt_poll import halt_poll, halt_poll_adjust
from anykvm.x86.hyperv import HV_REQUESTS, handle_hv_requests
from anykvm.x86.hyperv_clock import kvm_hv_setup_tsc_page
from anykvm.x86.irq import lapic_timer_load, lapic_timer_put
from anykvm.x86.kvm_host import MpState, Request, VcpuX86
from anykvm.x86.msrs import update_pvclock
from anykvm.x86.pv_eoi import sync_pv_eoi_from_guest
from anykvm.x86.regs import get_cr8, set_cr8
from anykvm.x86.stats import count_userspace_exit, publish_vcpu, publish_vm, waiting
from anykvm.x86.steal_time import (
    record_steal_time,
    steal_time_sched_in,
    steal_time_set_preempted,
)
from anykvm.x86.svm import nested_triple_fault
from anykvm.x86.sync_regs import store_regs, sync_regs
from anykvm.x86.vapic import kvm_lapic_sync_from_vapic, kvm_lapic_sync_to_vapic

# As in fastpath.py, for they are looked at on each way into the guest.
RUNNABLE = MpState.RUNNABLE
CLOCK_UPDATE = Request.CLOCK_UPDATE
EVENT = Request.EVENT
IOAPIC_EOI_EXIT = Request.IOAPIC_EOI_EXIT
REPORT_TPR_ACCESS = Request.REPORT_TPR_ACCESS
STEAL_UPDATE = Request.STEAL_UPDATE
TRIPLE_FAULT = Request.TRIPLE_FAULT
EXIT_REQUESTS = {IOAPIC_EOI_EXIT, REPORT_TPR_ACCESS, TRIPLE_FAULT}


def kvm_arch_vcpu_ioctl_run(vcpu: VcpuX86) -> int:
    """KVM_RUN with signals held back, see kvm/sigset.py."""
    fastpath = vcpu.fastpath
    if fastpath is None:
        fastpath = vcpu.fastpath = VcpuFastpath(vcpu)
    vcpu.sigset.activate()
    try:
        way = fastpath.enter()
        if way is not DONE:
            _ioctl_run(vcpu, left=way is LEFT)
    finally:
        lapic_timer_put(vcpu)
        vcpu.sigset.deactivate()
    return 0


def _ioctl_run(vcpu: VcpuX86, left: bool) -> None:
    """`left`: the guest was entered, and what it has left for is still to be dealt with."""
    try:
        if left:
            vcpu_run(vcpu, left=True)
            return
        vcpu.cpu.memory_may_have_changed()
        lapic_timer_load(vcpu)
        vcpu.run.flags = 0
        if vcpu.run.kvm_valid_regs & ~uapi.KVM_SYNC_X86_VALID_FIELDS:
            raise fail(EINVAL, f"kvm_valid_regs is {vcpu.run.kvm_valid_regs:#x}")
        _run(vcpu)
    finally:
        if vcpu.run.kvm_valid_regs:
            store_regs(vcpu)
        _post_kvm_run_save(vcpu)
        publish_vcpu(vcpu)
        count_userspace_exit(vcpu)


def _run(vcpu: VcpuX86) -> None:
    if vcpu.mp_state == MpState.UNINITIALIZED:
        _wait_for_init(vcpu)
    if vcpu.run.kvm_dirty_regs:
        sync_regs(vcpu)
    steal_time_sched_in(vcpu)
    if vcpu.apic is None and not set_cr8(vcpu, vcpu.run.cr8):
        raise fail(EINVAL, f"kvm_run.cr8 is {vcpu.run.cr8:#x}")
    complete, vcpu.complete_userspace_io = vcpu.complete_userspace_io, None
    if complete is not None and not (complete() and _finish_instruction(vcpu)):
        return
    if vcpu.run.immediate_exit:
        _leave_at_once(vcpu)
        return
    if vcpu.run.request_interrupt_window:
        vcpu.requests.add(EVENT)
    vcpu_run(vcpu)


def _finish_instruction(vcpu: VcpuX86) -> int:
    """An instruction with several MMIO accesses makes them all before anything else happens, as the
    kernel's emulator does: so nothing of it is missing from the registers that userspace reads.
    """
    while vcpu.cpu.mid_instruction() and vcpu.mp_state == RUNNABLE:
        vcpu.cpu.finish_instruction()
        if not vcpu_enter_guest(vcpu, finishing=True):
            return 0
    return 1


def _nothing_to_report(vcpu: VcpuX86) -> int:
    """Whether no exit would be forgotten if the state were read now."""
    if not _finish_instruction(vcpu):
        return 0
    reported = EXIT_REQUESTS
    if vcpu.kvm.triple_fault_event:  # KVM_GET_VCPU_EVENTS tells of it
        reported = reported - {TRIPLE_FAULT}
    return vcpu.requests.isdisjoint(reported) or _handle_requests(vcpu)


def _leave_at_once(vcpu: VcpuX86) -> None:
    """`immediate_exit` before the guest was entered: the last exit's reason stays."""
    before = vcpu.run.exit_reason
    if _nothing_to_report(vcpu):
        interrupted = _interrupted(vcpu)
        vcpu.run.exit_reason = before
        raise interrupted


def _interrupt(vcpu: VcpuX86) -> None:
    if _nothing_to_report(vcpu):
        raise _interrupted(vcpu)


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
    steal_time_set_preempted(vcpu)
    vcpu.stat.signal_exits += vcpu.sigset.signal_pending()
    vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
    return fail(EINTR, "KVM_RUN was interrupted")


def vcpu_run(vcpu: VcpuX86, *, left: bool = False) -> None:
    """Until an exit for userspace; EINTR. `left`: the guest has just left native code."""
    vcpu.has_run = True
    if left and not leave_guest(vcpu, vcpu.cpu.resume()):
        return
    # Another process's thread may be out of this call before we know, and read this at once.
    vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
    while True:
        if vcpu.look_for_signals and _called_back(vcpu):
            _interrupt(vcpu)
            return
        running = vcpu.mp_state == RUNNABLE and not vcpu.halted_in_guest
        if not (vcpu_enter_guest(vcpu) if running else vcpu_block(vcpu)):
            return
        if vcpu.run.request_interrupt_window and interrupt_window_open(vcpu):
            vcpu.run.exit_reason = uapi.KVM_EXIT_IRQ_WINDOW_OPEN
            vcpu.stat.request_irq_exits += 1
            return
        vcpu.look_for_signals |= not running


def _called_back(vcpu: VcpuX86) -> bool:
    """Whether userspace wants its thread back: what a tick has us look for."""
    vcpu.look_for_signals = False
    publish_vcpu(vcpu)
    publish_vm(vcpu.kvm)
    return vcpu.sigset.signal_pending() or bool(vcpu.run.immediate_exit)


def vcpu_enter_guest(vcpu: VcpuX86, *, finishing: bool = False) -> int:
    """One stay in the guest, with what is pending injected before and its exit handled after.

    `finishing`: only to the end of an instruction, or under REP of its turn.
    """
    if vcpu.dirty_ring is not None and vcpu.cpu.dirty_ring_full():
        return handle_dirty_ring_full(vcpu)
    if vcpu.requests and not _handle_requests(vcpu):
        return 0
    if vcpu.mp_state != RUNNABLE:
        return 1
    # From here a kick reaches the processor, so what came before it is seen here.
    vcpu.mode = INSIDE
    if vcpu.requests:
        vcpu.mode = OUTSIDE
        return 1
    return leave_guest(vcpu, vcpu.cpu.run(), finishing=finishing)


def leave_guest(vcpu: VcpuX86, exit_kind: Exit, *, finishing: bool = False) -> int:
    """The guest has left: its exit is handled."""
    vcpu.stat.exits += 1
    vcpu.mode = OUTSIDE
    kvm_lapic_sync_from_vapic(vcpu)
    if enabled():
        trace("kvm_exit", vcpu_id=vcpu.vcpu_id, reason=exit_kind, rip=vcpu.state.rip)
    if finishing and exit_kind is Exit.MMIO and not vcpu.cpu.mid_instruction():
        return 1  # the next turn's first access, of which nothing was done yet
    return EXIT_HANDLERS[exit_kind](vcpu)


def _handle_requests(vcpu: VcpuX86) -> int:
    requests = vcpu.requests
    if CLOCK_UPDATE in requests:
        requests.discard(CLOCK_UPDATE)
        update_pvclock(vcpu)
        if vcpu.vcpu_idx == 0:
            kvm_hv_setup_tsc_page(vcpu)
    if not HV_REQUESTS.isdisjoint(requests) and not handle_hv_requests(vcpu):
        return 0
    if STEAL_UPDATE in requests:
        requests.discard(STEAL_UPDATE)
        record_steal_time(vcpu)
    if IOAPIC_EOI_EXIT in requests:
        requests.discard(IOAPIC_EOI_EXIT)
        vcpu.run.exit_reason = uapi.KVM_EXIT_IOAPIC_EOI
        vcpu.run.eoi.vector = vcpu.pending_ioapic_eoi
        return 0
    if REPORT_TPR_ACCESS in requests:
        requests.discard(REPORT_TPR_ACCESS)
        vcpu.run.exit_reason = uapi.KVM_EXIT_TPR_ACCESS
        return 0
    if TRIPLE_FAULT in requests:
        requests.discard(TRIPLE_FAULT)
        if not nested_triple_fault(vcpu):
            vcpu.run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
            return 0
    if EVENT in requests:
        requests.discard(EVENT)
        vcpu.stat.req_event += 1
        kvm_apic_accept_events(vcpu)
        if vcpu.mp_state == RUNNABLE:
            inject_pending_events(vcpu)
        kvm_lapic_sync_to_vapic(vcpu)
    return 1


def vcpu_block(vcpu: VcpuX86) -> int:
    """Sleep until there is something to run for, a signal, or `immediate_exit`; returns 1."""
    vcpu.mode = VcpuMode.BLOCKED
    sleeps = not kvm_arch_vcpu_runnable(vcpu) and not interrupt_window_open(vcpu)
    if sleeps and not vcpu.run.immediate_exit:
        began = time.monotonic_ns()
        if not halt_poll(vcpu):
            with waiting(vcpu):
                vcpu.sigset.wait()
        halt_poll_adjust(vcpu, time.monotonic_ns() - began)
    vcpu.mode = OUTSIDE
    if kvm_arch_vcpu_runnable(vcpu):
        vcpu.stat.halt_wakeup += 1
        kvm_apic_accept_events(vcpu)
        if is_halted(vcpu):
            kvm_vcpu_unhalt(vcpu)
            steal_time_sched_in(vcpu)
    return 1


def _post_kvm_run_save(vcpu: VcpuX86) -> None:
    """`post_kvm_run_save`."""
    sync_pv_eoi_from_guest(vcpu)  # if the guest was not entered any more
    run = vcpu.run
    if vcpu.smm.active:
        run.flags |= uapi.KVM_RUN_X86_SMM
    run.if_flag = vcpu.state.flags >> 9 & 1
    run.cr8 = get_cr8(vcpu)
    run.apic_base = vcpu.state.apic_base
    in_kernel = vcpu.kvm.pic_in_kernel()
    run.ready_for_interrupt_injection = in_kernel or ready_for_interrupt_injection(vcpu)
