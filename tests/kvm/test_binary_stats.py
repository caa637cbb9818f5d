"""Statistics descriptors: layout, identity, who may read them and until when."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from errno import EBADF, EPERM

import pytest
from tests.x86.fake_engine import FakeEngine
from tests.x86.machine import machine

from anykvm.api import Kvm, StatsFd, StatType, StatUnit
from anykvm.cpu.state import Exit
from anykvm.kvm.binary_stats import (
    Counter,
    KvmStats,
    KvmVcpuStatGeneric,
    TimeNsec,
    kvm_stats,
    log_hist_update,
)
from anykvm.uapi import kvm as uapi
from anykvm.x86.processor import use_engine


@kvm_stats
class Base(ctypes.Structure):
    first: Counter
    second: TimeNsec


@kvm_stats
class Derived(Base):
    third: Counter
    other: int  # no statistic


def test_a_structure_is_laid_out_as_declared_after_its_base():
    names = [name for name, _ in (*Base._fields_, *Derived._fields_)]
    assert names == ["first", "second", "third"]
    assert (Derived.first.offset, Derived.second.offset, Derived.third.offset) == (0, 8, 16)
    assert ctypes.sizeof(Derived) == 24


def test_the_file_holds_header_identity_descriptors_and_live_values():
    stats = KvmStats("kvm-test-stats", "kvm-1/vcpu-0", Derived)
    stats.stat.third = 7
    with StatsFd(stats.getfd()) as reader:
        assert reader.id == "kvm-1/vcpu-0"
        names = [(d.name, d.type, d.unit, d.exponent, d.size) for d in reader.descriptors]
        assert names == [
            ("first", StatType.CUMULATIVE, StatUnit.NONE, 0, 1),
            ("second", StatType.CUMULATIVE, StatUnit.SECONDS, -9, 1),
            ("third", StatType.CUMULATIVE, StatUnit.NONE, 0, 1),
        ]
        assert reader.read()["third"].value == 7
        stats.stat.third += 1
        assert reader.read()["third"].value == 8
        stats.close()
        assert reader.read()["third"].value == 8


def test_a_descriptor_only_reads_has_its_own_position_and_is_closed_on_exec():
    stats = KvmStats("kvm-test-stats", "kvm-1", Derived)
    one, two = stats.getfd(), stats.getfd()
    try:
        whole = os.read(one, 1 << 16)
        assert len(whole) == os.fstat(one).st_size
        assert os.read(one, 1) == b""
        assert os.read(two, 24) == whole[:24]
        assert not os.get_inheritable(one)
        with pytest.raises(OSError, match=f"Errno {EBADF}]"):
            os.write(one, b"x")
        with pytest.raises(OSError, match=f"Errno {EPERM}]"):
            os.truncate(f"/proc/self/fd/{stats._fd}", 0)
    finally:
        os.close(one)
        os.close(two)
        stats.close()


def test_an_object_without_use_gives_its_descriptor_back():
    fds = set(os.listdir("/proc/self/fd"))
    stats = KvmStats("kvm-test-stats", "kvm-1", Derived)
    assert set(os.listdir("/proc/self/fd")) != fds
    del stats
    assert set(os.listdir("/proc/self/fd")) == fds


@pytest.mark.parametrize(
    ("value", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), ((1 << 30) - 1, 30), (1 << 31, 31), (1 << 60, 31)],
)
def test_a_logarithmic_histogram_counts_by_significant_bits(value, bucket):
    stat = KvmVcpuStatGeneric()
    log_hist_update(stat.halt_wait_hist, value)
    assert [n for n, count in enumerate(stat.halt_wait_hist) if count] == [bucket]


def test_vms_that_live_at_the_same_time_have_names_of_their_own():
    with use_engine(FakeEngine), Kvm(backend="soft") as kvm:
        with kvm.create_vm() as first:
            plain = first.stats().id
            with kvm.create_vm() as second, second.create_vcpu(3) as vcpu:
                assert second.stats().id not in ("", plain)
                assert vcpu.stats().id == f"{second.stats().id}/vcpu-3"
        with kvm.create_vm() as third:
            assert third.stats().id == plain
    assert plain.startswith(f"kvm-{os.getpid()}")


def test_the_argument_does_not_matter_and_names_are_linuxs():
    with machine() as m:
        vcpu = m.add_vcpu()
        for target, name in ((m.vm, "kvm-vm-stats"), (vcpu, "kvm-vcpu-stats:0")):
            fd = target.ioctl(uapi.KVM_GET_STATS_FD, 5)
            try:
                assert os.readlink(f"/proc/self/fd/{fd}") == f"/memfd:{name} (deleted)"
            finally:
                os.close(fd)


READER = """
import sys
from anykvm.api import StatsFd
print(StatsFd(int(sys.argv[1])).read()["halt_exits"].value)
"""


def test_another_process_reads_what_it_was_given_while_the_guest_runs():
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        with vcpu.stats_fd() as stats:
            vcpu.run()
            code = [sys.executable, "-c", READER, str(stats.fd)]
            ran = subprocess.run(
                code, pass_fds=[stats.fd], check=True, capture_output=True, text=True, timeout=60
            )
            assert ran.stdout == "1\n"


def test_descriptors_outlive_their_vm_and_objects_leave_none():
    with use_engine(FakeEngine), Kvm(backend="soft") as kvm:
        before = set(os.listdir("/proc/self/fd"))
        vm = kvm.create_vm()
        vcpu = vm.create_vcpu()
        stats = vm.stats_fd(), vcpu.stats_fd()
        vcpu.close()
        vm.close()
        assert [len(s.read()) > 10 for s in stats] == [True, True]
        for s in stats:
            s.close()
        assert set(os.listdir("/proc/self/fd")) == before
