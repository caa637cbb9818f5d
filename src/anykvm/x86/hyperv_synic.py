"""Hyper-V's synthetic interrupt controller: sixteen sources (SINTs) a processor, with a page of
messages and a page of event flags. TLFS, chapter 11; `synic_*` of arch/x86/kvm/hyperv.c.
"""

from __future__ import annotations

from errno import EAGAIN, EINVAL, ENOENT

from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_state import Synic
from anykvm.x86.hyperv_stimer import stimers_of_sint
from anykvm.x86.kvm_host import KvmX86, Request, VcpuX86


def kvm_hv_activate_synic(vcpu: VcpuX86, dont_zero_pages: bool) -> None:
    """KVM_CAP_HYPERV_SYNIC and _SYNIC2: the VMM wants it; it is the guest's to enable."""
    synic = vcpu.hv.synic
    synic.active, synic.dont_zero_pages, synic.control = True, dont_zero_pages, hv.ENABLE


def sint_vector(synic: Synic, sint: int) -> int | None:
    value = synic.sint[sint]
    return None if value & hv.SINT_MASKED else value & hv.SINT_VECTOR


def synic_set_sint(vcpu: VcpuX86, sint: int, value: int, host: bool) -> bool:
    """Vectors below 16 are invalid, but may stand in a masked register."""
    synic, masked = vcpu.hv.synic, value & hv.SINT_MASKED
    if value & hv.SINT_VECTOR < hv.FIRST_VALID_VECTOR and not host and not masked:
        return False
    synic.sint[sint] = value
    synic.vectors = synic.auto_eoi = 0
    for n in range(hv.SINT_COUNT):
        vector = sint_vector(synic, n)
        if vector is not None and vector >= hv.FIRST_VALID_VECTOR:
            synic.vectors |= 1 << vector
            synic.auto_eoi |= bool(synic.sint[n] & hv.SINT_AUTO_EOI) << vector
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.auto_eoi = synic.auto_eoi
    return True


def synic_set_page(vcpu: VcpuX86, which: str, value: int, host: bool) -> bool:
    """SIEFP or SIMP; a page that the guest names is cleared, unless the VMM wants it as it is."""
    synic = vcpu.hv.synic
    if value & hv.ENABLE and not host and not synic.dont_zero_pages:
        gpa = value & hv.PAGE_MASK
        if not vcpu.kvm.writable(gpa):
            return False
        vcpu.kvm.kvm_write_guest(gpa, bytes(hv.PAGE_SIZE))
    setattr(synic, which, value)
    return True


def synic_exit(vcpu: VcpuX86, msr: int) -> None:
    """Tell the VMM what the guest has set up."""
    synic, exit_ = vcpu.hv.synic, vcpu.hv.exit
    exit_.type = uapi.KVM_EXIT_HYPERV_SYNIC
    exit_.u.synic.msr, exit_.u.synic.control = msr, synic.control
    exit_.u.synic.evt_page, exit_.u.synic.msg_page = synic.evt_page, synic.msg_page
    vcpu.requests.add(Request.HV_EXIT)


def synic_set_irq(vcpu: VcpuX86, sint: int) -> int:
    """Interrupt by a SINT: as `accept_irq`, negative errno where it cannot."""
    if vcpu.apic is None or sint >= hv.SINT_COUNT:
        return -EINVAL
    vector = sint_vector(vcpu.hv.synic, sint)
    if vector is None:
        return -ENOENT
    with vcpu.kvm.irqchip.lock:
        return vcpu.apic.accept_irq(0, vector)


def kvm_hv_synic_set_irq(kvm: KvmX86, vp_index: int, sint: int) -> int:
    """A route of type KVM_IRQ_ROUTING_HV_SINT was raised."""
    vcpu = get_vcpu_by_vpidx(kvm, vp_index)
    active = vcpu is not None and vcpu.hv.synic.active
    return synic_set_irq(vcpu, sint) if vcpu is not None and active else -EINVAL


def get_vcpu_by_vpidx(kvm: KvmX86, vp_index: int) -> VcpuX86 | None:
    return next((vcpu for vcpu in kvm.x86_vcpus() if vcpu.hv.vp_index == vp_index), None)


def synic_deliver_msg(vcpu: VcpuX86, sint: int, message: bytes, no_retry: bool) -> int:
    """Put a message into its slot and interrupt: 0, or -EAGAIN where the slot is full, which its
    owner is then told so that it asks for more (`no_retry`: the message is dropped instead).
    """
    page, kvm = vcpu.hv.synic.msg_page, vcpu.kvm
    slot = (page & hv.PAGE_MASK) + sint * hv.MESSAGE_SIZE
    if not page & hv.ENABLE or not kvm.writable(slot):
        return -ENOENT
    header = kvm.kvm_read_guest(slot, hv.MESSAGE_FLAGS + 1)
    if int.from_bytes(header[:4], "little") != hv.HVMSG_NONE:
        if no_retry:
            return 0
        kvm.kvm_write_guest(
            slot + hv.MESSAGE_FLAGS, bytes((header[hv.MESSAGE_FLAGS] | hv.MESSAGE_PENDING,))
        )
        return -EAGAIN
    kvm.kvm_write_guest(slot, message)
    result = synic_set_irq(vcpu, sint)
    return 0 if result > 0 else result or -EINVAL


def kvm_hv_notify_acked_sint(vcpu: VcpuX86, sint: int) -> None:
    """The slot may be free again: timers try anew, and who listens for the SINT's EOI is told."""
    stimers_of_sint(vcpu, sint)
    gsi = vcpu.hv.synic.gsi.get(sint)
    if gsi is not None:
        for notify in list(vcpu.kvm.irq_ack_notifiers.get(gsi, ())):
            notify()


def kvm_hv_synic_send_eoi(vcpu: VcpuX86, vector: int) -> None:
    """The guest has ended a SINT's interrupt."""
    for sint in range(hv.SINT_COUNT):
        if sint_vector(vcpu.hv.synic, sint) == vector:
            kvm_hv_notify_acked_sint(vcpu, sint)
