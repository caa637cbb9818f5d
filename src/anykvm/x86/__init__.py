"""Linux's arch/x86/kvm. Importing this is loading the module: it registers /dev/kvm."""

from __future__ import annotations

from anykvm.kvm import dirty_log, memory_region
from anykvm.kvm.chardev import kvm_init
from anykvm.x86 import (
    absent,
    dev_ioctl,
    fpu,
    guest_debug,
    mce,
    nested,
    platform_msrs,
    pmu,
    pv,
    pv_eoi,
    regs,
    smm,
    steal_time,
    svm,
    tsc_ioctl,
    vapic,
    vcpu_capability,
    vcpu_events,
    vcpu_ioctl,
    vm_ioctl,
    xen,
)
from anykvm.x86.x86 import X86Arch

# Imported for the rows that they enter into the ioctl tables.
IOCTL_ROWS = (
    dirty_log,
    memory_region,
    absent,
    dev_ioctl,
    fpu,
    guest_debug,
    mce,
    nested,
    pmu,
    regs,
    smm,
    tsc_ioctl,
    vapic,
    vcpu_events,
    vcpu_ioctl,
    vm_ioctl,
    vcpu_capability,
    xen,
)

# And these for the rows that they enter into the table of MSRs.
MSR_ROWS = (mce, platform_msrs, pv, pv_eoi, smm, steal_time, svm)

kvm_init(X86Arch())
