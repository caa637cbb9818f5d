"""Statistics of a VM or a vCPU, as the descriptor of KVM_GET_STATS_FD gives them (api.rst 4.131).

with vcpu.stats_fd() as stats:
    before = stats.read()["exits"].value
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from struct import unpack_from

from anykvm.api.descriptor import Descriptor
from anykvm.uapi import kvm as abi

_HEADER = ctypes.sizeof(abi.kvm_stats_header)
_DESC = ctypes.sizeof(abi.kvm_stats_desc)
_VALUE = 8


class StatType(IntEnum):
    """KVM_STATS_TYPE_*: what a value means over time, or what the values of a histogram count."""

    CUMULATIVE = abi.KVM_STATS_TYPE_CUMULATIVE
    INSTANT = abi.KVM_STATS_TYPE_INSTANT
    PEAK = abi.KVM_STATS_TYPE_PEAK
    LINEAR_HIST = abi.KVM_STATS_TYPE_LINEAR_HIST
    LOG_HIST = abi.KVM_STATS_TYPE_LOG_HIST


class StatUnit(IntEnum):
    """KVM_STATS_UNIT_*."""

    NONE = abi.KVM_STATS_UNIT_NONE
    BYTES = abi.KVM_STATS_UNIT_BYTES
    SECONDS = abi.KVM_STATS_UNIT_SECONDS
    CYCLES = abi.KVM_STATS_UNIT_CYCLES
    BOOLEAN = abi.KVM_STATS_UNIT_BOOLEAN


@dataclass(frozen=True, slots=True)
class StatDescriptor:
    """What is told of a statistic before its values: they count units of `base ** exponent`.

    A histogram has `size` buckets: linear ones are `bucket_size` wide, a logarithmic one's bucket
    n has values from 2 ** (n - 1) up, its first zero.
    """

    name: str
    type: StatType
    unit: StatUnit
    base: int
    exponent: int
    size: int
    offset: int
    bucket_size: int


@dataclass(frozen=True, slots=True)
class Stat:
    """A statistic at one moment."""

    descriptor: StatDescriptor
    values: tuple[int, ...]

    @property
    def value(self) -> int:
        """The only value; of a histogram the sum of its buckets."""
        return sum(self.values)

    @property
    def scaled(self) -> float:
        """`value` in whole units: seconds, bytes."""
        return self.value * float(self.descriptor.base) ** self.descriptor.exponent


class Stats(Mapping[str, Stat]):
    """All statistics of the object `id` ("kvm-PID", "kvm-PID/vcpu-N"), by name, at one moment."""

    def __init__(self, id: str, stats: dict[str, Stat]) -> None:
        self.id = id
        self._stats = stats

    def __getitem__(self, name: str) -> Stat:
        return self._stats[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stats)

    def __len__(self) -> int:
        return len(self._stats)

    def __repr__(self) -> str:
        return f"<Stats {self.id}: {len(self)}>"


class StatsFd(Descriptor):
    """A statistics descriptor; what does not change is read once. ValueError for any other file."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        try:
            self._header = header = self._read_header()
            self.id = _text(self._pread(header.name_size, header.id_offset))
            self.descriptors = self._read_descriptors()
        except BaseException:
            self.close()
            raise

    def _pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) < size:
            raise ValueError(f"no statistics: {len(data)} bytes at {offset}, not {size}")
        return data

    def _read_header(self) -> abi.kvm_stats_header:
        return abi.kvm_stats_header.from_buffer_copy(self._pread(_HEADER, 0))

    def _read_descriptors(self) -> tuple[StatDescriptor, ...]:
        header = self._header
        step = _DESC + header.name_size
        data = self._pread(step * header.num_desc, header.desc_offset)
        return tuple(_descriptor(data[at : at + step]) for at in range(0, len(data), step))

    def read(self) -> Stats:
        """The values now."""
        end = max((d.offset + d.size * _VALUE for d in self.descriptors), default=0)
        data = self._pread(end, self._header.data_offset)
        return Stats(self.id, {d.name: _stat(d, data) for d in self.descriptors})


def _text(name: bytes) -> str:
    return name.partition(b"\0")[0].decode()


def _descriptor(data: bytes) -> StatDescriptor:
    desc = abi.kvm_stats_desc.from_buffer_copy(data)
    return StatDescriptor(
        name=_text(data[_DESC:]),
        type=StatType(desc.flags & abi.KVM_STATS_TYPE_MASK),
        unit=StatUnit(desc.flags & abi.KVM_STATS_UNIT_MASK),
        base=2 if desc.flags & abi.KVM_STATS_BASE_MASK == abi.KVM_STATS_BASE_POW2 else 10,
        exponent=desc.exponent,
        size=desc.size,
        offset=desc.offset,
        bucket_size=desc.bucket_size,
    )


def _stat(descriptor: StatDescriptor, data: bytes) -> Stat:
    return Stat(descriptor, unpack_from(f"<{descriptor.size}Q", data, descriptor.offset))


class Counting(Descriptor):
    """Descriptors that know KVM_GET_STATS_FD: VMs and vCPUs."""

    def stats_fd(self) -> StatsFd:
        """KVM_GET_STATS_FD: a descriptor to read statistics from, again and again."""
        return StatsFd(self.ioctl(abi.KVM_GET_STATS_FD))

    def stats(self) -> Stats:
        """The statistics now."""
        with self.stats_fd() as descriptor:
            return descriptor.read()
