"""Hypercalls: VMCALL or VMMCALL, a number in RAX, arguments in RBX, RCX, RDX and RSI, the result in
RAX.

Documentation/virt/kvm/x86/hypercalls.rst; `kvm_emulate_hypercall` in arch/x86/kvm/x86.c. Which of
the two instructions the processor has follows from the vendor that the guest's CPUID names; the
other is rewritten to it, as KVM does unless KVM_X86_QUIRK_FIX_HYPERCALL_INSN is disabled.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from anykvm.fs.trace import trace
from anykvm.uapi import kvm as uapi
from anykvm.x86 import kvm_para as para
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.hypercall_insn import VMCALL, VMMCALL, native_hypercall
from anykvm.x86.hyperv_hcall import kvm_hv_hypercall, kvm_hv_hypercall_enabled
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.kvm_para import KvmFeature
from anykvm.x86.lapic_regs import LapicIrq
from anykvm.x86.mode import get_cpl, is_64_bit_mode
from anykvm.x86.xen import kvm_xen_hypercall

UD_VECTOR, GP_VECTOR = 6, 13
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
PAGE_SIZE = 4096
CLOCK_PAIRING = struct.Struct("<qqQI36x")  # struct kvm_clock_pairing: sec, nsec, tsc, flags
NSEC_PER_SEC = 1_000_000_000
CLOCK_SAMPLES = 3
EXIT_HYPERCALL_VALID_MASK = 1 << para.KVM_HC_MAP_GPA_RANGE


class Call(NamedTuple):
    """One hypercall's arguments; `wide` is whether they have 64 bits."""

    args: tuple[int, int, int, int]
    wide: bool


def handle_vmcall(vcpu: VcpuX86) -> int:
    if native_hypercall(vcpu) == VMCALL:
        return kvm_emulate_hypercall(vcpu)
    if get_cpl(vcpu):
        vcpu.cpu.inject_exception(GP_VECTOR, 0)
        return 1
    return _fix_hypercall(vcpu)


def handle_vmmcall(vcpu: VcpuX86) -> int:
    if native_hypercall(vcpu) == VMMCALL:
        return kvm_emulate_hypercall(vcpu)
    return _fix_hypercall(vcpu)


def _fix_hypercall(vcpu: VcpuX86) -> int:
    """The other vendor's instruction: it is rewritten and executed again, or undefined."""
    if vcpu.kvm.disabled_quirks & uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN:
        vcpu.cpu.inject_exception(UD_VECTOR)
    else:
        vcpu.cpu.patch_instruction(native_hypercall(vcpu))
    return 1


def kvm_emulate_hypercall(vcpu: VcpuX86) -> int:
    if vcpu.kvm.xen_hypercall_enabled():
        return kvm_xen_hypercall(vcpu)
    if kvm_hv_hypercall_enabled(vcpu):
        return kvm_hv_hypercall(vcpu)
    gpr, wide = vcpu.state.gpr, is_64_bit_mode(vcpu)
    mask = MASK64 if wide else MASK32
    number = gpr[RAX] & mask
    a0, a1, a2, a3 = (gpr[n] & mask for n in (RBX, RCX, RDX, RSI))
    trace("kvm_hypercall", nr=number, args=(a0, a1, a2, a3))
    if get_cpl(vcpu):
        return complete_hypercall(vcpu, -para.KVM_EPERM)
    body = HYPERCALLS.get(number)
    result = body(vcpu, Call((a0, a1, a2, a3), wide)) if body is not None else -para.KVM_ENOSYS
    return 0 if result is None else complete_hypercall(vcpu, result)


def complete_hypercall(vcpu: VcpuX86, result: int) -> int:
    """The result, as wide as the caller's registers, and on behind the instruction."""
    vcpu.stat.hypercalls += 1
    vcpu.state.gpr[RAX] = result & (MASK64 if is_64_bit_mode(vcpu) else MASK32)
    vcpu.cpu.advance()
    return 1


# The calls: a result, or None for one that userspace answers.


def _vapic_poll_irq(vcpu: VcpuX86, call: Call) -> int:
    """To leave the guest was all that was asked."""
    return 0


def _kick_cpu(vcpu: VcpuX86, call: Call) -> int:
    """Wake a processor that has halted in a lock's slow path; its APIC ID is the second argument.

    The message's delivery mode is one that hardware no longer uses.
    """
    if not vcpu.pv_cpuid.has(KvmFeature.PV_UNHALT):
        return -para.KVM_ENOSYS
    dest = call.args[1] & MASK32
    vcpu.kvm.irqchip.deliver(
        LapicIrq(
            vector=0,
            delivery_mode=reg.APIC_DM_REMRD,
            dest_mode=reg.APIC_DEST_PHYSICAL,
            dest_id=dest,
        )
    )
    os.sched_yield()
    return 0


