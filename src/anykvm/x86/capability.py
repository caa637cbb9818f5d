"""x86's capabilities: what KVM_CHECK_EXTENSION says and what KVM_ENABLE_CAP switches on. What is
not in a table is 0.

`kvm_vm_ioctl_check_extension` and `kvm_vm_ioctl_enable_cap` of arch/x86/kvm/x86.c; api.rst 4.4, 7
and 8.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EEXIST, EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.irqchip import KVM_MAX_IRQ_ROUTES
from anykvm.kvm.kvm_main import KVM_MAX_VCPUS
from anykvm.uapi import kvm as uapi
from anykvm.x86.clock import KVM_CLOCK_VALID_FLAGS
from anykvm.x86.fpu import XSAVE_SIZE
from anykvm.x86.guest_debug import KVM_GUESTDBG_VALID_MASK
from anykvm.x86.hypercall import EXIT_HYPERCALL_VALID_MASK
from anykvm.x86.kvm_host import KVM_MAX_MCE_BANKS, IrqchipMode, KvmX86
from anykvm.x86.nested import NESTED_STATE_SIZE
from anykvm.x86.vm_capability import PROCESSOR_CAPS, PROCESSOR_ENABLE, within
from anykvm.x86.xen import XEN_HVM

X2APIC_API = uapi.KVM_X2APIC_API_USE_32BIT_IDS | uapi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
USER_SPACE_MSR = (
    uapi.KVM_MSR_EXIT_REASON_INVAL
    | uapi.KVM_MSR_EXIT_REASON_UNKNOWN
    | uapi.KVM_MSR_EXIT_REASON_FILTER
)

X86_CAPS: dict[int, int] = {
    uapi.KVM_CAP_IRQCHIP: 1,
    uapi.KVM_CAP_HLT: 1,
    uapi.KVM_CAP_SET_TSS_ADDR: 1,
    uapi.KVM_CAP_EXT_CPUID: 1,
    uapi.KVM_CAP_VAPIC: 1,
    uapi.KVM_CAP_EXT_EMUL_CPUID: 1,
    uapi.KVM_CAP_CLOCKSOURCE: 1,
    uapi.KVM_CAP_PIT: 1,
    uapi.KVM_CAP_NOP_IO_DELAY: 1,
    uapi.KVM_CAP_MP_STATE: 1,
    uapi.KVM_CAP_USER_NMI: 1,
    uapi.KVM_CAP_REINJECT_CONTROL: 1,
    uapi.KVM_CAP_IRQ_INJECT_STATUS: 1,
    uapi.KVM_CAP_PIT2: 1,
    uapi.KVM_CAP_PIT_STATE2: 1,
    uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR: 1,
    uapi.KVM_CAP_VCPU_EVENTS: 1,
    uapi.KVM_CAP_DEBUGREGS: 1,
    uapi.KVM_CAP_SET_GUEST_DEBUG: 1,
    uapi.KVM_CAP_SET_GUEST_DEBUG2: KVM_GUESTDBG_VALID_MASK,
    uapi.KVM_CAP_X86_ROBUST_SINGLESTEP: 1,
    uapi.KVM_CAP_XSAVE: 1,
    uapi.KVM_CAP_XCRS: 1,
    uapi.KVM_CAP_GET_TSC_KHZ: 1,
    uapi.KVM_CAP_KVMCLOCK_CTRL: 1,
    uapi.KVM_CAP_TSC_DEADLINE_TIMER: 1,
    uapi.KVM_CAP_IOAPIC_POLARITY_IGNORED: 1,
    uapi.KVM_CAP_SET_BOOT_CPU_ID: 1,
    uapi.KVM_CAP_SPLIT_IRQCHIP: 1,
    uapi.KVM_CAP_GET_MSR_FEATURES: 1,
    uapi.KVM_CAP_EXCEPTION_PAYLOAD: 1,
    uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: 1,
    uapi.KVM_CAP_X86_MSR_FILTER: 1,
    uapi.KVM_CAP_SREGS2: 1,
    uapi.KVM_CAP_STEAL_TIME: 1,
    uapi.KVM_CAP_SYS_ATTRIBUTES: 1,
    uapi.KVM_CAP_VCPU_ATTRIBUTES: 1,
    uapi.KVM_CAP_ENFORCE_PV_FEATURE_CPUID: 1,
    uapi.KVM_CAP_XEN_HVM: XEN_HVM,
    uapi.KVM_CAP_HYPERV: 1,
    uapi.KVM_CAP_HYPERV_VAPIC: 1,
    uapi.KVM_CAP_HYPERV_SPIN: 1,
    uapi.KVM_CAP_HYPERV_TIME: 1,
    uapi.KVM_CAP_HYPERV_SYNIC: 1,
    uapi.KVM_CAP_HYPERV_SYNIC2: 1,
    uapi.KVM_CAP_HYPERV_VP_INDEX: 1,
    uapi.KVM_CAP_HYPERV_EVENTFD: 1,
    uapi.KVM_CAP_HYPERV_TLBFLUSH: 1,
    uapi.KVM_CAP_HYPERV_SEND_IPI: 1,
    uapi.KVM_CAP_HYPERV_CPUID: 1,
    uapi.KVM_CAP_HYPERV_ENFORCE_CPUID: 1,
    uapi.KVM_CAP_SYS_HYPERV_CPUID: 1,
    uapi.KVM_CAP_EXIT_HYPERCALL: EXIT_HYPERCALL_VALID_MASK,
    uapi.KVM_CAP_SYNC_REGS: uapi.KVM_SYNC_X86_VALID_FIELDS,
    uapi.KVM_CAP_ADJUST_CLOCK: KVM_CLOCK_VALID_FLAGS,
    uapi.KVM_CAP_X2APIC_API: X2APIC_API,
    uapi.KVM_CAP_X86_USER_SPACE_MSR: USER_SPACE_MSR,
    uapi.KVM_CAP_XSAVE2: XSAVE_SIZE,
    uapi.KVM_CAP_NESTED_STATE: NESTED_STATE_SIZE,
    uapi.KVM_CAP_MCE: KVM_MAX_MCE_BANKS,
    uapi.KVM_CAP_NR_VCPUS: min(os.cpu_count() or 1, KVM_MAX_VCPUS),
    uapi.KVM_CAP_MAX_VCPUS: KVM_MAX_VCPUS,
    **PROCESSOR_CAPS,
}


def kvm_vm_ioctl_check_extension(kvm: KvmX86 | None, cap: int) -> int:
    """The capability's value, 0 for what is not there."""
    return X86_CAPS.get(cap, 0)


