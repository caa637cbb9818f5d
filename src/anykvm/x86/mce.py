"""Machine checks: the registers that a guest finds errors in, and errors that the VMM reports.

SDM vol. 3, chapter 16; arch/x86/kvm/x86.c, `set_msr_mce` and `kvm_vcpu_ioctl_x86_set_mce`; api.rst
4.104 to 4.107.
"""

from __future__ import annotations

from ctypes import c_uint64
from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import (
    KVM_MAX_MCE_BANKS,
    MASK64,
    PendingException,
    Request,
    VcpuX86,
)
from anykvm.x86.lapic_regs import APIC_LVTCMCI
from anykvm.x86.msrs import Msr, constant, enter
from anykvm.x86.tables import vcpu_ioctls

MC_VECTOR = 18
CR4_MCE = 1 << 6
MCG_BANKCNT_MASK = 0xFF
MCG_CTL_P, MCG_CMCI_P, MCG_SER_P, MCG_LMCE_P = 1 << 8, 1 << 10, 1 << 24, 1 << 27
MCE_CAP_SUPPORTED = MCG_CTL_P | MCG_CMCI_P | MCG_SER_P | MCG_LMCE_P
MCG_STATUS_MCIP = 1 << 2
MCG_EXT_CTL_LMCE_EN = 1
MCI_STATUS_VAL, MCI_STATUS_OVER, MCI_STATUS_UC = 1 << 63, 1 << 62, 1 << 61
MCI_STATUS_PCC, MCI_STATUS_S, MCI_STATUS_AR = 1 << 57, 1 << 56, 1 << 55
MCI_CTL2_CMCI_EN, MCI_CTL2_CMCI_THRESHOLD_MASK = 1 << 30, 0x7FFF
MSR_FEAT_CTL, FEAT_CTL_LOCKED, FEAT_CTL_LMCE_ENABLED = 0x3A, 1, 1 << 20
MSR_P5_MC_ADDR, MSR_P5_MC_TYPE = 0, 1
MSR_MCG_CAP, MSR_MCG_STATUS, MSR_MCG_CTL, MSR_MCG_EXT_CTL = 0x179, 0x17A, 0x17B, 0x4D0
MSR_MC0_CTL2, MSR_MC0_CTL = 0x280, 0x400
CTL, STATUS, ADDR, MISC = range(4)


def banks(vcpu: VcpuX86) -> int:
    return vcpu.mce.cap & MCG_BANKCNT_MASK


# Registers.


def _read_mcg_cap(vcpu: VcpuX86) -> int:
    return vcpu.mce.cap


def _read_mcg_status(vcpu: VcpuX86) -> int:
    return vcpu.mce.status


def _write_mcg_status(vcpu: VcpuX86, value: int, host: bool) -> bool:
    vcpu.mce.status = value
    return True


def _has_mcg_ctl(vcpu: VcpuX86) -> bool:
    return bool(vcpu.mce.cap & MCG_CTL_P)


def _read_mcg_ctl(vcpu: VcpuX86) -> int:
    return vcpu.mce.ctl


