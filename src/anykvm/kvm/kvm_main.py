"""KVM's objects and lifetimes: a VM (`struct kvm`), its vCPUs (`struct kvm_vcpu`), and who holds
them (`virt/kvm/kvm_main.c`).

A vCPU file holds its VM, as the VM's own file does: the VM is destroyed at the last `kvm_put_kvm`,
whatever order the descriptors are closed in. What depends on the processor is a method `kvm_arch_*`
of a subclass, and `kvm_init` is given the architecture that makes those.
"""

from __future__ import annotations

import ctypes
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from errno import EEXIST, EINVAL, EIO, ENODEV
from typing import Any, Protocol

from anykvm.fs.mapping import Mapping, Memfd
from anykvm.fs.task import current
from anykvm.fs.trace import call
from anykvm.fs.uaccess import UserMemory
from anykvm.kvm.binary_stats import (
    KvmVcpuStatGeneric,
    KvmVmStatGeneric,
    kvm_vcpu_stats,
    kvm_vm_stats,
)
from anykvm.kvm.coalesced_mmio import CoalescedRing, CoalescedZones
from anykvm.kvm.dirty_ring import RING_OFFSET, KvmDirtyRing
from anykvm.kvm.errors import fail
from anykvm.kvm.eventfd import KvmEventfds
from anykvm.kvm.ioctl import IoctlTable
from anykvm.kvm.iodev import BUS_SHIFTS, KvmBus, KvmIoBus
from anykvm.kvm.irqchip import IrqRoutingTable, KernelIrqRoutingEntry
from anykvm.kvm.memslots import PAGE_SIZE, KvmMemorySlot, KvmMemslots, KvmMrChange
from anykvm.kvm.sigset import new_sigset
from anykvm.kvm.worker import Worker
from anykvm.uapi.kvm import (
    KVM_COALESCED_MMIO_PAGE_OFFSET,
    KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_PIO_PAGE_OFFSET,
    kvm_irq_routing_entry,
    kvm_run,
)

KVM_MAX_VCPUS = 255  # so that every APIC ID fits xAPIC's eight bits
VCPU_MMAP_PAGES = 3  # kvm_run, PIO data, coalesced ring


class VcpuMode(IntEnum):
    """Where a vCPU's thread is, for those who want its attention."""

    OUTSIDE_GUEST_MODE = 0
    IN_GUEST_MODE = 1
    BLOCKED = 2