def _split_irqchip(kvm: KvmX86, args: tuple[int, ...]) -> None:
    """Local APICs here, the rest with the VMM, whose IOAPIC has `args[0]` pins."""
    if args[0] > KVM_MAX_IRQ_ROUTES:
        raise fail(EINVAL, f"an IOAPIC of {args[0]} pins is too large")
    with kvm.lock:
        if kvm.irqchip_in_kernel():
            raise fail(EEXIST, "there is an irqchip already")
        if kvm.vcpus:
            raise fail(EEXIST, "the irqchip must be there before any vCPU")
        kvm.nr_reserved_ioapic_pins = args[0]
        kvm.irqchip_mode = IrqchipMode.SPLIT


def _x2apic_api(kvm: KvmX86, args: tuple[int, ...]) -> None:
    within(args[0], X2APIC_API, "KVM_CAP_X2APIC_API")
    if args[0] & uapi.KVM_X2APIC_API_USE_32BIT_IDS:
        kvm.x2apic_format = True
    if args[0] & uapi.KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK:
        kvm.x2apic_broadcast_quirk = False


def _exception_payload(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.exception_payload_enabled = bool(args[0])


def _triple_fault_event(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.triple_fault_event = bool(args[0])


def _user_space_msr(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.user_space_msr_mask = within(args[0], USER_SPACE_MSR, "KVM_CAP_X86_USER_SPACE_MSR")


def _exit_hypercall(kvm: KvmX86, args: tuple[int, ...]) -> None:
    kvm.hypercall_exit_enabled = within(
        args[0], EXIT_HYPERCALL_VALID_MASK, "KVM_CAP_EXIT_HYPERCALL"
    )


ENABLE: dict[int, Callable[[KvmX86, tuple[int, ...]], None]] = {
    **PROCESSOR_ENABLE,
    uapi.KVM_CAP_SPLIT_IRQCHIP: _split_irqchip,
    uapi.KVM_CAP_EXIT_HYPERCALL: _exit_hypercall,
    uapi.KVM_CAP_X2APIC_API: _x2apic_api,
    uapi.KVM_CAP_EXCEPTION_PAYLOAD: _exception_payload,
    uapi.KVM_CAP_X86_TRIPLE_FAULT_EVENT: _triple_fault_event,
    uapi.KVM_CAP_X86_USER_SPACE_MSR: _user_space_msr,
}


def kvm_vm_ioctl_enable_cap(kvm: KvmX86, cap: int, flags: int, args: tuple[int, ...]) -> int:
    """KVM_ENABLE_CAP of a VM; EINVAL for what cannot be switched."""
    enable = ENABLE.get(cap)
    if enable is None or flags:
        raise fail(EINVAL, f"capability {cap} cannot be enabled (flags {flags:#x})")
    enable(kvm, args)
    return 0
