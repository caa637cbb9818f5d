"""KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE: a vCPU whose guest is running a guest.

api.rst 4.114 and 4.115; arch/x86/kvm/svm/nested.c, `svm_get_nested_state` and
`svm_set_nested_state`. The registers that the other ioctls give are L2's; here are the control area
that L1 runs it under, as far as it has come, and L1's own registers.
"""

from __future__ import annotations

from ctypes import c_uint32, sizeof
from errno import E2BIG, EFAULT, EINVAL

from anykvm.cpu.svm_checks import invalid_control, invalid_paging, invalid_save
from anykvm.cpu.vmcb import Vmcb
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import Value
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import EFER_SVME
from anykvm.x86.svm import page_address_valid
from anykvm.x86.tables import vcpu_ioctls

HEADER = sizeof(uapi.kvm_nested_state)
NESTED_STATE_SIZE = HEADER + uapi.KVM_STATE_NESTED_SVM_VMCB_SIZE
GUEST_MODE, RUN_PENDING, GIF_SET = (
    uapi.KVM_STATE_NESTED_GUEST_MODE,
    uapi.KVM_STATE_NESTED_RUN_PENDING,
    uapi.KVM_STATE_NESTED_GIF_SET,
)
KNOWN_FLAGS = (
    GUEST_MODE
    | RUN_PENDING
    | GIF_SET
    | uapi.KVM_STATE_NESTED_EVMCS
    | uapi.KVM_STATE_NESTED_MTF_PENDING
)
SIZE_OFFSET = uapi.kvm_nested_state.size.offset  # type: ignore[attr-defined]
CR0_PE, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 29, 1 << 30, 1 << 31
RFLAGS_VM = 1 << 17


def _state(vcpu: VcpuX86) -> tuple[uapi.kvm_nested_state, bytes]:
    svm = vcpu.cpu.svm
    header = uapi.kvm_nested_state(format=uapi.KVM_STATE_NESTED_FORMAT_SVM, size=HEADER)
    header.flags = GIF_SET if svm.gif else 0
    if not svm.guest_mode:
        return header, b""
    header.flags |= GUEST_MODE
    header.size = NESTED_STATE_SIZE
    header.hdr.svm.vmcb_pa = svm.vmcb_pa
    return header, bytes(Vmcb(control=svm.control, save=svm.host))


@vcpu_ioctls.row(
    "KVM_GET_NESTED_STATE",
    Value(),
    uapi.KVM_CAP_NESTED_STATE,
    errors={
        EFAULT: "the argument is outside of the caller's memory",
        E2BIG: "the state is larger than `size`, which then says how large",
    },
)
def kvm_get_nested_state(vcpu: VcpuX86, address: int) -> None:
    """GIF, and in guest mode L1's registers and the control area of its VMCB."""
    mm = vcpu.kvm.mm
    room = int.from_bytes(mm.read(address + SIZE_OFFSET, sizeof(c_uint32)), "little")
    header, vmcb = _state(vcpu)
    size = header.size
    if size > room:
        mm.write(address + SIZE_OFFSET, bytes(c_uint32(size)))
        raise fail(E2BIG, f"KVM_GET_NESTED_STATE: {size} bytes do not fit into {room}")
    mm.write(address, bytes(header) + vmcb)


@vcpu_ioctls.row(
    "KVM_SET_NESTED_STATE",
    Value(),
    uapi.KVM_CAP_NESTED_STATE,
    errors={
        EFAULT: "the argument is outside of the caller's memory",
        EINVAL: "unknown flags, a format that is not SVM's, or a state that L1 cannot be in",
    },
)
def kvm_set_nested_state(vcpu: VcpuX86, address: int) -> None:
    """Enter guest mode, whose registers are there already, or leave it."""
    mm = vcpu.kvm.mm
    header = uapi.kvm_nested_state.from_buffer_copy(mm.read(address, HEADER))
    _check_header(vcpu, header)
    svm = vcpu.cpu.svm
    if not header.flags & GUEST_MODE:
        svm.reset()
        svm.set_gif(bool(header.flags & GIF_SET))
        return
    vmcb = _read_vmcb(vcpu, header, address)
    svm.reset()
    svm.host = vmcb.save
    svm.enter(header.hdr.svm.vmcb_pa, vmcb.control)
    svm.gif = bool(header.flags & GIF_SET)
    vcpu.cpu.mode_changed()
    vcpu.cpu.flush_tlb()
    vcpu.requests.add(Request.EVENT)


def _check_header(vcpu: VcpuX86, header: uapi.kvm_nested_state) -> None:
    flags = header.flags
    svm_flags = GUEST_MODE | RUN_PENDING | GIF_SET
    disabled = not vcpu.state.efer & EFER_SVME
    rules = (
        (header.size < HEADER, f"size {header.size} is less than the header's"),
        (flags & ~KNOWN_FLAGS, f"flags {flags:#x}"),
        (flags & RUN_PENDING and not flags & GUEST_MODE, "a run is pending outside of guest mode"),
        (header.format != uapi.KVM_STATE_NESTED_FORMAT_SVM, f"format {header.format}"),
        (flags & ~svm_flags, f"flags {flags:#x} are not SVM's"),
        (disabled and flags != GIF_SET, f"flags {flags:#x} without EFER.SVME"),
        (vcpu.smm.active and flags & GUEST_MODE, "guest mode in system management mode"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_SET_NESTED_STATE: {text}")


def _read_vmcb(vcpu: VcpuX86, header: uapi.kvm_nested_state, address: int) -> Vmcb:
    """The VMCB behind the header, checked as VMRUN does."""
    pa = header.hdr.svm.vmcb_pa
    if not page_address_valid(vcpu, pa):
        raise fail(EINVAL, f"KVM_SET_NESTED_STATE: a VMCB at {pa:#x}")
    if header.size < NESTED_STATE_SIZE:
        raise fail(EINVAL, f"KVM_SET_NESTED_STATE: size {header.size} has no room for a VMCB")
    data = vcpu.kvm.mm.read(address + HEADER, uapi.KVM_STATE_NESTED_SVM_VMCB_SIZE)
    vmcb = Vmcb.from_buffer_copy(data)
    cr0, host = vcpu.state.cr0, vmcb.save
    paged = host.cr0 & CR0_PG and host.cr0 & CR0_PE
    control = invalid_control(vmcb.control) or invalid_paging(vmcb.control, host)
    rules = (
        (control, "VMRUN would refuse the control area"),
        (cr0 & CR0_NW and not cr0 & CR0_CD, f"L2's cr0 {cr0:#x} has NW without CD"),
        (not paged or host.rflags & RFLAGS_VM, "L1 is not in protected mode with paging"),
        (invalid_save(host), "VMRUN would refuse L1's registers"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_SET_NESTED_STATE: {text}")
    return vmcb