class Kvm(ABC):
    """struct kvm. `lock` guards the vCPUs and creation flags, `slots_lock` the slots and buses."""

    address_space_num = 1
    stat_type: type[KvmVmStatGeneric] = KvmVmStatGeneric
    stat: KvmVmStatGeneric

    def __init__(self) -> None:
        self.mm: UserMemory = current().mm
        self.userspace_pid = self.mm.pid
        self.stats = kvm_vm_stats(self.mm.pid, self.stat_type)
        self.stat = self.stats.stat
        self.users_count = 1
        self._users_lock = threading.Lock()
        self.lock = threading.RLock()
        self.slots_lock = threading.RLock()
        self.vcpus: dict[int, KvmVcpu] = {}  # by vcpu_id
        self.max_vcpus = KVM_MAX_VCPUS
        self.address_spaces = tuple(map(KvmMemslots, range(self.address_space_num)))
        self.memslots = self.address_spaces[0]
        self.dirty_ring_size = 0  # bytes; 0: there is the dirty log
        self.manual_dirty_log_protect = 0
        self.buses = {bus: KvmIoBus(BUS_SHIFTS.get(bus, 0)) for bus in KvmBus}
        self.worker = Worker("kvm-vm")
        self.irq_routing = IrqRoutingTable()
        self.irq_ack_notifiers: dict[int, list[Callable[[], None]]] = {}
        self.eventfds = KvmEventfds(self)
        self.coalesced_lock = threading.Lock()
        self.coalesced_mmio_ring: CoalescedRing | None = None
        self.coalesced_zones = CoalescedZones(self)

    # The seam to the architecture.

    @abstractmethod
    def kvm_arch_vcpu_precreate(self, vcpu_id: int) -> None:
        """Refuse a vCPU that the VM's set-up does not allow."""

    @abstractmethod
    def kvm_arch_vcpu_create(self, vcpu_id: int, memfd: Memfd) -> KvmVcpu:
        """The vCPU in its power-on state, not yet visible to others."""

    @abstractmethod
    def kvm_arch_vcpu_postcreate(self, vcpu: KvmVcpu) -> None:
        """The vCPU is among `vcpus` now."""

    @abstractmethod
    def kvm_arch_prepare_memory_region(
        self, change: KvmMrChange, old: KvmMemorySlot | None, new: KvmMemorySlot | None
    ) -> None:
        """Refuse a change that the processor cannot follow; EINVAL."""

    @abstractmethod
    def kvm_arch_commit_memory_region(
        self, change: KvmMrChange, old: KvmMemorySlot | None, new: KvmMemorySlot | None
    ) -> None:
        """Make the processor see the change of a slot."""

    @abstractmethod
    def kvm_arch_sync_dirty_log(self, slot: KvmMemorySlot) -> None:
        """Move what the processor has dirtied into the slot's bitmap, and go on from there."""

    @abstractmethod
    def kvm_arch_reset_dirty_gfns(self, gfns: list[tuple[int, int]]) -> None:
        """Pages (slot number, page in the slot) go into a dirty ring when they are written next."""

    @abstractmethod
    def kvm_arch_intc_initialized(self) -> bool:
        """Whether interrupts have anywhere to go."""

    @abstractmethod
    def kvm_arch_irqfd_allowed(self, resample: bool) -> bool:
        """Whether an irqfd of this kind works with the interrupt controllers there are."""

    @abstractmethod
    def kvm_set_routing_entry(self, entry: kvm_irq_routing_entry) -> KernelIrqRoutingEntry:
        """Turn a checked user entry into one that can be delivered; EINVAL."""

    @abstractmethod
    def kvm_arch_post_irq_routing_update(self) -> None:
        """The routing table has been replaced."""

    @abstractmethod
    def kvm_vm_ioctl_enable_cap(self, cap: int, flags: int, args: tuple[int, ...]) -> int:
        """KVM_ENABLE_CAP for capabilities of the architecture; EINVAL."""

    @abstractmethod
    def kvm_arch_publish_stats(self) -> None:
        """Bring what the processor counts of the VM into `stat`."""

    @abstractmethod
    def kvm_arch_destroy_vm(self) -> None:
        """Free what the architecture holds; no vCPU is left."""

    # What all architectures share.

    @property
    def dirty_log_initially_set(self) -> bool:
        return bool(self.manual_dirty_log_protect & KVM_DIRTY_LOG_INITIALLY_SET)

    @property
    def vcpu_file_size(self) -> int:
        """What a vCPU's descriptor has to map: kvm_run and its kin, and the dirty ring."""
        if self.dirty_ring_size:
            return RING_OFFSET + self.dirty_ring_size
        return VCPU_MMAP_PAGES * PAGE_SIZE

    def get_vcpu_by_id(self, vcpu_id: int) -> KvmVcpu | None:
        return self.vcpus.get(vcpu_id)

    def check_mm(self) -> None:
        """EIO for callers other than the process that made the VM."""
        if self.userspace_pid != current().mm.pid:
            raise fail(EIO, "the VM belongs to another process")


class KvmVcpu(ABC):
    """struct kvm_vcpu. `mutex` is held by the ioctl under way; `run` is the shared kvm_run page."""

    stat_type: type[KvmVcpuStatGeneric] = KvmVcpuStatGeneric
    stat: KvmVcpuStatGeneric

    def __init__(self, kvm: Kvm, vcpu_id: int, memfd: Memfd) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.vcpu_idx = len(kvm.vcpus)
        self.mutex = threading.Lock()
        self.stats = kvm_vcpu_stats(kvm.stats.stats_id, vcpu_id, self.stat_type)
        self.stat = self.stats.stat
        mapping = memfd.mapping
        assert mapping is not None
        self.run = mapping.view(kvm_run)
        self.run_io = self.run.io
        self.pio_data = pio_page(mapping)
        self.coalesced_ring = mapping.view(
            CoalescedRing, KVM_COALESCED_MMIO_PAGE_OFFSET * PAGE_SIZE
        )
        self.dirty_ring: KvmDirtyRing | None = None
        if kvm.dirty_ring_size:
            self.dirty_ring = KvmDirtyRing(mapping, kvm.dirty_ring_size)
        self.sigset = new_sigset(self.kick)
        self.mode = VcpuMode.OUTSIDE_GUEST_MODE
        self.touched = True  # by an ioctl other than KVM_RUN, since KVM_RUN last said otherwise

    @abstractmethod
    def kvm_arch_vcpu_ioctl_run(self) -> int:
        """KVM_RUN: 0 with `run` filled in; EINTR and others as OSError."""

    @abstractmethod
    def kick(self) -> None:
        """Make the vCPU's thread look again: leave the guest, or wake. Any thread, never lost."""

    @abstractmethod
    def kvm_arch_vcpu_destroy(self) -> None:
        """Free what the architecture holds."""


