"""Model-specific registers: a row each, with how the guest and the VMM read and write it.

SDM vol. 4; Documentation/virt/kvm/x86/msr.rst. What has no row is #GP for the guest and ends
KVM_GET_MSRS and KVM_SET_MSRS. A host-initiated access is the VMM's and may set what the guest can
only read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from anykvm.x86 import lapic_regs as apic_reg
from anykvm.x86.cpuid import MODEL
from anykvm.x86.kvm_host import MASK64, KvmX86, Request, VcpuX86
from anykvm.x86.kvm_para import (
    KVM_MSR_ENABLED,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    MSR_KVM_PV_EOI_EN,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_SYSTEM_TIME,
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_WALL_CLOCK,
    MSR_KVM_WALL_CLOCK_NEW,
    KvmFeature,
)
from anykvm.x86.lapic_regs import ApicFault

MSR_IA32_TSC_ADJUST = 0x3B
MTRR_VARIABLE = 8
MTRR_CAP = 1 << 10 | 1 << 8 | MTRR_VARIABLE  # write-combining, fixed ranges
MTRR_TYPES = frozenset((0, 1, 4, 5, 6))
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))

EFER_SCE, EFER_LME, EFER_LMA, EFER_NX, EFER_SVME = 1, 1 << 8, 1 << 10, 1 << 11, 1 << 12
EFER_OF_FEATURE = {"syscall": EFER_SCE, "lm": EFER_LME | EFER_LMA, "nx": EFER_NX, "svm": EFER_SVME}
EFER_ALLOWED = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX | EFER_SVME
CR0_PG = 1 << 31

# IA32_ARCH_CAPABILITIES: what the processor is not vulnerable to, which is all of it.
ARCH_CAPABILITIES = sum(
    1 << bit
    for bit in (
        0,  # RDCL_NO
        3,  # SKIP_L1DFL_VMENTRY
        4,  # SSB_NO
        5,  # MDS_NO
        6,  # IF_PSCHANGE_MC_NO
        8,  # TAA_NO
        13,  # SBDR_SSDP_NO
        14,  # FBSDP_NO
        15,  # PSDP_NO
        20,  # BHI_NO
        24,  # PBRSB_NO
        26,  # GDS_NO
        27,  # RFDS_NO
        62,  # ITS_NO
    )
)

Read = Callable[[VcpuX86], int]
Write = Callable[[VcpuX86, int, bool], bool]
Gate = Callable[[VcpuX86, bool], bool]


class Msr(NamedTuple):
    """One register. `write` says whether the value was allowed; None refuses all but equal values.

    `listed`: it belongs to what KVM_GET_MSR_INDEX_LIST says is to be saved. `feature`: it describes
    the processor and can be read from /dev/kvm. `reset` is its value after power-on, where it is
    only stored. `pv` is the feature without which a guest may not have it, see `kvm_para.py`.
    `guest_reads` says whether a guest may read it, `exists` whether it is there at all, where that
    depends, `gate` both for the guest and (True) for the VMM.
    """

    name: str
    read: Read
    write: Write | None
    listed: bool = True
    feature: bool = False
    reset: int | None = None
    pv: KvmFeature | None = None
    guest_reads: Callable[[VcpuX86], bool] | None = None
    exists: Callable[[VcpuX86], bool] | None = None
    gate: Gate | None = None

    def offered(self, vcpu: VcpuX86, host: bool) -> bool:
        """Whether this vCPU has the register, for the guest or the VMM."""
        if self.gate is not None and not self.gate(vcpu, host):
            return False
        if self.pv is not None and not vcpu.pv_cpuid.has(self.pv):
            return False
        return self.exists is None or self.exists(vcpu)


MSRS: dict[int, Msr] = {}


def enter(index: int, msr: Msr) -> None:
    """Put a row into the table."""
    assert index not in MSRS, f"{msr.name} and {MSRS[index].name} are both {index:#x}"
    MSRS[index] = msr


def canonical(value: int) -> bool:
    """Whether a linear address has its upper 17 bits equal (48-bit addresses)."""
    return value >> 47 in (0, 0x1FFFF)


def _field(index: int, name: str, allowed: Callable[[int], bool] = lambda value: True) -> None:
    """A register that is a field of the processor's state."""

    def read(vcpu: VcpuX86) -> int:
        value: int = getattr(vcpu.state, name)
        return value

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not allowed(value):
            return False
        setattr(vcpu.state, name, value)
        return True

    enter(index, Msr(name, read, write))


