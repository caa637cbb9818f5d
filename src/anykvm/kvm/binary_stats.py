"""Statistics descriptors: `virt/kvm/binary_stats.c`, api.rst 4.131 (KVM_GET_STATS_FD).

The counters of a VM or a vCPU are a ctypes structure, in which the kernel half counts as Linux does
(`vcpu.stat.exits += 1`). Its fields are declared with what the ABI says of each: kind, unit, number
of values. The structure lies in a memfd, behind the header, the identity and the descriptors that
precede the data in the ABI, so that this file is what KVM_GET_STATS_FD promises: any process that
holds a descriptor of it reads live values by read(2) and pread(2), without a call into this one.

A vCPU's counters are written by its own thread alone, a VM's under `slots_lock` or by copying
totals that are counted elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from ctypes import c_uint64
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Generic, TypeVar, get_type_hints

from anykvm.fs.mapping import Memfd
from anykvm.fs.task import current
from anykvm.fs.trace import call
from anykvm.uapi import kvm as uapi

KVM_STATS_NAME_SIZE = 48
HALT_POLL_HIST_COUNT = 32
S = TypeVar("S", bound=ctypes.Structure)


@dataclass(frozen=True, slots=True)
class StatsDesc:
    """What the ABI says of a statistic: `flags` are KVM_STATS_TYPE_*, _UNIT_* and _BASE_*, a value
    counts units of base ** `exponent`, and there are `size` of them.
    """

    flags: int
    exponent: int = 0
    size: int = 1
    bucket_size: int = 0


_NSEC = uapi.KVM_STATS_UNIT_SECONDS
_BOOLEAN = uapi.KVM_STATS_TYPE_INSTANT | uapi.KVM_STATS_UNIT_BOOLEAN
_LOG_NSEC = StatsDesc(uapi.KVM_STATS_TYPE_LOG_HIST | _NSEC, -9, HALT_POLL_HIST_COUNT)

Counter = Annotated[int, StatsDesc(uapi.KVM_STATS_TYPE_CUMULATIVE)]
Instant = Annotated[int, StatsDesc(uapi.KVM_STATS_TYPE_INSTANT)]
Peak = Annotated[int, StatsDesc(uapi.KVM_STATS_TYPE_PEAK)]
Boolean = Annotated[int, StatsDesc(_BOOLEAN)]
TimeNsec = Annotated[int, StatsDesc(_NSEC, -9)]
LogHistTimeNsec = Annotated["ctypes.Array[c_uint64]", _LOG_NSEC]


def kvm_stats(cls: type[S]) -> type[S]:
    """Lay out a structure whose own annotations say what its statistics are."""
    fields: list[tuple[str, type]] = []
    for name, desc in _declared(cls):
        if not hasattr(cls, name):  # else a base class has it
            fields.append((name, c_uint64 * desc.size if desc.size > 1 else c_uint64))
    cls._fields_ = fields
    return cls


def _declared(cls: type[ctypes.Structure]) -> Iterator[tuple[str, StatsDesc]]:
    for name, hint in get_type_hints(cls, include_extras=True).items():
        for desc in getattr(hint, "__metadata__", ()):
            yield name, desc


@kvm_stats
class KvmVmStatGeneric(ctypes.Structure):
    """KVM_GENERIC_VM_STATS."""

    remote_tlb_flush: Counter
    remote_tlb_flush_requests: Counter


@kvm_stats
class KvmVcpuStatGeneric(ctypes.Structure):
    """KVM_GENERIC_VCPU_STATS."""

    halt_successful_poll: Counter
    halt_attempted_poll: Counter
    halt_poll_invalid: Counter
    halt_wakeup: Counter
    halt_poll_success_ns: TimeNsec
    halt_poll_fail_ns: TimeNsec
    halt_wait_ns: TimeNsec
    halt_poll_success_hist: LogHistTimeNsec
    halt_poll_fail_hist: LogHistTimeNsec
    halt_wait_hist: LogHistTimeNsec
    blocking: Boolean


_vm_ids: set[str] = set()
_vm_ids_lock = threading.Lock()


def _release(fd: int, stats_id: str) -> None:
    os.close(fd)
    _vm_ids.discard(stats_id)


@cache
def _descriptors(kind: type[ctypes.Structure]) -> bytes:
    """The descriptors of a structure's statistics, one behind the other."""
    found = b""
    for name, desc in _declared(kind):
        head = uapi.kvm_stats_desc(
            desc.flags, desc.exponent, desc.size, getattr(kind, name).offset, desc.bucket_size
        )
        assert len(name) < KVM_STATS_NAME_SIZE
        found += bytes(head) + name.encode().ljust(KVM_STATS_NAME_SIZE, b"\0")
    return found