def pio_page(mapping: Mapping) -> Any:
    """The bytes of the PIO page, as a ctypes array that takes slices."""
    return mapping.view(ctypes.c_ubyte * PAGE_SIZE, KVM_PIO_PAGE_OFFSET * PAGE_SIZE)


class KvmArch(Protocol):
    """What `kvm_init` needs of an architecture: its tables and the functions of no VM."""

    dev_ioctls: IoctlTable[Any]
    vm_ioctls: IoctlTable[Any]
    vcpu_ioctls: IoctlTable[Any]

    def kvm_arch_alloc_vm(self, vm_type: int) -> Kvm: ...

    def kvm_vm_ioctl_check_extension(self, kvm: Kvm | None, cap: int) -> int | None: ...


class _Running(threading.local):
    """The vCPU whose ioctl a thread executes."""

    vcpu: KvmVcpu | None = None


_running = _Running()


@contextmanager
def vcpu_load(vcpu: KvmVcpu) -> Iterator[None]:
    """`vcpu_load` ... `vcpu_put`."""
    _running.vcpu = vcpu
    try:
        yield
    finally:
        _running.vcpu = None


def kvm_get_running_vcpu() -> KvmVcpu | None:
    """The vCPU whose ioctl the calling thread executes; known only where there is a dirty ring."""
    return _running.vcpu


_arch: KvmArch | None = None


def set_arch(arch: KvmArch) -> None:
    """Called once by `kvm_init`."""
    global _arch
    if _arch is not None:
        raise fail(EEXIST, "an architecture is registered already")
    _arch = arch


def arch() -> KvmArch:
    """The architecture that registered; ENODEV before any has."""
    if _arch is None:
        raise fail(ENODEV, "no architecture has registered with kvm_init")
    return _arch


def kvm_create_vm(vm_type: int) -> Kvm:
    """A VM with one reference, the caller's."""
    with call("kvm_create_vm", type=vm_type), call("kvm_arch_alloc_vm"):
        return arch().kvm_arch_alloc_vm(vm_type)


def kvm_get_kvm(kvm: Kvm) -> None:
    """Take a reference; the caller has one."""
    with kvm._users_lock:
        assert kvm.users_count > 0
        kvm.users_count += 1


def kvm_put_kvm(kvm: Kvm) -> None:
    """Give a reference back; the last one destroys the VM."""
    with kvm._users_lock:
        kvm.users_count -= 1
        last = kvm.users_count == 0
    if last:
        kvm_destroy_vm(kvm)


def kvm_destroy_vm(kvm: Kvm) -> None:
    with call("kvm_destroy_vm"):
        kvm.eventfds.release()
        kvm.worker.stop()
        for bus in kvm.buses.values():
            bus.destroy()
        kvm.coalesced_mmio_ring = None
        for vcpu in kvm.vcpus.values():
            vcpu.kvm_arch_vcpu_destroy()
            vcpu.sigset.close()
            vcpu.stats.close()
        kvm.vcpus.clear()
        kvm.kvm_arch_destroy_vm()
        kvm.stats.close()


def kvm_create_vcpu(kvm: Kvm, vcpu_id: int, memfd: Memfd) -> KvmVcpu:
    """Make vCPU `vcpu_id` and enter it; EINVAL for a bad id, EEXIST for one there is."""
    if not 0 <= vcpu_id < kvm.max_vcpus:
        raise fail(EINVAL, f"vCPU id {vcpu_id} is not below {kvm.max_vcpus}")
    with kvm.lock:
        if vcpu_id in kvm.vcpus:
            raise fail(EEXIST, f"there is a vCPU {vcpu_id} already")
        kvm.kvm_arch_vcpu_precreate(vcpu_id)
        with call("kvm_arch_vcpu_create", vcpu_id=vcpu_id):
            vcpu = kvm.kvm_arch_vcpu_create(vcpu_id, memfd)
        kvm.vcpus = {**kvm.vcpus, vcpu_id: vcpu}
        if kvm.coalesced_mmio_ring is None:
            kvm.coalesced_mmio_ring = vcpu.coalesced_ring
    kvm.kvm_arch_vcpu_postcreate(vcpu)
    return vcpu
