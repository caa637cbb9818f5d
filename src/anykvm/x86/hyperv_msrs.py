"""Hyper-V's MSRs. TLFS, appendix F; `kvm_hv_set_msr_common` of arch/x86/kvm/hyperv.c.

A guest has them where its CPUID names Hyper-V; with KVM_CAP_HYPERV_ENFORCE_CPUID, only those whose
feature it was given. The VMM always has them.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from anykvm.kvm.kvm_main import KVM_MAX_VCPUS
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.hypercall_insn import native_hypercall
from anykvm.x86.hyperv_clock import get_time_ref_counter
from anykvm.x86.hyperv_state import TscPageStatus
from anykvm.x86.hyperv_stimer import stimer_set_config, stimer_set_count
from anykvm.x86.hyperv_synic import (
    kvm_hv_notify_acked_sint,
    synic_exit,
    synic_set_page,
    synic_set_sint,
)
from anykvm.x86.hyperv_tlfs import Access, Feature
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.kvm_para import KVM_MSR_ENABLED, MSR_KVM_PV_EOI_EN
from anykvm.x86.lapic_regs import ApicFault
from anykvm.x86.lapic_timer import APIC_BUS_CYCLE_NS
from anykvm.x86.msrs import Gate, Msr, Read, Write, enter

RET, OR_EAX_MARK = b"\xc3", b"\x0d\0\0\0\x80"
APIC_BUS_FREQUENCY = 1_000_000_000 // APIC_BUS_CYCLE_NS
KHZ = 1000
MASK32 = (1 << 32) - 1


def hv_gate(access: Access | None = None, feature: Feature | None = None) -> Gate:
    """`hv_check_msr_access`."""

    def allowed(vcpu: VcpuX86, host: bool) -> bool:
        cpuid = vcpu.hv.cpuid
        given = (access is None or cpuid.access & access) and (
            feature is None or cpuid.features & feature
        )
        return host or (cpuid.enabled and (not cpuid.enforce or bool(given)))

    return allowed


def _row(index: int, name: str, read: Read, write: Write, gate: Gate, listed: bool = True) -> None:
    enter(index, Msr(f"hv_{name}", read, write, listed, gate=gate))


def _read_only(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """What cannot be set; a VMM that restores everything may try."""
    return host


def _partition(index: int, name: str, gate: Gate, store: Write | None = None) -> None:
    """A register that all vCPUs share: a field of `KvmHv`."""

    def read(vcpu: VcpuX86) -> int:
        value: int = getattr(vcpu.kvm.hv, name)
        return value

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        with vcpu.kvm.hv.lock:
            if store is not None:
                return store(vcpu, value, host)
            setattr(vcpu.kvm.hv, name, value)
            return True

    _row(index, name, read, write, gate)


# Identity and the page with the hypercall's code.


def _write_guest_os_id(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """Without an identity there are no hypercalls."""
    state = vcpu.kvm.hv
    state.guest_os_id = value
    if not value:
        state.hypercall &= ~hv.ENABLE
    return True


def _write_hypercall(vcpu: VcpuX86, value: int, host: bool) -> bool:
    state = vcpu.kvm.hv
    if not state.guest_os_id:
        return True
    gpa = value & hv.PAGE_MASK
    if value & hv.ENABLE:
        if not vcpu.kvm.writable(gpa):
            return False
        # Calls of Hyper-V's are marked where Xen's use the same instruction.
        mark = OR_EAX_MARK if vcpu.kvm.xen_hypercall_enabled() else b""
        vcpu.kvm.kvm_write_guest(gpa, mark + native_hypercall(vcpu) + RET)
    state.hypercall = value
    return True


_partition(hv.GUEST_OS_ID, "guest_os_id", hv_gate(Access.HYPERCALL), _write_guest_os_id)
_partition(hv.HYPERCALL, "hypercall", hv_gate(Access.HYPERCALL), _write_hypercall)

# Time.


def _write_reference_tsc(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """The first vCPU writes the page before it runs on."""
    state = vcpu.kvm.hv
    state.tsc_page, state.tsc_page_status = value, TscPageStatus.UNSET
    if value & hv.ENABLE:
        changed = TscPageStatus.HOST_CHANGED if host else TscPageStatus.GUEST_CHANGED
        state.tsc_page_status = changed
        vcpu.kvm.x86_vcpus()[0].make_request(Request.CLOCK_UPDATE)
    return True


def _runtime() -> int:
    return time.thread_time_ns() // 100


def _write_runtime(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if host:
        vcpu.hv.runtime_offset = value - _runtime()
    return host


def _write_emulation_status(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if value and not host:
        return False
    vcpu.kvm.hv.tsc_emulation_status = value
    return True


_partition(hv.REFERENCE_TSC, "tsc_page", hv_gate(Access.REFERENCE_TSC), _write_reference_tsc)
_row(
    hv.TIME_REF_COUNT,
    "time_ref_count",
    lambda vcpu: get_time_ref_counter(vcpu.kvm),
    _read_only,
    hv_gate(Access.TIME_REF_COUNT),
)
_row(
    hv.TSC_FREQUENCY,
    "tsc_frequency",
    lambda vcpu: vcpu.tsc_khz * KHZ,
    _read_only,
    hv_gate(Access.FREQUENCY),
)
_row(
    hv.APIC_FREQUENCY,
    "apic_frequency",
    lambda vcpu: APIC_BUS_FREQUENCY,
    _read_only,
    hv_gate(Access.FREQUENCY),
)
_row(
    hv.VP_RUNTIME,
    "vp_runtime",
    lambda vcpu: _runtime() + vcpu.hv.runtime_offset & (1 << 64) - 1,
    _write_runtime,
    hv_gate(Access.VP_RUNTIME),
)
_REENLIGHTENMENT = hv_gate(Access.REENLIGHTENMENT)
_partition(hv.REENLIGHTENMENT_CONTROL, "reenlightenment_control", _REENLIGHTENMENT)
_partition(hv.TSC_EMULATION_CONTROL, "tsc_emulation_control", _REENLIGHTENMENT)
_partition(
    hv.TSC_EMULATION_STATUS, "tsc_emulation_status", _REENLIGHTENMENT, _write_emulation_status
)

# Ends: a crash with its parameters, and a reset.


def _crash_parameter(n: int) -> None:
    def read(vcpu: VcpuX86) -> int:
        return vcpu.kvm.hv.crash_param[n]

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        vcpu.kvm.hv.crash_param[n] = value
        return True

    _row(hv.CRASH_P0 + n, f"crash_p{n}", read, write, hv_gate(feature=Feature.CRASH_MSRS))


def _write_crash_ctl(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """The VMM says what it can be told; the guest tells."""
    if host:
        vcpu.kvm.hv.crash_ctl = value & hv.CRASH_NOTIFY
    elif value & hv.CRASH_NOTIFY:
        vcpu.requests.add(Request.HV_CRASH)
    return True


def _write_reset(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if value == 1:
        vcpu.requests.add(Request.HV_RESET)
    return True


for _n in range(hv.CRASH_PARAMETERS):
    _crash_parameter(_n)
_partition(hv.CRASH_CTL, "crash_ctl", hv_gate(feature=Feature.CRASH_MSRS), _write_crash_ctl)
_row(hv.RESET, "reset", lambda vcpu: 0, _write_reset, hv_gate(Access.RESET))

# The processor and its local APIC.


def _write_vp_index(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """The number under which hypercalls know the processor."""
    if not host or value & MASK32 >= KVM_MAX_VCPUS:
        return False
    vcpu.hv.vp_index = value & MASK32
    return True


def _write_vp_assist_page(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """Its first word says whether an EOI may be left out, see `pv_eoi.py`."""
    gpa = value & hv.PAGE_MASK
    if value & hv.ENABLE:
        if not vcpu.kvm.writable(gpa):
            return False
        vcpu.kvm.kvm_write_guest(gpa, bytes(4))
        vcpu.msrs[MSR_KVM_PV_EOI_EN] = gpa | KVM_MSR_ENABLED
    elif vcpu.hv.vp_assist_page & hv.ENABLE:  # else the EOI may be KVM's own, which is restored
        vcpu.msrs[MSR_KVM_PV_EOI_EN] = 0
    vcpu.hv.vp_assist_page = value
    return True


def _apic_register(index: int, name: str, offset: int) -> None:
    """A register of the local APIC that costs less to reach this way than through its page."""

    def read(vcpu: VcpuX86) -> int:
        assert vcpu.apic is not None
        with vcpu.kvm.irqchip.lock:
            return vcpu.apic.hv_read(offset)

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if vcpu.apic is None:
            return False
        with vcpu.kvm.irqchip.lock:
            try:
                vcpu.apic.hv_write(offset, value)
            except ApicFault:
                return False
            vcpu.state.cr8 = vcpu.apic.cr8
        return True

    offered = hv_gate(Access.APIC_ACCESS)

    def gate(vcpu: VcpuX86, host: bool) -> bool:
        return vcpu.apic is not None and offered(vcpu, host)

    _row(index, name, read, write, gate, listed=False)


_row(
    hv.VP_INDEX,
    "vp_index",
    lambda vcpu: vcpu.hv.vp_index,
    _write_vp_index,
    hv_gate(Access.VP_INDEX),
)
_row(
    hv.VP_ASSIST_PAGE,
    "vp_assist_page",
    lambda vcpu: vcpu.hv.vp_assist_page,
    _write_vp_assist_page,
    hv_gate(Access.APIC_ACCESS),
)
_apic_register(hv.EOI, "eoi", reg.APIC_EOI)
_apic_register(hv.ICR, "icr", reg.APIC_ICR)
_apic_register(hv.TPR, "tpr", reg.APIC_TASKPRI)

# SynIC.


def _synic_gate(access: Access) -> Gate:
    """Nothing for a guest whose VMM has not enabled the SynIC."""
    offered = hv_gate(access)
    return lambda vcpu, host: offered(vcpu, host) and (host or vcpu.hv.synic.active)


SetSynic = Callable[[VcpuX86, int, bool], bool]


def _synic(index: int, name: str, store: SetSynic, exits: bool, listed: bool) -> None:
    def read(vcpu: VcpuX86) -> int:
        value: int = getattr(vcpu.hv.synic, name)
        return value

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not vcpu.hv.synic.active and value:
            return False
        stored = store(vcpu, value, host)
        if stored and exits and not host:
            synic_exit(vcpu, index)
        return stored

    _row(index, f"synic_{name}", read, write, _synic_gate(Access.SYNIC), listed)


def _set_control(vcpu: VcpuX86, value: int, host: bool) -> bool:
    vcpu.hv.synic.control = value
    return True


def _set_version(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if host:
        vcpu.hv.synic.version = value
    return host


def _end_of_message(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if vcpu.hv.synic.active:
        for sint in range(hv.SINT_COUNT):
            kvm_hv_notify_acked_sint(vcpu, sint)
        return True
    return not value


def _sint(n: int) -> None:
    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        inactive = not vcpu.hv.synic.active and value
        return not inactive and synic_set_sint(vcpu, n, value, host)

    _row(
        hv.SINT0 + n,
        f"sint{n}",
        lambda vcpu: vcpu.hv.synic.sint[n],
        write,
        _synic_gate(Access.SYNIC),
        listed=False,
    )


def _stimer(n: int) -> None:
    gate = _synic_gate(Access.SYNTIMER)
    _row(
        hv.STIMER0_CONFIG + 2 * n,
        f"stimer{n}_config",
        lambda vcpu: vcpu.hv.stimers[n].config,
        lambda vcpu, value, host: stimer_set_config(vcpu, vcpu.hv.stimers[n], value, host),
        gate,
        listed=n == 0,
    )
    _row(
        hv.STIMER0_COUNT + 2 * n,
        f"stimer{n}_count",
        lambda vcpu: vcpu.hv.stimers[n].count,
        lambda vcpu, value, host: stimer_set_count(vcpu, vcpu.hv.stimers[n], value, host),
        gate,
        listed=False,
    )


_synic(hv.SCONTROL, "control", _set_control, exits=True, listed=True)
_synic(hv.SVERSION, "version", _set_version, exits=False, listed=False)
for _index, _name in ((hv.SIEFP, "evt_page"), (hv.SIMP, "msg_page")):
    _synic(
        _index,
        _name,
        lambda vcpu, value, host, name=_name: synic_set_page(vcpu, name, value, host),  # type: ignore[misc]
        exits=True,
        listed=False,
    )
_row(hv.EOM, "eom", lambda vcpu: 0, _end_of_message, _synic_gate(Access.SYNIC), listed=False)
for _n in range(hv.SINT_COUNT):
    _sint(_n)
for _n in range(hv.STIMER_COUNT):
    _stimer(_n)
