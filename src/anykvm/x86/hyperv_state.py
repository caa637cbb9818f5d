"""What a VM and a vCPU have of Hyper-V: `struct kvm_hv`, `kvm_vcpu_hv`, its SynIC and its timers
(asm/kvm_host.h).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum, auto

from anykvm.kvm.eventfd import EventfdCtx
from anykvm.kvm.worker import Hrtimer
from anykvm.uapi.kvm import kvm_hyperv_exit
from anykvm.x86.hyperv_cpuid import HvCpuid
from anykvm.x86.hyperv_tlfs import (
    CRASH_PARAMETERS,
    SINT_COUNT,
    SINT_MASKED,
    STIMER_COUNT,
    SYNIC_VERSION,
)


class TscPageStatus(Enum):
    """enum hv_tsc_page_status."""

    UNSET = auto()
    GUEST_CHANGED = auto()
    HOST_CHANGED = auto()
    SET = auto()
    BROKEN = auto()  # the guest gave no memory for it


@dataclass(slots=True)
class Syndbg:
    """struct kvm_hv_syndbg: the synthetic debugger's registers."""

    control: int = 0
    status: int = 0
    send_page: int = 0
    recv_page: int = 0
    pending_page: int = 0
    options: int = 0


@dataclass(slots=True)
class KvmHv:
    """A VM's. `lock` is held while a register that all vCPUs share is written."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    guest_os_id: int = 0
    hypercall: int = 0
    tsc_page: int = 0
    tsc_page_status: TscPageStatus = TscPageStatus.UNSET
    tsc_scale: int = 0
    tsc_offset: int = 0
    crash_param: list[int] = field(default_factory=lambda: [0] * CRASH_PARAMETERS)
    crash_ctl: int = 0
    reenlightenment_control: int = 0
    tsc_emulation_control: int = 0
    tsc_emulation_status: int = 0
    syndbg: Syndbg = field(default_factory=Syndbg)
    connections: dict[int, EventfdCtx] = field(default_factory=dict)

    def destroy(self) -> None:
        """`kvm_hv_destroy_vm`."""
        for eventfd in self.connections.values():
            eventfd.put()
        self.connections.clear()


@dataclass(slots=True)
class Synic:
    """struct kvm_vcpu_hv_synic. `vectors` are those of its SINTs, `auto_eoi` those that need no
    EOI, a bit each; `gsi` is what routing gives a SINT.
    """

    active: bool = False
    dont_zero_pages: bool = False
    control: int = 0
    version: int = SYNIC_VERSION
    evt_page: int = 0
    msg_page: int = 0
    sint: list[int] = field(default_factory=lambda: [SINT_MASKED] * SINT_COUNT)
    vectors: int = 0
    auto_eoi: int = 0
    gsi: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True)
class Stimer:
    """struct kvm_vcpu_hv_stimer. Times are in units of 100 ns of the reference counter."""

    index: int
    config: int = 0
    count: int = 0
    exp_time: int = 0
    msg_pending: bool = False
    timer: Hrtimer | None = None


@dataclass(slots=True)
class VcpuHv:
    """A vCPU's. Any thread may add to `stimers_due`; the rest is the vCPU's thread's."""

    vp_index: int
    cpuid: HvCpuid = field(default_factory=HvCpuid)
    vp_assist_page: int = 0
    runtime_offset: int = 0
    synic: Synic = field(default_factory=Synic)
    stimers: list[Stimer] = field(default_factory=lambda: [Stimer(n) for n in range(STIMER_COUNT)])
    stimers_due: set[int] = field(default_factory=set)
    exit: kvm_hyperv_exit = field(default_factory=kvm_hyperv_exit)
