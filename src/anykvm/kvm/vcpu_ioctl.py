"""The descriptor of a vCPU: `kvm_vcpu_fops`, KVM_RUN and KVM_SET_SIGNAL_MASK."""

from __future__ import annotations

from collections.abc import Mapping
from errno import EAGAIN, EFAULT, EINTR, EINVAL, EMFILE
from io import StringIO

from anykvm.fs.file import File, FileOperations, Inode, VmArea
from anykvm.fs.mapping import MAP_SHARED, PROT_EXEC
from anykvm.fs.trace import call, enabled
from anykvm.fs.uaccess import UserMemory
from anykvm.fs.vfs import noop_llseek
from anykvm.kvm.dirty_ring import RING_OFFSET
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import BAD_POINTER, IoctlTable, Value, drive
from anykvm.kvm.kvm_main import KvmVcpu, arch, kvm_put_kvm, vcpu_load
from anykvm.kvm.sigset import SIGSET_SIZE
from anykvm.uapi import kvm as uapi
from anykvm.uapi.names import exit_name

KVM_RUN = uapi.KVM_RUN
kvm_vcpu_ioctls: IoctlTable[KvmVcpu] = IoctlTable("kvm_vcpu_ioctl")


@kvm_vcpu_ioctls.row(
    "KVM_RUN",
    Value(unused=True),
    errors={
        EINTR: "a signal is pending (exit_reason is KVM_EXIT_INTR), or immediate_exit is set",
        EAGAIN: "the vCPU waited for INIT or SIPI and something came",
        EFAULT: "guest memory that is not there",
        EINVAL: "unknown fields in kvm_valid_regs or kvm_dirty_regs, or registers that cannot be",
    },
)
def kvm_vcpu_ioctl_run(vcpu: KvmVcpu, _: int) -> int:
    """Run the guest until `vcpu.run` has something for the caller, or a signal (EINTR)."""
    if not enabled():
        return vcpu.kvm_arch_vcpu_ioctl_run()
    with call("kvm_arch_vcpu_ioctl_run", vcpu_id=vcpu.vcpu_id) as this:
        try:
            return vcpu.kvm_arch_vcpu_ioctl_run()
        finally:
            this.result = exit_name(vcpu.run.exit_reason)


class SignalMask:
    """struct kvm_signal_mask and the sigset behind it, None for a null pointer; any other length is
    EINVAL.
    """

    text = "struct kvm_signal_mask and behind it the sigset, in; or 0"
    errors: Mapping[int, str] = {EFAULT: BAD_POINTER, EINVAL: "len is not 8"}

    def copy_in(self, mm: UserMemory, address: int) -> bytes | None:
        if not address:
            return None
        length = int.from_bytes(mm.read(address, 4), "little")
        if length != SIGSET_SIZE:
            raise fail(
                EINVAL, f"KVM_SET_SIGNAL_MASK: a sigset is {SIGSET_SIZE} bytes, not {length}"
            )
        return mm.read(address + 4, SIGSET_SIZE)

    def copy_out(self, mm: UserMemory, address: int, value: bytes | None) -> None:
        """Nothing returns."""


@kvm_vcpu_ioctls.row("KVM_SET_SIGNAL_MASK", SignalMask())
def kvm_vcpu_ioctl_set_sigmask(vcpu: KvmVcpu, sigset: bytes | None) -> None:
    """Which signals do not interrupt KVM_RUN; without one, those that its caller blocks."""
    vcpu.sigset.set_mask(sigset)


@kvm_vcpu_ioctls.row(
    "KVM_GET_STATS_FD",
    Value(),
    uapi.KVM_CAP_BINARY_STATS_FD,
    returns="a descriptor to read",
    errors={EMFILE: "no descriptor is free"},
)
def kvm_vcpu_ioctl_get_stats_fd(vcpu: KvmVcpu, _: int) -> int:
    """A new descriptor that reads the vCPU's statistics; whatever the argument is."""
    return vcpu.stats.getfd()


def kvm_vcpu_ioctl(file: File, cmd: int, arg: int) -> int:
    vcpu: KvmVcpu = file.private_data
    vcpu.kvm.check_mm()
    if cmd == KVM_RUN and not arg and vcpu.dirty_ring is None and not enabled():
        # As below. All others together are rarer, and `with` takes twice as long.
        vcpu.mutex.acquire()
        try:
            return vcpu.kvm_arch_vcpu_ioctl_run()
        finally:
            vcpu.mutex.release()
    with vcpu.mutex:
        if cmd != KVM_RUN:
            vcpu.touched = True
        if vcpu.dirty_ring is not None:  # nobody else asks for the running vCPU
            with vcpu_load(vcpu):
                return drive((kvm_vcpu_ioctls, arch().vcpu_ioctls), vcpu, cmd, arg)
        return drive((kvm_vcpu_ioctls, arch().vcpu_ioctls), vcpu, cmd, arg)


def kvm_vcpu_mmap(file: File, vma: VmArea) -> None:
    """Any mapping of kvm_run, PIO data and the coalesced ring; EINVAL for one of the dirty ring
    that is private or executable.
    """
    vcpu: KvmVcpu = file.private_data
    ring = vcpu.dirty_ring is not None and vma.offset + vma.length > RING_OFFSET
    if ring and (vma.prot & PROT_EXEC or not vma.flags & MAP_SHARED):
        raise fail(EINVAL, "the dirty ring is mapped shared, and not to be executed")


def kvm_vcpu_show_fdinfo(text: StringIO, file: File) -> None:
    vcpu: KvmVcpu = file.private_data
    text.write(f"vcpu:\t{vcpu.vcpu_id}\n")


def kvm_vcpu_release(inode: Inode, file: File) -> None:
    vcpu: KvmVcpu = file.private_data
    kvm_put_kvm(vcpu.kvm)


kvm_vcpu_fops = FileOperations(
    release=kvm_vcpu_release,
    unlocked_ioctl=kvm_vcpu_ioctl,
    compat_ioctl=kvm_vcpu_ioctl,
    mmap=kvm_vcpu_mmap,
    llseek=noop_llseek,
    show_fdinfo=kvm_vcpu_show_fdinfo,
)