def _clock_pairing(vcpu: VcpuX86, call: Call) -> int:
    """The time of day and the guest's TSC at one moment, to the address in the first argument."""
    gpa, kind = call.args[:2]
    if kind != para.KVM_CLOCK_PAIRING_WALLCLOCK:
        return -para.KVM_EOPNOTSUPP
    if not vcpu.kvm.writable(gpa) or not vcpu.kvm.writable(gpa + CLOCK_PAIRING.size - 1):
        return -para.KVM_EFAULT
    _, now, tsc = min(_walltime_and_tsc(vcpu) for _ in range(CLOCK_SAMPLES))
    seconds, nanoseconds = divmod(now, NSEC_PER_SEC)
    vcpu.kvm.kvm_write_guest(gpa, CLOCK_PAIRING.pack(seconds, nanoseconds, tsc, 0))
    return 0


def _walltime_and_tsc(vcpu: VcpuX86) -> tuple[int, int, int]:
    """The time of day and a TSC near to it; first how far apart they may be."""
    before, now, after = vcpu.guest_tsc(), time.time_ns(), vcpu.guest_tsc()
    return after - before, now, (before + after) // 2


def _send_ipi(vcpu: VcpuX86, call: Call) -> int:
    """`kvm_pv_send_ipi`: two words of a bitmap of APIC IDs that begins with the third argument;
    how many processors took the interrupt.
    """
    if not vcpu.pv_cpuid.has(KvmFeature.PV_SEND_IPI):
        return -para.KVM_ENOSYS
    low, high, first, icr = call.args
    if icr & (reg.APIC_DEST_LOGICAL << 11 | 3 << 18):
        return -para.KVM_EINVAL
    if vcpu.apic is None:
        return -para.KVM_EOPNOTSUPP
    bitmap = low | high << (64 if call.wide else 32)
    irq = LapicIrq(
        vector=icr & reg.APIC_VECTOR_MASK,
        delivery_mode=icr >> 8 & 7,
        level=int(bool(icr & reg.APIC_INT_ASSERT)),
        trig_mode=icr >> 15 & 1,
    )
    return vcpu.kvm.irqchip.deliver_to(bitmap, first & MASK32, irq)


def _sched_yield(vcpu: VcpuX86, call: Call) -> int:
    if not vcpu.pv_cpuid.has(KvmFeature.PV_SCHED_YIELD):
        return -para.KVM_ENOSYS
    vcpu.stat.directed_yield_attempted += 1
    os.sched_yield()
    return 0


def _map_gpa_range(vcpu: VcpuX86, call: Call) -> int | None:
    """Userspace decides, if it asked to (KVM_CAP_EXIT_HYPERCALL)."""
    if not vcpu.kvm.hypercall_exit_enabled & 1 << para.KVM_HC_MAP_GPA_RANGE:
        return -para.KVM_ENOSYS
    gpa, npages, attributes = call.args[:3]
    wraps = (gpa // PAGE_SIZE + npages & MASK64) <= gpa // PAGE_SIZE
    if gpa % PAGE_SIZE or not npages or wraps:
        return -para.KVM_EINVAL
    vcpu.run.exit_reason = uapi.KVM_EXIT_HYPERCALL
    exit_ = vcpu.run.hypercall
    exit_.nr, exit_.longmode = para.KVM_HC_MAP_GPA_RANGE, call.wide
    for n, value in enumerate((gpa, npages, attributes)):
        exit_.args[n] = value
    vcpu.complete_userspace_io = partial(_answered, vcpu)
    return None


def _answered(vcpu: VcpuX86) -> int:
    return complete_hypercall(vcpu, vcpu.run.hypercall.ret)


HYPERCALLS: dict[int, Callable[[VcpuX86, Call], int | None]] = {
    para.KVM_HC_VAPIC_POLL_IRQ: _vapic_poll_irq,
    para.KVM_HC_KICK_CPU: _kick_cpu,
    para.KVM_HC_CLOCK_PAIRING: _clock_pairing,
    para.KVM_HC_SEND_IPI: _send_ipi,
    para.KVM_HC_SCHED_YIELD: _sched_yield,
    para.KVM_HC_MAP_GPA_RANGE: _map_gpa_range,
}
