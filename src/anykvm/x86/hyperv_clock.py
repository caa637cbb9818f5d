"""Hyper-V's time: the partition's reference counter, in units of 100 ns, and the page with which a
guest computes it from its TSC. TLFS, chapter 12; `kvm_hv_setup_tsc_page` of hyperv.c.
"""

from __future__ import annotations

from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_state import KvmHv, TscPageStatus
from anykvm.x86.kvm_host import KvmX86, VcpuX86

MASK64 = (1 << 64) - 1


def get_time_ref_counter(kvm: KvmX86) -> int:
    """By the page if there is one, so that both ways agree to the tick."""
    if kvm.hv.tsc_page_status is not TscPageStatus.SET:
        return kvm.clock.now() // 100
    first = kvm.x86_vcpus()[0]
    return (first.guest_tsc() * kvm.hv.tsc_scale >> 64) + kvm.hv.tsc_offset & MASK64


def _parameters(vcpu: VcpuX86) -> tuple[int, int]:
    """(scale, offset): `(tsc * scale >> 64) + offset` is the time."""
    at, ns, mul, shift = vcpu.pvclock.parameters(vcpu.state.tsc_ratio, vcpu.l1_tsc_offset)
    scale = (mul << 32 + shift) // 100
    return scale, ns // 100 - (at * scale >> 64)


def _update_unsafe(hv_: KvmHv) -> bool:
    """A guest that emulates its TSC since a migration wants to be asked before it changes."""
    guest_changed = hv_.tsc_page_status is TscPageStatus.GUEST_CHANGED
    return not guest_changed and bool(hv_.tsc_emulation_control)


def kvm_hv_setup_tsc_page(vcpu: VcpuX86) -> None:
    """The clock of the first vCPU has changed, or the page's register: write it if need be."""
    kvm, state = vcpu.kvm, vcpu.kvm.hv
    with state.lock:
        changed = _parameters(vcpu) != (state.tsc_scale, state.tsc_offset)
        if state.tsc_page_status is TscPageStatus.SET and changed and not _update_unsafe(state):
            state.tsc_page_status = TscPageStatus.HOST_CHANGED
        due = (TscPageStatus.GUEST_CHANGED, TscPageStatus.HOST_CHANGED)
        if state.tsc_page_status not in due or not state.tsc_page & hv.ENABLE:
            return
        gpa = state.tsc_page & hv.PAGE_MASK
        if not kvm.writable(gpa):
            state.tsc_page_status = TscPageStatus.BROKEN
            return
        sequence, scale, offset = hv.TSC_PAGE.unpack(kvm.kvm_read_guest(gpa, hv.TSC_PAGE.size))
        if sequence and _update_unsafe(state):
            state.tsc_scale, state.tsc_offset = scale, offset
        else:
            _write(vcpu, gpa, sequence)
        state.tsc_page_status = TscPageStatus.SET


def _write(vcpu: VcpuX86, gpa: int, sequence: int) -> None:
    """While the sequence is zero, a guest asks the MSR."""
    kvm, state = vcpu.kvm, vcpu.kvm.hv
    kvm.kvm_write_guest(gpa, bytes(4))
    state.tsc_scale, state.tsc_offset = _parameters(vcpu)
    page = hv.TSC_PAGE.pack(0, state.tsc_scale, state.tsc_offset)
    kvm.kvm_write_guest(gpa + 4, page[4:])
    following = sequence + 1 & 0xFFFFFFFF
    following = 1 if following in (0, 0xFFFFFFFF) else following
    kvm.kvm_write_guest(gpa, following.to_bytes(4, "little"))
