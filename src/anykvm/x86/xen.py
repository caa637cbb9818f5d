"""Xen guests: the page of hypercalls, and their way to a VMM that answers them.

arch/x86/kvm/xen.c, as far as KVM_XEN_HVM_CONFIG; api.rst 4.61 and 8.17. No event channels, shared
info pages, time or run state: the capability's flags say so.
"""

from __future__ import annotations

from errno import EINVAL
from functools import partial

from anykvm.fs.trace import trace
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In
from anykvm.uapi import kvm as uapi
from anykvm.x86.hypercall_insn import native_hypercall
from anykvm.x86.hyperv_hcall import kvm_hv_hypercall, kvm_hv_hypercall_enabled
from anykvm.x86.kvm_host import KvmX86, VcpuX86
from anykvm.x86.mode import get_cpl, is_64_bit_mode, is_long_mode
from anykvm.x86.tables import vm_ioctls

XEN_HVM = uapi.KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
"""KVM_CAP_XEN_HVM."""
PERMITTED_FLAGS = uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
PAGE_SIZE, ENTRY_SIZE = 4096, 32
MOV_EAX, RET, INT3 = b"\xb8", b"\xc3", b"\xcc"
RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8, R9, R10 = 0, 1, 2, 3, 5, 6, 7, 8, 9, 10
LONG_PARAMS = (RDI, RSI, RDX, R10, R8, R9)
SHORT_PARAMS = (RBX, RCX, RDX, RSI, RDI, RBP)
MASK32 = (1 << 32) - 1
HYPERV_MARK = 1 << 31


@vm_ioctls.row(
    "KVM_XEN_HVM_CONFIG",
    In(uapi.kvm_xen_hvm_config),
    uapi.KVM_CAP_XEN_HVM,
    errors={EINVAL: "unknown flags, or pages of code although hypercalls are intercepted"},
)
def kvm_xen_hvm_config(kvm: KvmX86, config: uapi.kvm_xen_hvm_config) -> None:
    """Which MSR gives a guest its page of hypercalls, and whether KVM or the VMM wrote that."""
    if config.flags & ~PERMITTED_FLAGS:
        raise fail(EINVAL, f"KVM_XEN_HVM_CONFIG: flags {config.flags:#x}")
    blobs = config.blob_addr_32, config.blob_addr_64, config.blob_size_32, config.blob_size_64
    if config.flags and any(blobs):
        raise fail(EINVAL, "intercepted hypercalls have a page of KVM's own")
    with kvm.lock:
        kvm.xen_hvm_config = uapi.kvm_xen_hvm_config.from_buffer_copy(config)


def kvm_xen_write_hypercall_page(vcpu: VcpuX86, value: int) -> bool:
    """The guest writes the MSR: an address, and in the lower bits which page it wants there."""
    kvm = vcpu.kvm
    gpa, number = value & ~(PAGE_SIZE - 1), value % PAGE_SIZE
    if kvm.xen_hypercall_enabled():
        page = b"" if number else _own_page(vcpu)
    else:
        page = _vmms_page(vcpu, number)
    if not page or not kvm.writable(gpa):
        return False
    kvm.kvm_write_guest(gpa, page)
    return True


def _own_page(vcpu: VcpuX86) -> bytes:
    """An entry for each number, which puts it into EAX and makes the hypercall."""
    call = native_hypercall(vcpu) + RET
    entries = (
        (MOV_EAX + number.to_bytes(4, "little") + call).ljust(ENTRY_SIZE, INT3)
        for number in range(PAGE_SIZE // ENTRY_SIZE)
    )
    return b"".join(entries)


def _vmms_page(vcpu: VcpuX86, number: int) -> bytes:
    """One of the pages that the VMM has; empty for one that it has not. EFAULT."""
    config, long = vcpu.kvm.xen_hvm_config, is_long_mode(vcpu)
    address = config.blob_addr_64 if long else config.blob_addr_32
    if number >= (config.blob_size_64 if long else config.blob_size_32):
        return b""
    return vcpu.kvm.mm.read(address + number * PAGE_SIZE, PAGE_SIZE)


def kvm_xen_hypercall(vcpu: VcpuX86) -> int:
    """KVM_EXIT_XEN; Hyper-V's page marks its calls where a guest has both."""
    if vcpu.state.gpr[RAX] & HYPERV_MARK and kvm_hv_hypercall_enabled(vcpu):
        return kvm_hv_hypercall(vcpu)
    gpr, long = vcpu.state.gpr, is_64_bit_mode(vcpu)
    params = [gpr[n] & (~0 if long else MASK32) for n in (LONG_PARAMS if long else SHORT_PARAMS)]
    trace("kvm_xen_hypercall", nr=gpr[RAX], args=tuple(params))
    vcpu.run.exit_reason = uapi.KVM_EXIT_XEN
    vcpu.run.xen.type = uapi.KVM_EXIT_XEN_HCALL
    call = vcpu.run.xen.u.hcall
    call.longmode, call.cpl, call.input = long, get_cpl(vcpu), gpr[RAX]
    for n, value in enumerate(params):
        call.params[n] = value
    vcpu.complete_userspace_io = partial(_answered, vcpu, vcpu.state.rip)
    return 0


def _answered(vcpu: VcpuX86, rip: int) -> int:
    """Nothing is done for a VMM that has moved RIP meanwhile."""
    if vcpu.state.rip == rip:
        vcpu.state.gpr[RAX] = vcpu.run.xen.u.hcall.result
        vcpu.cpu.advance()
    return 1
