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
from anykvm.x86.lapic_regs import ApicFault

KVM_MAX_MCE_BANKS = 32
MSR_IA32_TSC_ADJUST, MSR_IA32_MCG_CAP = 0x3B, 0x179
MSR_KVM_SYSTEM_TIME_NEW = 0x4B564D01
MCG_CTL_P, MCG_SER_P = 1 << 8, 1 << 24
MCE_CAP_SUPPORTED = MCG_CTL_P | MCG_SER_P | KVM_MAX_MCE_BANKS
MCE_CAP_DEFAULT = MCG_CTL_P | KVM_MAX_MCE_BANKS
MTRR_VARIABLE = 8
MTRR_CAP = 1 << 10 | 1 << 8 | MTRR_VARIABLE  # write-combining, fixed ranges
MTRR_TYPES = frozenset((0, 1, 4, 5, 6))
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))

EFER_SCE, EFER_LME, EFER_LMA, EFER_NX = 1, 1 << 8, 1 << 10, 1 << 11
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
    )
)

Read = Callable[[VcpuX86], int]
Write = Callable[[VcpuX86, int, bool], bool]


class Msr(NamedTuple):
    """One register. `write` says whether the value was allowed; None refuses all but equal values.

    `listed`: it belongs to what KVM_GET_MSR_INDEX_LIST says is to be saved. `feature`: it describes
    the processor and can be read from /dev/kvm. `reset` is its value after power-on, where it is
    only stored.
    """

    name: str
    read: Read
    write: Write | None
    listed: bool = True
    feature: bool = False
    reset: int | None = None


MSRS: dict[int, Msr] = {}


def _enter(index: int, msr: Msr) -> None:
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

    _enter(index, Msr(name, read, write))


def _stored(
    index: int,
    name: str,
    reset: int = 0,
    allowed: Callable[[int], bool] = lambda value: True,
    guest_writes: bool = True,
    listed: bool = True,
    feature: bool = False,
) -> None:
    """A register without effect that keeps what is written."""

    def read(vcpu: VcpuX86) -> int:
        return vcpu.msrs.get(index, reset)

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not (host or guest_writes) or not allowed(value):
            return False
        vcpu.msrs[index] = value
        return True

    _enter(index, Msr(name, read, write, listed, feature, reset))


def _constant(index: int, name: str, value: int, ignore_writes: bool = False) -> None:
    """A register that cannot change; with `ignore_writes` a write is no error."""
    write: Write | None = (lambda vcpu, value, host: True) if ignore_writes else None
    _enter(index, Msr(name, lambda vcpu: value, write, listed=False))


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

    _enter(index, Msr(name, read, write))


_segment_base(0xC0000100, "fs_base", 4)
_segment_base(0xC0000101, "gs_base", 5)


def efer_reserved(vcpu: VcpuX86) -> int:
    """The bits of EFER that the guest's CPUID does not give it."""
    allowed = 0
    for feature, bits in (("syscall", EFER_SCE), ("lm", EFER_LME | EFER_LMA), ("nx", EFER_NX)):
        if vcpu.cpuid.has(feature):
            allowed |= bits
    return ~allowed & MASK64


def _read_efer(vcpu: VcpuX86) -> int:
    return vcpu.state.efer


