"""VM ioctls of x86: interrupt controllers, timer, clock, addresses that VMX needed, MSR filter."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_uint64
from dataclasses import dataclass, replace
from errno import EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENXIO

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOut, Need, Out, Value
from anykvm.kvm.irqchip import IrqRoutingTable
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.uapi import kvm as uapi
from anykvm.x86.i8254 import Pit
from anykvm.x86.kvm_host import IDENTITY_MAP_DEFAULT, IrqchipMode, KvmX86
from anykvm.x86.msrs import restart_clocks
from anykvm.x86.tables import vm_ioctls

NO_VCPU: Need[KvmX86] = Need(lambda kvm: not kvm.vcpus, EINVAL, "must come before any vCPU")
IRQCHIP: Need[KvmX86] = Need(
    KvmX86.pic_in_kernel, ENXIO, "there is no full in-kernel irqchip", after_copy=True
)
PIT: Need[KvmX86] = Need(
    lambda kvm: kvm.irqchip.pit is not None, ENXIO, "there is no in-kernel PIT"
)
PIT_AFTER_COPY = replace(PIT, after_copy=True)
MAX_TSS_ADDR = (1 << 32) - 3 * PAGE_SIZE
MIN_MMU_PAGES = 64


@vm_ioctls.row(
    "KVM_SET_TSS_ADDR",
    Value(),
    uapi.KVM_CAP_SET_TSS_ADDR,
    errors={EINVAL: "three pages do not fit below 4 GiB"},
)
def kvm_vm_ioctl_set_tss_addr(kvm: KvmX86, addr: int) -> None:
    """Where VT-x without unrestricted guests keeps three pages; a software processor needs none."""
    if addr > MAX_TSS_ADDR:
        raise fail(EINVAL, f"{addr:#x} leaves no room for three pages below 4 GiB")
    kvm.tss_addr = addr


@vm_ioctls.row(
    "KVM_SET_IDENTITY_MAP_ADDR",
    In(c_uint64),
    uapi.KVM_CAP_SET_IDENTITY_MAP_ADDR,
    needs=(NO_VCPU,),
)
def kvm_vm_ioctl_set_identity_map_addr(kvm: KvmX86, addr: c_uint64) -> None:
    """Where VT-x kept a page table; remembered, and not used. 0 is the default."""
    kvm.identity_map_addr = addr.value or IDENTITY_MAP_DEFAULT


@vm_ioctls.row("KVM_SET_NR_MMU_PAGES", Value(), errors={EINVAL: "fewer than 64"})
def kvm_vm_ioctl_set_nr_mmu_pages(kvm: KvmX86, pages: int) -> None:
    """The size of the shadow page tables, of which there are none: only remembered."""
    if pages < MIN_MMU_PAGES:
        raise fail(EINVAL, f"{pages} pages are fewer than {MIN_MMU_PAGES}")
    kvm.nr_mmu_pages = pages


@vm_ioctls.row("KVM_GET_NR_MMU_PAGES", Value(), returns="what KVM_SET_NR_MMU_PAGES has set")
def kvm_vm_ioctl_get_nr_mmu_pages(kvm: KvmX86, _: int) -> int:
    """What was set; there are no shadow page tables."""
    return kvm.nr_mmu_pages


@vm_ioctls.row(
    "KVM_SET_BOOT_CPU_ID", Value(), uapi.KVM_CAP_SET_BOOT_CPU_ID, errors={EBUSY: "there is a vCPU"}
)
def kvm_vm_ioctl_set_boot_cpu_id(kvm: KvmX86, vcpu_id: int) -> None:
    """The vCPU that starts; the others wait for INIT and SIPI. 0 unless set."""
    if kvm.vcpus:
        raise fail(EBUSY, "must come before any vCPU")
    kvm.bsp_vcpu_id = vcpu_id


@vm_ioctls.row(
    "KVM_CREATE_IRQCHIP",
    Value(),
    uapi.KVM_CAP_IRQCHIP,
    errors={EEXIST: "there is an irqchip", EINVAL: "there is a vCPU"},
)
def kvm_vm_ioctl_create_irqchip(kvm: KvmX86, _: int) -> None:
    """The 8259 pair, the IOAPIC and, with each vCPU, a local APIC."""
    with kvm.lock:
        if kvm.irqchip_in_kernel():
            raise fail(EEXIST, "there is an irqchip already")
        if kvm.vcpus:
            raise fail(EINVAL, "the irqchip must be there before any vCPU")
        kvm.irqchip.create()
        kvm.irq_routing = IrqRoutingTable(kvm.irqchip.default_routing())
        kvm.irqchip_mode = IrqchipMode.KERNEL


@dataclass(frozen=True, slots=True)
class Chip:
    """How KVM_GET_IRQCHIP and KVM_SET_IRQCHIP reach one of the chips."""

    get: Callable[[KvmX86, uapi.kvm_irqchip_chip], None]
    set: Callable[[KvmX86, uapi.kvm_irqchip_chip], None]


def _pic(n: int) -> Chip:
    def get(kvm: KvmX86, chip: uapi.kvm_irqchip_chip) -> None:
        chip.pic = kvm.irqchip.pic.get_state(n)

    def put(kvm: KvmX86, chip: uapi.kvm_irqchip_chip) -> None:
        kvm.irqchip.pic.set_state(n, chip.pic)

    return Chip(get, put)


def _get_ioapic(kvm: KvmX86, chip: uapi.kvm_irqchip_chip) -> None:
    chip.ioapic = kvm.irqchip.ioapic.get_state()


def _set_ioapic(kvm: KvmX86, chip: uapi.kvm_irqchip_chip) -> None:
    kvm.irqchip.ioapic.set_state(chip.ioapic)


CHIPS: dict[int, Chip] = {
    uapi.KVM_IRQCHIP_PIC_MASTER: _pic(0),
    uapi.KVM_IRQCHIP_PIC_SLAVE: _pic(1),
    uapi.KVM_IRQCHIP_IOAPIC: Chip(_get_ioapic, _set_ioapic),
}


def _chip(chip_id: int) -> Chip:
    found = CHIPS.get(chip_id)
    if found is None:
        raise fail(EINVAL, f"there is no irqchip {chip_id}")
    return found


@vm_ioctls.row(
    "KVM_GET_IRQCHIP",
    InOut(uapi.kvm_irqchip),
    uapi.KVM_CAP_IRQCHIP,
    needs=(IRQCHIP,),
    errors={EINVAL: "there is no such chip"},
)
def kvm_vm_ioctl_get_irqchip(kvm: KvmX86, chip: uapi.kvm_irqchip) -> None:
    """The state of one of the 8259s or of the IOAPIC."""
    with kvm.irqchip.lock:
        _chip(chip.chip_id).get(kvm, chip.chip)


@vm_ioctls.row(
    "KVM_SET_IRQCHIP",
    In(uapi.kvm_irqchip),
    uapi.KVM_CAP_IRQCHIP,
    needs=(IRQCHIP,),
    errors={EINVAL: "there is no such chip"},
)
def kvm_vm_ioctl_set_irqchip(kvm: KvmX86, chip: uapi.kvm_irqchip) -> None:
    """Load the state of one of the 8259s or of the IOAPIC."""
    with kvm.irqchip.lock:
        _chip(chip.chip_id).set(kvm, chip.chip)
    for vcpu in kvm.x86_vcpus():
        vcpu.kick()


def _create_pit(kvm: KvmX86, flags: int) -> None:
    with kvm.lock:
        if kvm.irqchip.pit is not None:
            raise fail(EEXIST, "there is a PIT already")
        if not kvm.pic_in_kernel():
            raise fail(ENOENT, "the PIT needs the in-kernel irqchip")
        kvm.irqchip.create_pit(flags)


@vm_ioctls.row(
    "KVM_CREATE_PIT",
    Value(),
    uapi.KVM_CAP_PIT,
    errors={EEXIST: "there is a PIT", ENOENT: "there is no in-kernel irqchip"},
)
def kvm_vm_ioctl_create_pit(kvm: KvmX86, _: int) -> None:
    """As KVM_CREATE_PIT2 with KVM_PIT_SPEAKER_DUMMY."""
    _create_pit(kvm, uapi.KVM_PIT_SPEAKER_DUMMY)


@vm_ioctls.row(
    "KVM_CREATE_PIT2",
    In(uapi.kvm_pit_config),
    uapi.KVM_CAP_PIT2,
    errors={EEXIST: "there is a PIT", ENOENT: "there is no in-kernel irqchip"},
)
def kvm_vm_ioctl_create_pit2(kvm: KvmX86, config: uapi.kvm_pit_config) -> None:
    """The 8254 on line 0, and port 0x61 unless that is left to the VMM."""
    _create_pit(kvm, config.flags)


def _the_pit(kvm: KvmX86) -> Pit:
    assert kvm.irqchip.pit is not None
    return kvm.irqchip.pit


@vm_ioctls.row("KVM_GET_PIT", InOut(uapi.kvm_pit_state), uapi.KVM_CAP_PIT, needs=(PIT_AFTER_COPY,))
def kvm_vm_ioctl_get_pit(kvm: KvmX86, state: uapi.kvm_pit_state) -> None:
    """The three counters."""
    with kvm.irqchip.lock:
        state.channels = _the_pit(kvm).get_state().channels


@vm_ioctls.row("KVM_SET_PIT", In(uapi.kvm_pit_state), uapi.KVM_CAP_PIT, needs=(PIT_AFTER_COPY,))
def kvm_vm_ioctl_set_pit(kvm: KvmX86, state: uapi.kvm_pit_state) -> None:
    """Load the three counters."""
    with kvm.irqchip.lock:
        _the_pit(kvm).set_state(uapi.kvm_pit_state2(channels=state.channels))


@vm_ioctls.row("KVM_GET_PIT2", Out(uapi.kvm_pit_state2), uapi.KVM_CAP_PIT_STATE2, needs=(PIT,))
def kvm_vm_ioctl_get_pit2(kvm: KvmX86, state: uapi.kvm_pit_state2) -> None:
    """The three counters and the flags."""
    with kvm.irqchip.lock:
        found = _the_pit(kvm).get_state()
    state.channels, state.flags = found.channels, found.flags


@vm_ioctls.row(
    "KVM_SET_PIT2", In(uapi.kvm_pit_state2), uapi.KVM_CAP_PIT_STATE2, needs=(PIT_AFTER_COPY,)
)
def kvm_vm_ioctl_set_pit2(kvm: KvmX86, state: uapi.kvm_pit_state2) -> None:
    """Load the three counters and the flags."""
    with kvm.irqchip.lock:
        _the_pit(kvm).set_state(state)


@vm_ioctls.row(
    "KVM_REINJECT_CONTROL",
    In(uapi.kvm_reinject_control),
    uapi.KVM_CAP_REINJECT_CONTROL,
    needs=(PIT_AFTER_COPY,),
)
def kvm_vm_ioctl_reinject(kvm: KvmX86, control: uapi.kvm_reinject_control) -> None:
    """Whether ticks that the guest has missed are delivered later."""
    with kvm.irqchip.lock:
        _the_pit(kvm).set_reinject(bool(control.pit_reinject))


@vm_ioctls.row("KVM_GET_CLOCK", Out(uapi.kvm_clock_data), uapi.KVM_CAP_ADJUST_CLOCK)
def kvm_vm_ioctl_get_clock(kvm: KvmX86, data: uapi.kvm_clock_data) -> None:
    """kvmclock in nanoseconds, with the host's time and TSC of the same moment."""
    now = kvm.clock.get()
    data.clock, data.flags = now.clock, now.flags
    data.realtime, data.host_tsc = now.realtime, now.host_tsc


