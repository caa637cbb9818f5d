"""What a VM and a vCPU are on x86: `struct kvm_arch` and `struct kvm_vcpu_arch` (asm/kvm_host.h).

State and the small things that go with it. `x86.py` completes both classes with the seam to the
generic half; everything between the two works on these.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, IntEnum, auto
from errno import EFAULT
from typing import TYPE_CHECKING

from anykvm.fs.mapping import Memfd
from anykvm.kvm.errors import fail
from anykvm.kvm.kvm_main import Kvm, KvmVcpu, VcpuMode, kvm_get_running_vcpu
from anykvm.kvm.memslots import PAGE_SIZE, KvmMemorySlot, KvmMemslots
from anykvm.kvm.worker import Hrtimer
from anykvm.uapi import kvm as uapi
from anykvm.x86.clock import KvmClock, PvClockPage
from anykvm.x86.cpuid import GuestCpuid
from anykvm.x86.hyperv_state import KvmHv, VcpuHv
from anykvm.x86.kvm_para import KvmFeature, PvCpuid
from anykvm.x86.lapic import Lapic
from anykvm.x86.processor import Cpu, new_engine
from anykvm.x86.sched_info import RunDelay
from anykvm.x86.stats import KvmVcpuStat, KvmVmStat
from anykvm.x86.tsc import host_tsc, host_tsc_khz, scale_tsc, tsc_ratio

if TYPE_CHECKING:
    from anykvm.x86.fastpath import VcpuFastpath
    from anykvm.x86.irq import InKernelIrqchip
    from anykvm.x86.pmu import PmuEventFilter

MASK64 = (1 << 64) - 1
log = logging.getLogger("anykvm.x86")
ADDRESS_SPACES = 2  # the second is system management mode's
IDENTITY_MAP_DEFAULT = 0xFFFBC000
DEFAULT_MAXPHYADDR = 36
KVM_MAX_MCE_BANKS = 32
MSR_IA32_MISC_ENABLE, MISC_ENABLE_MWAIT = 0x1A0, 1 << 18
CR4_OSXSAVE, APIC_BASE_ENABLE = 1 << 18, 1 << 11


class IrqchipMode(Enum):
    """enum kvm_irqchip_mode."""

    NONE = auto()  # interrupt controllers are the VMM's
    KERNEL = auto()
    SPLIT = auto()  # only the local APICs are here


class MpState(IntEnum):
    """KVM_MP_STATE_*."""

    RUNNABLE = uapi.KVM_MP_STATE_RUNNABLE
    UNINITIALIZED = uapi.KVM_MP_STATE_UNINITIALIZED
    INIT_RECEIVED = uapi.KVM_MP_STATE_INIT_RECEIVED
    HALTED = uapi.KVM_MP_STATE_HALTED
    SIPI_RECEIVED = uapi.KVM_MP_STATE_SIPI_RECEIVED


class Request(IntEnum):  # whose hash is an int's
    """KVM_REQ_*: what a vCPU does before it enters the guest again."""

    EVENT = auto()  # look for interrupts
    CLOCK_UPDATE = auto()  # write the pvclock page
    IOAPIC_EOI_EXIT = auto()  # split irqchip: tell the VMM of an EOI
    TRIPLE_FAULT = auto()
    STEAL_UPDATE = auto()  # write the record of steal time
    TLB_FLUSH_GUEST = auto()  # another vCPU's guest asked for it
    HV_CRASH = auto()
    HV_RESET = auto()
    HV_EXIT = auto()  # tell the VMM what is in `hv.exit`
    HV_STIMER = auto()  # look at the synthetic timers
    REPORT_TPR_ACCESS = auto()


@dataclass(slots=True)
class Smm:
    """A vCPU's system management mode, see smm.py."""

    active: bool = False
    inside_nmi: bool = False  # NMIs were blocked when it was entered
    pending: bool = False  # an SMI waits
    count: int = 0
    smbase: int = 0x30000


