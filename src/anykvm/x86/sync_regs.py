"""Registers that travel in kvm_run instead of by ioctls of their own (KVM_CAP_SYNC_REGS, api.rst
6.74).
"""

from __future__ import annotations

from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.regs import get_regs, get_sregs, set_regs, set_sregs
from anykvm.x86.vcpu_events import get_vcpu_events, set_vcpu_events


def store_regs(vcpu: VcpuX86) -> None:
    """Fill the parts of `kvm_run.s.regs` that `kvm_valid_regs` asks for."""
    wanted, synced = vcpu.run.kvm_valid_regs, vcpu.run.s.regs
    if wanted & uapi.KVM_SYNC_X86_REGS:
        get_regs(vcpu, synced.regs)
    if wanted & uapi.KVM_SYNC_X86_SREGS:
        get_sregs(vcpu, synced.sregs)
    if wanted & uapi.KVM_SYNC_X86_EVENTS:
        get_vcpu_events(vcpu, synced.events)


def sync_regs(vcpu: VcpuX86) -> None:
    """Take over the parts that userspace changed: `kvm_dirty_regs`."""
    dirty, synced = vcpu.run.kvm_dirty_regs, vcpu.run.s.regs
    if dirty & ~uapi.KVM_SYNC_X86_VALID_FIELDS:
        raise fail(EINVAL, f"kvm_dirty_regs is {dirty:#x}")
    if dirty & uapi.KVM_SYNC_X86_REGS:
        set_regs(vcpu, synced.regs)
    if dirty & uapi.KVM_SYNC_X86_SREGS:
        set_sregs(vcpu, synced.sregs)
    if dirty & uapi.KVM_SYNC_X86_EVENTS:
        set_vcpu_events(vcpu, synced.events)
    vcpu.run.kvm_dirty_regs = 0