def _front(stats_id: str, kind: type[ctypes.Structure]) -> bytes:
    """All that precedes the data: header, identity, descriptors."""
    descriptors = _descriptors(kind)
    step = ctypes.sizeof(uapi.kvm_stats_desc) + KVM_STATS_NAME_SIZE
    at_id = ctypes.sizeof(uapi.kvm_stats_header)
    at_descriptors = at_id + KVM_STATS_NAME_SIZE
    at_data = at_descriptors + len(descriptors)
    count = len(descriptors) // step
    header = uapi.kvm_stats_header(0, KVM_STATS_NAME_SIZE, count, at_id, at_descriptors, at_data)
    identity = stats_id.encode().ljust(KVM_STATS_NAME_SIZE, b"\0")
    return bytes(header) + identity + descriptors


class KvmStats(Generic[S]):
    """The statistics of one object, `stat`, in the memfd `name` that describes them as `stats_id`.

    The file is there as long as the object, so that `anykvm stat` finds it in /proc/PID/fd.
    """

    def __init__(self, name: str, stats_id: str, kind: type[S]) -> None:
        self.name = name
        self.stats_id = stats_id
        front = _front(stats_id, kind)
        memfd = Memfd(name, len(front) + ctypes.sizeof(kind))
        self.close = weakref.finalize(self, _release, memfd.fd, stats_id)
        self.close.atexit = False
        os.fchmod(memfd.fd, 0o400)  # a descriptor opened anew cannot write
        mapping = memfd.mapping
        assert mapping is not None
        ctypes.memmove(mapping.address, front, len(front))
        self._fd = memfd.fd
        self.stat: S = mapping.view(kind, len(front))

    def getfd(self) -> int:
        """A new descriptor that reads the statistics, with a position of its own.

        It needs nothing of this process: after the object's end it reads the last values.
        """
        with call("anon_inode_getfd", file=self.name) as this:
            flags = os.O_RDONLY | os.O_CLOEXEC
            this.result = fd = os.open(f"/proc/self/fd/{self._fd}", flags)
            current().fd_installed(fd)
            return fd


def kvm_vm_stats(pid: int, kind: type[S]) -> KvmStats[S]:
    """The statistics of a VM that process `pid` makes: "kvm-PID", as Linux calls it.

    Linux gives the same name to all VMs of a process; here the second one that lives at a time
    is "kvm-PID-2", so that vCPUs can be told apart by whose they are.
    """
    with _vm_ids_lock:
        stats_id = next(name for name in _vm_names(pid) if name not in _vm_ids)
        _vm_ids.add(stats_id)
    try:
        return KvmStats("kvm-vm-stats", stats_id, kind)
    except BaseException:
        _vm_ids.discard(stats_id)
        raise


def _vm_names(pid: int) -> Iterator[str]:
    yield f"kvm-{pid}"
    number = 2
    while True:
        yield f"kvm-{pid}-{number}"
        number += 1


def kvm_vcpu_stats(vm_id: str, vcpu_id: int, kind: type[S]) -> KvmStats[S]:
    """The statistics of a vCPU: "kvm-PID/vcpu-N"."""
    return KvmStats(f"kvm-vcpu-stats:{vcpu_id}", f"{vm_id}/vcpu-{vcpu_id}", kind)


def log_hist_update(hist: ctypes.Array[c_uint64], value: int) -> None:
    """`kvm_stats_log_hist_update`: bucket n counts values of n significant bits."""
    hist[min(value.bit_length(), len(hist) - 1)] += 1
