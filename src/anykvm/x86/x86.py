"""The seam `kvm_arch_*` on x86: how VMs and vCPUs are made, and what the generic half asks of them.

arch/x86/kvm/x86.c. Importing `anykvm.x86` registers this with `kvm_init`, as loading kvm.ko does.
"""

from __future__ import annotations

from collections.abc import Iterator
from errno import EINVAL
from typing import Any

from anykvm.cpu.memory import PHYSICAL_BITS
from anykvm.fs.mapping import Memfd
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import IoctlTable
from anykvm.kvm.irqchip import KernelIrqRoutingEntry
from anykvm.kvm.kvm_main import KVM_MAX_VCPUS, Kvm, KvmVcpu
from anykvm.kvm.memslots import KvmMemorySlot, KvmMrChange
from anykvm.uapi import kvm as uapi
from anykvm.x86.capability import kvm_vm_ioctl_check_extension, kvm_vm_ioctl_enable_cap
from anykvm.x86.irq import InKernelIrqchip
from anykvm.x86.kvm_host import KvmX86, MpState, VcpuX86
from anykvm.x86.reset import kvm_vcpu_reset
from anykvm.x86.stats import count_mapping, publish_vm
from anykvm.x86.tables import dev_ioctls, vcpu_ioctls, vm_ioctls
from anykvm.x86.vcpu_run import kvm_arch_vcpu_ioctl_run

APIC_BASE_ENABLED = 0xFEE00000 | 1 << 11
APIC_BASE_BSP = 1 << 8


class X86Vcpu(VcpuX86):
    """A vCPU after power-on: the boot processor runs, the others wait for INIT if their APIC is
    here.
    """

    def __init__(self, kvm: KvmX86, vcpu_id: int, memfd: Memfd) -> None:
        super().__init__(kvm, vcpu_id, memfd)
        self.state.apic_base = APIC_BASE_ENABLED | (APIC_BASE_BSP if self.is_bsp else 0)
        if kvm.irqchip_in_kernel():
            self.apic = kvm.irqchip.new_lapic(self)
            self.state.apic_base = self.apic.apic_base
            self.mp_state = MpState.RUNNABLE if self.is_bsp else MpState.UNINITIALIZED
        self.set_tsc_khz(kvm.default_tsc_khz)
        self.synchronize_tsc(0)
        kvm_vcpu_reset(self, init_event=False)

    kvm_arch_vcpu_ioctl_run = kvm_arch_vcpu_ioctl_run

    def kvm_arch_vcpu_destroy(self) -> None:
        """The processor goes with its engine; the timer with the VM's thread."""
        self.run_delay.close()


class X86Vm(KvmX86):
    """A VM with its engine, whose interrupt controllers are still to be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.irqchip = InKernelIrqchip(self)

    def kvm_arch_vcpu_precreate(self, vcpu_id: int) -> None:
        """EINVAL for an id above the VM's limit, which is fixed from now on."""
        self.max_vcpu_ids = self.max_vcpu_ids or KVM_MAX_VCPUS
        if vcpu_id >= self.max_vcpu_ids:
            raise fail(EINVAL, f"vCPU id {vcpu_id} is not below {self.max_vcpu_ids}")

    def kvm_arch_vcpu_create(self, vcpu_id: int, memfd: Memfd) -> KvmVcpu:
        return X86Vcpu(self, vcpu_id, memfd)

    def kvm_arch_vcpu_postcreate(self, vcpu: KvmVcpu) -> None:
        self.irqchip.map_changed()

    def kvm_arch_prepare_memory_region(
        self, change: KvmMrChange, old: KvmMemorySlot | None, new: KvmMemorySlot | None
    ) -> None:
        moves = change in (KvmMrChange.CREATE, KvmMrChange.MOVE)
        if moves and new is not None and new.gpa + new.size > 1 << PHYSICAL_BITS:
            raise fail(EINVAL, f"guest addresses have {PHYSICAL_BITS} bits")
        if new is not None:
            with self.engine.stopped():
                new.host_address = self.mm.host_address(new.userspace_addr, new.size)

    def kvm_arch_commit_memory_region(
        self, change: KvmMrChange, old: KvmMemorySlot | None, new: KvmMemorySlot | None
    ) -> None:
        with self.engine.stopped():
            if old is not None and change in (KvmMrChange.DELETE, KvmMrChange.MOVE):
                if new is not None and old.log_dirty:
                    new.merge_dirty(self.engine.take_dirty(old.gpa, old.as_id))
                self.engine.unmap_memory(old.gpa, old.size, old.as_id)
            if new is not None:
                self._map_memory(new)
        count_mapping(self, old, new)

    def _map_memory(self, slot: KvmMemorySlot) -> None:
        self.engine.map_memory(
            slot.gpa,
            slot.size,
            slot.host_address,
            slot.readonly,
            slot.log_dirty,
            all_dirty=bool(self.dirty_ring_size) and self.dirty_log_initially_set,
            number=slot.number,
        )

    def kvm_arch_sync_dirty_log(self, slot: KvmMemorySlot) -> None:
        slot.merge_dirty(self.engine.take_dirty(slot.gpa, slot.as_id))

    def kvm_arch_reset_dirty_gfns(self, gfns: list[tuple[int, int]]) -> None:
        self.engine.reset_dirty(self._pages_of_slots(gfns))
        for vcpu in self.x86_vcpus():
            if vcpu.dirty_ring is not None:
                vcpu.state.ring_reset = vcpu.dirty_ring.reset_index

    def _pages_of_slots(self, gfns: list[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """Those that there are: what stands in a ring comes from userspace."""
        for number, page in gfns:
            space = number >> 16
            if space < self.address_space_num:
                slot = self.address_spaces[space].id_to_memslot(number & 0xFFFF)
                if slot is not None and page < slot.npages:
                    yield space, slot.gpa, page

    def kvm_arch_intc_initialized(self) -> bool:
        return self.irqchip_in_kernel()

    def kvm_arch_irqfd_allowed(self, resample: bool) -> bool:
        """A resampling irqfd must see interrupts end, which the IOAPIC and the PIC tell."""
        return self.pic_in_kernel() if resample else self.irqchip_in_kernel()

    def kvm_set_routing_entry(self, entry: uapi.kvm_irq_routing_entry) -> KernelIrqRoutingEntry:
        return self.irqchip.set_routing_entry(entry)

    def kvm_arch_post_irq_routing_update(self) -> None:
        self.irqchip.routing_changed()

    def kvm_vm_ioctl_enable_cap(self, cap: int, flags: int, args: tuple[int, ...]) -> int:
        return kvm_vm_ioctl_enable_cap(self, cap, flags, args)

    def kvm_arch_publish_stats(self) -> None:
        publish_vm(self)

    def kvm_arch_destroy_vm(self) -> None:
        self.engine.close()
        self.hv.destroy()


class X86Arch:
    """What `kvm_init` is given."""

    dev_ioctls: IoctlTable[Any] = dev_ioctls
    vm_ioctls: IoctlTable[Any] = vm_ioctls
    vcpu_ioctls: IoctlTable[Any] = vcpu_ioctls

    def kvm_arch_alloc_vm(self, vm_type: int) -> Kvm:
        if vm_type:
            raise fail(EINVAL, f"x86 has one type of VM, 0, not {vm_type}")
        return X86Vm()

    def kvm_vm_ioctl_check_extension(self, kvm: Kvm | None, cap: int) -> int | None:
        return kvm_vm_ioctl_check_extension(kvm if isinstance(kvm, KvmX86) else None, cap)