def stored(
    index: int,
    name: str,
    reset: int = 0,
    allowed: Callable[[int], bool] = lambda value: True,
    guest_writes: bool = True,
    listed: bool = True,
    feature: bool = False,
    pv: KvmFeature | None = None,
) -> None:
    """A register without effect that keeps what is written."""

    def read(vcpu: VcpuX86) -> int:
        return vcpu.msrs.get(index, reset)

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not (host or guest_writes) or not allowed(value):
            return False
        vcpu.msrs[index] = value
        return True

    enter(index, Msr(name, read, write, listed, feature, reset, pv))


def constant(index: int, name: str, value: int, ignore_writes: bool = False) -> None:
    """A register that cannot change; with `ignore_writes` a write is no error."""
    write: Write | None = (lambda vcpu, value, host: True) if ignore_writes else None
    enter(index, Msr(name, lambda vcpu: value, write, listed=False))


def _within(mask: int) -> Callable[[int], bool]:
    return lambda value: not value & ~mask


def _types(types: frozenset[int]) -> Callable[[int], bool]:
    """Whether each byte is one of these memory types."""
    return lambda value: all(byte in types for byte in value.to_bytes(8, "little"))


# Segment bases and system calls.

_field(0xC0000081, "star")
_field(0xC0000082, "lstar", canonical)
_field(0xC0000083, "cstar", canonical)
_field(0xC0000084, "fmask", _within(0xFFFFFFFF))
_field(0xC0000102, "kernel_gs_base", canonical)
_field(0xC0000103, "tsc_aux", _within(0xFFFFFFFF))
_field(0x174, "sysenter_cs", _within(0xFFFFFFFF))
_field(0x175, "sysenter_esp", canonical)
_field(0x176, "sysenter_eip", canonical)
_field(0x277, "pat", _types(PAT_TYPES))


def _segment_base(index: int, name: str, seg: int) -> None:
    def read(vcpu: VcpuX86) -> int:
        return vcpu.state.seg[seg].base

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not canonical(value):
            return False
        vcpu.state.seg[seg].base = value
        return True

    enter(index, Msr(name, read, write))


_segment_base(0xC0000100, "fs_base", 4)
_segment_base(0xC0000101, "gs_base", 5)


def efer_reserved(vcpu: VcpuX86) -> int:
    """The bits of EFER that the guest's CPUID does not give it."""
    allowed = 0
    for feature, bits in EFER_OF_FEATURE.items():
        if vcpu.cpuid.has(feature):
            allowed |= bits
    return ~allowed & MASK64


def _read_efer(vcpu: VcpuX86) -> int:
    return vcpu.state.efer


