"""System management mode: SMI, the save-state area, RSM (AMD APM vol. 2, chapter 10; SDM vol. 3,
chapter 32; arch/x86/kvm, `enter_smm` and `em_rsm`).

The save area is AMD's 64-bit one for guests with long mode, the older 32-bit one for others, as in
KVM. Neither I/O restart nor auto-HALT restart is kept: as in KVM an SMI ends HLT.
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64

from anykvm.cpu.state import Seg
from anykvm.fs.trace import trace
from anykvm.kvm.ioctl import Value
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import (
    CR0_PG,
    EFER_LMA,
    EFER_LME,
    Msr,
    efer_reserved,
    enter,
)
from anykvm.x86.regs import CR4_ALLOWED, CR4_PAE, RFLAGS_FIXED, load_pdptrs, pae_paging
from anykvm.x86.svm import svm_enter_smm, svm_leave_smm
from anykvm.x86.tables import vcpu_ioctls

MSR_SMI_COUNT, MSR_IA32_SMBASE = 0x34, 0x9E
SMRAM_OFFSET, SMRAM_SIZE = 0xFE00, 512
SMBASE_DEFAULT, ENTRY_RIP = 0x30000, 0x8000
REVISION_32, REVISION_64 = 0x20000, 0x20064
ATTRIBUTES, PRESENT, UNUSABLE = 0xF0FF, 1 << 7, 1 << 16
SMM_SEGMENT = 1 << 15 | PRESENT | 1 << 4 | 3  # granular, present, read and write
CR0_PE, CR0_EM, CR0_TS, CR0_ET = 1, 1 << 2, 1 << 3, 1 << 4
CR0_NW, CR0_CD, CR0_DEFINED = 1 << 29, 1 << 30, 0xE005003F
DR6_FIXED, DR6_VOLATILE = 0xFFFF0FF0, 0xE00F
DR7_FIXED, DR7_VOLATILE = 0x400, 0xFFFF2BFF
LIMIT = 0xFFFFFFFF


class Segment64(ctypes.Structure):
    """A segment or descriptor table of the 64-bit area."""

    _fields_ = [
        ("selector", c_uint16),
        ("attributes", c_uint16),
        ("limit", c_uint32),
        ("base", c_uint64),
    ]


class SmramState64(ctypes.Structure):
    """The area at SMBASE + 0xFE00 of a guest with long mode (APM vol. 2, table 10-1).

    `int_shadow` is in a byte that the manual reserves, where later KVMs have it.
    """

    _pack_ = 1
    _fields_ = [
        *((name, Segment64) for name in ("es", "cs", "ss", "ds", "fs", "gs")),
        *((name, Segment64) for name in ("gdtr", "ldtr", "idtr", "tr")),
        ("io_restart", c_uint64 * 5),
        ("io_inst_restart", c_uint8),
        ("auto_hlt_restart", c_uint8),
        ("nmi_mask", c_uint8),
        ("int_shadow", c_uint8),
        ("reserved1", c_uint32),
        ("efer", c_uint64),
        ("svm_guest_flag", c_uint64),
        ("svm_guest_vmcb_gpa", c_uint64),
        ("svm_guest_virtual_int", c_uint64),
        ("reserved2", c_uint32 * 3),
        ("revision", c_uint32),
        ("smbase", c_uint32),
        ("reserved3", c_uint32 * 17),
        *((name, c_uint64) for name in ("cr4", "cr3", "cr0", "dr7", "dr6", "rflags", "rip")),
        ("gpr", c_uint64 * 16),  # R15 first
    ]


class Segment32(ctypes.Structure):
    """A segment or descriptor table of the 32-bit area, without its selector."""

    _fields_ = [("attributes", c_uint32), ("limit", c_uint32), ("base", c_uint32)]


class SmramState32(ctypes.Structure):
    """The area of a guest without long mode; `int_shadow` as above."""

    _fields_ = [
        ("reserved1", c_uint32 * 62),
        ("smbase", c_uint32),
        ("revision", c_uint32),
        ("restart", c_uint32 * 5),
        ("cr4", c_uint32),
        ("reserved2", c_uint16),
        ("int_shadow", c_uint8),
        ("reserved3", c_uint8 * 17),
        *((name, Segment32) for name in ("ds", "fs", "gs", "idtr", "tr")),
        ("reserved4", c_uint32),
        *((name, Segment32) for name in ("gdtr", "ldtr", "es", "cs", "ss")),
        ("selector", c_uint16 * 16),  # in words of 32 bits: ES to GS, LDTR, TR
        *((name, c_uint32) for name in ("dr7", "dr6")),
        ("gpr", c_uint32 * 8),
        *((name, c_uint32) for name in ("rip", "rflags", "cr3", "cr0")),
    ]


SmramState = SmramState64 | SmramState32
assert ctypes.sizeof(SmramState64) == ctypes.sizeof(SmramState32) == SMRAM_SIZE
SEGMENTS = tuple((seg.name.lower(), seg) for seg in Seg)
CONTROL = ("cr0", "cr3", "cr4", "dr6", "dr7", "rip")


# Requests.


def is_smm(vcpu: VcpuX86) -> bool:
    return vcpu.smm.active


@vcpu_ioctls.row("KVM_SMI", Value(), uapi.KVM_CAP_X86_SMM)
def kvm_vcpu_ioctl_smi(vcpu: VcpuX86, _: int) -> None:
    """Queue an SMI; one more while one is pending is the same one."""
    kvm_inject_smi(vcpu)


def kvm_inject_smi(vcpu: VcpuX86) -> bool:
    """From any thread; an SMI can always be taken."""
    vcpu.smm.pending = True
    vcpu.make_request(Request.EVENT)
    return True


def smi_allowed(vcpu: VcpuX86) -> bool:
    return vcpu.smm.pending and not vcpu.smm.active and vcpu.cpu.svm.gif


def reset_smm(vcpu: VcpuX86, init_event: bool) -> None:
    """Power-on, or INIT, which does not move SMBASE."""
    smm = vcpu.smm
    smm.pending, smm.count = False, 0
    if smm.active:
        kvm_smm_changed(vcpu, False)
    if not init_event:
        smm.smbase = SMBASE_DEFAULT


def kvm_smm_changed(vcpu: VcpuX86, entering: bool) -> None:
    """Guest-physical addresses are of the other address space; what waited for the end of SMM is
    looked at again.
    """
    vcpu.smm.active = entering
    if not entering:
        vcpu.smm.inside_nmi = False
        vcpu.requests.add(Request.EVENT)
    vcpu.cpu.use_address_space(int(entering))


def inject_smi(vcpu: VcpuX86) -> bool:
    """Enter SMM if an SMI is pending and can be taken; between two parts of an instruction it has
    to wait for the rest.
    """
    if not smi_allowed(vcpu):
        return False
    if vcpu.cpu.mid_instruction() or vcpu.cpu.debug.trap_pending():
        vcpu.cpu.finish_instruction()
        return False
    vcpu.smm.pending = False
    vcpu.smm.count += 1
    trace("kvm_enter_smm", vcpu_id=vcpu.vcpu_id, smbase=vcpu.smm.smbase, entering=True)
    enter_smm(vcpu)
    return True


# Entering.


def _save_segments(vcpu: VcpuX86, area: SmramState) -> None:
    for name, seg in SEGMENTS:
        held, saved = vcpu.state.seg[seg], getattr(area, name)
        rights = held.attr & ATTRIBUTES
        if held.attr & UNUSABLE:
            rights &= ~PRESENT
        saved.limit, saved.base = held.limit, held.base
        if isinstance(area, SmramState64):
            saved.selector, saved.attributes = held.selector, rights
        else:
            area.selector[2 * seg], saved.attributes = held.selector, rights << 8


def _save_state(vcpu: VcpuX86, area: SmramState) -> None:
    state = vcpu.state
    _save_segments(vcpu, area)
    for name in CONTROL:
        setattr(area, name, getattr(state, name))
    area.rflags = vcpu.cpu.rflags
    area.gdtr.base, area.gdtr.limit = state.gdt_base, state.gdt_limit
    area.idtr.base, area.idtr.limit = state.idt_base, state.idt_limit
    area.smbase = vcpu.smm.smbase
    area.int_shadow = state.shadow if vcpu.cpu.in_shadow() else 0
    if isinstance(area, SmramState64):
        area.revision, area.efer = REVISION_64, state.efer
        area.gpr[:] = list(reversed(state.gpr))
    else:
        area.revision = REVISION_32
        area.gpr[:] = list(state.gpr[:8])


def _load_smm_segments(vcpu: VcpuX86) -> None:
    for seg in (Seg.CS, Seg.DS, Seg.ES, Seg.FS, Seg.GS, Seg.SS):
        held = vcpu.state.seg[seg]
        held.selector, held.base, held.limit, held.attr = 0, 0, LIMIT, SMM_SEGMENT
    code = vcpu.state.seg[Seg.CS]
    code.selector, code.base = vcpu.smm.smbase >> 4 & 0xFFFF, vcpu.smm.smbase


def enter_smm(vcpu: VcpuX86) -> None:
    """Save the processor's state and go to SMBASE + 0x8000 in a mode like real mode."""
    state, smm = vcpu.state, vcpu.smm
    area: SmramState = SmramState64() if vcpu.cpuid.has("lm") else SmramState32()
    _save_state(vcpu, area)
    if isinstance(area, SmramState64) and not svm_enter_smm(vcpu, area):
        vcpu.requests.add(Request.TRIPLE_FAULT)
    kvm_smm_changed(vcpu, True)
    _write_smram(vcpu, bytes(area))
    smm.inside_nmi = bool(state.nmi_blocked)
    state.nmi_blocked = 1
    vcpu.cpu.rflags = RFLAGS_FIXED
    state.rip, state.shadow = ENTRY_RIP, 0
    state.cr0 &= ~(CR0_PE | CR0_EM | CR0_TS | CR0_PG)
    state.cr4 = state.idt_base = state.idt_limit = 0
    state.dr7 = DR7_FIXED
    _load_smm_segments(vcpu)
    if vcpu.cpuid.has("lm"):
        state.efer = 0
    vcpu.cpu.svm.reset()  # with EFER.SVME goes its guest mode
    vcpu.update_cpuid_runtime()
    vcpu.cpu.debug.changed()
    vcpu.cpu.mode_changed()
    vcpu.cpu.flush_tlb()


