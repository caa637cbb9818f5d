"""CPUID: what is offered hangs together; how a guest's leaves are looked up."""

from __future__ import annotations

import pytest

from anykvm.api import Kvm
from anykvm.uapi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2
from anykvm.x86.cpuid import FEATURES, GuestCpuid, feature_names, supported_cpuid, tsc_leaf
from anykvm.x86.tsc import host_tsc, host_tsc_khz


@pytest.fixture(scope="module")
def cpuid() -> GuestCpuid:
    return GuestCpuid(supported_cpuid())


def text(*words: int) -> str:
    return b"".join(word.to_bytes(4, "little") for word in words).decode().rstrip("\0")


def test_the_signatures(cpuid):
    _, b, c, d = cpuid.lookup(0, 0)
    assert text(b, d, c) == "GenuineIntel"
    _, b, c, d = cpuid.lookup(0x40000000, 0)
    assert text(b, c, d) == "KVMKVMKVM"
    brand = [word for leaf in (2, 3, 4) for word in cpuid.lookup(0x80000000 + leaf, 0)]
    assert text(*brand) == "anykvm software processor"


def test_maximum_leaves_are_there(cpuid):
    for base in (0, 0x40000000, 0x80000000):
        maximum = cpuid.lookup(base, 0)[0]
        assert cpuid.find(maximum) is not None
        assert not any(
            e.function > maximum for e in cpuid.entries if e.function >> 28 == base >> 28
        )


def test_exactly_the_features_that_are_on_are_offered():
    assert feature_names(supported_cpuid()) == [f.name for f in FEATURES if f.on]


def test_long_mode_has_what_it_needs(cpuid):
    needed = ("lm", "pae", "msr", "fxsr", "sse", "sse2", "cmov", "cx8", "syscall", "nx", "pge")
    assert all(cpuid.has(name) for name in needed)


def test_the_tsc_leaf_gives_the_frequency(cpuid):
    assert cpuid.lookup(0x15, 0) == tsc_leaf(host_tsc_khz())
    assert cpuid.lookup(0x16, 0)[0] == round(host_tsc_khz() / 1000)


@pytest.mark.parametrize("khz", [800_000, 1_000_071, 2_499_950, 2_500_000, 3_999_763, 5_123_457])
def test_a_frequency_and_what_linux_makes_of_it(khz):
    """`native_calibrate_tsc` and `lapic_timer_period`, in 32 bits; what others compute in 64."""
    denominator, numerator, crystal, _ = tsc_leaf(khz)
    assert abs(crystal * numerator // denominator - khz * 1000) <= numerator // denominator + 1
    mask = (1 << 32) - 1
    linux = (crystal // 1000 * numerator & mask) // denominator
    assert 0 <= khz - linux <= 1 + khz // 1_000_000
    assert crystal // 1000 * 1000 & mask == pytest.approx(1_000_000_000, rel=120e-6)


def test_cache_leaves_end(cpuid):
    assert [cpuid.lookup(4, n)[0] & 0x1F for n in range(4)] == [1, 2, 3, 0]
    ways, line, sets = (cpuid.lookup(4, 0)[1] >> 22) + 1, 64, cpuid.lookup(4, 0)[2] + 1
    assert ways * line * sets == 32 * 1024


def entry(function: int, index: int | None = None, **regs: int) -> kvm_cpuid_entry2:
    flags = 0 if index is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    return kvm_cpuid_entry2(function=function, index=index or 0, flags=flags, **regs)


def test_look_up_by_subleaf():
    guest = GuestCpuid([entry(4, 0, eax=10), entry(4, 1, eax=11), entry(6, eax=5)])
    assert [guest.lookup(4, n)[0] for n in range(3)] == [10, 11, 0]
    assert guest.lookup(6, 99)[0] == 5


def test_beyond_the_limit_is_the_last_basic_leaf():
    guest = GuestCpuid([entry(0, eax=7), entry(7, 0, eax=77), entry(0x80000000, eax=0x80000001)])
    assert guest.lookup(8, 0)[0] == 77
    assert guest.lookup(0x80000099, 0)[0] == 77
    assert guest.lookup(5, 0) == (0, 0, 0, 0)
    assert GuestCpuid().lookup(0, 0) == (0, 0, 0, 0)


def test_emulated_cpuid():
    with Kvm(backend="soft") as kvm:
        assert [e.function for e in kvm.emulated_cpuid()] == [0]


def test_the_tsc_counts_at_its_frequency():
    import time

    ns, tsc = time.monotonic_ns(), host_tsc()
    time.sleep(0.02)
    passed, ticks = time.monotonic_ns() - ns, host_tsc() - tsc
    assert ticks / passed * 1e6 == pytest.approx(host_tsc_khz(), rel=0.01)