def _write_mcg_ctl(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """All or nothing, and the VMM may clear even what is not there."""
    if (not _has_mcg_ctl(vcpu) and (value or not host)) or value not in (0, MASK64):
        return False
    vcpu.mce.ctl = value
    return True


def feat_ctl(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_FEAT_CTL, 0)


def _write_feat_ctl(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """Once the guest's firmware has locked it, it is the VMM's alone."""
    lmce = FEAT_CTL_LMCE_ENABLED if vcpu.mce.cap & MCG_LMCE_P else 0
    locked = not host and feat_ctl(vcpu) & FEAT_CTL_LOCKED
    if locked or value & ~(FEAT_CTL_LOCKED | lmce):
        return False
    vcpu.msrs[MSR_FEAT_CTL] = value
    return True


def _lmce_enabled(vcpu: VcpuX86) -> bool:
    return bool(feat_ctl(vcpu) & FEAT_CTL_LMCE_ENABLED)


def _read_mcg_ext_ctl(vcpu: VcpuX86) -> int:
    return vcpu.mce.ext_ctl


def _write_mcg_ext_ctl(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if not (host or _lmce_enabled(vcpu)) or value & ~MCG_EXT_CTL_LMCE_EN:
        return False
    vcpu.mce.ext_ctl = value
    return True


def _bank_register(index: int) -> None:
    """CTL takes all or nothing (bits 0 and 10 are spared); the guest may only clear STATUS."""
    bank, kind = divmod(index - MSR_MC0_CTL, 4)

    def read(vcpu: VcpuX86) -> int:
        return vcpu.mce.banks[4 * bank + kind]

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        partial = kind == CTL and value and value | 1 << 10 | 1 != MASK64
        if partial or (kind == STATUS and not host and value):
            return False
        vcpu.mce.banks[4 * bank + kind] = value
        return True

    name = f"mc{bank}_{('ctl', 'status', 'addr', 'misc')[kind]}"
    enter(index, Msr(name, read, write, False, exists=lambda vcpu: bank < banks(vcpu)))


def _ctl2(bank: int) -> None:
    """Corrected-error interrupts of a bank."""

    def has_cmci(vcpu: VcpuX86) -> bool:
        return bool(vcpu.mce.cap & MCG_CMCI_P)

    def read(vcpu: VcpuX86) -> int:
        return vcpu.mce.ctl2[bank]

    def write(vcpu: VcpuX86, value: int, host: bool) -> bool:
        if not has_cmci(vcpu) and (value or not host):
            return False
        if value & ~(MCI_CTL2_CMCI_EN | MCI_CTL2_CMCI_THRESHOLD_MASK):
            return False
        vcpu.mce.ctl2[bank] = value
        return True

    row = Msr(f"mc{bank}_ctl2", read, write, False, guest_reads=has_cmci)
    enter(MSR_MC0_CTL2 + bank, row._replace(exists=lambda vcpu: bank < banks(vcpu)))


constant(MSR_P5_MC_ADDR, "p5_mc_addr", 0)
constant(MSR_P5_MC_TYPE, "p5_mc_type", 0)
enter(MSR_MCG_CAP, Msr("mcg_cap", _read_mcg_cap, None, listed=False))
enter(MSR_MCG_STATUS, Msr("mcg_status", _read_mcg_status, _write_mcg_status))
enter(MSR_MCG_CTL, Msr("mcg_ctl", _read_mcg_ctl, _write_mcg_ctl, guest_reads=_has_mcg_ctl))
enter(MSR_FEAT_CTL, Msr("feature_control", feat_ctl, _write_feat_ctl))
enter(
    MSR_MCG_EXT_CTL,
    Msr("mcg_ext_ctl", _read_mcg_ext_ctl, _write_mcg_ext_ctl, guest_reads=_lmce_enabled),
)
for _bank in range(KVM_MAX_MCE_BANKS):
    _ctl2(_bank)
    for _kind in range(4):
        _bank_register(MSR_MC0_CTL + 4 * _bank + _kind)


# ioctls.


@vcpu_ioctls.row(
    "KVM_X86_SETUP_MCE",
    In(c_uint64),
    uapi.KVM_CAP_MCE,
    errors={EINVAL: "no bank, more than KVM_CAP_MCE has, or unsupported features"},
)
def kvm_vcpu_ioctl_x86_setup_mce(vcpu: VcpuX86, mcg_cap: c_uint64) -> None:
    """Which of the machine-check features and banks the guest sees; all errors are reported."""
    cap = mcg_cap.value
    count = cap & MCG_BANKCNT_MASK
    if not 0 < count <= KVM_MAX_MCE_BANKS or cap & ~(MCE_CAP_SUPPORTED | 0xFF00FF):
        raise fail(EINVAL, f"KVM_X86_SETUP_MCE: {cap:#x}")
    mce = vcpu.mce
    mce.cap = cap
    if cap & MCG_CTL_P:
        mce.ctl = MASK64
    for bank in range(count):
        mce.banks[4 * bank + CTL] = MASK64
        if cap & MCG_CMCI_P:
            mce.ctl2[bank] = 0
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.set_cmci(bool(cap & MCG_CMCI_P))


def is_ucna(mce: uapi.kvm_x86_mce) -> bool:
    """Uncorrected, and nothing has to be done about it now."""
    urgent = MCI_STATUS_PCC | MCI_STATUS_S | MCI_STATUS_AR
    return bool(not mce.mcg_status and not mce.status & urgent and mce.status & MCI_STATUS_UC)


@vcpu_ioctls.row(
    "KVM_X86_SET_MCE",
    In(uapi.kvm_x86_mce),
    uapi.KVM_CAP_MCE,
    errors={EINVAL: "the guest has no such bank, or the status is not valid"},
)
def kvm_vcpu_ioctl_x86_set_mce(vcpu: VcpuX86, mce: uapi.kvm_x86_mce) -> None:
    """Report an error: in its bank and, if it is uncorrected, by #MC."""
    if mce.bank >= banks(vcpu) or not mce.status & MCI_STATUS_VAL:
        raise fail(EINVAL, f"KVM_X86_SET_MCE: bank {mce.bank}, status {mce.status:#x}")
    if is_ucna(mce):
        _set_ucna(vcpu, mce)
    elif mce.status & MCI_STATUS_UC:
        _set_uncorrected(vcpu, mce)
    else:
        _set_corrected(vcpu, mce)


def _record(vcpu: VcpuX86, mce: uapi.kvm_x86_mce, over: int) -> None:
    first = 4 * mce.bank
    record = (mce.status | over, mce.addr, mce.misc)
    vcpu.mce.banks[first + STATUS : first + MISC + 1] = record


def _overflow(vcpu: VcpuX86, bank: int) -> int:
    """The flag of an error that takes the place of another."""
    full = vcpu.mce.banks[4 * bank + STATUS] & MCI_STATUS_VAL
    return MCI_STATUS_OVER if full else 0


def _set_ucna(vcpu: VcpuX86, mce: uapi.kvm_x86_mce) -> None:
    """`kvm_vcpu_x86_set_ucna`: as corrected errors, by an interrupt of the local APIC."""
    _record(vcpu, mce, 0)
    vcpu.mce.status = mce.mcg_status
    enabled = vcpu.mce.cap & MCG_CMCI_P and vcpu.mce.ctl2[mce.bank] & MCI_CTL2_CMCI_EN
    if enabled and vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.local_deliver(APIC_LVTCMCI)


def _set_uncorrected(vcpu: VcpuX86, mce: uapi.kvm_x86_mce) -> None:
    """Not where reporting is disabled; shutdown where no #MC can be taken."""
    own = vcpu.mce
    if (own.cap & MCG_CTL_P and own.ctl != MASK64) or own.banks[4 * mce.bank + CTL] != MASK64:
        return
    if own.status & MCG_STATUS_MCIP or not vcpu.state.cr4 & CR4_MCE:
        vcpu.make_request(Request.TRIPLE_FAULT)
        return
    _record(vcpu, mce, _overflow(vcpu, mce.bank))
    own.status = mce.mcg_status
    vcpu.exception = PendingException(MC_VECTOR)
    vcpu.requests.add(Request.EVENT)


def _set_corrected(vcpu: VcpuX86, mce: uapi.kvm_x86_mce) -> None:
    """An uncorrected error stays where it is."""
    uncorrected = MCI_STATUS_VAL | MCI_STATUS_UC
    at = 4 * mce.bank + STATUS
    if vcpu.mce.banks[at] & uncorrected == uncorrected:
        vcpu.mce.banks[at] |= MCI_STATUS_OVER
    else:
        _record(vcpu, mce, _overflow(vcpu, mce.bank))