def _write_smram(vcpu: VcpuX86, data: bytes) -> None:
    """Where there is no memory the state is lost, as on hardware and as in Linux 6.1."""
    gpa, space = vcpu.smm.smbase + SMRAM_OFFSET, int(vcpu.smm.active)
    while data and vcpu.kvm.writable(gpa, space):
        part = min(len(data), PAGE_SIZE - gpa % PAGE_SIZE)
        vcpu.kvm.kvm_write_guest(gpa, data[:part], space)
        gpa, data = gpa + part, data[part:]


def _read_smram(vcpu: VcpuX86) -> bytes | None:
    """The save area, None where a part of it is no memory."""
    gpa, left, data = vcpu.smm.smbase + SMRAM_OFFSET, SMRAM_SIZE, b""
    slots = vcpu.kvm.memslots_of(int(vcpu.smm.active))
    while left:
        if slots.gpa_to_memslot(gpa) is None:
            return None
        part = min(left, PAGE_SIZE - gpa % PAGE_SIZE)
        data += vcpu.kvm.kvm_read_guest(gpa, part, int(vcpu.smm.active))
        gpa, left = gpa + part, left - part
    return data


# Leaving.


def emulate_rsm(vcpu: VcpuX86) -> bool:
    """RSM in SMM: back to the saved state. False where that cannot be read; a state that no
    processor can be in shuts it down.
    """
    data = _read_smram(vcpu)
    if data is None:
        return False
    long = vcpu.cpuid.has("lm")
    area: SmramState = (SmramState64 if long else SmramState32).from_buffer_copy(data)
    if not vcpu.smm.inside_nmi:
        vcpu.state.nmi_blocked = 0
    kvm_smm_changed(vcpu, False)
    trace("kvm_enter_smm", vcpu_id=vcpu.vcpu_id, smbase=vcpu.smm.smbase, entering=False)
    nested = not isinstance(area, SmramState64) or svm_leave_smm(vcpu, area)
    if not nested or not _load_state(vcpu, area):
        vcpu.requests.add(Request.TRIPLE_FAULT)
    vcpu.update_cpuid_runtime()
    vcpu.cpu.debug.changed()
    vcpu.cpu.mode_changed()
    vcpu.cpu.flush_tlb()
    return True


