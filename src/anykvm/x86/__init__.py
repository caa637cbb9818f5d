"""Linux's arch/x86/kvm. Importing this is loading the module: it registers /dev/kvm."""

from __future__ import annotations

from anykvm.kvm import dirty_log
from anykvm.kvm.chardev import kvm_init
from anykvm.x86 import dev_ioctl, fpu, regs, vapic, vcpu_events, vcpu_ioctl, vm_ioctl
from anykvm.x86.x86 import X86Arch

# Imported for the rows that they enter into the ioctl tables.
IOCTL_ROWS = (dirty_log, dev_ioctl, fpu, regs, vapic, vcpu_events, vcpu_ioctl, vm_ioctl)

kvm_init(X86Arch())
