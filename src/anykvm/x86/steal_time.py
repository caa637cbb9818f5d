"""Steal time: how long a vCPU was ready to run and its thread was not, in a record that the guest
reads. Documentation/virt/kvm/x86/msr.rst, MSR_KVM_STEAL_TIME; `record_steal_time` in
arch/x86/kvm/x86.c.

The time is the host scheduler's (`run_delay` of schedstat). A vCPU that userspace has called back
(EINTR) is marked as preempted until it runs again: other vCPUs then leave a TLB flush to be done
for them in the record, instead of waiting for it to take an interrupt.
"""

from __future__ import annotations

import struct

from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.kvm_para import KVM_MSR_ENABLED, MSR_KVM_STEAL_TIME, KvmFeature
from anykvm.x86.msrs import Msr, enter
from anykvm.x86.sched_info import sched_info_on

KVM_STEAL_RESERVED_MASK = 0x3E  # the record is aligned to its 64 bytes
KVM_VCPU_PREEMPTED, KVM_VCPU_FLUSH_TLB = 1, 2
RECORD = struct.Struct("<QIIB")  # struct kvm_steal_time: steal, version, flags, preempted
VERSION, PREEMPTED = 8, 16  # offsets
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def _write_steal_time(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if not sched_info_on() or value & KVM_STEAL_RESERVED_MASK:
        return False
    vcpu.msrs[MSR_KVM_STEAL_TIME] = value
    if value & KVM_MSR_ENABLED:
        vcpu.steal_record_due = True
        vcpu.requests.add(Request.STEAL_UPDATE)
    return True


enter(
    MSR_KVM_STEAL_TIME,
    Msr(
        "kvm_steal_time",
        lambda vcpu: vcpu.msrs.get(MSR_KVM_STEAL_TIME, 0),
        _write_steal_time,
        pv=KvmFeature.STEAL_TIME,
    ),
)


def _record(vcpu: VcpuX86) -> int | None:
    """Where the guest keeps its record: memory that can be written."""
    msr = vcpu.msrs.get(MSR_KVM_STEAL_TIME, 0)
    if not msr & KVM_MSR_ENABLED:
        return None
    gpa = msr & ~(KVM_STEAL_RESERVED_MASK | KVM_MSR_ENABLED)
    slot = vcpu.kvm.memslots.gpa_to_memslot(gpa)
    return gpa if slot is not None and not slot.readonly else None


def steal_time_sched_in(vcpu: VcpuX86) -> None:
    """The vCPU's thread is here again, and may have waited."""
    if vcpu.msrs.get(MSR_KVM_STEAL_TIME, 0) & KVM_MSR_ENABLED:
        vcpu.requests.add(Request.STEAL_UPDATE)


def record_steal_time(vcpu: VcpuX86) -> None:
    """Add what has passed, take the mark of preemption away, and do what was asked meanwhile."""
    gpa, kvm = _record(vcpu), vcpu.kvm
    if gpa is None:
        return
    passed = vcpu.run_delay.passed()
    if not passed and not vcpu.steal_record_due:
        return
    vcpu.steal_record_due = False
    steal, version, _, _ = RECORD.unpack(kvm.kvm_read_guest(gpa, RECORD.size))
    version = (version | 1) + (version & 1) * 2  # odd, and not the one that was there
    kvm.kvm_write_guest(gpa + VERSION, struct.pack("<I", version & MASK32))
    # In one step: a vCPU that asks for a flush sees that this one runs again.
    asked = vcpu.cpu.exchange(gpa + PREEMPTED, 0)
    if asked & KVM_VCPU_FLUSH_TLB and vcpu.pv_cpuid.has(KvmFeature.PV_TLB_FLUSH):
        vcpu.cpu.flush_tlb()
    kvm.kvm_write_guest(gpa, struct.pack("<Q", steal + passed & MASK64))
    kvm.kvm_write_guest(gpa + VERSION, struct.pack("<I", version + 1 & MASK32))


def steal_time_set_preempted(vcpu: VcpuX86) -> None:
    """Userspace has called the vCPU back between two instructions."""
    gpa = _record(vcpu)
    between = vcpu.complete_userspace_io is None and not vcpu.cpu.mid_instruction()
    vcpu.stat.preemption_reported += between
    vcpu.stat.preemption_other += not between
    if gpa is not None and between:
        vcpu.steal_record_due = True
        vcpu.kvm.kvm_write_guest(gpa + PREEMPTED, bytes((KVM_VCPU_PREEMPTED,)))