def _valid(vcpu: VcpuX86, area: SmramState, efer: int) -> bool:
    """Whether a processor can be in a saved state, by the checks of its registers' own writes."""
    cr0, cr4, paging = area.cr0, area.cr4, area.cr0 & CR0_PG
    wrong = (
        area.dr6 >> 32 or area.dr7 >> 32,
        cr0 >> 32 or (paging and not cr0 & CR0_PE),
        cr0 & CR0_NW and not cr0 & CR0_CD,
        cr4 & ~CR4_ALLOWED,
        efer & ~EFER_LMA & efer_reserved(vcpu),
        paging and efer & EFER_LME and not cr4 & CR4_PAE,
    )
    return not any(wrong)


def _load_state(vcpu: VcpuX86, area: SmramState) -> bool:
    state = vcpu.state
    efer = area.efer if isinstance(area, SmramState64) else state.efer & ~EFER_LMA
    if not _valid(vcpu, area, efer):
        return False
    _load_registers(vcpu, area)
    state.cr0, state.cr3, state.cr4 = area.cr0 & CR0_DEFINED | CR0_ET, area.cr3, area.cr4
    state.efer = efer & ~EFER_LMA
    if efer & EFER_LME and area.cr0 & CR0_PG:
        state.efer |= EFER_LMA
    _load_segments(vcpu, area)
    if pae_paging(state.cr0, state.cr4, state.efer):
        load_pdptrs(vcpu)
    return True


