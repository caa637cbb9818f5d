"""The seam `kvm_arch_*` on x86: how VMs and vCPUs are made, and what the generic half asks of them.

arch/x86/kvm/x86.c. Importing `anykvm.x86` registers this with `kvm_init`, as loading kvm.ko does.
"""

from __future__ import annotations

from errno import EINVAL
from typing import Any

from anykvm.fs.mapping import Memfd
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import IoctlTable
from anykvm.kvm.irqchip import KernelIrqRoutingEntry
from anykvm.kvm.kvm_main import Kvm, KvmVcpu
from anykvm.kvm.memslots import KvmMemorySlot, KvmMrChange
from anykvm.uapi import kvm as uapi
from anykvm.x86.capability import kvm_vm_ioctl_check_extension, kvm_vm_ioctl_enable_cap
from anykvm.x86.irq import InKernelIrqchip
from anykvm.x86.kvm_host import IrqchipMode, KvmX86, MpState, VcpuX86
from anykvm.x86.reset import kvm_vcpu_reset
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
        self.set_tsc_offset(kvm.cur_tsc_offset)
        kvm_vcpu_reset(self, init_event=False)

    def kvm_arch_vcpu_ioctl_run(self) -> int:
        return kvm_arch_vcpu_ioctl_run(self)

    def kvm_arch_vcpu_destroy(self) -> None:
        """The processor goes with its engine; the timer with the VM's thread."""


class X86Vm(KvmX86):
    """A VM with its engine, whose interrupt controllers are still to be chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.irqchip = InKernelIrqchip(self)

    def kvm_arch_vcpu_precreate(self, vcpu_id: int) -> None:
        """Nothing forbids a vCPU; after one, KVM_CREATE_IRQCHIP is refused."""

    def kvm_arch_vcpu_create(self, vcpu_id: int, memfd: Memfd) -> KvmVcpu:
        return X86Vcpu(self, vcpu_id, memfd)

    def kvm_arch_vcpu_postcreate(self, vcpu: KvmVcpu) -> None:
        self.irqchip.map_changed()

    def kvm_arch_commit_memory_region(
        self, change: KvmMrChange, old: KvmMemorySlot | None, new: KvmMemorySlot | None
    ) -> None:
        if old is not None and change in (KvmMrChange.DELETE, KvmMrChange.MOVE):
            self.engine.unmap_memory(old.gpa, old.size)
        if new is not None:
            self.engine.map_memory(
                new.gpa, new.size, new.userspace_addr, new.readonly, new.log_dirty
            )

    def kvm_arch_sync_dirty_log(self, slot: KvmMemorySlot) -> None:
        found = self.engine.take_dirty(slot.gpa)
        if slot.dirty is not None and any(found):
            merged = int.from_bytes(slot.dirty, "little") | int.from_bytes(found, "little")
            slot.dirty[:] = merged.to_bytes(len(slot.dirty), "little")

    def kvm_arch_intc_initialized(self) -> bool:
        return self.irqchip_in_kernel()

    def kvm_arch_irqfd_allowed(self, resample: bool) -> bool:
        """A resampling irqfd must see interrupts end, which the IOAPIC and the PIC tell."""
        return not resample or self.irqchip_mode is IrqchipMode.KERNEL

    def kvm_set_routing_entry(self, entry: uapi.kvm_irq_routing_entry) -> KernelIrqRoutingEntry:
        return self.irqchip.set_routing_entry(entry)

    def kvm_arch_post_irq_routing_update(self) -> None:
        self.irqchip.routing_changed()

    def kvm_vm_ioctl_enable_cap(self, cap: int, flags: int, args: tuple[int, ...]) -> int:
        return kvm_vm_ioctl_enable_cap(self, cap, flags, args)

    def kvm_arch_destroy_vm(self) -> None:
        self.engine.close()


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
