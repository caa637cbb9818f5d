"""Which mode and privilege a vCPU's guest is in (SDM vol. 3, 2.2; `is_64_bit_mode` of x86.h)."""

from __future__ import annotations

from anykvm.cpu.state import Flag, Seg
from anykvm.x86.kvm_host import VcpuX86

CR0_PE, EFER_LMA, CS_LONG = 1, 1 << 10, 1 << 13


def is_protmode(vcpu: VcpuX86) -> bool:
    return bool(vcpu.state.cr0 & CR0_PE)


def is_long_mode(vcpu: VcpuX86) -> bool:
    return bool(vcpu.state.efer & EFER_LMA)


def is_64_bit_mode(vcpu: VcpuX86) -> bool:
    state = vcpu.state
    return bool(state.efer & EFER_LMA and state.seg[Seg.CS].attr & CS_LONG)


def get_cpl(vcpu: VcpuX86) -> int:
    if not is_protmode(vcpu):
        return 0
    return 3 if vcpu.cpu.rflags & Flag.VM else vcpu.state.seg[Seg.SS].attr >> 5 & 3