@vm_ioctls.row(
    "KVM_SET_CLOCK",
    In(uapi.kvm_clock_data),
    uapi.KVM_CAP_ADJUST_CLOCK,
    errors={EINVAL: "unknown flags"},
)
def kvm_vm_ioctl_set_clock(kvm: KvmX86, data: uapi.kvm_clock_data) -> None:
    """Let kvmclock go on from here; with KVM_CLOCK_REALTIME, plus the time since."""
    kvm.clock.set(data)
    restart_clocks(kvm)


# Which MSRs the guest may reach (api.rst 4.97).


@dataclass(frozen=True, slots=True)
class MsrRange:
    """A bitmap from `base` on: set bits allow the accesses of `flags`, clear ones deny them."""

    flags: int
    base: int
    nmsrs: int
    bitmap: int

    def decides(self, index: int, access: int) -> bool:
        return bool(self.flags & access) and self.base <= index < self.base + self.nmsrs

    def allows(self, index: int) -> bool:
        return bool(self.bitmap >> index - self.base & 1)


def _read_range(kvm: KvmX86, given: uapi.kvm_msr_filter_range) -> MsrRange | None:
    if not given.nmsrs:
        return None
    size = (given.nmsrs + 63) // 64 * 8
    known = uapi.KVM_MSR_FILTER_READ | uapi.KVM_MSR_FILTER_WRITE
    if size > uapi.KVM_MSR_FILTER_MAX_BITMAP_SIZE or given.flags & ~known:
        raise fail(EINVAL, f"MSR filter: {given.nmsrs} registers, flags {given.flags:#x}")
    bits = int.from_bytes(kvm.mm.read(given.bitmap, size), "little")
    return MsrRange(given.flags, given.base, given.nmsrs, bits)


@vm_ioctls.row(
    "KVM_X86_SET_MSR_FILTER",
    In(uapi.kvm_msr_filter),
    uapi.KVM_CAP_X86_MSR_FILTER,
    errors={
        EINVAL: "unknown flags, a bitmap that is too large, or everything denied without a range",
        EFAULT: "a bitmap cannot be read",
    },
)
def kvm_vm_ioctl_set_msr_filter(kvm: KvmX86, given: uapi.kvm_msr_filter) -> None:
    """Replace the filter; without any range every access is allowed again."""
    deny = bool(given.flags & uapi.KVM_MSR_FILTER_DEFAULT_DENY)
    ranges = [r for r in (_read_range(kvm, each) for each in given.ranges) if r is not None]
    if given.flags & ~uapi.KVM_MSR_FILTER_DEFAULT_DENY or (deny and not ranges):
        raise fail(EINVAL, f"MSR filter: flags {given.flags:#x} with {len(ranges)} ranges")

    def allows(index: int, write: bool) -> bool:
        access = uapi.KVM_MSR_FILTER_WRITE if write else uapi.KVM_MSR_FILTER_READ
        for each in ranges:
            if each.decides(index, access):
                return each.allows(index)
        return not deny

    kvm.msr_filter = allows if ranges else None
