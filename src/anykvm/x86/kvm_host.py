"""What a VM and a vCPU are on x86: `struct kvm_arch` and `struct kvm_vcpu_arch` (asm/kvm_host.h).

State and the small things that go with it. `x86.py` completes both classes with the seam to the
generic half; everything between the two works on these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, IntEnum, auto
from errno import EFAULT
from typing import TYPE_CHECKING

from anykvm.fs.mapping import Memfd
from anykvm.kvm.errors import fail
from anykvm.kvm.kvm_main import Kvm, KvmVcpu, VcpuMode
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.kvm.worker import Hrtimer
from anykvm.uapi import kvm as uapi
from anykvm.x86.clock import KvmClock, PvClockPage
from anykvm.x86.cpuid import GuestCpuid
from anykvm.x86.lapic import Lapic
from anykvm.x86.processor import Cpu, new_engine
from anykvm.x86.tsc import host_tsc, host_tsc_khz

if TYPE_CHECKING:
    from anykvm.x86.irq import InKernelIrqchip

MASK64 = (1 << 64) - 1
IDENTITY_MAP_DEFAULT = 0xFFFBC000
DEFAULT_MAXPHYADDR = 36


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


class Request(Enum):
    """KVM_REQ_*: what a vCPU does before it enters the guest again."""

    EVENT = auto()  # look for interrupts
    CLOCK_UPDATE = auto()  # write the pvclock page
    IOAPIC_EOI_EXIT = auto()  # split irqchip: tell the VMM of an EOI
    TRIPLE_FAULT = auto()
    REPORT_TPR_ACCESS = auto()


@dataclass(frozen=True, slots=True)
class PendingException:
    """An exception that waits to be delivered (KVM_SET_VCPU_EVENTS)."""

    vector: int
    error_code: int | None = None


class KvmX86(Kvm):
    """A VM. `irqchip.lock` guards every interrupt controller of it."""

    irqchip: InKernelIrqchip

    def __init__(self) -> None:
        super().__init__()
        self.engine = new_engine()
        self.clock = KvmClock()
        self.cur_tsc_offset = -self.clock.master_tsc & MASK64  # the TSC starts with the VM
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
        self.wall_clock_gpa = 0
        self.wall_clock_version = 0

    def irqchip_in_kernel(self) -> bool:
        return self.irqchip_mode is not IrqchipMode.NONE

    def pic_in_kernel(self) -> bool:
        return self.irqchip_mode is IrqchipMode.KERNEL

    def x86_vcpus(self) -> list[VcpuX86]:
        return [v for v in self.vcpus.values() if isinstance(v, VcpuX86)]

    def kvm_read_guest(self, gpa: int, size: int) -> bytes:
        """Guest memory within a page; EFAULT where there is none."""
        slot = self.memslots.gpa_to_memslot(gpa)
        if slot is None:
            raise fail(EFAULT, f"guest address {gpa:#x} is no memory")
        return self.mm.read(slot.hva(gpa), size)

    def kvm_write_guest(self, gpa: int, data: bytes) -> None:
        """Write guest memory on behalf of KVM itself; EFAULT outside of writable slots."""
        while data:
            slot = self.memslots.gpa_to_memslot(gpa)
            if slot is None or slot.readonly:
                raise fail(EFAULT, f"guest address {gpa:#x} is not writable memory")
            part = min(len(data), PAGE_SIZE - gpa % PAGE_SIZE)
            self.mm.write(slot.hva(gpa), data[:part])
            slot.mark_dirty(gpa, part)
            gpa, data = gpa + part, data[part:]


class VcpuX86(KvmVcpu):
    """A vCPU. Any thread may add to `requests`; all else is the thread's that is in an ioctl."""

    kvm: KvmX86

    def __init__(self, kvm: KvmX86, vcpu_id: int, memfd: Memfd) -> None:
        super().__init__(kvm, vcpu_id, memfd)
        self.cpu: Cpu = kvm.engine.create_cpu(self.vcpu_idx, ticks=True)
        self.state = self.cpu.state
        self.cpuid = GuestCpuid()
        self.msrs: dict[int, int] = {}  # those that are only stored
        self.tsc_khz = host_tsc_khz()
        self.pvclock = PvClockPage(kvm.clock)
        self.requests: set[Request] = set()
        self.pending_ioapic_eoi = 0
        self.nmi_pending = 0
        self.injected_vector: int | None = None  # KVM_INTERRUPT's
        self.exception: PendingException | None = None
        self.look_for_signals = False
        self.complete_userspace_io: Callable[[], int] | None = None
        self.mp_state = MpState.RUNNABLE
        self.apic: Lapic | None = None
        self.lapic_timer: Hrtimer | None = None
        self.vapic_addr = 0
        self.tpr_access_reporting = False

    @property
    def is_bsp(self) -> bool:
        return self.vcpu_id == self.kvm.bsp_vcpu_id

    def guest_tsc(self) -> int:
        tsc: int = host_tsc()
        return tsc + self.state.tsc_offset & MASK64

    def set_guest_tsc(self, value: int) -> None:
        """Make the guest's TSC read `value` now."""
        tsc: int = host_tsc()
        self.set_tsc_offset(value - tsc & MASK64)

    def synchronize_tsc(self, value: int) -> None:
        """The VMM writes the TSC. Zero, or within a second of what the other vCPUs count, means
        theirs: VMMs write each vCPU's in turn and want one time (`kvm_synchronize_tsc`).
        """
        tsc: int = host_tsc()
        ahead = value - (tsc + self.kvm.cur_tsc_offset) & MASK64
        second = self.tsc_khz * 1000
        if value and second < ahead < MASK64 - second:
            self.kvm.cur_tsc_offset = value - tsc & MASK64
        self.set_tsc_offset(self.kvm.cur_tsc_offset)

    def set_tsc_offset(self, offset: int) -> None:
        self.state.tsc_offset = offset
        self.requests.add(Request.CLOCK_UPDATE)
        if self.apic is not None:
            with self.kvm.irqchip.lock:
                self.apic.tsc_changed()

    def maxphyaddr(self) -> int:
        """`cpuid_maxphyaddr`: 36 where the guest's CPUID does not say."""
        leaf = self.cpuid.find(0x80000008)
        return leaf.eax & 0xFF if leaf is not None else DEFAULT_MAXPHYADDR

    def complete_out(self) -> int:
        """Userspace has taken what OUT sent."""
        self.cpu.complete_out()
        return 1

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
