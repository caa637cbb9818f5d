"""General, segment and control registers: KVM_GET/SET_REGS, SREGS and SREGS2.

api.rst 4.11 to 4.14, 4.132; what is not allowed together is EINVAL (`kvm_is_valid_sregs`).
"""

from __future__ import annotations

import struct
from errno import EINVAL

from anykvm.cpu.state import Seg
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, Out
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import FEATURES
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import EFER_LMA, EFER_LME, EFER_SVME, write_apic_base
from anykvm.x86.tables import vcpu_ioctls

# The order of the ABI against the processor's own (RAX RCX RDX RBX RSP RBP RSI RDI R8...).
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
SEGMENTS = (
    ("cs", Seg.CS),
    ("ds", Seg.DS),
    ("es", Seg.ES),
    ("fs", Seg.FS),
    ("gs", Seg.GS),
    ("ss", Seg.SS),
    ("tr", Seg.TR),
    ("ldt", Seg.LDTR),
)
# The parts of a segment's attributes: ABI name, first bit, number of bits.
ATTRIBUTES = (
    ("type", 0, 4),
    ("s", 4, 1),
    ("dpl", 5, 2),
    ("present", 7, 1),
    ("avl", 12, 1),
    ("l", 13, 1),
    ("db", 14, 1),
    ("g", 15, 1),
    ("unusable", 16, 1),
)
CR0_PE, CR0_NW, CR0_CD, CR0_PG = 1, 1 << 29, 1 << 30, 1 << 31
CR4_PAE, CR4_OSXSAVE = 1 << 5, 1 << 18
# VME to OSXMMEXCPT, then what features of the model's table bring.
CR4_PLAIN = 0x7FF
CR4_OF_FEATURE = {"umip": 11, "fsgsbase": 16, "pcid": 17, "xsave": 18, "smep": 20, "smap": 21}
CR4_ALLOWED = CR4_PLAIN | sum(
    1 << CR4_OF_FEATURE[f.name] for f in FEATURES if f.on and f.name in CR4_OF_FEATURE
)
RFLAGS_FIXED = 2
PDPTE_COUNT = 4

Sregs = uapi.kvm_sregs | uapi.kvm_sregs2


def get_regs(vcpu: VcpuX86, regs: uapi.kvm_regs) -> None:
    for name, value in zip(GPRS, vcpu.state.gpr, strict=True):
        setattr(regs, name, value)
    regs.rip, regs.rflags = vcpu.state.rip, vcpu.cpu.rflags


def set_regs(vcpu: VcpuX86, regs: uapi.kvm_regs) -> None:
    """An interrupt shadow stays, as a register of its own (KVM_SET_VCPU_EVENTS may come first)."""
    if vcpu.cpu.in_shadow():
        vcpu.state.shadow_rip = regs.rip
    for i, name in enumerate(GPRS):
        vcpu.state.gpr[i] = getattr(regs, name)
    vcpu.state.rip = regs.rip
    vcpu.cpu.rflags = regs.rflags | RFLAGS_FIXED
    vcpu.exception = None
    vcpu.cpu.debug.drop_trap()
    vcpu.cpu.mode_changed()  # RFLAGS.TF and VM are part of it
    vcpu.requests.add(Request.EVENT)


def get_segment(vcpu: VcpuX86, segment: uapi.kvm_segment, seg: Seg) -> None:
    held = vcpu.state.seg[seg]
    segment.base, segment.limit, segment.selector = held.base, held.limit, held.selector
    for name, shift, width in ATTRIBUTES:
        setattr(segment, name, held.attr >> shift & (1 << width) - 1)


def set_segment(vcpu: VcpuX86, segment: uapi.kvm_segment, seg: Seg) -> None:
    held = vcpu.state.seg[seg]
    held.base, held.limit, held.selector = segment.base, segment.limit, segment.selector
    attr = 0
    for name, shift, width in ATTRIBUTES:
        attr |= (getattr(segment, name) & (1 << width) - 1) << shift
    # As in VMX: what is not present cannot be used.
    held.attr = attr if segment.present else attr | 1 << 16


