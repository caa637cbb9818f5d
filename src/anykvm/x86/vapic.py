"""The virtual APIC page: a task priority that 32-bit guests change without leaving the guest.

With KVM_TPR_ACCESS_REPORTING the VMM learns which instructions access the TPR and patches the guest
to use a word of memory instead, which KVM_SET_VAPIC_ADDR names and which is kept in step here
(api.rst 4.41, 4.42).
"""

from __future__ import annotations

from errno import EINVAL

from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, InOut
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.pv_eoi import sync_pv_eoi_from_guest, sync_pv_eoi_to_guest
from anykvm.x86.tables import LAPIC, vcpu_ioctls

VAPIC_SIZE = 4


def _highest(vectors: int) -> int:
    return max(vectors.bit_length() - 1, 0)


def kvm_lapic_sync_to_vapic(vcpu: VcpuX86) -> None:
    """Before the guest runs: TPR, class in service, highest request."""
    sync_pv_eoi_to_guest(vcpu)
    apic = vcpu.apic
    if apic is None or not vcpu.vapic_addr:
        return
    word = apic.tpr | (_highest(apic.isr) & 0xF0) << 8 | _highest(apic.irr) << 24
    vcpu.kvm.kvm_write_guest(vcpu.vapic_addr, word.to_bytes(VAPIC_SIZE, "little"))


def kvm_lapic_sync_from_vapic(vcpu: VcpuX86) -> None:
    """After the guest ran: the TPR is what it wrote."""
    sync_pv_eoi_from_guest(vcpu)
    if vcpu.apic is None or not vcpu.vapic_addr:
        return
    tpr = vcpu.kvm.kvm_read_guest(vcpu.vapic_addr, VAPIC_SIZE)[0]
    if tpr != vcpu.apic.tpr:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.tpr = tpr


def report_tpr_access(vcpu: VcpuX86, write: bool) -> None:
    """The guest has accessed the TPR's register: tell the VMM, if it wants to know."""
    if vcpu.tpr_access_reporting:
        vcpu.run.tpr_access.rip, vcpu.run.tpr_access.is_write = vcpu.state.rip, write
        vcpu.requests.add(Request.REPORT_TPR_ACCESS)


@vcpu_ioctls.row(
    "KVM_TPR_ACCESS_REPORTING",
    InOut(uapi.kvm_tpr_access_ctl),
    uapi.KVM_CAP_VAPIC,
    errors={EINVAL: "unknown flags"},
)
def vcpu_ioctl_tpr_access_reporting(vcpu: VcpuX86, control: uapi.kvm_tpr_access_ctl) -> None:
    """Exit with KVM_EXIT_TPR_ACCESS at accesses to the task priority."""
    if control.flags:
        raise fail(EINVAL, f"KVM_TPR_ACCESS_REPORTING: unknown flags {control.flags:#x}")
    vcpu.tpr_access_reporting = bool(control.enabled)


@vcpu_ioctls.row(
    "KVM_SET_VAPIC_ADDR",
    In(uapi.kvm_vapic_addr),
    uapi.KVM_CAP_VAPIC,
    needs=(LAPIC,),
    errors={EINVAL: "the address is no guest memory"},
)
def kvm_lapic_set_vapic_addr(vcpu: VcpuX86, addr: uapi.kvm_vapic_addr) -> None:
    """Zero switches it off."""
    gpa = addr.vapic_addr
    if gpa and vcpu.kvm.memslots.gpa_to_memslot(gpa) is None:
        raise fail(EINVAL, f"KVM_SET_VAPIC_ADDR: {gpa:#x}")
    vcpu.vapic_addr = gpa
    vcpu.requests.add(Request.EVENT)