def _write_efer(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """LMA follows CR0.PG and LME; LME is fixed while paging is on."""
    everything = EFER_SCE | EFER_LME | EFER_LMA | EFER_NX
    old = vcpu.state.efer
    if value & (~everything if host else efer_reserved(vcpu)):
        return False
    if not host and vcpu.state.cr0 & CR0_PG and (old ^ value) & EFER_LME:
        return False
    vcpu.state.efer = value if host else value & ~EFER_LMA | old & EFER_LMA
    vcpu.cpu.mode_changed()
    if (old ^ value) & EFER_NX:
        vcpu.cpu.flush_tlb()
    return True


_enter(0xC0000080, Msr("efer", _read_efer, _write_efer))

# Time.


def _write_tsc(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """A write by the guest shows in IA32_TSC_ADJUST (SDM vol. 3, 18.17.3)."""
    if host:
        vcpu.synchronize_tsc(value)
        return True
    before = vcpu.state.tsc_offset
    vcpu.set_guest_tsc(value)
    change = vcpu.state.tsc_offset - before
    vcpu.msrs[MSR_IA32_TSC_ADJUST] = vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0) + change & MASK64
    return True


def _read_tsc_adjust(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0)


def _write_tsc_adjust(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """A write by the guest moves its TSC by as much; the VMM restores the register alone."""
    if not host:
        change = value - vcpu.msrs.get(MSR_IA32_TSC_ADJUST, 0)
        vcpu.set_tsc_offset(vcpu.state.tsc_offset + change & MASK64)
    vcpu.msrs[MSR_IA32_TSC_ADJUST] = value
    return True


_enter(0x10, Msr("tsc", VcpuX86.guest_tsc, _write_tsc))
_enter(MSR_IA32_TSC_ADJUST, Msr("tsc_adjust", _read_tsc_adjust, _write_tsc_adjust, reset=0))

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
    vcpu.cpuid.set_runtime(bool(vcpu.state.cr4 >> 18 & 1), bool(value >> 11 & 1))
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


_enter(0x1B, Msr("apic_base", _read_apic_base, write_apic_base))
_enter(0x6E0, Msr("tsc_deadline", _read_tscdeadline, _write_tscdeadline))

# kvmclock.

SYSTEM_TIME_ENABLE = 1


def update_pvclock(vcpu: VcpuX86) -> None:
    """Write the vCPU's time page, if the guest has enabled it."""
    msr = vcpu.msrs.get(MSR_KVM_SYSTEM_TIME_NEW, 0)
    if msr & SYSTEM_TIME_ENABLE:
        vcpu.pvclock.update(vcpu.kvm.kvm_write_guest, msr & ~1, vcpu.state.tsc_offset)


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
        kvm.wall_clock_version = kvm.clock.write_wall_clock(
            kvm.kvm_write_guest, value, kvm.wall_clock_version
        )
    return True


for _index in (MSR_KVM_SYSTEM_TIME_NEW, 0x12):
    _enter(_index, Msr("kvm_system_time", _read_system_time, _write_system_time))
for _index in (0x4B564D00, 0x11):
    _enter(_index, Msr("kvm_wall_clock", _read_wall_clock, _write_wall_clock))

# Memory types: kept for the guest, without effect on memory that has no caches.

_constant(0xFE, "mtrr_cap", MTRR_CAP)
_stored(0x2FF, "mtrr_def_type", 0, lambda v: not v & ~0xCFF and (v & 0xFF) in MTRR_TYPES)
for _n in range(MTRR_VARIABLE):
    _stored(0x200 + 2 * _n, f"mtrr_phys_base{_n}", 0, lambda v: (v & 0xFF) in MTRR_TYPES)
    _stored(0x201 + 2 * _n, f"mtrr_phys_mask{_n}", 0, lambda v: not v & 0x7FF)
for _index in (0x250, 0x258, 0x259, *range(0x268, 0x270)):
    _stored(_index, f"mtrr_fixed_{_index:x}", 0, _types(MTRR_TYPES))

# Machine checks: banks to read and write; nothing ever reports one.


def _bank(index: int) -> None:
    """CTL takes all or nothing (bits 0 and 10 are spared); the guest may only clear STATUS."""
    control, status = index % 4 == 0, index % 4 == 1

    def read(vcpu: VcpuX86) -> int:
        return vcpu.msrs.get(index, 0)

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        partial = value and value | 1 << 10 | 1 != MASK64
        if (control and partial) or (status and not host and value):
            return False
        vcpu.msrs[index] = value
        return True

    _enter(index, Msr(f"mc{(index - 0x400) // 4}_{index % 4}", read, write, False, reset=0))


_stored(MSR_IA32_MCG_CAP, "mcg_cap", MCE_CAP_DEFAULT, guest_writes=False, listed=False)
_stored(0x17A, "mcg_status", 0)
_stored(0x17B, "mcg_ctl", 0, lambda v: v in (0, MASK64))
for _index in range(0x400, 0x400 + 4 * KVM_MAX_MCE_BANKS):
    _bank(_index)

# What describes the processor.

_stored(0x10A, "arch_capabilities", ARCH_CAPABILITIES, guest_writes=False, feature=True)
_stored(0x8B, "ucode_rev", 1 << 32, guest_writes=True, listed=False, feature=True)
_stored(0xCE, "platform_info", 0, guest_writes=False)  # no CPUID faulting
_stored(0x140, "misc_features_enables", 0, _within(0))
_stored(0x1A0, "misc_enable", 1 << 0 | 1 << 11 | 1 << 12)
_stored(0x3A, "feature_control", 1, guest_writes=False)  # locked: neither VMX nor SGX
_stored(0x1D9, "debugctl", 0, _within(1 << 0 | 1 << 1), listed=False)
_constant(0x17, "platform_id", 0)
_constant(0x2A, "ebl_cr_poweron", 0)
_constant(0xCD, "fsb_freq", 3)
_constant(0x198, "perf_status", 1000 | 4 << 40)
_constant(0x119, "bbl_cr_ctl", 0, ignore_writes=True)
_constant(0x11E, "bbl_cr_ctl3", 0xBE702111)
_constant(0x79, "ucode_write", 0, ignore_writes=True)
_stored(0x34, "smi_count", 0, guest_writes=False)
for _n in range(4):
    _constant((0x1DB, 0x1DC, 0x1DD, 0x1DE)[_n], f"last_branch_{_n}", 0)

assert MODEL == 0x1C  # fsb_freq and bbl_cr_ctl3 above are this model's

X2APIC_MSRS = range(apic_reg.APIC_BASE_MSR, apic_reg.APIC_LAST_MSR + 1)


def kvm_get_msr(vcpu: VcpuX86, index: int) -> int | None:
    """The value, or None where the register does not exist."""
    row = MSRS.get(index)
    if row is not None:
        return row.read(vcpu)
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
    configured = (MSR_IA32_MCG_CAP,)  # by the VMM, not by the guest
    vcpu.msrs = {index: vcpu.msrs[index] for index in configured if index in vcpu.msrs}


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
