"""kvmclock: the VM's paravirtual clock, which the guest computes from its TSC and a page that KVM
fills in.

Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW; asm/pvclock-abi.h; KVM_GET_CLOCK in
api.rst 4.29. One pair of TSC and time, taken when the clock is set, serves all vCPUs: their pages
agree to the nanosecond.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from errno import EINVAL

from anykvm.cpu.state import TSC_RATIO_BITS
from anykvm.kvm.errors import fail
from anykvm.uapi.kvm import (
    KVM_CLOCK_HOST_TSC,
    KVM_CLOCK_REALTIME,
    KVM_CLOCK_TSC_STABLE,
    kvm_clock_data,
)
from anykvm.x86.tsc import host_tsc, host_tsc_khz, scale_tsc

KVM_CLOCK_VALID_FLAGS = KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC
NSEC_PER_SEC = 1_000_000_000
PVCLOCK_TSC_STABLE_BIT = 1
PVCLOCK_GUEST_STOPPED = 2
PVCLOCK_VCPU_TIME_INFO = struct.Struct("<IIQQIbB2x")
PVCLOCK_FLAGS = 29  # where they are in it
PVCLOCK_WALL_CLOCK = struct.Struct("<III")
MASK64 = (1 << 64) - 1

GuestRead = Callable[[int, int], bytes]
GuestWrite = Callable[[int, bytes], None]


def kvm_get_time_scale(scaled_hz: int, base_hz: int) -> tuple[int, int]:
    """(shift, multiplier): `(ticks << shift) * multiplier >> 32` converts base to scaled."""
    shift = 0
    scaled, tps = scaled_hz, base_hz
    while tps > scaled * 2 or tps >> 32:
        tps >>= 1
        shift -= 1
    while tps <= scaled or scaled >> 32:
        if scaled >> 32 or tps & 1 << 31:
            scaled >>= 1
        else:
            tps <<= 1
        shift += 1
    return shift, (scaled << 32) // tps


def next_version(read: GuestRead, gpa: int) -> int:
    """The even version after the one that the guest's copy has: it may have come from another VM,
    and a guest that was reading it then must not find the number that it began with.
    """
    version = int.from_bytes(read(gpa, 4), "little")
    return (version + 1 | 1) + 1 & 0xFFFFFFFF


class KvmClock:
    """One VM's clock, in nanoseconds since its creation or since what KVM_SET_CLOCK said."""

    def __init__(self) -> None:
        self.shift, self.mul = kvm_get_time_scale(NSEC_PER_SEC, host_tsc_khz() * 1000)
        self.master_tsc: int = host_tsc()
        self.master_ns = 0

    def scale(self, ticks: int) -> int:
        """TSC ticks as the guest turns them into nanoseconds."""
        shifted = ticks << self.shift if self.shift >= 0 else ticks >> -self.shift
        return shifted * self.mul >> 32

    def at(self, tsc: int) -> int:
        return self.master_ns + self.scale(tsc - self.master_tsc)

    def now(self) -> int:
        """`get_kvmclock_ns`."""
        return self.at(host_tsc())

    def get(self) -> kvm_clock_data:
        """KVM_GET_CLOCK."""
        tsc: int = host_tsc()
        return kvm_clock_data(
            clock=self.at(tsc),
            flags=KVM_CLOCK_TSC_STABLE | KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC,
            realtime=time.time_ns(),
            host_tsc=tsc,
        )

    def set(self, data: kvm_clock_data) -> None:
        """KVM_SET_CLOCK: with KVM_CLOCK_REALTIME the time that has passed since then is added."""
        if data.flags & ~KVM_CLOCK_VALID_FLAGS:
            raise fail(EINVAL, f"KVM_SET_CLOCK: unknown flags {data.flags:#x}")
        passed = time.time_ns() - data.realtime if data.flags & KVM_CLOCK_REALTIME else 0
        self.master_tsc = host_tsc()
        self.master_ns = data.clock + max(passed, 0)

    def write_wall_clock(self, read: GuestRead, write: GuestWrite, gpa: int) -> None:
        """MSR_KVM_WALL_CLOCK: the time of day at which this clock was zero."""
        version = next_version(read, gpa)
        seconds, nanoseconds = divmod(time.time_ns() - self.now(), NSEC_PER_SEC)
        write(gpa, PVCLOCK_WALL_CLOCK.pack(version, seconds, nanoseconds))


class PvClockPage:
    """`struct pvclock_vcpu_time_info` of one vCPU, where MSR_KVM_SYSTEM_TIME put it."""

    def __init__(self, clock: KvmClock) -> None:
        self._clock = clock
        self.guest_stopped = False

    def _rate(self, ratio: int) -> tuple[int, int]:
        """(shift, multiplier) for a guest's TSC; computed where it is not the host's."""
        if ratio == 1 << TSC_RATIO_BITS:
            return self._clock.shift, self._clock.mul
        khz = scale_tsc(host_tsc_khz(), ratio) or 1  # rounded down: the ratio may be of 1 kHz
        return kvm_get_time_scale(NSEC_PER_SEC, khz * 1000)

    def parameters(self, tsc_ratio: int, tsc_offset: int) -> tuple[int, int, int, int]:
        """(TSC, nanoseconds at it, multiplier, shift): what the page tells."""
        shift, mul = self._rate(tsc_ratio)
        tsc = scale_tsc(self._clock.master_tsc, tsc_ratio) + tsc_offset & MASK64
        return tsc, self._clock.master_ns, mul, shift

    def update(
        self, read: GuestRead, write: GuestWrite, gpa: int, tsc_ratio: int, tsc_offset: int
    ) -> None:
        """Publish; an odd version tells a guest that reads meanwhile to start over. That it was
        stopped stays said until the guest clears it.
        """
        flags = PVCLOCK_TSC_STABLE_BIT | read(gpa + PVCLOCK_FLAGS, 1)[0] & PVCLOCK_GUEST_STOPPED
        if self.guest_stopped:
            flags |= PVCLOCK_GUEST_STOPPED
            self.guest_stopped = False
        version = next_version(read, gpa)
        body = (0, *self.parameters(tsc_ratio, tsc_offset), flags)
        write(gpa, struct.pack("<I", version - 1 & 0xFFFFFFFF))
        page = PVCLOCK_VCPU_TIME_INFO.pack(version, *body)
        write(gpa + 4, page[4:])
        write(gpa, page[:4])