@dataclass(slots=True)
class Mce:
    """A vCPU's machine-check registers, see mce.py: banks are CTL, STATUS, ADDR and MISC each."""

    cap: int = KVM_MAX_MCE_BANKS
    status: int = 0
    ctl: int = 0
    ext_ctl: int = 0
    banks: list[int] = field(default_factory=lambda: [0] * 4 * KVM_MAX_MCE_BANKS)
    ctl2: list[int] = field(default_factory=lambda: [0] * KVM_MAX_MCE_BANKS)


@dataclass(frozen=True, slots=True)
class PendingException:
    """An exception that waits to be delivered (KVM_SET_VCPU_EVENTS)."""

    vector: int
    error_code: int | None = None
    payload: int | None = None  # of #DB, what it does to DR6
    injected: bool = False  # its delivery had begun


class KvmX86(Kvm):
    """A VM. `irqchip.lock` guards every interrupt controller of it."""

    address_space_num = ADDRESS_SPACES
    irqchip: InKernelIrqchip
    stat_type = KvmVmStat
    stat: KvmVmStat

    def __init__(self) -> None:
        super().__init__()
        self.engine = new_engine()
        self.clock = KvmClock()
        self.cur_tsc_offset = -self.clock.master_tsc & MASK64  # the TSC starts with the VM
        self.default_tsc_khz = self.last_tsc_khz = host_tsc_khz()
        self.irqchip_mode = IrqchipMode.NONE
        self.bsp_vcpu_id = 0
        self.tss_addr = 0
        self.identity_map_addr = IDENTITY_MAP_DEFAULT
        self.nr_mmu_pages = 0
        self.disabled_quirks = 0
        self.nr_reserved_ioapic_pins = 0
        self.x2apic_format = False
        self.x2apic_broadcast_quirk = True
        self.exception_payload_enabled = False
        self.triple_fault_event = False
        self.user_space_msr_mask = 0
        self.msr_filter: Callable[[int, bool], bool] | None = None
        self.hv = KvmHv()
        self.hypercall_exit_enabled = 0  # KVM_CAP_EXIT_HYPERCALL
        self.xen_hvm_config = uapi.kvm_xen_hvm_config()
        self.disabled_exits = 0  # KVM_X86_DISABLE_EXITS_*
        self.exit_on_emulation_error = False
        self.guest_can_read_msr_platform_info = True
        self.bus_lock_detection_enabled = False
        self.max_vcpu_ids = 0  # KVM_CAP_MAX_VCPU_ID; 0 until it was set
        self.max_halt_poll_ns = 0
        self.pmu_event_filter: PmuEventFilter | None = None
        self.wall_clock_gpa = 0

    def irqchip_in_kernel(self) -> bool:
        return self.irqchip_mode is not IrqchipMode.NONE

    def pic_in_kernel(self) -> bool:
        return self.irqchip_mode is IrqchipMode.KERNEL

    def x86_vcpus(self) -> list[VcpuX86]:
        return [v for v in self.vcpus.values() if isinstance(v, VcpuX86)]

    def has_quirk(self, quirk: int) -> bool:
        """`kvm_check_has_quirk`: an old behaviour that the VMM has not disabled."""
        return not self.disabled_quirks & quirk

    def memslots_of(self, space: int) -> KvmMemslots:
        """The slots of an address space: 0, or 1 for system management mode."""
        return self.address_spaces[space]

    def xen_hypercall_enabled(self) -> bool:
        """`kvm_xen_hypercall_enabled`: hypercalls are Xen's, and the VMM answers them."""
        config = self.xen_hvm_config
        return bool(config.msr and config.flags & uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL)

    def writable(self, gpa: int, space: int = 0) -> bool:
        """Whether a slot has memory there that may be written."""
        slot = self.memslots_of(space).gpa_to_memslot(gpa)
        return slot is not None and not slot.readonly

    def kvm_read_guest(self, gpa: int, size: int, space: int = 0) -> bytes:
        """Guest memory within a page; EFAULT where there is none."""
        slot = self.memslots_of(space).gpa_to_memslot(gpa)
        if slot is None:
            raise fail(EFAULT, f"guest address {gpa:#x} is no memory")
        return self.mm.read(slot.hva(gpa), size)

    def kvm_write_guest(self, gpa: int, data: bytes, space: int = 0) -> None:
        """Write guest memory on behalf of KVM itself; EFAULT outside of writable slots."""
        while data:
            slot = self.memslots_of(space).gpa_to_memslot(gpa)
            if slot is None or slot.readonly:
                raise fail(EFAULT, f"guest address {gpa:#x} is not writable memory")
            part = min(len(data), PAGE_SIZE - gpa % PAGE_SIZE)
            self.mm.write(slot.hva(gpa), data[:part])
            self.mark_page_dirty(slot, gpa, part)
            self.engine.code_written(gpa, part, space)
            gpa, data = gpa + part, data[part:]

    def mark_page_dirty(self, slot: KvmMemorySlot, gpa: int, size: int) -> None:
        """`mark_page_dirty_in_slot`, after KVM itself wrote within a page."""
        if not self.dirty_ring_size:
            slot.mark_dirty(gpa, size)
        elif slot.log_dirty:
            vcpu = kvm_get_running_vcpu()
            if isinstance(vcpu, VcpuX86):
                vcpu.cpu.mark_dirty(gpa, slot.as_id)
            else:
                log.warning("write to %#x outside of a vCPU's ioctl: in no dirty ring", gpa)