def _write_efer(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """LMA follows CR0.PG and LME; LME is fixed while paging is on."""
    old = vcpu.state.efer
    if value & (~EFER_ALLOWED if host else efer_reserved(vcpu)):
        return False
    if not host and vcpu.state.cr0 & CR0_PG and (old ^ value) & EFER_LME:
        return False
    vcpu.state.efer = value if host else value & ~EFER_LMA | old & EFER_LMA
    if old & ~value & EFER_SVME:
        vcpu.cpu.svm.reset()
    vcpu.cpu.mode_changed()
    if (old ^ value) & EFER_NX:
        vcpu.cpu.flush_tlb()
    return True


enter(0xC0000080, Msr("efer", _read_efer, _write_efer))

# Time.


def _write_tsc(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """A write by the guest shows in IA32_TSC_ADJUST (SDM vol. 3, 18.17.3)."""
    if host:
        vcpu.synchronize_tsc(value)
        return True
    before = vcpu.l1_tsc_offset
    vcpu.set_guest_tsc(value)
    change = vcpu.l1_tsc_offset - before
    vcpu.msrs[MSR_IA32_TSC_ADJUST] = vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0) + change & MASK64
    return True


def _read_tsc_adjust(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0)


def _write_tsc_adjust(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """A write by the guest moves its TSC by as much; the VMM restores the register alone."""
    if not host:
        change = value - vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0)
        vcpu.set_tsc_offset(vcpu.l1_tsc_offset + change & MASK64)
    vcpu.msrs[MSR_IA32_TSC_ADJUST] = value
    return True


enter(0x10, Msr("tsc", VcpuX86.guest_tsc, _write_tsc))
enter(MSR_IA32_TSC_ADJUST, Msr("tsc_adjust", _read_tsc_adjust, _write_tsc_adjust, reset=0))

# The local APIC.


def _read_apic_base(vcpu: VcpuX86) -> int:
    return vcpu.apic.apic_base if vcpu.apic is not None else vcpu.state.apic_base


def write_apic_base(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            try:
                vcpu.apic.set_base(value, host)
            except ApicFault:
                return False
    elif value & (0x2FF | -1 << vcpu.maxphyaddr()):
        return False
    vcpu.state.apic_base = value
    vcpu.update_cpuid_runtime()
    return True


def _read_tscdeadline(vcpu: VcpuX86) -> int:
    if vcpu.apic is None:
        return 0
    with vcpu.kvm.irqchip.lock:
        return vcpu.apic.read_tscdeadline()


def _write_tscdeadline(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.write_tscdeadline(value)
    return True


enter(0x1B, Msr("apic_base", _read_apic_base, write_apic_base))
enter(0x6E0, Msr("tsc_deadline", _read_tscdeadline, _write_tscdeadline))

# kvmclock.


def update_pvclock(vcpu: VcpuX86) -> None:
    """Write the vCPU's time page, if the guest has enabled it."""
    msr = vcpu.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0)
    if msr & KVM_MSR_ENABLED:
        kvm = vcpu.kvm
        ratio, offset = vcpu.state.tsc_ratio, vcpu.l1_tsc_offset
        vcpu.pvclock.update(kvm.kvm_read_guest, kvm.kvm_write_guest, msr & ~1, ratio, offset)


def _read_system_time(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0)


def _write_system_time(vcpu: VcpuX86, value: int, host: bool) -> bool:
    vcpu.msrs[MSR_KVM_SYSTEM_TIME_NEW] = value
    vcpu.requests.add(Request.CLOCK_UPDATE)
    return True


def _read_wall_clock(vcpu: VcpuX86) -> int:
    return vcpu.kvm.wall_clock_gpa


def _write_wall_clock(vcpu: VcpuX86, value: int, host: bool) -> bool:
    kvm = vcpu.kvm
    kvm.wall_clock_gpa = value
    if value and kvm.memslots.gpa_to_memslot(value) is not None:
        kvm.clock.write_wall_clock(kvm.kvm_read_guest, kvm.kvm_write_guest, value)
    return True


PV_ARRANGEMENTS = (
    MSR_KVM_SYSTEM_TIME_NEW,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
    MSR_KVM_STEAL_TIME,
    MSR_KVM_PV_EOI_EN,
)


def _clock(system_time: int, wall_clock: int, pv: KvmFeature) -> None:
    """Both registers of one generation; they mean the same."""
    enter(system_time, Msr("kvm_system_time", _read_system_time, _write_system_time, pv=pv))
    enter(wall_clock, Msr("kvm_wall_clock", _read_wall_clock, _write_wall_clock, pv=pv))


_clock(MSR_KVM_SYSTEM_TIME_NEW, MSR_KVM_WALL_CLOCK_NEW, KvmFeature.CLOCKSOURCE2)
_clock(MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK, KvmFeature.CLOCKSOURCE)

# Memory types: kept for the guest, without effect on memory that has no caches.

constant(0xFE, "mtrr_cap", MTRR_CAP)
stored(0x2FF, "mtrr_def_type", 0, lambda v: not v & ~0xCFF and (v & 0xFF) in MTRR_TYPES)
for _n in range(MTRR_VARIABLE):
    stored(0x200 + 2 * _n, f"mtrr_phys_base{_n}", 0, lambda v: (v & 0xFF) in MTRR_TYPES)
    stored(0x201 + 2 * _n, f"mtrr_phys_mask{_n}", 0, lambda v: not v & 0x7FF)
for _index in (0x250, 0x258, 0x259, *range(0x268, 0x270)):
    stored(_index, f"mtrr_fixed_{_index:x}", 0, _types(MTRR_TYPES))

# What describes the processor.

stored(0x10A, "arch_capabilities", ARCH_CAPABILITIES, guest_writes=False, feature=True)
stored(0x8B, "ucode_rev", 1 << 32, guest_writes=True, listed=False, feature=True)
stored(0x1D9, "debugctl", 0, _within(1 << 0 | 1 << 1), listed=False)
constant(0x17, "platform_id", 0)
constant(0x2A, "ebl_cr_poweron", 0)
constant(0xCD, "fsb_freq", 3)
constant(0x198, "perf_status", 1000 | 4 << 40)
constant(0x119, "bbl_cr_ctl", 0, ignore_writes=True)
constant(0x11E, "bbl_cr_ctl3", 0xBE702111)
constant(0x79, "ucode_write", 0, ignore_writes=True)

for _n in range(4):
    constant((0x1DB, 0x1DC, 0x1DD, 0x1DE)[_n], f"last_branch_{_n}", 0)

assert MODEL == 0x1C  # fsb_freq and bbl_cr_ctl3 above are this model's

X2APIC_MSRS = range(apic_reg.APIC_BASE_MSR, apic_reg.APIC_LAST_MSR + 1)


def kvm_get_msr(vcpu: VcpuX86, index: int, host: bool = False) -> int | None:
    """The value, or None where the register does not exist, or not for who asks."""
    row = MSRS.get(index)
    if row is not None:
        allowed = host or row.guest_reads is None or row.guest_reads(vcpu)
        return row.read(vcpu) if allowed and row.offered(vcpu, host) else None
    if index in X2APIC_MSRS and vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            try:
                return vcpu.apic.read_msr(index)
            except ApicFault:
                return None
    return None


def kvm_set_msr(vcpu: VcpuX86, index: int, value: int, host: bool) -> bool:
    """Whether the register took the value."""
    row = MSRS.get(index)
    if row is not None:
        if not row.offered(vcpu, host):
            return False
        if row.write is None:
            return host and row.read(vcpu) == value
        return row.write(vcpu, value, host)
    if index in X2APIC_MSRS and vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            try:
                vcpu.apic.write_msr(index, value)
                return True
            except ApicFault:
                return False
    return False


def reset_msrs(vcpu: VcpuX86) -> None:
    """Power-on values of what is stored here."""
    vcpu.msrs = {}


def reset_pv_msrs(vcpu: VcpuX86) -> None:
    """Power-on and INIT end what the guest has arranged with KVM."""
    for index in PV_ARRANGEMENTS:
        vcpu.msrs.pop(index, None)


def msr_index_list() -> list[int]:
    """KVM_GET_MSR_INDEX_LIST: what has to be saved for a guest to be restored."""
    return [index for index, row in MSRS.items() if row.listed]


def msr_feature_index_list() -> list[int]:
    """KVM_GET_MSR_FEATURE_INDEX_LIST."""
    return [index for index, row in MSRS.items() if row.feature]


def feature_msr(index: int) -> int | None:
    """A feature register's value as /dev/kvm gives it."""
    row = MSRS.get(index)
    return row.reset if row is not None and row.feature else None


def restart_clocks(kvm: KvmX86) -> None:
    """The VM's clock was set: every vCPU publishes anew before it runs on."""
    for vcpu in kvm.x86_vcpus():
        vcpu.make_request(Request.CLOCK_UPDATE)
