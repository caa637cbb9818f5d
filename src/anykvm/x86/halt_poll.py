"""Halt polling: a halted vCPU looks for work for a while before it sleeps (KVM_CAP_HALT_POLL;
Documentation/virt/kvm/halt-polling.rst; virt/kvm/kvm_main.c, `kvm_vcpu_halt`).

The time grows while wake-ups come soon, and is given up when one takes longer than the most that is
allowed. Unlike on Linux that is 0 until a VMM sets it: who polls takes the GIL from the others.
"""

from __future__ import annotations

import time

from anykvm.kvm.binary_stats import log_hist_update
from anykvm.x86.events import kvm_arch_vcpu_runnable
from anykvm.x86.kvm_host import VcpuX86

HALT_POLL_NS_GROW, HALT_POLL_NS_GROW_START = 2, 10_000


def halt_poll(vcpu: VcpuX86) -> bool:
    """Whether work came while polling."""
    if not vcpu.halt_poll_ns:
        return False
    stat, began = vcpu.stat, time.monotonic_ns()
    stat.halt_attempted_poll += 1
    while True:
        if kvm_arch_vcpu_runnable(vcpu):
            passed = time.monotonic_ns() - began
            stat.halt_successful_poll += 1
            stat.halt_poll_success_ns += passed
            log_hist_update(stat.halt_poll_success_hist, passed)
            return True
        passed = time.monotonic_ns() - began
        interrupted = vcpu.sigset.signal_pending() or vcpu.run.immediate_exit
        if passed >= vcpu.halt_poll_ns or interrupted:
            stat.halt_poll_fail_ns += passed
            log_hist_update(stat.halt_poll_fail_hist, passed)
            return False
        time.sleep(0)


def halt_poll_adjust(vcpu: VcpuX86, blocked_ns: int) -> None:
    """How long to poll the next time, after a halt of `blocked_ns` nanoseconds."""
    most, now = vcpu.kvm.max_halt_poll_ns, vcpu.halt_poll_ns
    if blocked_ns > most:
        now = 0
    elif blocked_ns > now:
        now = max(now * HALT_POLL_NS_GROW, HALT_POLL_NS_GROW_START)
    vcpu.halt_poll_ns = min(now, most)
