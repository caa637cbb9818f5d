"""The virtual machine control block: its layout, and the numbers in it (AMD APM vol. 2, appendix B
and appendix C).
"""

from __future__ import annotations

import ctypes
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from enum import IntEnum, IntFlag

from anykvm.cpu.state import Segment

u8, u16, u32, u64 = c_uint8, c_uint16, c_uint32, c_uint64
VMCB_SIZE, SAVE_OFFSET = 4096, 0x400
INTERCEPT_WORDS = 6
EXIT_INVALID = 2**64 - 1
UNUSABLE = 1 << 16


class SvmExit(IntEnum):
    """Exit codes. Up to the intercepts of instructions each is also the number of the intercept's
    bit, counted from the start of the VMCB (`SVM_EXIT_*` in asm/svm.h).
    """

    READ_CR0 = 0x00
    READ_CR8 = 0x08
    WRITE_CR0 = 0x10
    WRITE_CR3 = 0x13
    WRITE_CR8 = 0x18
    READ_DR0 = 0x20
    WRITE_DR0 = 0x30
    EXCP_BASE = 0x40
    INTR = 0x60
    NMI = 0x61
    SMI = 0x62
    INIT = 0x63
    VINTR = 0x64
    CR0_SEL_WRITE = 0x65
    IDTR_READ = 0x66
    GDTR_READ = 0x67
    LDTR_READ = 0x68
    TR_READ = 0x69
    IDTR_WRITE = 0x6A
    GDTR_WRITE = 0x6B
    LDTR_WRITE = 0x6C
    TR_WRITE = 0x6D
    RDTSC = 0x6E
    RDPMC = 0x6F
    PUSHF = 0x70
    POPF = 0x71
    CPUID = 0x72
    RSM = 0x73
    IRET = 0x74
    SWINT = 0x75
    INVD = 0x76
    PAUSE = 0x77
    HLT = 0x78
    INVLPG = 0x79
    INVLPGA = 0x7A
    IOIO = 0x7B
    MSR = 0x7C
    TASK_SWITCH = 0x7D
    FERR_FREEZE = 0x7E
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81
    VMLOAD = 0x82
    VMSAVE = 0x83
    STGI = 0x84
    CLGI = 0x85
    SKINIT = 0x86
    RDTSCP = 0x87
    ICEBP = 0x88
    WBINVD = 0x89
    MONITOR = 0x8A
    MWAIT = 0x8B
    XSETBV = 0x8D
    NPF = 0x400
    SW = 0xF0000000  # not the processor's: for software, as SMM's entry in KVM


class EventType(IntEnum):
    """TYPE of EVENTINJ and EXITINTINFO."""

    INTR = 0
    NMI = 2
    EXCEPTION = 3
    SOFT = 4


EVENT_VECTOR, EVENT_TYPE_SHIFT = 0xFF, 8
EVENT_HAS_ERROR, EVENT_VALID = 1 << 11, 1 << 31


class IntCtl(IntFlag):
    """The virtual interrupt's control word."""

    V_TPR = 0xFF
    V_IRQ = 1 << 8
    V_INTR_PRIO = 15 << 16
    V_IGN_TPR = 1 << 20
    V_INTR_MASKING = 1 << 24


INTERRUPT_SHADOW = 1  # int_state
TASK_IRET, TASK_JMP, TASK_HAS_ERROR = 1 << 36, 1 << 38, 1 << 44  # EXITINFO2 of a task switch
MSRPM_SIZE, IOPM_SIZE = 0x2000, 0x3000
HV_MSR_BITMAP = 2  # hv_enlightenments: L1 tells when it changes the MSR map, by this bit of `clean`
HV_CLEAN = 1 << 31
NP_ENABLE = 1  # nested_ctl


class VmcbSegment(ctypes.Structure):
    """A segment register; `attrib` has the descriptor's bits 40-47 and 52-55 side by side."""

    _pack_ = 1
    _fields_ = [("selector", u16), ("attrib", u16), ("limit", u32), ("base", u64)]
    selector: int
    attrib: int
    limit: int
    base: int

    def load(self, segment: Segment) -> None:
        """Into a segment register; what is not present is unusable."""
        segment.selector, segment.base, segment.limit = self.selector, self.base, self.limit
        attr = self.attrib & 0xFF | (self.attrib & 0xF00) << 4
        segment.attr = attr if self.attrib & 0x80 else attr | UNUSABLE

    def store(self, segment: Segment) -> None:
        self.selector, self.base, self.limit = segment.selector, segment.base, segment.limit
        attr = segment.attr if not segment.attr & UNUSABLE else 0
        self.attrib = attr & 0xFF | attr >> 4 & 0xF00


