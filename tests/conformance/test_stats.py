"""KVM_GET_STATS_FD: what the kernel's selftest kvm_binary_stats_test looks at, and more."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import resource
from errno import EBADF, EMFILE, ENODEV, ENOTTY
from typing import NamedTuple

import pytest

from anykvm import fs
from anykvm.api.stats import StatDescriptor, StatsFd, StatType, StatUnit
from anykvm.uapi import kvm as uapi

from .framework import conforms, differs, host_may_differ
from .machine import Machine, fails, ioctl

NAME_SIZE = 48
HEADER, DESC = ctypes.sizeof(uapi.kvm_stats_header), ctypes.sizeof(uapi.kvm_stats_desc)
OUT_TWICE_HLT = bytes.fromhex("ba f8 03  b0 41  ee  ee  f4")
BOTH = pytest.mark.parametrize("target", ["vm", "vcpu"])
STATS_FD = conforms("VM:KVM_GET_STATS_FD", "vCPU:KVM_GET_STATS_FD")
LEAST_EXPONENT = {StatUnit.SECONDS: -9}


def stats_fd(machine: Machine, target: str) -> int:
    machine.require(uapi.KVM_CAP_BINARY_STATS_FD)
    return machine.keep(ioctl(getattr(machine, target), uapi.KVM_GET_STATS_FD))


class Layout(NamedTuple):
    header: uapi.kvm_stats_header
    descriptors: tuple[StatDescriptor, ...]
    data_size: int


def layout(fd: int) -> Layout:
    reader = StatsFd(os.dup(fd))
    with reader:
        size = sum(d.size * 8 for d in reader.descriptors)
        header = uapi.kvm_stats_header.from_buffer_copy(os.pread(fd, HEADER, 0))
        return Layout(header, reader.descriptors, size)


@STATS_FD
@BOTH
def test_the_header_and_where_things_are(machine: Machine, target: str) -> None:
    header, descriptors, size = layout(stats_fd(machine, target))
    assert (header.flags, header.name_size) == (0, NAME_SIZE)
    assert len(descriptors) == header.num_desc > 0
    assert header.id_offset >= HEADER
    assert header.desc_offset >= header.id_offset + NAME_SIZE
    assert header.data_offset >= header.desc_offset + header.num_desc * (DESC + NAME_SIZE)
    assert size >= header.num_desc * 8


@STATS_FD
@BOTH
def test_the_identity_names_the_process_and_the_vcpu(machine: Machine, target: str) -> None:
    fd = stats_fd(machine, target)
    header = layout(fd).header
    name = os.pread(fd, NAME_SIZE, header.id_offset).partition(b"\0")[0].decode()
    vcpu = "/vcpu-0" if target == "vcpu" else ""
    assert re.fullmatch(rf"kvm-{os.getpid()}(-\d+)?{vcpu}", name)


@STATS_FD
@BOTH
def test_each_descriptor_is_sound(machine: Machine, target: str) -> None:
    _, descriptors, size = layout(stats_fd(machine, target))
    assert len({d.name for d in descriptors}) == len(descriptors)
    for d in descriptors:
        histogram = d.type in (StatType.LINEAR_HIST, StatType.LOG_HIST)
        assert 0 < len(d.name) < NAME_SIZE
        assert LEAST_EXPONENT.get(d.unit, 0) <= d.exponent <= 0
        assert d.size > 0 if histogram else d.size == 1
        assert bool(d.bucket_size) == (d.type is StatType.LINEAR_HIST)
        assert d.offset % 8 == 0
        assert d.offset + d.size * 8 <= size


@STATS_FD
@BOTH
def test_values_do_not_overlap(machine: Machine, target: str) -> None:
    _, descriptors, size = layout(stats_fd(machine, target))
    places = sorted((d.offset, d.offset + d.size * 8) for d in descriptors)
    ends = [0, *(end for _, end in places)]
    assert [start for start, _ in places] == ends[:-1]
    assert ends[-1] == size


@STATS_FD
@BOTH
def test_reads_advance_and_end_with_the_data(machine: Machine, target: str) -> None:
    fd = stats_fd(machine, target)
    header, _, size = layout(fd)
    whole = os.pread(fd, 1 << 16, 0)
    assert len(whole) == header.data_offset + size
    parts = iter(lambda: os.read(fd, 1000), b"")
    assert len(b"".join(parts)) == len(whole)
    assert os.pread(fd, 8, len(whole) + 100) == b""
    again = stats_fd(machine, target)
    assert os.read(again, HEADER) == whole[:HEADER]


@STATS_FD
@BOTH
def test_the_descriptor_only_reads(machine: Machine, target: str) -> None:
    fd = stats_fd(machine, target)
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    with pytest.raises(OSError, match=f"Errno {EBADF}]"):
        os.write(fd, b"x")
    for cmd in (uapi.KVM_GET_API_VERSION, uapi.KVM_GET_STATS_FD):
        fails(ENOTTY, fd, cmd)


@STATS_FD
@differs(linux=0, anykvm=5, why="a statistics descriptor is a file of memory: lseek moves")
@BOTH
def test_seeking(machine: Machine, target: str, expected: int) -> None:
    fd = stats_fd(machine, target)
    assert os.lseek(fd, 5, os.SEEK_SET) == expected


@STATS_FD
@differs(
    linux=ENODEV,
    anykvm=0,
    why="a statistics descriptor is a file of memory: it can be mapped",
    errnos=True,
)
@BOTH
def test_mapping(machine: Machine, target: str, expected: int) -> None:
    fd, got = stats_fd(machine, target), 0
    try:
        fs.Mapping(fs.PAGE_SIZE, fs.PROT_READ, fs.MAP_SHARED, fd)
    except OSError as error:
        got = error.errno or 0
    assert got == expected


@STATS_FD
@BOTH
def test_no_descriptor_is_free(machine: Machine, target: str) -> None:
    machine.require(uapi.KVM_CAP_BINARY_STATS_FD)
    descriptor = getattr(machine, target)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        fails(EMFILE, descriptor, uapi.KVM_GET_STATS_FD)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@STATS_FD
@BOTH
def test_the_argument_does_not_matter(machine: Machine, target: str) -> None:
    machine.require(uapi.KVM_CAP_BINARY_STATS_FD)
    fd = machine.keep(ioctl(getattr(machine, target), uapi.KVM_GET_STATS_FD, 0x1000))
    assert layout(fd).header.num_desc > 0


@STATS_FD
def test_statistics_of_several_vms_and_vcpus(machine: Machine) -> None:
    machine.require(uapi.KVM_CAP_BINARY_STATS_FD)
    vms = [machine.create_vm() for _ in range(4)]
    vcpus = [machine.create_vcpu(vm, n) for vm in vms for n in range(4)]
    fds = [machine.keep(ioctl(fd, uapi.KVM_GET_STATS_FD)) for fd in vms + vcpus]
    for fd in vms + vcpus:
        machine.close(fd)
    assert [layout(fd).header.name_size for fd in fds] == [NAME_SIZE] * 20


@conforms("vCPU:KVM_GET_STATS_FD")
@host_may_differ("a KVM that emulates real mode leaves the processor less often")
def test_exits_are_counted(machine: Machine) -> None:
    guest = machine.guest(OUT_TWICE_HLT)
    machine.require(uapi.KVM_CAP_BINARY_STATS_FD)
    with StatsFd(ioctl(guest.vcpu, uapi.KVM_GET_STATS_FD)) as stats:
        before = stats.read()
        guest.run_until(uapi.KVM_EXIT_IO)
        guest.run_until(uapi.KVM_EXIT_IO)
        guest.run_until(uapi.KVM_EXIT_HLT)
        after = stats.read()
    rise = {name: after[name].value - before[name].value for name in after}
    assert (rise["io_exits"], rise["halt_exits"]) == (2, 1)
    assert rise["exits"] >= 3
