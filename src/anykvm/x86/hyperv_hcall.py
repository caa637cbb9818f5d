"""Hyper-V's hypercalls: an input value with a code and counts, two parameters in registers or
memory, and a status. TLFS, chapter 3; `kvm_hv_hypercall` of arch/x86/kvm/hyperv.c.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from anykvm.fs.trace import trace
from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_cpuid import HvCpuid
from anykvm.x86.hyperv_tlfs import Code, Feature, Hint, Privilege, Status
from anykvm.x86.hyperv_vpset import hv_flush_tlb, hv_send_ipi
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.mode import get_cpl, is_64_bit_mode, is_protmode

RAX, RCX, RDX, RBX, RSI, RDI, R8 = 0, 1, 2, 3, 6, 7, 8
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
UD_VECTOR = 6
NO_RETRY_NOTICE = MASK32  # "never notify" of long spins
XMM_FAST = frozenset(
    (Code.FLUSH_SPACE, Code.FLUSH_LIST, Code.FLUSH_SPACE_EX, Code.FLUSH_LIST_EX, Code.SEND_IPI_EX)
)
FLAG_NUMBER = 0xFFFF << 32


def _halves(vcpu: VcpuX86) -> list[int]:
    """XMM0 to XMM5 as quadwords."""
    data = b"".join(bytes(vcpu.state.xmm[n])[:16] for n in range(hv.MAX_XMM_REGISTERS))
    return [int.from_bytes(data[n : n + 8], "little") for n in range(0, len(data), 8)]


@dataclass(frozen=True, slots=True)
class Hcall:
    """struct kvm_hv_hcall: the input value taken apart; `ingpa` and `outgpa` are addresses,
    or with `fast` the values themselves.
    """

    param: int
    ingpa: int
    outgpa: int

    @property
    def code(self) -> int:
        return self.param & 0xFFFF

    @property
    def fast(self) -> bool:
        return bool(self.param & hv.FAST)

    @property
    def var_cnt(self) -> int:
        return self.param >> hv.VAR_SHIFT & hv.VAR_MASK

    @property
    def rep_cnt(self) -> int:
        return self.param >> hv.REP_COUNT_SHIFT & hv.REP_MASK

    @property
    def rep_idx(self) -> int:
        return self.param >> hv.REP_START_SHIFT & hv.REP_MASK

    @property
    def rep(self) -> bool:
        return bool(self.rep_cnt or self.rep_idx)


# A status (with the repetitions done), or None for userspace to answer.
Body = Callable[[VcpuX86, Hcall], int | None]


def kvm_hv_hypercall_enabled(vcpu: VcpuX86) -> bool:
    return vcpu.uses_hyperv()


def _decode(vcpu: VcpuX86) -> Hcall:
    gpr = vcpu.state.gpr
    if is_64_bit_mode(vcpu):
        return Hcall(gpr[RCX], gpr[RDX], gpr[R8])

    def pair(high: int, low: int) -> int:
        return (gpr[high] & MASK32) << 32 | gpr[low] & MASK32

    return Hcall(pair(RDX, RAX), pair(RBX, RCX), pair(RDI, RSI))


def kvm_hv_hypercall(vcpu: VcpuX86) -> int:
    """From user or real mode the instruction is undefined."""
    if get_cpl(vcpu) or not is_protmode(vcpu):
        return _undefined(vcpu)
    call = _decode(vcpu)
    trace("kvm_hv_hypercall", code=call.code, fast=call.fast, ingpa=call.ingpa, outgpa=call.outgpa)
    cpuid = vcpu.hv.cpuid
    row = HCALLS.get(call.code)
    if row is not None and cpuid.enforce and not row.allowed(cpuid):
        return _complete(vcpu, Status.ACCESS_DENIED)
    if call.param & hv.RESERVED:
        return _complete(vcpu, Status.INVALID_HYPERCALL_INPUT)
    if row is None:
        return _complete(vcpu, Status.INVALID_HYPERCALL_CODE)
    xmm = call.fast and call.code in XMM_FAST
    if xmm and cpuid.enforce and not cpuid.features & Feature.XMM_INPUT:
        return _undefined(vcpu)
    if not row.legal(call):
        return _complete(vcpu, Status.INVALID_HYPERCALL_INPUT)
    result = row.body(vcpu, call)
    return _exit_hcall(vcpu, call) if result is None else _complete(vcpu, result)


def _undefined(vcpu: VcpuX86) -> int:
    vcpu.cpu.inject_exception(UD_VECTOR)
    return 1


def _complete(vcpu: VcpuX86, result: int) -> int:
    gpr = vcpu.state.gpr
    if is_64_bit_mode(vcpu):
        gpr[RAX] = result
    else:
        gpr[RDX], gpr[RAX] = result >> 32, result & MASK32
    vcpu.stat.hypercalls += 1
    vcpu.cpu.advance()
    return 1


def _exit_hcall(vcpu: VcpuX86, call: Hcall) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_HYPERV
    exit_ = vcpu.run.hyperv
    exit_.type = uapi.KVM_EXIT_HYPERV_HCALL
    exit_.u.hcall.input = call.param
    exit_.u.hcall.params[0], exit_.u.hcall.params[1] = call.ingpa, call.outgpa
    vcpu.complete_userspace_io = partial(_answered, vcpu)
    return 0


def _answered(vcpu: VcpuX86) -> int:
    return _complete(vcpu, vcpu.run.hyperv.u.hcall.result)


# The calls.


def _long_spin_wait(vcpu: VcpuX86, call: Hcall) -> int:
    os.sched_yield()
    return Status.SUCCESS


def _post_message(vcpu: VcpuX86, call: Hcall) -> int | None:
    return None if vcpu.hv.synic.active else Status.INVALID_HYPERCALL_INPUT


def _signal_event(vcpu: VcpuX86, call: Hcall) -> int | None:
    """By an eventfd if the connection has one, else it is for userspace as a message is."""
    connection = call.ingpa
    if not call.fast:
        gpa = call.ingpa
        if gpa % 8 or vcpu.kvm.memslots.gpa_to_memslot(gpa) is None:
            return Status.INVALID_ALIGNMENT
        connection = int.from_bytes(vcpu.kvm.kvm_read_guest(gpa, 8), "little")
    if not connection & FLAG_NUMBER:
        if connection & ~uapi.KVM_HYPERV_CONN_ID_MASK:
            return Status.INVALID_HYPERCALL_INPUT
        eventfd = vcpu.kvm.hv.connections.get(connection)
        if eventfd is not None:
            eventfd.signal()
            return Status.SUCCESS
    return _post_message(vcpu, call)


def _send_ipi(vcpu: VcpuX86, call: Hcall) -> int:
    return hv_send_ipi(vcpu, call, _halves(vcpu))


def _flush(vcpu: VcpuX86, call: Hcall) -> int:
    """Everything is flushed, so all repetitions are done at once."""
    status = hv_flush_tlb(vcpu, call, _halves(vcpu))
    return status | call.rep_cnt << hv.REP_COUNT_SHIFT if status == Status.SUCCESS else status


def _debug_data(vcpu: VcpuX86, call: Hcall) -> int | None:
    return Status.INVALID_PARAMETER if call.fast else _debug(vcpu, call)


def _debug(vcpu: VcpuX86, call: Hcall) -> int | None:
    if not vcpu.hv.cpuid.syndbg:
        return Status.INVALID_HYPERCALL_CODE
    used = vcpu.kvm.hv.syndbg.options & hv.SYNDBG_USE_HCALLS
    return None if used else Status.OPERATION_DENIED


# Their legality: what counts may be given, and which CPUID allows them.


def _simple(call: Hcall) -> bool:
    return not call.rep and not call.var_cnt


def _not_repeated(call: Hcall) -> bool:
    return not call.rep


def _list(call: Hcall) -> bool:
    return bool(call.rep_cnt) and not call.rep_idx


def _list_of_few(call: Hcall) -> bool:
    return _list(call) and not call.var_cnt


def _any(call: Hcall) -> bool:
    return True


def _hints(*needed: Hint) -> Callable[[HvCpuid], bool]:
    return lambda cpuid: all(cpuid.hints & hint for hint in needed)


def _privilege(needed: Privilege) -> Callable[[HvCpuid], bool]:
    return lambda cpuid: bool(cpuid.privileges & needed)


def _spins(cpuid: HvCpuid) -> bool:
    return bool(cpuid.spinlock_retries) and cpuid.spinlock_retries != NO_RETRY_NOTICE


def _debugging(cpuid: HvCpuid) -> bool:
    """Without the debugger the code is unknown, which is another status."""
    return not cpuid.syndbg or bool(cpuid.privileges & Privilege.DEBUGGING)


@dataclass(frozen=True, slots=True)
class Row:
    """One hypercall."""

    body: Body
    legal: Callable[[Hcall], bool]
    allowed: Callable[[HvCpuid], bool]


FLUSH, IPI, EX = Hint.REMOTE_TLB_FLUSH, Hint.CLUSTER_IPI, Hint.EX_PROCESSOR_MASKS
HCALLS: dict[int, Row] = {
    Code.FLUSH_SPACE: Row(_flush, _simple, _hints(FLUSH)),
    Code.FLUSH_LIST: Row(_flush, _list_of_few, _hints(FLUSH)),
    Code.FLUSH_SPACE_EX: Row(_flush, _not_repeated, _hints(FLUSH, EX)),
    Code.FLUSH_LIST_EX: Row(_flush, _list, _hints(FLUSH, EX)),
    Code.SEND_IPI: Row(_send_ipi, _simple, _hints(IPI)),
    Code.SEND_IPI_EX: Row(_send_ipi, _not_repeated, _hints(IPI, EX)),
    Code.NOTIFY_LONG_SPIN_WAIT: Row(_long_spin_wait, _simple, _spins),
    Code.POST_MESSAGE: Row(_post_message, _simple, _privilege(Privilege.POST_MESSAGES)),
    Code.SIGNAL_EVENT: Row(_signal_event, _simple, _privilege(Privilege.SIGNAL_EVENTS)),
    Code.POST_DEBUG_DATA: Row(_debug_data, _any, _debugging),
    Code.RETRIEVE_DEBUG_DATA: Row(_debug_data, _any, _debugging),
    Code.RESET_DEBUG_SESSION: Row(_debug, _any, _debugging),
}
