"""TSCs at another rate than the host's: what the guest reads, what follows from it."""

from __future__ import annotations

import errno
import struct
import time

import pytest

from anykvm.uapi import kvm as uapi
from anykvm.x86.tsc import host_tsc_khz, scale_tsc, tsc_ratio

from .long_guest import LongGuest, long_guest

MSR_TSC, MSR_TSC_ADJUST, MSR_SYSTEM_TIME = 0x10, 0x3B, 0x4B564D01
RDTSC = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"  # rdtsc; shl rdx, 32; or rax, rdx
RATES = (0.5, 1.7, 3.0)


def rates(guest: LongGuest, seconds: float = 0.05) -> tuple[float, float]:
    """Between which the guest's RDTSC must count, in kHz: how busy the machine is decides how near
    they are.
    """
    outer = time.monotonic()
    first = guest.execute(RDTSC)
    inner = time.monotonic()
    time.sleep(seconds)
    inside = time.monotonic() - inner
    ticks = (guest.execute(RDTSC) - first) / 1000
    return ticks / (time.monotonic() - outer), ticks / inside


@pytest.mark.parametrize("factor", RATES)
def test_rdtsc_and_the_msr_count_at_the_rate(factor: float) -> None:
    with long_guest() as guest:
        vcpu, khz = guest.vcpus[0], int(host_tsc_khz() * factor)
        vcpu.set_tsc_khz(khz)
        assert vcpu.get_tsc_khz() == khz
        slowest, fastest = rates(guest)
        assert slowest * 0.99 < khz < fastest * 1.01
        before = vcpu.get_msrs([MSR_TSC])[MSR_TSC]
        inside = guest.execute(RDTSC)
        after = vcpu.get_msrs([MSR_TSC])[MSR_TSC]
        assert before < inside < after


def test_what_the_vmm_writes_is_read_back() -> None:
    with long_guest() as guest:
        vcpu, khz = guest.vcpus[0], host_tsc_khz() * 2
        vcpu.set_tsc_khz(khz)
        vcpu.set_msrs({MSR_TSC: 1 << 50})
        assert 0 < guest.execute(RDTSC) - (1 << 50) < khz * 1000


def test_tsc_adjust_moves_it_in_the_guests_own_ticks() -> None:
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        vcpu.set_tsc_khz(host_tsc_khz() // 2)
        before = guest.execute(RDTSC)
        assert guest.wrmsr(MSR_TSC_ADJUST, 1 << 45)
        moved = guest.execute(RDTSC) - before & (1 << 64) - 1  # a scaled TSC may begin below 0
        assert 0 < moved - (1 << 45) < 1 << 40


def test_vcpus_of_one_rate_count_alike() -> None:
    with long_guest(vcpus=2) as guest:
        for vcpu in guest.vcpus:
            vcpu.set_tsc_khz(1_000_000)
        for vcpu in guest.vcpus:
            vcpu.set_msrs({MSR_TSC: 0})
        first, second = guest.execute(RDTSC, 0), guest.execute(RDTSC, 1)
        assert 0 < second - first < 1_000_000_000


@pytest.mark.parametrize("factor", RATES)
def test_kvmclock_follows(factor: float) -> None:
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        vcpu.set_tsc_khz(int(host_tsc_khz() * factor))
        assert guest.wrmsr(MSR_SYSTEM_TIME, 0x3001)
        tsc = guest.execute(RDTSC)
        clock = guest.vm.get_clock().clock
        page = struct.unpack("<IIQQIbB2x", guest.memory.read(0x3000, 32))
        _, _, tsc_timestamp, system_time, mul, shift, _ = page
        ticks = tsc - tsc_timestamp
        shifted = ticks << shift if shift >= 0 else ticks >> -shift
        seen = system_time + (shifted * mul >> 32)
        assert 0 < clock - seen < 500_000_000


def test_the_vms_rate_is_that_of_new_vcpus() -> None:
    with long_guest() as guest:
        vm, own = guest.vm, guest.vcpus[0].get_tsc_khz()
        assert vm.get_tsc_khz() == own == host_tsc_khz()
        vm.set_tsc_khz(1_234_567)
        assert vm.get_tsc_khz() == 1_234_567
        with vm.create_vcpu(1) as vcpu:
            assert vcpu.get_tsc_khz() == 1_234_567
            assert vcpu.get_msrs([MSR_TSC])[MSR_TSC] < 10 * 1_234_567_000  # it began at 0
        assert guest.vcpus[0].get_tsc_khz() == own
        vm.set_tsc_khz(0)
        assert vm.get_tsc_khz() == own
        for target in (vm, guest.vcpus[0]):
            with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
                target.set_tsc_khz(0x7FFFFFFF)


def test_ratios() -> None:
    host = host_tsc_khz()
    assert tsc_ratio(host) == tsc_ratio(host + host // 10_000) == 1 << 48
    assert tsc_ratio(host * 2) == 2 << 48
    assert scale_tsc(12345, 1 << 48) == 12345
    assert scale_tsc(1 << 63, 3 << 47) == (3 << 62) & (1 << 64) - 1


def test_capabilities() -> None:
    with long_guest() as guest:
        for cap in (uapi.KVM_CAP_TSC_CONTROL, uapi.KVM_CAP_VM_TSC_CONTROL):
            assert guest.kvm.check_extension(cap) == 1
