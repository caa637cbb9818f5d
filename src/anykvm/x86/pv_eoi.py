"""Paravirtual EOI: a bit in guest memory says that an interrupt's end need not be told at once.

Documentation/virt/kvm/x86/msr.rst, MSR_KVM_PV_EOI_EN; `apic_sync_pv_eoi_to_guest` and
`_from_guest` in arch/x86/kvm/lapic.c. The bit is set on the way into the guest where nothing waits
for the end of the interrupt in service. A guest that finds it set clears it, and that was its EOI;
the local APIC learns of it when the guest next leaves.
"""

from __future__ import annotations

from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.kvm_para import KVM_MSR_ENABLED, MSR_KVM_PV_EOI_EN, KvmFeature
from anykvm.x86.msrs import Msr, enter

ALIGNMENT = 4
MAY_SKIP, MUST_TELL = b"\1", b"\0"


def _write_pv_eoi(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """`kvm_lapic_set_pv_eoi`."""
    gpa = value & ~KVM_MSR_ENABLED
    if gpa % ALIGNMENT:
        return False
    if value & KVM_MSR_ENABLED and vcpu.kvm.memslots.gpa_to_memslot(gpa) is None:
        return False
    vcpu.msrs[MSR_KVM_PV_EOI_EN] = value
    return True


enter(
    MSR_KVM_PV_EOI_EN,
    Msr(
        "kvm_pv_eoi_en",
        lambda vcpu: vcpu.msrs.get(MSR_KVM_PV_EOI_EN, 0),
        _write_pv_eoi,
        pv=KvmFeature.PV_EOI,
    ),
)


def _word(vcpu: VcpuX86) -> int:
    return vcpu.msrs.get(MSR_KVM_PV_EOI_EN, 0) & ~KVM_MSR_ENABLED


def sync_pv_eoi_to_guest(vcpu: VcpuX86) -> None:
    """Before the guest runs: allow it to skip the EOI of the one interrupt in service, if no other
    waits for that and no other controller is to hear of it.
    """
    sync_pv_eoi_from_guest(vcpu)  # of an entry that was given up
    apic = vcpu.apic
    if apic is None or not vcpu.msrs.get(MSR_KVM_PV_EOI_EN, 0) & KVM_MSR_ENABLED:
        return
    with vcpu.kvm.irqchip.lock:
        safe = apic.isr and not apic.irr
        if not safe or vcpu.kvm.irqchip.handles_vector(apic.isr.bit_length() - 1):
            return
    if vcpu.kvm.writable(_word(vcpu)):
        vcpu.kvm.kvm_write_guest(_word(vcpu), MAY_SKIP)
        vcpu.pv_eoi_pending = True


def sync_pv_eoi_from_guest(vcpu: VcpuX86) -> None:
    """After the guest ran: if it skipped an EOI that is made up for, else it may not any more."""
    if not vcpu.pv_eoi_pending:
        return
    vcpu.pv_eoi_pending = False
    if not vcpu.kvm.writable(_word(vcpu)):
        return
    if vcpu.kvm.kvm_read_guest(_word(vcpu), 1)[0] & 1:
        vcpu.kvm.kvm_write_guest(_word(vcpu), MUST_TELL)
        return
    apic = vcpu.apic
    if apic is not None:
        with vcpu.kvm.irqchip.lock:
            apic.eoi()
