"""Hyper-V's synthetic timers: four a processor, which send a message by a SINT or interrupt
directly. TLFS, 12.3; `stimer_*` of arch/x86/kvm/hyperv.c.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_clock import get_time_ref_counter
from anykvm.x86.hyperv_state import Stimer
from anykvm.x86.hyperv_tlfs import Feature
from anykvm.x86.kvm_host import Request, VcpuX86

ENABLE, PERIODIC, AUTO_ENABLE, DIRECT = 1 << 0, 1 << 1, 1 << 3, 1 << 12
VECTOR_SHIFT, SINT_SHIFT, SINT_MASK = 4, 16, 15

NEVER = 1 << 62  # in nanoseconds

# `synic_deliver_msg`: a SINT's message, which is told to `hyperv_synic` that imports this.
Deliver = Callable[[VcpuX86, int, bytes, bool], int]


def _sint(timer: Stimer) -> int:
    return timer.config >> SINT_SHIFT & SINT_MASK


def stimer_cleanup(vcpu: VcpuX86, timer: Stimer) -> None:
    if timer.timer is not None:
        timer.timer.cancel()
    vcpu.hv.stimers_due.discard(timer.index)
    timer.msg_pending = False
    timer.exp_time = 0


def stimer_mark_pending(vcpu: VcpuX86, timer: Stimer) -> None:
    """The vCPU looks at the timer before it enters the guest again."""
    vcpu.hv.stimers_due.add(timer.index)
    vcpu.requests.add(Request.HV_STIMER)


def _expired(vcpu: VcpuX86, timer: Stimer) -> None:
    """On the VM's thread."""
    vcpu.hv.stimers_due.add(timer.index)
    vcpu.make_request(Request.HV_STIMER)


def stimer_set_config(vcpu: VcpuX86, timer: Stimer, config: int, host: bool) -> bool:
    if not vcpu.hv.synic.active and (not host or config):
        return False
    cpuid = vcpu.hv.cpuid
    allowed = host or not cpuid.enforce or cpuid.features & Feature.STIMER_DIRECT
    if config & DIRECT and not allowed:
        return False
    stimer_cleanup(vcpu, timer)
    if timer.config & ENABLE and not config & DIRECT and not config >> SINT_SHIFT & SINT_MASK:
        config &= ~ENABLE
    timer.config = config
    if timer.config & ENABLE:
        stimer_mark_pending(vcpu, timer)
    return True


def stimer_set_count(vcpu: VcpuX86, timer: Stimer, count: int, host: bool) -> bool:
    if not vcpu.hv.synic.active and (not host or count):
        return False
    stimer_cleanup(vcpu, timer)
    timer.count = count
    if not count:
        timer.config &= ~ENABLE
    elif timer.config & AUTO_ENABLE:
        timer.config |= ENABLE
    if timer.config & ENABLE:
        stimer_mark_pending(vcpu, timer)
    return True


def stimers_of_sint(vcpu: VcpuX86, sint: int) -> None:
    """A message of this SINT was taken: timers whose own could not be delivered try again."""
    for timer in vcpu.hv.stimers:
        waits = timer.msg_pending and timer.config & ENABLE and not timer.config & DIRECT
        if waits and _sint(timer) == sint:
            stimer_mark_pending(vcpu, timer)


def _start(vcpu: VcpuX86, timer: Stimer) -> None:
    now, now_ns = get_time_ref_counter(vcpu.kvm), time.monotonic_ns()
    if timer.config & PERIODIC:
        if not timer.exp_time:
            timer.exp_time = now + timer.count
        elif now >= timer.exp_time:
            timer.exp_time = now + timer.count - (now - timer.exp_time) % timer.count
    else:
        timer.exp_time = timer.count
        if now >= timer.count:
            stimer_mark_pending(vcpu, timer)
            return
    if timer.timer is None:
        timer.timer = vcpu.kvm.worker.hrtimer(partial(_expired, vcpu, timer))
    timer.timer.start(min(now_ns + 100 * (timer.exp_time - now), NEVER))


def _notify(vcpu: VcpuX86, timer: Stimer, deliver: Deliver) -> bool:
    """Whether the guest was told."""
    if timer.config & DIRECT:
        if vcpu.apic is not None:
            with vcpu.kvm.irqchip.lock:
                return vcpu.apic.accept_irq(0, timer.config >> VECTOR_SHIFT & 0xFF) > 0
        return True
    message = hv.TIMER_MESSAGE.pack(
        hv.HVMSG_TIMER_EXPIRED,
        hv.TIMER_PAYLOAD,
        0,
        0,
        timer.index,
        timer.exp_time,
        get_time_ref_counter(vcpu.kvm),
    )
    # Ticks of a periodic timer do not pile up: one that cannot be delivered is lost.
    return deliver(vcpu, _sint(timer), message, bool(timer.config & PERIODIC)) == 0


def _expire(vcpu: VcpuX86, timer: Stimer, deliver: Deliver) -> None:
    timer.msg_pending = True
    if _notify(vcpu, timer, deliver):
        timer.msg_pending = False
        if not timer.config & PERIODIC:
            timer.config &= ~ENABLE


def kvm_hv_process_stimers(vcpu: VcpuX86, deliver: Deliver) -> None:
    """Deal with the timers that are due or were set, on the vCPU's thread."""
    for timer in vcpu.hv.stimers:
        if timer.index not in vcpu.hv.stimers_due:
            continue
        vcpu.hv.stimers_due.discard(timer.index)
        if not timer.config & ENABLE:
            continue
        if timer.exp_time and get_time_ref_counter(vcpu.kvm) >= timer.exp_time:
            _expire(vcpu, timer, deliver)
        if not (timer.config & ENABLE and timer.count):
            stimer_cleanup(vcpu, timer)
        elif not timer.msg_pending:
            _start(vcpu, timer)
