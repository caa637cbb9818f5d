"""I/O buses: which in-kernel device answers a port or a guest-physical address (`virt/kvm/iodev.h`,
`kvm_io_bus_*`).

Several devices may cover one address; they are asked in turn until one takes the access.
"""

from __future__ import annotations

from bisect import bisect_right
from enum import IntEnum
from errno import ENOENT
from typing import TYPE_CHECKING, NamedTuple

from anykvm.kvm.errors import fail

if TYPE_CHECKING:
    from anykvm.kvm.kvm_main import KvmVcpu


MAX_FOUND = 4096  # look-ups kept
SUMMARY = 1 << 16  # bits


class KvmBus(IntEnum):
    """enum kvm_bus."""

    MMIO_BUS = 0
    PIO_BUS = 1
    VIRTIO_CCW_NOTIFY_BUS = 2  # nothing on x86 writes there; KVM_IOEVENTFD accepts it


BUS_SHIFTS = {KvmBus.MMIO_BUS: 12}  # pages; the others have few addresses


class KvmIoDevice:
    """struct kvm_io_device: read and write by address; what it does not take goes to the next
    device.
    """

    def read(self, vcpu: KvmVcpu, addr: int, length: int) -> bytes | None:
        """`length` bytes, or None where this device does not answer."""
        return None

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        """Whether this device took the write."""
        return False

    def destructor(self) -> None:
        """The device has left its bus."""


class KvmIoRange(NamedTuple):
    addr: int
    length: int
    dev: KvmIoDevice


class KvmIoBus:
    """struct kvm_io_bus. Look-ups take no lock: the lists are replaced, never changed.

    `summary` is for native code: no device is at an address where bit `address >> shift`, modulo
    their number, is clear.
    """

    def __init__(self, shift: int = 0) -> None:
        self.shift = shift
        self.summary = bytearray(SUMMARY // 8)
        self._ranges: tuple[list[int], list[KvmIoRange], int] = ([], [], 0)
        self._found: dict[int, list[KvmIoDevice]] = {}  # look-ups since the last change

    def __len__(self) -> int:
        return len(self._ranges[1])

    def register_dev(self, addr: int, length: int, dev: KvmIoDevice) -> None:
        """Add a device; the caller holds the VM's slots_lock."""
        self._replace([*self._ranges[1], KvmIoRange(addr, length, dev)])

    def unregister_dev(self, dev: KvmIoDevice) -> None:
        """Remove a device with all its ranges; ENOENT."""
        kept = [r for r in self._ranges[1] if r.dev is not dev]
        if len(kept) == len(self._ranges[1]):
            raise fail(ENOENT, "the device is not on this bus")
        self._replace(kept)
        dev.destructor()

    def destroy(self) -> None:
        devices = {id(r.dev): r.dev for r in self._ranges[1]}
        self._replace([])
        for dev in devices.values():
            dev.destructor()

    def _replace(self, ranges: list[KvmIoRange]) -> None:
        ranges = sorted(ranges, key=lambda r: r.addr)
        longest = max((r.length for r in ranges), default=0)
        self._ranges = ([r.addr for r in ranges], ranges, longest)
        self._found = {}
        self.summary[:] = self._summary(ranges).to_bytes(SUMMARY // 8, "little")

    def _summary(self, ranges: list[KvmIoRange]) -> int:
        bits, every = 0, (1 << SUMMARY) - 1
        for r in ranges:
            first, last = r.addr >> self.shift, r.addr + max(r.length, 1) - 1 >> self.shift
            run = (1 << min(last - first + 1, SUMMARY)) - 1 << first % SUMMARY
            bits |= run & every | run >> SUMMARY
        return bits

    def at(self, addr: int) -> list[KvmIoDevice]:
        """The devices to ask about an access to `addr`, mostly none or one."""
        found = self._found
        devices = found.get(addr)
        if devices is None:
            if len(found) >= MAX_FOUND:
                found.clear()
            devices = found[addr] = self._at(addr)
        return devices

    def _at(self, addr: int) -> list[KvmIoDevice]:
        """The devices whose range holds `addr`, in order of registration within one address."""
        starts, ranges, longest = self._ranges
        end = bisect_right(starts, addr)
        first = bisect_right(starts, addr - longest - 1)
        return [r.dev for r in ranges[first:end] if addr < r.addr + r.length or r.addr == addr]

    def read(self, vcpu: KvmVcpu, addr: int, length: int) -> bytes | None:
        for dev in self.at(addr):
            data = dev.read(vcpu, addr, length)
            if data is not None:
                return data
        return None

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        devices = self.at(addr)
        return bool(devices) and any(dev.write(vcpu, addr, data) for dev in devices)
