"""The in-kernel interrupt controllers of one VM, wired to each other and to the vCPUs.

arch/x86/kvm/irq.c and irq_comm.c: the 8259 pair, the IOAPIC and the PIT on their buses, the local
APICs, messages (MSI), and which interrupt a vCPU takes next. `lock` is held around every call of a
controller.
"""

from __future__ import annotations

import threading
import time
from errno import EINVAL
from functools import partial

from anykvm.fs.trace import trace
from anykvm.kvm.errors import fail
from anykvm.kvm.iodev import KvmBus, KvmIoDevice
from anykvm.kvm.irqchip import (
    KVM_PIT_IRQ_SOURCE_ID,
    KernelIrqRoutingEntry,
    kvm_notify_acked_irq,
    kvm_set_irq,
)
from anykvm.kvm.kvm_main import KvmVcpu
from anykvm.uapi import kvm as uapi
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.hyperv_synic import kvm_hv_synic_send_eoi, kvm_hv_synic_set_irq
from anykvm.x86.i8254 import Pit
from anykvm.x86.i8259 import PIC_NUM_PINS, PIC_PORTS, Pic
from anykvm.x86.ioapic import IOAPIC_DEFAULT_BASE_ADDRESS, IOAPIC_MEM_LENGTH, Ioapic
from anykvm.x86.kvm_host import IrqchipMode, KvmX86, Request, VcpuX86
from anykvm.x86.lapic import Lapic, LapicIrq, LapicOptions, LapicOutputs, LapicTime
from anykvm.x86.smm import kvm_inject_smi

MSI_DEST_SHIFT, MSI_EXT_DEST_SHIFT = 12, 5
MSI_REDIRECT_HINT, MSI_LOGICAL = 1 << 3, 1 << 2
PIT_GSI = 0


class PortDevice(KvmIoDevice):
    """A chip of byte-wide ports on the PIO bus; wider accesses read zero and write nothing."""

    def __init__(self, lock: threading.RLock, chip: Pic | Pit) -> None:
        self._lock, self._chip = lock, chip

    def read(self, vcpu: KvmVcpu, addr: int, length: int) -> bytes | None:
        if length != 1:
            return bytes(length)
        with self._lock:
            return bytes((self._chip.read(addr),))

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        if len(data) == 1:
            with self._lock:
                self._chip.write(addr, data[0])
        return True


class IoapicDevice(KvmIoDevice):
    """The IOAPIC's page: aligned accesses of 1, 2, 4 and 8 bytes."""

    def __init__(self, lock: threading.RLock, ioapic: Ioapic) -> None:
        self._lock, self._ioapic = lock, ioapic

    def read(self, vcpu: KvmVcpu, addr: int, length: int) -> bytes | None:
        with self._lock:
            value = self._ioapic.read(addr & IOAPIC_MEM_LENGTH - 1 & ~0xF, length)
        return value.to_bytes(length, "little")

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        with self._lock:
            value = int.from_bytes(data, "little")
            self._ioapic.write(addr & IOAPIC_MEM_LENGTH - 1 & ~0xF, value, len(data))
        return True


