"""x86's three ioctl tables; the rows are entered where their handlers are."""

from __future__ import annotations

from anykvm.fs.file import File
from anykvm.kvm.ioctl import IoctlTable
from anykvm.x86.kvm_host import KvmX86, VcpuX86

dev_ioctls: IoctlTable[File] = IoctlTable("kvm_arch_dev_ioctl")
vm_ioctls: IoctlTable[KvmX86] = IoctlTable("kvm_arch_vm_ioctl")
vcpu_ioctls: IoctlTable[VcpuX86] = IoctlTable("kvm_arch_vcpu_ioctl")
