"""Capabilities of a VM about the processor that it gives its guests: quirks, exits, identifiers,
halt polling, machine-wide features. `capability.py` has the others.

arch/x86/kvm/x86.c, `kvm_vm_ioctl_check_extension` and `kvm_vm_ioctl_enable_cap`; api.rst 7 and 8.
What Linux has and this does not, and so is 0: notify VM exits (the processor is never stuck without
an interrupt window), a MAXPHYADDR below the host's, SGX, memory encryption.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.kvm_main import KVM_MAX_VCPUS
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import ADDRESS_SPACES, KvmX86

QUIRKS = (
    uapi.KVM_X86_QUIRK_LINT0_REENABLED
    | uapi.KVM_X86_QUIRK_CD_NW_CLEARED  # of caches, which memory here has none of
    | uapi.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    | uapi.KVM_X86_QUIRK_OUT_7E_INC_RIP
    | uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT
    | uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
    | uapi.KVM_X86_QUIRK_MWAIT_NEVER_UD_FAULTS
)
# PAUSE never exits. MWAIT cannot wait for memory, and there are no C states to be read.
DISABLED_EXITS = uapi.KVM_X86_DISABLE_EXITS_HLT | uapi.KVM_X86_DISABLE_EXITS_PAUSE
BUS_LOCK = uapi.KVM_BUS_LOCK_DETECTION_OFF | uapi.KVM_BUS_LOCK_DETECTION_EXIT

PROCESSOR_CAPS: dict[int, int] = {
    uapi.KVM_CAP_MMU_SHADOW_CACHE_CONTROL: 1,
    uapi.KVM_CAP_PCI_SEGMENT: 1,
    uapi.KVM_CAP_INTR_SHADOW: 1,
    uapi.KVM_CAP_ENABLE_CAP: 1,
    uapi.KVM_CAP_DISABLE_QUIRKS: 1,
    uapi.KVM_CAP_DISABLE_QUIRKS2: QUIRKS,
    uapi.KVM_CAP_X86_DISABLE_EXITS: DISABLED_EXITS,
    uapi.KVM_CAP_X86_SMM: 1,
    uapi.KVM_CAP_MULTI_ADDRESS_SPACE: ADDRESS_SPACES,
    uapi.KVM_CAP_TSC_CONTROL: 1,
    uapi.KVM_CAP_VM_TSC_CONTROL: 1,
    uapi.KVM_CAP_HALT_POLL: 1,
    uapi.KVM_CAP_MSR_PLATFORM_INFO: 1,
    uapi.KVM_CAP_PMU_EVENT_FILTER: 1,
    uapi.KVM_CAP_PMU_CAPABILITY: uapi.KVM_PMU_CAP_DISABLE,
    uapi.KVM_CAP_LAST_CPU: 1,
    uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE: 1,
    uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: 1,
    uapi.KVM_CAP_X86_BUS_LOCK_EXIT: BUS_LOCK,
    uapi.KVM_CAP_MAX_VCPU_ID: KVM_MAX_VCPUS,
}

Enable = Callable[[KvmX86, tuple[int, ...]], None]


def within(value: int, mask: int, what: str) -> int:
    """The value, or EINVAL for bits that the mask does not have."""
    if value & ~mask:
        raise fail(EINVAL, f"{what}: {value:#x} has unknown bits")
    return value


def _disable_quirks(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """In place of those disabled before; the old call lets through what it does not know."""
    kvm.disabled_quirks = args[0] & QUIRKS


def _disable_quirks2(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.disabled_quirks = within(args[0], QUIRKS, "KVM_CAP_DISABLE_QUIRKS2")


def _disable_exits(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """Those that are defined but not there are let pass, as Linux does."""
    valid = uapi.KVM_X86_DISABLE_VALID_EXITS
    kvm.disabled_exits |= within(args[0], valid, "KVM_CAP_X86_DISABLE_EXITS") & DISABLED_EXITS


def _msr_platform_info(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.guest_can_read_msr_platform_info = bool(args[0])


def _exit_on_emulation_failure(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.exit_on_emulation_error = bool(within(args[0], 1, "KVM_CAP_EXIT_ON_EMULATION_FAILURE"))


def _no_vcpus(kvm: KvmX86, what: str) -> None:
    if kvm.vcpus:
        raise fail(EINVAL, f"{what} must come before any vCPU")


def _pmu_capability(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """There is no PMU to disable."""
    within(args[0], uapi.KVM_PMU_CAP_DISABLE, "KVM_CAP_PMU_CAPABILITY")
    with kvm.lock:
        _no_vcpus(kvm, "KVM_CAP_PMU_CAPABILITY")


def _disable_nx_huge_pages(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """No guest can harm this host by executable large pages, and none are forbidden."""
    within(args[0], 0, "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES")
    with kvm.lock:
        _no_vcpus(kvm, "KVM_CAP_VM_DISABLE_NX_HUGE_PAGES")


def _max_vcpu_id(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """Once, and before any vCPU; the same limit again is no error."""
    if args[0] > KVM_MAX_VCPUS:
        raise fail(EINVAL, f"vCPU ids end below {KVM_MAX_VCPUS}")
    with kvm.lock:
        if kvm.max_vcpu_ids not in (0, args[0]):
            raise fail(EINVAL, f"vCPU ids are limited to {kvm.max_vcpu_ids} already")
        kvm.max_vcpu_ids = args[0]


def _halt_poll(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """For how many nanoseconds a halted vCPU looks for work before it sleeps."""
    kvm.max_halt_poll_ns = within(args[0], (1 << 32) - 1, "KVM_CAP_HALT_POLL")


def _bus_lock_exit(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """OFF changes nothing once it is on: so it is on Linux."""
    mode = within(args[0], BUS_LOCK, "KVM_CAP_X86_BUS_LOCK_EXIT")
    if mode == BUS_LOCK:
        raise fail(EINVAL, "bus locks cannot both exit and not exit")
    if mode & uapi.KVM_BUS_LOCK_DETECTION_EXIT:
        kvm.bus_lock_detection_enabled = True
        for vcpu in kvm.x86_vcpus():
            vcpu.state.bus_lock_exits = 1


PROCESSOR_ENABLE: dict[int, Enable] = {
    uapi.KVM_CAP_DISABLE_QUIRKS: _disable_quirks,
    uapi.KVM_CAP_DISABLE_QUIRKS2: _disable_quirks2,
    uapi.KVM_CAP_X86_DISABLE_EXITS: _disable_exits,
    uapi.KVM_CAP_MSR_PLATFORM_INFO: _msr_platform_info,
    uapi.KVM_CAP_EXIT_ON_EMULATION_FAILURE: _exit_on_emulation_failure,
    uapi.KVM_CAP_PMU_CAPABILITY: _pmu_capability,
    uapi.KVM_CAP_VM_DISABLE_NX_HUGE_PAGES: _disable_nx_huge_pages,
    uapi.KVM_CAP_MAX_VCPU_ID: _max_vcpu_id,
    uapi.KVM_CAP_HALT_POLL: _halt_poll,
    uapi.KVM_CAP_X86_BUS_LOCK_EXIT: _bus_lock_exit,
}
