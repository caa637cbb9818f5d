"""Hyper-V's synthetic debugger: registers through which a kernel debugger's packets reach the VMM.

`syndbg_*` of arch/x86/kvm/hyperv.c; KVM_EXIT_HYPERV_SYNDBG in api.rst, section 5.
"""

from __future__ import annotations

from functools import partial

from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_msrs import hv_gate
from anykvm.x86.hyperv_tlfs import Feature
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import Msr, enter

REGISTERS = (
    (hv.SYNDBG_CONTROL, "control"),
    (hv.SYNDBG_STATUS, "status"),
    (hv.SYNDBG_SEND_BUFFER, "send_page"),
    (hv.SYNDBG_RECV_BUFFER, "recv_page"),
    (hv.SYNDBG_PENDING_BUFFER, "pending_page"),
    (hv.SYNDBG_OPTIONS, "options"),
)
TELLING = (hv.SYNDBG_CONTROL, hv.SYNDBG_PENDING_BUFFER)
_debug_msrs = hv_gate(feature=Feature.DEBUG_MSRS)


def _gate(vcpu: VcpuX86, host: bool) -> bool:
    return host or (vcpu.hv.cpuid.syndbg and _debug_msrs(vcpu, host))


def syndbg_exit(vcpu: VcpuX86, msr: int) -> None:
    """The guest has sent or wants something; the VMM answers with a status."""
    state, exit_ = vcpu.kvm.hv.syndbg, vcpu.hv.exit
    exit_.type = uapi.KVM_EXIT_HYPERV_SYNDBG
    syndbg = exit_.u.syndbg
    syndbg.msr, syndbg.control, syndbg.status = msr, state.control, state.status
    syndbg.send_page, syndbg.recv_page = state.send_page, state.recv_page
    syndbg.pending_page = state.pending_page
    vcpu.requests.add(Request.HV_EXIT)
    vcpu.complete_userspace_io = partial(_complete, vcpu, msr)


def _complete(vcpu: VcpuX86, msr: int) -> int:
    if msr == hv.SYNDBG_CONTROL:
        vcpu.kvm.hv.syndbg.status = vcpu.run.hyperv.u.syndbg.status
    return 1


def _register(index: int, name: str) -> None:
    def read(vcpu: VcpuX86) -> int:
        value: int = getattr(vcpu.kvm.hv.syndbg, name)
        return value

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        setattr(vcpu.kvm.hv.syndbg, name, value)
        if index in TELLING and not host:
            syndbg_exit(vcpu, index)
        return True

    enter(index, Msr(f"hv_syndbg_{name}", read, write, gate=_gate))


for _index, _name in REGISTERS:
    _register(_index, _name)