class VcpuX86(KvmVcpu):
    """A vCPU. Any thread may add to `requests`; all else is the thread's that is in an ioctl."""

    kvm: KvmX86
    stat_type = KvmVcpuStat
    stat: KvmVcpuStat

    def __init__(self, kvm: KvmX86, vcpu_id: int, memfd: Memfd) -> None:
        super().__init__(kvm, vcpu_id, memfd)
        self.cpu: Cpu = kvm.engine.create_cpu(self.vcpu_idx, ticks=True)
        self.state = self.cpu.state
        if self.dirty_ring is not None:
            ring = self.dirty_ring
            self.cpu.set_dirty_ring(ring.address, ring.size, ring.soft_limit)
        self.cpuid = GuestCpuid()
        self.msrs: dict[int, int] = {}  # those that are only stored
        self.tsc_khz = host_tsc_khz()
        self.smm = Smm()
        self.mce = Mce()
        self.halted_in_guest = False  # by HLT, with its exits disabled
        self.halt_poll_ns = 0  # how long it looks for work before it sleeps, see halt_poll.py
        self.state.bus_lock_exits = int(kvm.bus_lock_detection_enabled)
        self.pvclock = PvClockPage(kvm.clock)
        self.pv_cpuid = PvCpuid()
        self.hv = VcpuHv(self.vcpu_idx)
        self.cpu.svm.permissions.knows_hyperv = self.uses_hyperv
        self.run_delay = RunDelay()
        self.steal_record_due = False  # the record of steal time is to be written in any case
        self.pv_eoi_pending = False  # the guest may have skipped an EOI
        self.requests: set[Request] = set()
        self.pending_ioapic_eoi = 0
        self.nmi_pending = 0
        self.injected_vector: int | None = None  # KVM_INTERRUPT's
        self.exception: PendingException | None = None
        self.guest_debug = 0  # KVM_GUESTDBG_*
        self.look_for_signals = False
        self.complete_userspace_io: Callable[[], int] | None = None
        self.fastpath: VcpuFastpath | None = None  # from the first KVM_RUN on
        self.mp_state = MpState.RUNNABLE
        self.apic: Lapic | None = None
        self.lapic_timer: Hrtimer | None = None
        self.has_run = False  # the guest was entered: its CPUID stays as it is
        self.in_run = False  # inside of KVM_RUN, where alone the timer interrupts
        self.vapic_addr = 0
        self.tpr_access_reporting = False

    @property
    def is_bsp(self) -> bool:
        return self.vcpu_id == self.kvm.bsp_vcpu_id

    def scaled_tsc(self) -> int:
        """The host's TSC at the guest's rate."""
        return scale_tsc(host_tsc(), self.state.tsc_ratio)

    def guest_tsc(self) -> int:
        return self.scaled_tsc() + self.l1_tsc_offset & MASK64

    @property
    def l1_tsc_offset(self) -> int:
        """Without what a hypervisor in the guest adds for its own guest."""
        return self.cpu.svm.l1_tsc_offset

    def set_guest_tsc(self, value: int) -> None:
        """Make the guest's TSC read `value` now."""
        self.set_tsc_offset(value - self.scaled_tsc() & MASK64)

    def set_tsc_khz(self, khz: int) -> bool:
        """`kvm_set_tsc_khz`: the rate of the guest's TSC; False for one that cannot be had."""
        ratio = tsc_ratio(khz)
        if ratio is None:
            return False
        self.tsc_khz, self.state.tsc_ratio = khz, ratio
        self._tsc_changed()
        return True

    def synchronize_tsc(self, value: int) -> None:
        """The VMM writes the TSC. Zero, or within a second of what the other vCPUs count, means
        theirs, if they count as fast: VMMs write each vCPU's in turn and want one time
        (`kvm_synchronize_tsc`).
        """
        kvm, tsc = self.kvm, self.scaled_tsc()
        ahead = value - (tsc + kvm.cur_tsc_offset) & MASK64
        second = self.tsc_khz * 1000
        other = value and second < ahead < MASK64 - second
        if other or self.tsc_khz != kvm.last_tsc_khz:
            kvm.cur_tsc_offset, kvm.last_tsc_khz = value - tsc & MASK64, self.tsc_khz
        self.set_tsc_offset(kvm.cur_tsc_offset)

    def set_tsc_offset(self, offset: int) -> None:
        nested = self.state.tsc_offset - self.l1_tsc_offset
        self.state.tsc_offset = offset + nested & MASK64
        self._tsc_changed()

    def _tsc_changed(self) -> None:
        self.requests.add(Request.CLOCK_UPDATE)
        if self.apic is not None:
            with self.kvm.irqchip.lock:
                self.apic.tsc_changed()

    def update_cpuid_runtime(self, cpuid: GuestCpuid | None = None) -> None:
        """`kvm_update_cpuid_runtime`: the bits of CPUID that follow registers."""
        cpuid = self.cpuid if cpuid is None else cpuid
        quirk = self.kvm.has_quirk(uapi.KVM_X86_QUIRK_MISC_ENABLE_NO_MWAIT)
        misc_enable = self.msrs.get(MSR_IA32_MISC_ENABLE, 0)
        cpuid.set_runtime(
            osxsave=bool(self.state.cr4 & CR4_OSXSAVE),
            apic_enabled=bool(self.state.apic_base & APIC_BASE_ENABLE),
            mwait=None if quirk else bool(misc_enable & MISC_ENABLE_MWAIT),
        )
        leaf = cpuid.kvm_features()
        if leaf is not None and self.kvm.disabled_exits & uapi.KVM_X86_DISABLE_EXITS_HLT:
            leaf.eax &= ~(1 << KvmFeature.PV_UNHALT)

    def uses_hyperv(self) -> bool:
        """`kvm_hv_hypercall_enabled`: the guest has made itself known to Hyper-V's interface."""
        return self.hv.cpuid.enabled and bool(self.kvm.hv.guest_os_id)

    def maxphyaddr(self) -> int:
        """`cpuid_maxphyaddr`: 36 where the guest's CPUID does not say."""
        leaf = self.cpuid.find(0x80000008)
        return leaf.eax & 0xFF if leaf is not None else DEFAULT_MAXPHYADDR

    def kick(self) -> None:
        self.make_request(Request.EVENT)

    def make_request(self, request: Request) -> None:
        """`kvm_make_request` and `kvm_vcpu_kick`: the order of the two lines loses no wake-up."""
        self.requests.add(request)
        if self.mode == VcpuMode.IN_GUEST_MODE:
            self.cpu.request_exit()
        elif self.mode == VcpuMode.BLOCKED:
            self.sigset.wake()

    def inject_nmi(self) -> None:
        """Queue an NMI: one in service and one more, as the processor keeps (SDM vol. 3, 6.7)."""
        self.nmi_pending = min(self.nmi_pending + 1, 2)
        self.kick()