def _load_registers(vcpu: VcpuX86, area: SmramState) -> None:
    state = vcpu.state
    for n in range(len(area.gpr)):
        state.gpr[n] = area.gpr[15 - n] if isinstance(area, SmramState64) else area.gpr[n]
    state.rip = area.rip
    vcpu.cpu.rflags = area.rflags | RFLAGS_FIXED
    state.dr6 = area.dr6 & DR6_VOLATILE | DR6_FIXED
    state.dr7 = area.dr7 & DR7_VOLATILE | DR7_FIXED
    state.gdt_base, state.gdt_limit = area.gdtr.base, area.gdtr.limit & 0xFFFF
    state.idt_base, state.idt_limit = area.idtr.base, area.idtr.limit & 0xFFFF
    vcpu.smm.smbase = area.smbase
    state.shadow = min(area.int_shadow, 2)
    state.shadow_rip, state.shadow_count = state.rip, state.insn_count


def _load_segments(vcpu: VcpuX86, area: SmramState) -> None:
    for name, seg in SEGMENTS:
        held, saved = vcpu.state.seg[seg], getattr(area, name)
        if isinstance(area, SmramState64):
            held.selector, rights = saved.selector, saved.attributes & ATTRIBUTES
        else:
            held.selector, rights = area.selector[2 * seg], saved.attributes >> 8 & ATTRIBUTES
        held.base, held.limit = saved.base, saved.limit
        held.attr = rights if rights & PRESENT else rights | UNUSABLE


# MSRs.


def _read_smbase(vcpu: VcpuX86) -> int:
    return vcpu.smm.smbase


def _write_smbase(vcpu: VcpuX86, value: int, host: bool) -> bool:
    """For the VMM, which moves it with a guest; a guest can do so in the save area alone."""
    if host:
        vcpu.smm.smbase = value
    return host


enter(MSR_IA32_SMBASE, Msr("smbase", _read_smbase, _write_smbase, guest_reads=lambda vcpu: False))


def _read_smi_count(vcpu: VcpuX86) -> int:
    return vcpu.smm.count


def _write_smi_count(vcpu: VcpuX86, value: int, host: bool) -> bool:
    if host:
        vcpu.smm.count = value
    return host


enter(MSR_SMI_COUNT, Msr("smi_count", _read_smi_count, _write_smi_count))
