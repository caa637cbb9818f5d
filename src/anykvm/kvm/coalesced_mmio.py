"""Coalesced MMIO and PIO: writes that wait in a ring until the VMM looks
(`virt/kvm/coalesced_mmio.c`; api.rst 4.116).

The ring is the third page of the first vCPU's mapping: VMMs of several vCPUs read it there.
"""

from __future__ import annotations

import ctypes
from errno import EINVAL
from typing import TYPE_CHECKING

from anykvm.kvm.errors import fail
from anykvm.kvm.iodev import KvmBus, KvmIoDevice
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.uapi.kvm import kvm_coalesced_mmio, kvm_coalesced_mmio_ring, kvm_coalesced_mmio_zone

if TYPE_CHECKING:
    from anykvm.kvm.kvm_main import Kvm, KvmVcpu

KVM_COALESCED_MMIO_MAX = (PAGE_SIZE - ctypes.sizeof(kvm_coalesced_mmio_ring)) // ctypes.sizeof(
    kvm_coalesced_mmio
)


class CoalescedRing(ctypes.Structure):
    """struct kvm_coalesced_mmio_ring with its flexible array at full length."""

    _fields_ = [
        ("first", ctypes.c_uint32),
        ("last", ctypes.c_uint32),
        ("coalesced_mmio", kvm_coalesced_mmio * KVM_COALESCED_MMIO_MAX),
    ]
    first: int
    last: int
    coalesced_mmio: ctypes.Array[kvm_coalesced_mmio]


class CoalescedMmioDev(KvmIoDevice):
    """struct kvm_coalesced_mmio_dev: one zone; it takes writes while the ring has room."""

    def __init__(self, kvm: Kvm, zone: kvm_coalesced_mmio_zone) -> None:
        self.kvm = kvm
        self.addr, self.size, self.pio = zone.addr, zone.size, zone.pio

    def holds(self, addr: int, length: int) -> bool:
        return length > 0 and self.addr <= addr and addr + length <= self.addr + self.size

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        if not self.holds(addr, len(data)):
            return False
        with self.kvm.coalesced_lock:
            return self._append(self.kvm.coalesced_mmio_ring, addr, data)

    def _append(self, ring: CoalescedRing | None, addr: int, data: bytes) -> bool:
        if ring is None or ring.last >= KVM_COALESCED_MMIO_MAX:  # userspace may have scribbled
            return False
        insert = ring.last
        after = (insert + 1) % KVM_COALESCED_MMIO_MAX
        if after == ring.first:  # full: this write exits, and the VMM drains
            return False
        entry = ring.coalesced_mmio[insert]
        entry.phys_addr, entry.len, entry.pio = addr, len(data), self.pio
        ctypes.memmove(entry.data, data, len(data))
        ring.last = after
        return True


class CoalescedZones:
    """The zones of one VM (KVM_REGISTER/UNREGISTER_COALESCED_MMIO)."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._zones: list[CoalescedMmioDev] = []

    def register(self, zone: kvm_coalesced_mmio_zone) -> None:
        bus = self._bus(zone.pio)
        dev = CoalescedMmioDev(self._kvm, zone)
        with self._kvm.slots_lock:
            self._kvm.buses[bus].register_dev(zone.addr, zone.size, dev)
            self._zones.append(dev)

    def unregister(self, zone: kvm_coalesced_mmio_zone) -> None:
        """Drop the zones that hold this one; none at all is no error, as in the kernel."""
        bus = self._bus(zone.pio)
        with self._kvm.slots_lock:
            for dev in [d for d in self._zones if d.pio == zone.pio]:
                if dev.holds(zone.addr, zone.size):
                    self._zones.remove(dev)
                    self._kvm.buses[bus].unregister_dev(dev)

    @staticmethod
    def _bus(pio: int) -> KvmBus:
        if pio not in (0, 1):
            raise fail(EINVAL, f"pio is {pio}, must be 0 or 1")
        return KvmBus.PIO_BUS if pio else KvmBus.MMIO_BUS
