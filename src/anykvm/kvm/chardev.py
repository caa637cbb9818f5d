"""/dev/kvm: `kvm_chardev_ops`, the ioctls of no particular VM, and how the driver registers
(`kvm_init`).
"""

from __future__ import annotations

import os
from errno import EINVAL, EMFILE, EOPNOTSUPP

from anykvm.fs.anon_inodes import anon_inode_getfd
from anykvm.fs.char_dev import KVM_MINOR, MiscDevice, misc_register
from anykvm.fs.file import File, FileOperations
from anykvm.fs.module import Module
from anykvm.fs.vfs import noop_llseek
from anykvm.kvm.capability import kvm_vm_ioctl_check_extension_generic
from anykvm.kvm.ioctl import IoctlTable, Value, drive
from anykvm.kvm.kvm_main import (
    VCPU_MMAP_PAGES,
    KvmArch,
    arch,
    kvm_create_vm,
    kvm_put_kvm,
    set_arch,
)
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.kvm.vm_ioctl import kvm_vm_fops
from anykvm.uapi.kvm import KVM_API_VERSION

kvm_module = Module("kvm")
kvm_dev_ioctls: IoctlTable[File] = IoctlTable("kvm_dev_ioctl")


@kvm_dev_ioctls.row("KVM_GET_API_VERSION", Value(unused=True), returns="12")
def kvm_dev_ioctl_get_api_version(file: File, _: int) -> int:
    """The version, which has not changed since Linux 2.6.22."""
    return KVM_API_VERSION


@kvm_dev_ioctls.row(
    "KVM_CREATE_VM",
    Value(),
    returns="the descriptor of a new VM",
    errors={EINVAL: "the type of VM is not 0", EMFILE: "no descriptor is free"},
)
def kvm_dev_ioctl_create_vm(file: File, vm_type: int) -> int:
    """A new descriptor, which holds the VM."""
    kvm = kvm_create_vm(vm_type)
    try:
        return anon_inode_getfd("kvm-vm", kvm_vm_fops, kvm, os.O_RDWR | os.O_CLOEXEC)
    except BaseException:
        kvm_put_kvm(kvm)
        raise


@kvm_dev_ioctls.row(
    "KVM_CHECK_EXTENSION", Value(), returns="the capability's value, 0 for what is not there"
)
def kvm_dev_ioctl_check_extension(file: File, cap: int) -> int:
    """What is there and how much of it, for VMs in general."""
    return kvm_vm_ioctl_check_extension_generic(None, cap)


@kvm_dev_ioctls.row(
    "KVM_GET_VCPU_MMAP_SIZE", Value(unused=True), returns="bytes that a vCPU's descriptor maps"
)
def kvm_dev_ioctl_get_vcpu_mmap_size(file: File, _: int) -> int:
    """kvm_run, the data of port I/O and the ring of coalesced writes: three pages."""
    return VCPU_MMAP_PAGES * PAGE_SIZE


# Tracing of the first KVM versions: Linux keeps the numbers and refuses them.
kvm_dev_ioctls.mark_absent(
    EOPNOTSUPP, "KVM_TRACE_ENABLE", "KVM_TRACE_PAUSE", "KVM_TRACE_DISABLE", why="obsolete"
)


def kvm_dev_ioctl(file: File, cmd: int, arg: int) -> int:
    return drive((kvm_dev_ioctls, arch().dev_ioctls), file, cmd, arg)


kvm_chardev_ops = FileOperations(
    owner=kvm_module,
    unlocked_ioctl=kvm_dev_ioctl,
    compat_ioctl=kvm_dev_ioctl,
    llseek=noop_llseek,
)


def kvm_init(architecture: KvmArch) -> None:
    """Take the architecture's half and put /dev/kvm in place."""
    set_arch(architecture)
    misc_register(MiscDevice(KVM_MINOR, "kvm", kvm_chardev_ops))
