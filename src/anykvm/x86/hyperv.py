"""Hyper-V's enlightenments for Windows, and for Linux as its guest: what a vCPU does about them
before it enters the guest, and what the VMM may switch on.

arch/x86/kvm/hyperv.c. Time is in `hyperv_clock.py`, interrupts and messages in `hyperv_synic.py`,
timers in `hyperv_stimer.py`, registers in `hyperv_msrs.py`, calls in `hyperv_hcall.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_ioctl, hyperv_msrs, hyperv_syndbg
from anykvm.x86.hyperv_stimer import kvm_hv_process_stimers
from anykvm.x86.hyperv_synic import kvm_hv_activate_synic, synic_deliver_msg
from anykvm.x86.kvm_host import Request, VcpuX86

# Imported for the rows that they enter into the tables of ioctls and MSRs.
ROWS = (hyperv_ioctl, hyperv_msrs, hyperv_syndbg)


def _system_event(vcpu: VcpuX86, kind: int) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_SYSTEM_EVENT
    vcpu.run.system_event.type, vcpu.run.system_event.ndata = kind, 0
    return 0


def _crash(vcpu: VcpuX86) -> int:
    return _system_event(vcpu, uapi.KVM_SYSTEM_EVENT_CRASH)


def _reset(vcpu: VcpuX86) -> int:
    return _system_event(vcpu, uapi.KVM_SYSTEM_EVENT_RESET)


def _exit(vcpu: VcpuX86) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_HYPERV
    vcpu.run.hyperv = vcpu.hv.exit
    return 0


def _stimers(vcpu: VcpuX86) -> int:
    kvm_hv_process_stimers(vcpu, synic_deliver_msg)
    return 1


def _flush(vcpu: VcpuX86) -> int:
    vcpu.cpu.flush_tlb()
    return 1


# In Linux's order.
HANDLERS: dict[Request, Callable[[VcpuX86], int]] = {
    Request.TLB_FLUSH_GUEST: _flush,
    Request.HV_CRASH: _crash,
    Request.HV_RESET: _reset,
    Request.HV_EXIT: _exit,
    Request.HV_STIMER: _stimers,
}
HV_REQUESTS = frozenset(HANDLERS)


def handle_hv_requests(vcpu: VcpuX86) -> int:
    """1 to enter the guest, 0 for an exit to userspace."""
    for request, handler in HANDLERS.items():
        if request in vcpu.requests:
            vcpu.requests.discard(request)
            if not handler(vcpu):
                return 0
    return 1


def enable_synic(vcpu: VcpuX86, args: tuple[int, ...]) -> None:
    """KVM_CAP_HYPERV_SYNIC."""
    _activate(vcpu, dont_zero_pages=False)


def enable_synic2(vcpu: VcpuX86, args: tuple[int, ...]) -> None:
    """KVM_CAP_HYPERV_SYNIC2: pages are not cleared when the guest names them."""
    if args[0]:
        raise fail(EINVAL, f"KVM_CAP_HYPERV_SYNIC2 takes no argument, got {args[0]:#x}")
    _activate(vcpu, dont_zero_pages=True)


def _activate(vcpu: VcpuX86, dont_zero_pages: bool) -> None:
    if vcpu.apic is None:
        raise fail(EINVAL, "the SynIC needs an in-kernel local APIC")
    kvm_hv_activate_synic(vcpu, dont_zero_pages)


def enable_enforce_cpuid(vcpu: VcpuX86, args: tuple[int, ...]) -> None:
    """KVM_CAP_HYPERV_ENFORCE_CPUID."""
    vcpu.hv.cpuid.enforce = bool(args[0])
