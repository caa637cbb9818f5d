"""x86's three ioctl tables; the rows are entered where their handlers are."""

from __future__ import annotations

from errno import EINVAL

from anykvm.fs.file import File
from anykvm.kvm.ioctl import IoctlTable, Need
from anykvm.x86.kvm_host import KvmX86, VcpuX86

dev_ioctls: IoctlTable[File] = IoctlTable("kvm_arch_dev_ioctl", unknown=EINVAL)
vm_ioctls: IoctlTable[KvmX86] = IoctlTable("kvm_arch_vm_ioctl")
vcpu_ioctls: IoctlTable[VcpuX86] = IoctlTable("kvm_arch_vcpu_ioctl", unknown=EINVAL)

LAPIC: Need[VcpuX86] = Need(
    lambda vcpu: vcpu.apic is not None, EINVAL, "the local APIC is the VMM's"
)
