"""A virtual machine (api.rst: VM ioctls)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from anykvm.api.descriptor import Call, Exchange, Get, Quad, Set, Value
from anykvm.api.device import Device
from anykvm.api.flexible import IRQ_ROUTING, enable_cap
from anykvm.api.memory import GuestMemory
from anykvm.api.stats import Counting
from anykvm.api.vcpu import Vcpu
from anykvm.uapi import kvm as abi
from anykvm.uapi import later


class Vm(Counting):
    """A VM; `vcpu_mmap_size` is what KVM_GET_VCPU_MMAP_SIZE gave."""

    def __init__(self, fd: int, vcpu_mmap_size: int) -> None:
        super().__init__(fd)
        self.vcpu_mmap_size = vcpu_mmap_size
        self.memory: dict[int, GuestMemory] = {}

    check_extension = Value(abi.KVM_CHECK_EXTENSION)
    set_tss_addr = Value(abi.KVM_SET_TSS_ADDR)
    set_identity_map_addr = Quad(abi.KVM_SET_IDENTITY_MAP_ADDR)
    set_boot_cpu_id = Value(abi.KVM_SET_BOOT_CPU_ID)
    set_tsc_khz = Value(abi.KVM_SET_TSC_KHZ)
    get_tsc_khz = Call(abi.KVM_GET_TSC_KHZ)
    set_nr_mmu_pages = Value(abi.KVM_SET_NR_MMU_PAGES)

    create_irqchip = Call(abi.KVM_CREATE_IRQCHIP)
    set_irqchip = Set(abi.KVM_SET_IRQCHIP, abi.kvm_irqchip)
    get_pit2 = Get(abi.KVM_GET_PIT2, abi.kvm_pit_state2)
    set_pit2 = Set(abi.KVM_SET_PIT2, abi.kvm_pit_state2)
    get_clock = Get(abi.KVM_GET_CLOCK, abi.kvm_clock_data)
    set_clock = Set(abi.KVM_SET_CLOCK, abi.kvm_clock_data)
    signal_msi = Set(abi.KVM_SIGNAL_MSI, abi.kvm_msi)
    set_user_memory_region2 = Set(
        later.KVM_SET_USER_MEMORY_REGION2, later.kvm_userspace_memory_region2
    )
    clear_dirty_log = Exchange(abi.KVM_CLEAR_DIRTY_LOG, abi.kvm_clear_dirty_log)
    xen_hvm_config = Set(abi.KVM_XEN_HVM_CONFIG, abi.kvm_xen_hvm_config)
    set_msr_filter = Set(abi.KVM_X86_SET_MSR_FILTER, abi.kvm_msr_filter)
    reset_dirty_rings = Call(abi.KVM_RESET_DIRTY_RINGS)

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """KVM_CREATE_VCPU, with its `kvm_run` mapped."""
        return Vcpu(self.ioctl(abi.KVM_CREATE_VCPU, vcpu_id), self.vcpu_mmap_size)

    def create_device(self, type: int, flags: int = 0) -> Device:
        """KVM_CREATE_DEVICE."""
        request = abi.kvm_create_device(type=type, flags=flags)
        self.ioctl(abi.KVM_CREATE_DEVICE, request)
        return Device(request.fd)

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four arguments."""
        return self.ioctl(abi.KVM_ENABLE_CAP, enable_cap(cap, args, flags))

    # -- memory

    def set_user_memory_region(
        self, slot: int, addr: int, size: int, userspace_addr: int, flags: int = 0
    ) -> None:
        """Show the guest `size` bytes of ours at guest-physical `addr`; size 0 deletes the slot.

        The caller keeps the memory mapped; `add_memory` sees to that itself.
        """
        region = abi.kvm_userspace_memory_region(slot, flags, addr, size, userspace_addr)
        self.ioctl(abi.KVM_SET_USER_MEMORY_REGION, region)
        self.memory.pop(slot, None)

    def add_memory(self, slot: int, memory: GuestMemory, flags: int = 0) -> None:
        """Make `memory` the slot's, at its own address, and keep it."""
        self.set_user_memory_region(slot, memory.addr, memory.size, memory.userspace_addr, flags)
        self.memory[slot] = memory

    def remove_memory(self, slot: int) -> None:
        """Delete a slot and let its memory go."""
        self.set_user_memory_region(slot, 0, 0, 0)

    def get_dirty_log(self, slot: int, size: int) -> bytes:
        """A bit a page of the slot's `size` bytes: written since the last time."""
        bitmap = (ctypes.c_ubyte * ((size // 4096 + 63) // 64 * 8))()
        log = abi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
        self.ioctl(abi.KVM_GET_DIRTY_LOG, log)
        return bytes(bitmap)

    def register_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """Let writes to the range collect in the ring instead of exiting."""
        zone = abi.kvm_coalesced_mmio_zone(addr=addr, size=size, pio=pio)
        self.ioctl(abi.KVM_REGISTER_COALESCED_MMIO, zone)

    def unregister_coalesced_mmio(self, addr: int, size: int, pio: bool = False) -> None:
        """Undo `register_coalesced_mmio`."""
        zone = abi.kvm_coalesced_mmio_zone(addr=addr, size=size, pio=pio)
        self.ioctl(abi.KVM_UNREGISTER_COALESCED_MMIO, zone)

    # -- interrupts

    def create_pit2(self, flags: int = 0) -> None:
        """KVM_CREATE_PIT2; `flags` as KVM_PIT_SPEAKER_DUMMY."""
        self.ioctl(abi.KVM_CREATE_PIT2, abi.kvm_pit_config(flags=flags))

    def get_irqchip(self, chip_id: int) -> abi.kvm_irqchip:
        """The state of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
        chip = abi.kvm_irqchip(chip_id=chip_id)
        self.ioctl(abi.KVM_GET_IRQCHIP, chip)
        return chip

    def irq_line(self, gsi: int, level: int) -> None:
        """Set an interrupt line to 0 or 1."""
        self.ioctl(abi.KVM_IRQ_LINE, abi.kvm_irq_level(irq=gsi, level=level))

    def irq_line_status(self, gsi: int, level: int) -> int:
        """As `irq_line`; the number of CPUs reached, 0 coalesced, -1 masked."""
        request = abi.kvm_irq_level(irq=gsi, level=level)
        self.ioctl(abi.KVM_IRQ_LINE_STATUS, request)
        return request.status

    def set_gsi_routing(self, entries: Sequence[abi.kvm_irq_routing_entry]) -> None:
        """Replace the whole routing table."""
        self.ioctl(abi.KVM_SET_GSI_ROUTING, IRQ_ROUTING.pack(entries))

    def irqfd(self, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
        """Let an eventfd raise `gsi`, or with KVM_IRQFD_FLAG_DEASSIGN no more."""
        request = abi.kvm_irqfd(fd=fd, gsi=gsi, flags=flags, resamplefd=resamplefd)
        self.ioctl(abi.KVM_IRQFD, request)

    def ioeventfd(
        self, fd: int, addr: int, length: int, datamatch: int | None = None, flags: int = 0
    ) -> None:
        """Let a guest's write signal an eventfd instead of exiting.

        `flags` as KVM_IOEVENTFD_FLAG_PIO; giving `datamatch` sets that flag.
        """
        if datamatch is not None:
            flags |= abi.KVM_IOEVENTFD_FLAG_DATAMATCH
        request = abi.kvm_ioeventfd(
            datamatch=datamatch or 0, addr=addr, len=length, fd=fd, flags=flags
        )
        self.ioctl(abi.KVM_IOEVENTFD, request)