class InKernelIrqchip:
    """All controllers of a VM; which of them exist says `kvm.irqchip_mode`."""

    def __init__(self, kvm: KvmX86) -> None:
        self.kvm = kvm
        self.lock = threading.RLock()
        self.pic = Pic(
            output=self._pic_output,
            ack=partial(self._acked, uapi.KVM_IRQCHIP_PIC_MASTER),
            mask_changed=partial(self._mask_changed, uapi.KVM_IRQCHIP_PIC_MASTER),
            accepts_intr=self._accepts_pic_intr,
        )
        self.ioapic = Ioapic(
            deliver=self.deliver,
            ack=partial(self._acked, uapi.KVM_IRQCHIP_IOAPIC),
            mask_changed=partial(self._mask_changed, uapi.KVM_IRQCHIP_IOAPIC),
            resample=self._resample,
        )
        self.pit: Pit | None = None
        self._pit_timer = kvm.worker.hrtimer(self._pit_expired)
        self._eoi_vectors: frozenset[int] = frozenset()
        self._by_physical: dict[int, VcpuX86] | None = None

    # Creation.

    def create(self) -> None:
        """KVM_CREATE_IRQCHIP: the chips join their buses, and GSIs get their usual meaning."""
        pic, ioapic = PortDevice(self.lock, self.pic), IoapicDevice(self.lock, self.ioapic)
        with self.kvm.slots_lock:
            for port in PIC_PORTS:
                self.kvm.buses[KvmBus.PIO_BUS].register_dev(port, 1, pic)
            mmio = self.kvm.buses[KvmBus.MMIO_BUS]
            mmio.register_dev(IOAPIC_DEFAULT_BASE_ADDRESS, IOAPIC_MEM_LENGTH, ioapic)

    def create_pit(self, flags: int) -> None:
        """KVM_CREATE_PIT2."""
        self.pit = Pit(time.monotonic_ns, self._pit_irq, self._pit_rearm, flags)
        device = PortDevice(self.lock, self.pit)
        with self.kvm.slots_lock:
            for port in self.pit.ports:
                self.kvm.buses[KvmBus.PIO_BUS].register_dev(port, 1, device)
        self.kvm.irq_ack_notifiers.setdefault(PIT_GSI, []).append(self.pit.ack_irq)

    def new_lapic(self, vcpu: VcpuX86) -> Lapic:
        vcpu.lapic_timer = self.kvm.worker.hrtimer(partial(self._lapic_expired, vcpu))
        outputs = LapicOutputs(
            deliver=lambda irq: self.deliver(irq, vcpu.apic),
            kick=vcpu.kick,
            nmi=vcpu.inject_nmi,
            smi=partial(kvm_inject_smi, vcpu),
            eoi=partial(self._eoi, vcpu),
            timer_changed=partial(rearm_lapic, vcpu),
            map_changed=self.map_changed,
            in_run=lambda: vcpu.in_run,
        )
        clock = LapicTime(time.monotonic_ns, vcpu.guest_tsc, lambda: vcpu.tsc_khz)
        options = LapicOptions(
            bsp=vcpu.is_bsp,
            directed_eoi=self.kvm.irqchip_mode is IrqchipMode.SPLIT,
            x2apic_broadcast_quirk=self.kvm.x2apic_broadcast_quirk,
            lint0_reenabled=not self.kvm.disabled_quirks & uapi.KVM_X86_QUIRK_LINT0_REENABLED,
        )
        return Lapic(vcpu.vcpu_id, outputs, clock, options)

    # Timers, on the VM's own thread.

    def _lapic_expired(self, vcpu: VcpuX86) -> None:
        with self.lock:
            if vcpu.apic is not None and vcpu.in_run:
                vcpu.apic.expire(time.monotonic_ns())
                rearm_lapic(vcpu)

    def _pit_expired(self) -> None:
        with self.lock:
            if self.pit is not None:
                self.pit.advance(time.monotonic_ns())

    def _pit_rearm(self) -> None:
        deadline = self.pit.next_deadline_ns() if self.pit is not None else None
        if deadline is None:
            self._pit_timer.cancel()
        else:
            self._pit_timer.start(deadline)

    def _pit_irq(self, level: bool) -> None:
        """Channel 0's output: GSI 0, and LINT0 of processors that use it as NMI watchdog."""
        kvm_set_irq(self.kvm, KVM_PIT_IRQ_SOURCE_ID, PIT_GSI, int(level))
        if level:
            for vcpu in self.kvm.x86_vcpus():
                if vcpu.apic is not None and vcpu.apic.lvt0_in_nmi_mode:
                    vcpu.apic.local_deliver(reg.APIC_LVT0)

    # What the controllers tell.

    def _acked(self, chip: int, pin: int) -> None:
        """A pin's interrupt has ended; PIC pins count 0-15 over both chips here."""
        if chip == uapi.KVM_IRQCHIP_PIC_MASTER and pin >= 8:
            chip, pin = uapi.KVM_IRQCHIP_PIC_SLAVE, pin - 8
        kvm_notify_acked_irq(self.kvm, chip, pin)

    def _mask_changed(self, chip: int, pin: int, masked: bool) -> None:
        gsi = self.kvm.irq_routing.by_pin.get((chip, pin))
        if gsi == PIT_GSI and self.pit is not None:
            self.pit.mask_changed(masked)

    def _resample(self, pin: int) -> bool:
        gsi = self.kvm.irq_routing.by_pin.get((uapi.KVM_IRQCHIP_IOAPIC, pin))
        return gsi is not None and self.kvm.eventfds.resample(gsi)

    def _pic_output(self, level: bool) -> None:
        if level:
            for vcpu in self.kvm.x86_vcpus():
                if vcpu.apic is not None and vcpu.apic.accept_pic_intr():
                    vcpu.kick()

    def _accepts_pic_intr(self) -> bool:
        apics = (vcpu.apic for vcpu in self.kvm.x86_vcpus())
        return any(apic is not None and apic.accept_pic_intr() for apic in apics)

    def _eoi(self, vcpu: VcpuX86, vector: int, trig_mode: int) -> None:
        if vcpu.hv.synic.vectors >> vector & 1:
            kvm_hv_synic_send_eoi(vcpu, vector)
        if self.kvm.irqchip_mode is IrqchipMode.KERNEL:
            self.ioapic.eoi(vector, trig_mode)
        elif vector in self._eoi_vectors:
            vcpu.pending_ioapic_eoi = vector
            vcpu.requests.add(Request.IOAPIC_EOI_EXIT)

    # Messages.

    def map_changed(self) -> None:
        """Some APIC's ID or mode may be another now."""
        self._by_physical = None

    def _physical_map(self) -> dict[int, VcpuX86]:
        """APIC IDs that name exactly one processor, so that most messages need no search."""
        found: dict[int, VcpuX86] = {}
        twice: set[int] = set()
        for vcpu in self.kvm.x86_vcpus():
            apic = vcpu.apic
            if apic is not None and apic.hw_enabled:
                apic_id = apic.apic_id if apic.x2apic_mode else apic.xapic_id
                if found.setdefault(apic_id, vcpu) is not vcpu:
                    twice.add(apic_id)
        self._by_physical = {i: v for i, v in found.items() if i not in twice}
        return self._by_physical

    def _destinations(self, irq: LapicIrq, source: Lapic | None) -> list[Lapic]:
        plain = irq.dest_mode == reg.APIC_DEST_PHYSICAL and not irq.shorthand
        if plain and irq.dest_id < reg.APIC_BROADCAST:
            by_id = self._by_physical if self._by_physical is not None else self._physical_map()
            vcpu = by_id.get(irq.dest_id)
            if vcpu is not None and vcpu.apic is not None:
                return [vcpu.apic]
        return [
            vcpu.apic
            for vcpu in self.kvm.x86_vcpus()
            if vcpu.apic is not None
            and vcpu.apic.match_dest(irq.dest_id, irq.dest_mode, irq.shorthand, source)
        ]

    def deliver(self, irq: LapicIrq, source: Lapic | None = None) -> int:
        """`kvm_irq_delivery_to_apic`: how many processors took it, -1 if none was addressed."""
        with self.lock:
            targets = [a for a in self._destinations(irq, source) if a.hw_enabled]
            lowest = irq.delivery_mode == reg.APIC_DM_LOWEST or irq.msi_redir_hint
            if lowest and irq.delivery_mode in (reg.APIC_DM_FIXED, reg.APIC_DM_LOWEST):
                enabled = [apic for apic in targets if apic.sw_enabled]
                targets = [min(enabled, key=lambda apic: apic.arb_prio)] if enabled else []
            trace("kvm_apic_accept_irq", vector=irq.vector, mode=irq.delivery_mode)
            if not targets:
                return -1
            return sum(
                apic.accept_irq(irq.delivery_mode, irq.vector, irq.level, irq.trig_mode)
                for apic in targets
            )

    def deliver_to(self, bitmap: int, first: int, irq: LapicIrq) -> int:
        """To the processors whose APIC IDs, from `first` on, the bitmap has; how many took it."""
        with self.lock:
            by_id = self._by_physical if self._by_physical is not None else self._physical_map()
            apics = (v.apic for i, v in by_id.items() if i >= first and bitmap >> i - first & 1)
            return sum(
                apic.accept_irq(irq.delivery_mode, irq.vector, irq.level, irq.trig_mode)
                for apic in apics
                if apic is not None
            )

    def handles_vector(self, vector: int) -> bool:
        """`kvm_ioapic_handles_vector`: whether someone else is to hear of this vector's EOI."""
        if self.kvm.irqchip_mode is not IrqchipMode.KERNEL:
            return vector in self._eoi_vectors
        return any(self._eoi_matters(pin) for pin in self.ioapic.pins_of(vector))

    def _eoi_matters(self, pin: int) -> bool:
        gsi = self.kvm.irq_routing.by_pin.get((uapi.KVM_IRQCHIP_IOAPIC, pin))
        notified = gsi is not None and bool(self.kvm.irq_ack_notifiers.get(gsi))
        return notified or self.ioapic.level_triggered(pin)

    # Routing.

    def set_routing_entry(self, entry: uapi.kvm_irq_routing_entry) -> KernelIrqRoutingEntry:
        """`kvm_set_routing_entry`."""
        if entry.type == uapi.KVM_IRQ_ROUTING_MSI:
            return self._msi_route(entry)
        if entry.type == uapi.KVM_IRQ_ROUTING_HV_SINT:
            sint = entry.u.hv_sint
            return KernelIrqRoutingEntry(
                entry.gsi, entry.type, self._set_hv_sint, hv_sint=(sint.vcpu, sint.sint)
            )
        if entry.type == uapi.KVM_IRQ_ROUTING_IRQCHIP and self.kvm.pic_in_kernel():
            return self.chip_route(entry.gsi, entry.u.irqchip.irqchip, entry.u.irqchip.pin)
        raise fail(EINVAL, f"gsi {entry.gsi} cannot be routed by type {entry.type}")

    def _msi_route(self, entry: uapi.kvm_irq_routing_entry) -> KernelIrqRoutingEntry:
        msi = entry.u.msi
        if self.kvm.x2apic_format and msi.address_hi & 0xFF:
            raise fail(EINVAL, f"gsi {entry.gsi}: reserved bits in MSI address {msi.address_hi:#x}")
        return KernelIrqRoutingEntry(
            entry.gsi,
            entry.type,
            self._set_msi,
            address_lo=msi.address_lo,
            address_hi=msi.address_hi,
            data=msi.data,
        )

    def chip_route(self, gsi: int, chip: int, pin: int) -> KernelIrqRoutingEntry:
        pins = uapi.KVM_IOAPIC_NUM_PINS if chip == uapi.KVM_IRQCHIP_IOAPIC else PIC_NUM_PINS // 2
        if not 0 <= pin < pins:
            raise fail(EINVAL, f"gsi {gsi}: irqchip {chip} has no pin {pin}")
        setter = self._set_ioapic if chip == uapi.KVM_IRQCHIP_IOAPIC else self._set_pic
        return KernelIrqRoutingEntry(gsi, uapi.KVM_IRQ_ROUTING_IRQCHIP, setter, chip, pin)

    def _set_pic(self, entry: KernelIrqRoutingEntry, source_id: int, level: int) -> int:
        pin = entry.pin + 8 * (entry.irqchip == uapi.KVM_IRQCHIP_PIC_SLAVE)
        with self.lock:
            return self.pic.set_irq(pin, bool(level), source_id)

    def _set_ioapic(self, entry: KernelIrqRoutingEntry, source_id: int, level: int) -> int:
        with self.lock:
            return self.ioapic.set_irq(entry.pin, bool(level), source_id)

    def _set_msi(self, entry: KernelIrqRoutingEntry, source_id: int, level: int) -> int:
        return self.deliver(self.msi_message(entry)) if level else -1

    def _set_hv_sint(self, entry: KernelIrqRoutingEntry, source_id: int, level: int) -> int:
        vp_index, sint = entry.hv_sint
        return kvm_hv_synic_set_irq(self.kvm, vp_index, sint) if level else -1

    def msi_message(self, entry: KernelIrqRoutingEntry) -> LapicIrq:
        """`kvm_set_msi_irq` (SDM vol. 3, 11.11)."""
        low, data = entry.address_lo, entry.data
        dest = low >> MSI_DEST_SHIFT & 0xFF
        if self.kvm.x2apic_format:
            dest |= entry.address_hi & 0xFFFFFF00
        return LapicIrq(
            vector=data & 0xFF,
            delivery_mode=data >> 8 & 7,
            dest_mode=int(bool(low & MSI_LOGICAL)),
            trig_mode=data >> 15 & 1,
            dest_id=dest,
            msi_redir_hint=bool(low & MSI_REDIRECT_HINT),
        )

    def default_routing(self) -> list[KernelIrqRoutingEntry]:
        """`kvm_setup_default_irq_routing`: 0-15 lead to the PIC and the IOAPIC, 16-23 to the
        IOAPIC.
        """
        entries = []
        for gsi in range(uapi.KVM_IOAPIC_NUM_PINS):
            entries.append(self.chip_route(gsi, uapi.KVM_IRQCHIP_IOAPIC, gsi))
            if gsi < PIC_NUM_PINS:
                slave = gsi >= PIC_NUM_PINS // 2
                chip = uapi.KVM_IRQCHIP_PIC_SLAVE if slave else uapi.KVM_IRQCHIP_PIC_MASTER
                entries.append(self.chip_route(gsi, chip, gsi & 7))
        return entries

    def _connect_sints(self, routes: list[KernelIrqRoutingEntry]) -> None:
        """`kvm_hv_irq_routing_update`."""
        for vcpu in self.kvm.x86_vcpus():
            vcpu.hv.synic.gsi = {
                e.hv_sint[1]: e.gsi
                for e in routes
                if e.type == uapi.KVM_IRQ_ROUTING_HV_SINT and e.hv_sint[0] == vcpu.hv.vp_index
            }

    def routing_changed(self) -> None:
        """With a split irqchip, EOIs of level-triggered routes are the VMM's business; SINTs learn
        which GSI is theirs.
        """
        routes = [e for entries in self.kvm.irq_routing.by_gsi.values() for e in entries]
        self._connect_sints(routes)
        messages = (
            self.msi_message(e)
            for e in routes
            if e.type == uapi.KVM_IRQ_ROUTING_MSI and e.gsi < self.kvm.nr_reserved_ioapic_pins
        )
        self._eoi_vectors = frozenset(m.vector for m in messages if m.trig_mode)


def rearm_lapic(vcpu: VcpuX86) -> None:
    """Set the vCPU's timer to what its local APIC waits for."""
    deadline = vcpu.apic.next_deadline_ns() if vcpu.apic is not None else None
    if vcpu.lapic_timer is None or deadline is None:
        if vcpu.lapic_timer is not None:
            vcpu.lapic_timer.cancel()
        return
    vcpu.lapic_timer.start(deadline)


def lapic_timer_load(vcpu: VcpuX86) -> None:
    """KVM_RUN begins. The timer interrupts the vCPU only inside of it, so that the parts of its
    state are of one moment while userspace reads them; what has run out meanwhile comes now.
    """
    vcpu.in_run = True
    deadline = vcpu.apic.next_deadline_ns() if vcpu.apic is not None else None
    if vcpu.apic is not None and deadline is not None:
        now = time.monotonic_ns()
        if deadline <= now:
            with vcpu.kvm.irqchip.lock:
                vcpu.apic.expire(now)
                rearm_lapic(vcpu)


def lapic_timer_put(vcpu: VcpuX86) -> None:
    """KVM_RUN ends."""
    if vcpu.apic is None:
        vcpu.in_run = False
        return
    with vcpu.kvm.irqchip.lock:
        vcpu.in_run = False
