"""What is counted on x86: `kvm_vm_stats_desc` and `kvm_vcpu_stats_desc` of arch/x86/kvm/x86.c, then
what Linux does not have.

Linux's names come first, in its order. Where a software processor has nothing of the kind (shadow
pages, halt polling, the host's L1D and FPU) they stay 0; docs/stat.md says which.
What native code counts is in the vCPU's `State` and is brought here when its thread is in Python.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_uint64
from typing import TYPE_CHECKING, Annotated

from anykvm.kvm.binary_stats import (
    Boolean,
    Counter,
    Instant,
    KvmVcpuStatGeneric,
    KvmVmStatGeneric,
    Peak,
    StatsDesc,
    TimeNsec,
    kvm_stats,
    log_hist_update,
)
from anykvm.kvm.memslots import KvmMemorySlot
from anykvm.uapi import kvm as uapi
from anykvm.uapi import names

if TYPE_CHECKING:
    from anykvm.x86.kvm_host import KvmX86, VcpuX86

EXIT_REASONS = max(names.EXIT_REASONS) + 2  # the last bucket is for what has no name
ByExitReason = Annotated[
    "ctypes.Array[c_uint64]",
    StatsDesc(uapi.KVM_STATS_TYPE_LINEAR_HIST, size=EXIT_REASONS, bucket_size=1),
]
NSEC_PER_SEC = 1_000_000_000


@kvm_stats
class KvmVmStat(KvmVmStatGeneric):
    """struct kvm_vm_stat, then the translator's."""

    mmu_shadow_zapped: Counter
    mmu_pte_write: Counter
    mmu_pde_zapped: Counter
    mmu_flooded: Counter
    mmu_recycled: Counter
    mmu_cache_miss: Counter
    mmu_unsync: Instant
    pages_4k: Instant
    pages_2m: Instant
    pages_1g: Instant
    nx_lpage_splits: Instant
    max_mmu_rmap_size: Peak
    max_mmu_page_hash_collisions: Peak

    units_translated: Counter
    instructions_translated: Counter
    translating_ns: TimeNsec
    handlers_compiled: Counter
    handlers_loaded: Counter
    compiling_ns: TimeNsec


@kvm_stats
class KvmVcpuStat(KvmVcpuStatGeneric):
    """struct kvm_vcpu_stat, then the processor's; bucket n of `userspace_exits` counts returns from
    KVM_RUN with exit reason n.
    """

    pf_taken: Counter
    pf_fixed: Counter
    pf_emulate: Counter
    pf_spurious: Counter
    pf_fast: Counter
    pf_mmio_spte_created: Counter
    pf_guest: Counter
    tlb_flush: Counter
    invlpg: Counter
    exits: Counter
    io_exits: Counter
    mmio_exits: Counter
    signal_exits: Counter
    irq_window_exits: Counter
    nmi_window_exits: Counter
    l1d_flush: Counter
    halt_exits: Counter
    request_irq_exits: Counter
    irq_exits: Counter
    host_state_reload: Counter
    fpu_reload: Counter
    insn_emulation: Counter
    insn_emulation_fail: Counter
    hypercalls: Counter
    irq_injections: Counter
    nmi_injections: Counter
    req_event: Counter
    nested_run: Counter
    directed_yield_attempted: Counter
    directed_yield_successful: Counter
    preemption_reported: Counter
    preemption_other: Counter
    guest_mode: Boolean
    notify_window_exits: Counter

    instructions: Counter
    exceptions: Counter
    userspace_exits: ByExitReason


# What native code counts, and where in the State.
PUBLISHED = {
    "instructions": "insn_count",
    "exceptions": "count_exception",
    "pf_taken": "count_tlb_fill",
    "pf_fixed": "count_tlb_filled",
    "pf_guest": "count_page_fault",
    "tlb_flush": "count_flush",
    "invlpg": "count_invlpg",
    "insn_emulation": "count_assist",
    "nested_run": "count_nested_run",
}


def publish_vcpu(vcpu: VcpuX86) -> None:
    """Bring in what native code has counted. On the vCPU's own thread."""
    for counter, field in PUBLISHED.items():
        setattr(vcpu.stat, counter, getattr(vcpu.state, field))
    vcpu.stat.guest_mode = vcpu.cpu.svm.guest_mode


def count_userspace_exit(vcpu: VcpuX86) -> None:
    """KVM_RUN returns. Its exit reason is in memory that userspace may be writing to."""
    vcpu.stat.userspace_exits[min(vcpu.run.exit_reason, EXIT_REASONS - 1)] += 1


@contextmanager
def waiting(vcpu: VcpuX86) -> Iterator[None]:
    """A vCPU sleeps inside: `kvm_vcpu_block` and what `kvm_vcpu_halt` makes of the time."""
    stat = vcpu.stat
    publish_vcpu(vcpu)
    stat.blocking = 1
    began = time.monotonic_ns()
    try:
        yield
    finally:
        passed = time.monotonic_ns() - began
        stat.blocking = 0
        stat.halt_wait_ns += passed
        log_hist_update(stat.halt_wait_hist, passed)


def count_mapping(kvm: KvmX86, old: KvmMemorySlot | None, new: KvmMemorySlot | None) -> None:
    """A slot came, went or changed, with every processor stopped and its TLB emptied."""
    stat = kvm.stat
    stat.remote_tlb_flush_requests += 1
    stat.remote_tlb_flush += 1
    stat.pages_4k += (new.npages if new else 0) - (old.npages if old else 0)


def publish_vm(kvm: KvmX86) -> None:
    """Bring in what the translator has counted."""
    stat, counted = kvm.stat, kvm.engine.statistics()
    stat.units_translated = int(counted["units_translated"])
    stat.instructions_translated = int(counted["instructions_translated"])
    stat.translating_ns = int(counted["seconds_translating"] * NSEC_PER_SEC)
    stat.handlers_compiled = int(counted["handlers_compiled"])
    stat.handlers_loaded = int(counted["handlers_loaded"])
    stat.compiling_ns = int(counted["seconds_compiling"] * NSEC_PER_SEC)
