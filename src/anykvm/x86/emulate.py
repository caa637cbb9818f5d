"""Instructions that KVM itself executes for the guest, and those that nobody does: RSM, MONITOR,
MWAIT, bus locks, failures.

arch/x86/kvm/emulate.c, `em_rsm`; x86.c, `kvm_emulate_monitor_mwait`, `handle_emulation_failure`.
"""

from __future__ import annotations

import logging

from anykvm.fs.trace import trace
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import PendingException, Request, VcpuX86
from anykvm.x86.mode import get_cpl
from anykvm.x86.smm import emulate_rsm

log = logging.getLogger("anykvm.x86")
UD_VECTOR = 6
MAX_INSTRUCTION = 15
NOP = 0x90
RSM = b"\x0f\xaa"


def handle_invalid_op(vcpu: VcpuX86) -> int:
    vcpu.cpu.inject_exception(UD_VECTOR)
    return 1


def handle_rsm(vcpu: VcpuX86) -> int:
    """Undefined outside of SMM; a save area that is no memory fails as an emulation does."""
    if not vcpu.smm.active:
        return handle_invalid_op(vcpu)
    if emulate_rsm(vcpu):
        return 1
    state = vcpu.state
    state.insn_len = len(RSM)
    state.insn_bytes[: len(RSM)] = list(RSM)
    return _emulation_failed(vcpu, "rsm: the save area is no memory")


def handle_monitor_mwait(vcpu: VcpuX86) -> int:
    """They do nothing; for a guest without them they are undefined only if the VMM wants so."""
    lenient = vcpu.kvm.has_quirk(uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS)
    if not lenient and not vcpu.cpuid.has("monitor"):
        return handle_invalid_op(vcpu)
    vcpu.cpu.advance()
    return 1


def handle_bus_lock(vcpu: VcpuX86) -> int:
    """The access is done: tell the VMM, which may want to slow the guest down."""
    vcpu.run.exit_reason = uapi.KVM_EXIT_X86_BUS_LOCK
    vcpu.run.flags |= uapi.KVM_RUN_X86_BUS_LOCK
    return 0


def handle_emulation(vcpu: VcpuX86) -> int:
    """An instruction that is not implemented is undefined for the guest. For the VMM it is an error
    where the guest's kernel meets it, or anywhere with KVM_CAP_EXIT_ON_EMULATION_FAILURE; then
    nothing has happened to the guest.
    """
    return _emulation_failed(vcpu, vcpu.cpu.emulation_text)


def _emulation_failed(vcpu: VcpuX86, text: str) -> int:
    vcpu.stat.insn_emulation_fail += 1
    rip = vcpu.state.rip
    log.error("vCPU %d at %#x: %s", vcpu.vcpu_id, rip, text)
    trace("kvm_emulate_insn", rip=rip, text=text, failed=True)
    if not vcpu.kvm.exit_on_emulation_error:
        vcpu.exception = PendingException(UD_VECTOR)
        vcpu.requests.add(Request.EVENT)
        if get_cpl(vcpu):
            return 1
    _prepare_emulation_failure_exit(vcpu)
    return 0


def _prepare_emulation_failure_exit(vcpu: VcpuX86) -> None:
    state, failure = vcpu.state, vcpu.run.emulation_failure
    vcpu.run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    failure.suberror = uapi.KVM_INTERNAL_ERROR_EMULATION
    failure.ndata, failure.flags = 1, 0
    if state.insn_len:  # else there was nothing to fetch from
        size = min(state.insn_len, MAX_INSTRUCTION)
        failure.ndata = 3
        failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = size
        failure.insn_bytes[:] = [*state.insn_bytes[:size], *[NOP] * (MAX_INSTRUCTION - size)]