def get_cr8(vcpu: VcpuX86) -> int:
    return vcpu.apic.cr8 if vcpu.apic is not None else vcpu.state.cr8


def set_cr8(vcpu: VcpuX86, value: int) -> bool:
    """Whether the task priority is one: 0 to 15."""
    if value > 15:
        return False
    if vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.cr8 = value
    vcpu.state.cr8 = value
    return True


def _get_sregs_common(vcpu: VcpuX86, sregs: Sregs) -> None:
    state = vcpu.state
    for name, seg in SEGMENTS:
        get_segment(vcpu, getattr(sregs, name), seg)
    sregs.gdt.base, sregs.gdt.limit = state.gdt_base, state.gdt_limit
    sregs.idt.base, sregs.idt.limit = state.idt_base, state.idt_limit
    for name in ("cr0", "cr2", "cr3", "cr4", "efer", "apic_base"):
        setattr(sregs, name, getattr(state, name))
    sregs.cr8 = get_cr8(vcpu)


def _check_sregs(vcpu: VcpuX86, sregs: Sregs) -> None:
    cr0, cr4, efer = sregs.cr0, sregs.cr4, sregs.efer
    long_mode = efer & EFER_LME and cr0 & CR0_PG
    rules = (
        (cr0 >> 32 or (cr0 & CR0_PG and not cr0 & CR0_PE), f"cr0 {cr0:#x}"),
        (cr0 & CR0_NW and not cr0 & CR0_CD, f"cr0 {cr0:#x} has NW without CD"),
        (cr4 & ~CR4_ALLOWED, f"cr4 {cr4:#x} has reserved bits"),
        (long_mode and not (cr4 & CR4_PAE and efer & EFER_LMA), f"efer {efer:#x}, cr4 {cr4:#x}"),
        (not long_mode and (efer & EFER_LMA or sregs.cs.l), f"efer {efer:#x} without paging"),
        (long_mode and sregs.cr3 >> vcpu.maxphyaddr() & ~(1 << 63), f"cr3 {sregs.cr3:#x}"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_SET_SREGS: {text}")
    if not write_apic_base(vcpu, sregs.apic_base, True):
        raise fail(EINVAL, f"KVM_SET_SREGS: apic_base {sregs.apic_base:#x}")


def _set_sregs_common(vcpu: VcpuX86, sregs: Sregs) -> None:
    _check_sregs(vcpu, sregs)
    state = vcpu.state
    if state.efer & ~sregs.efer & EFER_SVME:
        vcpu.cpu.svm.reset()
    state.gdt_base, state.gdt_limit = sregs.gdt.base, sregs.gdt.limit
    state.idt_base, state.idt_limit = sregs.idt.base, sregs.idt.limit
    for name in ("cr0", "cr2", "cr3", "cr4", "efer"):
        setattr(state, name, getattr(sregs, name))
    set_cr8(vcpu, sregs.cr8 & 15)
    for name, seg in SEGMENTS:
        set_segment(vcpu, getattr(sregs, name), seg)
    vcpu.update_cpuid_runtime()
    vcpu.cpu.mode_changed()
    vcpu.cpu.flush_tlb()
    vcpu.requests.add(Request.EVENT)


def get_sregs(vcpu: VcpuX86, sregs: uapi.kvm_sregs) -> None:
    _get_sregs_common(vcpu, sregs)
    if vcpu.injected_vector is not None:
        sregs.interrupt_bitmap[vcpu.injected_vector // 64] |= 1 << vcpu.injected_vector % 64


def set_sregs(vcpu: VcpuX86, sregs: uapi.kvm_sregs) -> None:
    _set_sregs_common(vcpu, sregs)
    if pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        load_pdptrs(vcpu)
    pending = sum(word << 64 * i for i, word in enumerate(sregs.interrupt_bitmap))
    if pending:
        vcpu.injected_vector = (pending & -pending).bit_length() - 1


@vcpu_ioctls.row("KVM_GET_REGS", Out(uapi.kvm_regs))
def kvm_arch_vcpu_ioctl_get_regs(vcpu: VcpuX86, regs: uapi.kvm_regs) -> None:
    """The general registers, RIP and RFLAGS."""
    get_regs(vcpu, regs)


@vcpu_ioctls.row("KVM_SET_REGS", In(uapi.kvm_regs))
def kvm_arch_vcpu_ioctl_set_regs(vcpu: VcpuX86, regs: uapi.kvm_regs) -> None:
    """Load them; a pending exception is dropped."""
    set_regs(vcpu, regs)


@vcpu_ioctls.row("KVM_GET_SREGS", Out(uapi.kvm_sregs))
def kvm_arch_vcpu_ioctl_get_sregs(vcpu: VcpuX86, sregs: uapi.kvm_sregs) -> None:
    """Segment and control registers, and the vector that is being injected."""
    get_sregs(vcpu, sregs)


@vcpu_ioctls.row(
    "KVM_SET_SREGS",
    In(uapi.kvm_sregs),
    errors={EINVAL: "control registers that cannot be together, or a wrong APIC base"},
)
def kvm_arch_vcpu_ioctl_set_sregs(vcpu: VcpuX86, sregs: uapi.kvm_sregs) -> None:
    """Load them, or nothing of them if they cannot be together."""
    set_sregs(vcpu, sregs)


def load_pdptrs(vcpu: VcpuX86) -> None:
    """The PDPTEs that CR3 leads to, for a VMM that does not know of them; none without memory."""
    table = vcpu.state.cr3 & ~31 & 0xFFFF_FFFF
    space = int(vcpu.smm.active)
    if vcpu.kvm.memslots_of(space).gpa_to_memslot(table) is not None:
        entries = struct.unpack("<4Q", vcpu.kvm.kvm_read_guest(table, 8 * PDPTE_COUNT, space))
        for i, entry in enumerate(entries):
            vcpu.state.pdpte[i] = entry


def pae_paging(cr0: int, cr4: int, efer: int) -> bool:
    return bool(cr0 & CR0_PG and cr4 & CR4_PAE and not efer & EFER_LMA)


@vcpu_ioctls.row("KVM_GET_SREGS2", Out(uapi.kvm_sregs2), uapi.KVM_CAP_SREGS2)
def kvm_arch_vcpu_ioctl_get_sregs2(vcpu: VcpuX86, sregs: uapi.kvm_sregs2) -> None:
    """As KVM_GET_SREGS, and the PDPTEs where the paging mode has them in registers."""
    _get_sregs_common(vcpu, sregs)
    if pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        sregs.pdptrs[:] = list(vcpu.state.pdpte)
        sregs.flags |= uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID


@vcpu_ioctls.row(
    "KVM_SET_SREGS2",
    In(uapi.kvm_sregs2),
    uapi.KVM_CAP_SREGS2,
    errors={
        EINVAL: "unknown flags, control registers that cannot be together, or a wrong APIC base"
    },
)
def kvm_arch_vcpu_ioctl_set_sregs2(vcpu: VcpuX86, sregs: uapi.kvm_sregs2) -> None:
    """Load them, with the page-directory pointers if the flags say so."""
    valid = sregs.flags & uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID
    if sregs.flags & ~uapi.KVM_SREGS2_FLAGS_PDPTRS_VALID:
        raise fail(EINVAL, f"KVM_SET_SREGS2: unknown flags {sregs.flags:#x}")
    if valid and not pae_paging(sregs.cr0, sregs.cr4, sregs.efer):
        raise fail(EINVAL, "KVM_SET_SREGS2: PDPTEs without PAE paging")
    _set_sregs_common(vcpu, sregs)
    if valid:
        for i in range(PDPTE_COUNT):
            vcpu.state.pdpte[i] = sregs.pdptrs[i]