class VmcbControl(ctypes.Structure):
    """The control area; the last fields, of encrypted guests and AVIC, are left out."""

    _pack_ = 1
    _fields_ = [
        ("intercepts", u32 * INTERCEPT_WORDS),
        ("reserved_1", u32 * (15 - INTERCEPT_WORDS)),
        ("pause_filter_thresh", u16),
        ("pause_filter_count", u16),
        ("iopm_base_pa", u64),
        ("msrpm_base_pa", u64),
        ("tsc_offset", u64),
        ("asid", u32),
        ("tlb_ctl", u8),
        ("reserved_2", u8 * 3),
        ("int_ctl", u32),
        ("int_vector", u32),
        ("int_state", u32),
        ("reserved_3", u32),
        ("exit_code", u64),
        ("exit_info_1", u64),
        ("exit_info_2", u64),
        ("exit_int_info", u32),
        ("exit_int_info_err", u32),
        ("nested_ctl", u64),
        ("avic_vapic_bar", u64),
        ("ghcb_gpa", u64),
        ("event_inj", u32),
        ("event_inj_err", u32),
        ("nested_cr3", u64),
        ("virt_ext", u64),
        ("clean", u32),
        ("reserved_5", u32),
        ("next_rip", u64),
        ("insn_len", u8),
        ("insn_bytes", u8 * 15),
        ("rest", u8 * 768),
        ("hv_enlightenments", u32),  # of the 32 bytes for software: Hyper-V's
        ("hv_rest", u8 * 28),
    ]
    intercepts: ctypes.Array[c_uint32]
    iopm_base_pa: int
    msrpm_base_pa: int
    tsc_offset: int
    asid: int
    tlb_ctl: int
    int_ctl: int
    int_vector: int
    int_state: int
    exit_code: int
    exit_info_1: int
    exit_info_2: int
    exit_int_info: int
    exit_int_info_err: int
    nested_ctl: int
    event_inj: int
    event_inj_err: int
    nested_cr3: int
    clean: int
    next_rip: int
    hv_enlightenments: int


class VmcbSave(ctypes.Structure):
    """The state save area."""

    _pack_ = 1
    _fields_ = [
        *((name, VmcbSegment) for name in ("es", "cs", "ss", "ds", "fs", "gs")),
        *((name, VmcbSegment) for name in ("gdtr", "ldtr", "idtr", "tr")),
        ("reserved_1", u8 * 43),
        ("cpl", u8),
        ("reserved_2", u8 * 4),
        ("efer", u64),
        ("reserved_3", u8 * 112),
        ("cr4", u64),
        ("cr3", u64),
        ("cr0", u64),
        ("dr7", u64),
        ("dr6", u64),
        ("rflags", u64),
        ("rip", u64),
        ("reserved_4", u8 * 88),
        ("rsp", u64),
        ("reserved_5", u8 * 24),
        ("rax", u64),
        ("star", u64),
        ("lstar", u64),
        ("cstar", u64),
        ("sfmask", u64),
        ("kernel_gs_base", u64),
        ("sysenter_cs", u64),
        ("sysenter_esp", u64),
        ("sysenter_eip", u64),
        ("cr2", u64),
        ("reserved_6", u8 * 32),
        ("g_pat", u64),
        ("dbgctl", u64),
        ("br_from", u64),
        ("br_to", u64),
        ("last_excp_from", u64),
        ("last_excp_to", u64),
    ]
    cs: VmcbSegment
    ss: VmcbSegment
    gdtr: VmcbSegment
    idtr: VmcbSegment
    cpl: int
    efer: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    dr6: int
    dr7: int
    rflags: int
    rip: int
    rsp: int
    rax: int
    g_pat: int


class Vmcb(ctypes.Structure):
    """The page that VMRUN's operand names."""

    _pack_ = 1
    _fields_ = [
        ("control", VmcbControl),
        ("save", VmcbSave),
        ("reserved", u8 * (VMCB_SIZE - SAVE_OFFSET - ctypes.sizeof(VmcbSave))),
    ]
    control: VmcbControl
    save: VmcbSave


assert ctypes.sizeof(VmcbControl) == SAVE_OFFSET
assert ctypes.sizeof(Vmcb) == VMCB_SIZE
assert VmcbSave.rax.offset == 0x1F8  # type: ignore[attr-defined]
assert VmcbSave.g_pat.offset == 0x268  # type: ignore[attr-defined]


def event(kind: EventType, vector: int, error: int | None) -> tuple[int, int]:
    """EXITINTINFO of an event, and its error code."""
    has_error = EVENT_HAS_ERROR if error is not None else 0
    return EVENT_VALID | has_error | kind << EVENT_TYPE_SHIFT | vector, error or 0
