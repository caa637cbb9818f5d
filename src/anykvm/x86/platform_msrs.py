"""MSRs that say what the platform has and switch its features: IA32_MISC_ENABLE, PLATFORM_INFO,
MISC_FEATURES_ENABLES, IA32_POWER_CTL, IA32_XSS (SDM vol. 4; arch/x86/kvm/x86.c,
`kvm_set_msr_common`).
"""

from __future__ import annotations

from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import XSAVES
from anykvm.x86.kvm_host import MISC_ENABLE_MWAIT, MSR_IA32_MISC_ENABLE, VcpuX86
from anykvm.x86.msrs import Msr, enter, stored

MSR_PLATFORM_INFO, PLATFORM_INFO_CPUID_FAULT = 0xCE, 1 << 31
MSR_MISC_FEATURES_ENABLES, MISC_FEATURES_CPUID_FAULT = 0x140, 1
MSR_IA32_POWER_CTL, MSR_IA32_XSS = 0x1FC, 0xDA0
MISC_ENABLE_FAST_STRING, MISC_ENABLE_EMON = 1, 1 << 7
MISC_ENABLE_PMU_READ_ONLY = 1 << 11 | 1 << 12  # neither BTS nor PEBS
MISC_ENABLE_RESET = MISC_ENABLE_FAST_STRING | MISC_ENABLE_PMU_READ_ONLY


def _read_misc_enable(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_IA32_MISC_ENABLE, MISC_ENABLE_RESET)


def _write_misc_enable(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """Where the VMM has disabled the quirk that MWAIT's bit does nothing, CPUID follows it."""
    before = _read_misc_enable(vcpu)
    if not host:
        if (before ^ value) & MISC_ENABLE_PMU_READ_ONLY:
            return False
        value = value & ~MISC_ENABLE_EMON | before & MISC_ENABLE_EMON
    follows = not vcpu.kvm.has_quirk(uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
    follows = follows and bool((before ^ value) & MISC_ENABLE_MWAIT)
    if follows and not vcpu.cpuid.has("sse3"):
        return False
    vcpu.msrs[MSR_IA32_MISC_ENABLE] = value
    if follows:
        vcpu.update_cpuid_runtime()
    return True


def _read_platform_info(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_PLATFORM_INFO, PLATFORM_INFO_CPUID_FAULT)


def _write_platform_info(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """CPUID faulting cannot be taken from a guest that uses it."""
    used = vcpu.msrs.get(MSR_MISC_FEATURES_ENABLES, 0) & MISC_FEATURES_CPUID_FAULT
    if not host or (used and not value & PLATFORM_INFO_CPUID_FAULT):
        return False
    vcpu.msrs[MSR_PLATFORM_INFO] = value
    return True


def _has_xsaves(vcpu: VcpuX86, host: bool) -> bool:
    leaf = vcpu.cpuid.find(0xD, 1)
    return host or (leaf is not None and bool(leaf.eax & XSAVES))


def _guest_reads_platform_info(vcpu: VcpuX86) -> bool:
    return vcpu.kvm.guest_can_read_msr_platform_info


def _read_misc_features(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_MISC_FEATURES_ENABLES, 0)


def _write_misc_features(vcpu: VcpuX86, value: int, host: bool) -> bool:
    can_fault = _read_platform_info(vcpu) & PLATFORM_INFO_CPUID_FAULT
    if value & ~MISC_FEATURES_CPUID_FAULT or (value and not can_fault):
        return False
    vcpu.msrs[MSR_MISC_FEATURES_ENABLES] = value
    return True


stored(MSR_IA32_POWER_CTL, "power_ctl")
# No state is managed by XSAVES alone.
enter(
    MSR_IA32_XSS,
    Msr("xss", lambda vcpu: 0, lambda vcpu, value, host: not value, gate=_has_xsaves),
)
enter(MSR_IA32_MISC_ENABLE, Msr("misc_enable", _read_misc_enable, _write_misc_enable))
enter(
    MSR_PLATFORM_INFO,
    Msr(
        "platform_info",
        _read_platform_info,
        _write_platform_info,
        guest_reads=_guest_reads_platform_info,
    ),
)
enter(
    MSR_MISC_FEATURES_ENABLES,
    Msr("misc_features_enables", _read_misc_features, _write_misc_features),
)
