"""The performance-monitoring unit that guests do not have: CPUID leaf 0xA is zero. What a VMM says
about it is checked and kept as on Linux.

arch/x86/kvm/pmu.c, `kvm_vm_ioctl_set_pmu_event_filter`; api.rst 4.120.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from errno import EINVAL

from anykvm.fs.uaccess import UserMemory
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import InTail, Tail
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import KvmX86
from anykvm.x86.tables import vm_ioctls

KVM_PMU_EVENT_FILTER_MAX_EVENTS = 300
ACTIONS = (uapi.KVM_PMU_EVENT_ALLOW, uapi.KVM_PMU_EVENT_DENY)


class PmuEvent(ctypes.Structure):
    """An event of a filter: select in bits 0-7 and 32-35, unit mask in 8-15."""

    _fields_ = [("event", ctypes.c_uint64)]
    event: int


FilterTail = Tail[uapi.kvm_pmu_event_filter, PmuEvent]


@dataclass(frozen=True, slots=True)
class PmuEventFilter:
    """Which events a guest may count: event select and unit mask each, and fixed counters."""

    action: int
    fixed_counter_bitmap: int
    events: tuple[int, ...]


class _FilterArg(InTail[uapi.kvm_pmu_event_filter, PmuEvent]):
    """The header is found wrong before the events are counted, and these before they are read."""

    def copy_header(self, mm: UserMemory, address: int) -> tuple[uapi.kvm_pmu_event_filter, int]:
        header, count = super().copy_header(mm, address)
        if header.action not in ACTIONS or header.flags:
            raise fail(EINVAL, f"PMU filter: action {header.action}, flags {header.flags:#x}")
        return header, count


@vm_ioctls.row(
    "KVM_SET_PMU_EVENT_FILTER",
    _FilterArg(uapi.kvm_pmu_event_filter, PmuEvent, "nevents", KVM_PMU_EVENT_FILTER_MAX_EVENTS),
    uapi.KVM_CAP_PMU_EVENT_FILTER,
    errors={EINVAL: "an unknown action or flag"},
)
def kvm_vm_ioctl_set_pmu_event_filter(kvm: KvmX86, given: FilterTail) -> None:
    """Replaces the filter."""
    header = given.header
    events = tuple(sorted(entry.event for entry in given.entries))
    kvm.pmu_event_filter = PmuEventFilter(header.action, header.fixed_counter_bitmap, events)
