"""What one vCPU is made of, laid out once for Python, for native code and for save and restore.

`State` is a ctypes structure; native code reaches its fields by the offsets that ctypes assigns
(`offset_of`). Registers that an instruction's operand may name stand first, so that a record can
hold their offset in 16 bits, and general registers first of all, so that one byte is enough for a
base or an index.
"""

from __future__ import annotations

import ctypes
from ctypes import (
    c_int32,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
)
from enum import IntEnum
from typing import Any

u8, u16, u32, u64 = c_uint8, c_uint16, c_uint32, c_uint64

PAGE = 4096
TLB_ENTRIES = 1024  # per privilege
TLB_LIST = 1024  # entries filled since the last flush that are remembered
TLB_ENTRY = 32  # read tag, write tag, execute tag, host addend
JUMP_ENTRIES = 4096
JUMP_ENTRY = 32  # rip, mode, record, -
BOUNCE = 128  # bytes; the widest access is 64, twice for two operands
REPLAY = 128  # MMIO accesses that one instruction can make: FXSAVE 64, ENTER of 31 levels 63
STAY = 1 << 32  # what numbers of stays advance by; the lower half is the vCPU's
WATCHES = 4  # debug registers with an address
TSC_RATIO_BITS = 48  # fractional bits of `State.tsc_ratio`, as VMX's multiplier has


class Seg(IntEnum):
    """Index of a segment register in `State.seg`: the order of the instruction encoding, then LDTR
    and TR.
    """

    ES, CS, SS, DS, FS, GS, LDTR, TR = range(8)


class Exit(IntEnum):
    """Why native code returned to Python and, from REQUEST on, `Cpu.run` to its caller."""

    NONE = 0
    TRANSLATE = 1  # no translation of the code at rip
    ASSIST = 2  # an instruction whose microcode is in Python
    CODE_WRITE = 3  # a store is about to change translated code
    DELIVER = 4  # an exception whose delivery is in Python
    CODE_CHANGED = 5  # the code at a page (code_write_gpa: its host address) is not what it was
    EXCLUSIVE = 6  # a locked access that no single host instruction can make
    WATCH = 7  # an access meets a data breakpoint
    STEP_HERE = 8  # the code's page has an instruction breakpoint
    NESTED_FAULT = 9  # nested paging has no such page, see nested.py
    REQUEST = 16
    IRQ_WINDOW = 17
    HLT = 18
    IO = 19
    MMIO = 20
    CPUID = 21
    RDMSR = 22
    WRMSR = 23
    CR8_READ = 24
    CR8_WRITE = 25
    SHUTDOWN = 26
    EMULATION = 27
    DEBUG = 28
    VMCALL = 29
    VMMCALL = 30
    RSM = 31
    MONITOR = 32
    MWAIT = 33
    BUS_LOCK = 34  # a locked access across cache lines is done, see `bus_lock_exits`
    DIRTY_RING_FULL = 40  # written pages are to be collected before one more is written
    MEMORY_FAULT = 41  # the host memory behind a slot is not there, see extable.py


class Flag(IntEnum):
    """RFLAGS (SDM vol. 1, 3.4.3)."""

    CF, PF, AF, ZF, SF = 1, 1 << 2, 1 << 4, 1 << 6, 1 << 7
    TF, IF, DF, OF = 1 << 8, 1 << 9, 1 << 10, 1 << 11
    IOPL, NT, RF, VM, AC = 3 << 12, 1 << 14, 1 << 16, 1 << 17, 1 << 18
    VIF, VIP, ID = 1 << 19, 1 << 20, 1 << 21


STATUS_FLAGS = Flag.CF | Flag.PF | Flag.AF | Flag.ZF | Flag.SF | Flag.OF


class Mode(IntEnum):
    """What a translation depends on besides its bytes; part of a block's key."""

    CODE32, CODE64 = 1, 2  # neither: 16-bit code
    STACK32 = 4  # SS.B, outside 64-bit mode
    PROTECTED = 8
    NM = 16  # CR0.TS or CR0.EM: x87 and MMX raise #NM or #UD
    SSE_UD = 32  # CR4.OSFXSR clear or CR0.EM set
    SSE_NM = 64
    STEP = 128  # one instruction a block: RFLAGS.TF, a debugger's single step
    USER = 256  # CPL 3: in the jump cache only
    LONG = 512  # EFER.LMA
    AVX_UD = 1024
    VM86 = 2048
    GUEST = 4096  # SVM's guest mode: instructions that can be intercepted look whether they are


class Segment(ctypes.Structure):
    """A segment register; `attr` as in VMX's access rights: type 0-3, S 4, DPL 5-6, P 7, L 13, D/B
    14, G 15, null 16.
    """

    base: int
    limit: int
    attr: int
    selector: int
    _fields_ = [("base", u64), ("limit", u32), ("attr", u32), ("selector", u16), ("pad", u16 * 3)]


class Replay(ctypes.Structure):
    """An MMIO access that the current instruction made and that is complete."""

    gpa: int
    data: int
    size: int
    write: int
    _fields_ = [("gpa", u64), ("data", u64), ("size", u32), ("write", u32)]


class Watch(ctypes.Structure):
    """Where one debug register looks, see watch.py: the first and last address, and what for."""

    first: int
    last: int
    kinds: int
    _fields_ = [("first", u64), ("last", u64), ("kinds", u32), ("pad", u32)]


class State(ctypes.Structure):
    """Everything that native code and Python share about one vCPU. Sizes in bytes, addresses as
    integers.
    """

    _fields_ = [
        ("gpr", u64 * 16),
        ("zero", u64),  # base or index of an operand that has none
        ("scratch", u64 * 3),
        ("lf_res", u64),  # lazy flags, see flags.py
        ("lf_aux", u64),
        ("flags", u64),  # RFLAGS without the six status flags
        ("rip", u64),
        ("seg", Segment * 8),
        ("xmm", (u8 * 64) * 32),
        ("st", (u8 * 16) * 8),  # R0..R7 in physical order, 10 bytes used
        ("bounce", u8 * BOUNCE),
        # x87 and SSE control
        ("fpu_cw", u16),
        ("fpu_sw", u16),  # TOP included
        ("fpu_tag", u16),  # two bits a register, 3 = empty
        ("fpu_op", u16),
        ("fpu_ip", u64),
        ("fpu_dp", u64),
        ("mxcsr", u32),
        (
            "fpu_top",
            u64,
        ),  # TOP of fpu_sw while native code runs: x87 code needs it before the flags
        ("fpu_pc", u64),  # record that fpu_ip and fpu_op are to be taken from, or 0
        ("x87_image", u8 * 112),  # FRSTOR's image, for instructions that the host executes whole
        ("x87_operand", u8 * 16),  # the memory operand of an x87 instruction
        ("fx_image", u8 * 512),  # FXSAVE's image on its way
        ("sse_unmasked", u32),  # some SSE exception is unmasked: operations check after themselves
        ("gdt_base", u64),
        ("idt_base", u64),
        ("gdt_limit", u32),
        ("idt_limit", u32),
        ("cr0", u64),
        ("cr2", u64),
        ("cr3", u64),
        ("cr4", u64),
        ("cr8", u64),
        ("efer", u64),
        ("xcr0", u64),
        ("dr", u64 * 4),
        ("dr6", u64),
        ("dr7", u64),
        ("pdpte", u64 * 4),
        ("star", u64),
        ("lstar", u64),
        ("cstar", u64),
        ("fmask", u64),
        ("kernel_gs_base", u64),
        ("sysenter_cs", u64),
        ("sysenter_esp", u64),
        ("sysenter_eip", u64),
        ("tsc_aux", u64),
        ("tsc_offset", u64),
        ("tsc_ratio", u64),  # the guest's TSC: host's * ratio >> TSC_RATIO_BITS, plus the offset
        ("pat", u64),
        ("nested_paging", u32),  # SVM's guest mode with nested paging: nCR3, and L1's EFER.NXE
        ("nested_nx", u32),
        ("nested_cr3", u64),
        ("nested_fault_gpa", u64),
        ("nested_fault_error", u64),
        ("apic_base", u64),
        # Control of the native side
        ("mode", u64),  # Mode
        ("jump_key", u64),  # number of flushes << 32
        ("stay", u64),  # since userspace last ran: a number that no vCPU has twice
        ("exit_kind", u32),  # Exit
        ("exit_request", c_int32),  # written by other threads
        ("tick", u32),  # time to look for what only Python sees, see ticker.py
        ("irq_pending", u32),  # leave once interrupts can be taken: 1 physical, 2 virtual (SVM)
        ("intercepts", u32 * 6),  # as in the VMCB; none outside of guest mode
        (
            "shadow",
            u32,
        ),  # 1: STI, 2: MOV SS: no interrupt at shadow_rip while no instruction retired
        ("shadow_rip", u64),
        ("shadow_count", u64),
        ("nmi_blocked", u32),
        ("insn_count", u64),
        ("exit_record", u64),  # the record that left
        ("link_from", u64),  # record whose target is missing, or 0
        ("exc_vector", u32),
        ("exc_has_error", u32),
        ("exc_error", u64),
        ("exc_cr2", u64),
        # The pending I/O or MMIO access
        ("io_port", u32),
        ("io_size", u32),
        ("io_in", u32),
        ("io_count", u32),
        ("mmio_gpa", u64),
        ("mmio_data", u64),
        ("mmio_size", u32),
        ("mmio_write", u32),
        ("replay", Replay * REPLAY),
        ("replay_count", u32),
        ("replay_next", u32),
        ("replay_rip", u64),
        ("replay_insn", u64),
        ("insn_bytes", u8 * 16),
        ("insn_len", u32),
        ("exclusive", u32),  # no other vCPU is running
        ("bus_lock_exits", u32),  # leave after a locked access across cache lines, or to MMIO
        ("code_write_pass", u32),  # let the next store to translated code through
        ("code_write_gpa", u64),
        ("code_write_size", u64),
        # Tables owned by the engine
        ("physmap", u64),  # one pointer per GiB to an array of page entries
        ("physmap_top", u64),  # how many GiB it covers
        ("blocks", u64),  # hash table of translations
        ("blocks_mask", u64),
        ("records", u64),
        ("records_rip", u64),
        # Host memory that is not there, see extable.py
        ("fault_context", u64),
        ("fault_record", u64),  # where to go on, 1 for State.rip; 0 while handlers run
        ("fault_count", u64),  # instructions retired there
        ("fault_gpa", u64),
        # The dirty ring, see dirty.py; no ring is mask 0
        ("ring", u64),
        ("ring_mask", u64),  # entries - 1
        ("ring_limit", u64),  # so many entries are as good as full
        ("ring_index", u64),  # where the next page is noted
        ("ring_reset", u64),  # the oldest that was not collected
        ("ring_reserve", u32),  # what runs now may use the entries beyond the limit
        ("table_write", u32),  # the page walk wrote to bytes that were translated
        ("table_write_gpa", u64),
        # Debugging, see watch.py and debug.py
        ("watch", Watch * WATCHES),
        ("watch_kinds", u32),  # of all together
        ("watch_abort", u32),  # an access that meets a breakpoint is abandoned, else noted
        ("debug_hit", u32),  # what is to be trapped for after this instruction: bits of DR6
        ("untraced", u32),  # this instruction decided about TF itself
        ("resume_rip", u64),  # where RFLAGS.RF was loaded for
        # Native entry points, so that objects need no linking
        ("fn", u64 * 64),
        # Statistics
        ("count_tlb_fill", u64),
        ("count_lookup", u64),
        ("count_exception", u64),
        ("count_interrupt", u64),
        ("count_flush", u64),
        ("count_tlb_filled", u64),  # of the walks in count_tlb_fill, those that found memory
        ("count_invlpg", u64),
        ("count_page_fault", u64),
        ("count_assist", u64),
        ("count_nested_run", u64),
        ("tlb_listed", u64),
        (
            "large_low",
            u64,
        ),  # addresses that large pages were seen to cover since everything was flushed
        ("large_high", u64),
        ("tlb_list", u32 * TLB_LIST),
        ("jump", (u64 * 4) * JUMP_ENTRIES),
        ("tlb", ((u64 * 4) * TLB_ENTRIES) * 2),  # [0] supervisor, [1] user
    ]

    gpr: ctypes.Array[c_uint64]
    seg: ctypes.Array[Segment]
    xmm: ctypes.Array[ctypes.Array[c_uint8]]
    st: ctypes.Array[ctypes.Array[c_uint8]]
    dr: ctypes.Array[c_uint64]
    pdpte: ctypes.Array[c_uint64]
    fn: ctypes.Array[c_uint64]
    bounce: ctypes.Array[c_uint8]
    replay: ctypes.Array[Replay]
    watch: ctypes.Array[Watch]
    insn_bytes: ctypes.Array[c_uint8]
    zero: int
    lf_res: int
    lf_aux: int
    flags: int
    rip: int
    fpu_cw: int
    fpu_sw: int
    fpu_tag: int
    fpu_op: int
    fpu_ip: int
    fpu_dp: int
    mxcsr: int
    sse_unmasked: int
    gdt_base: int
    gdt_limit: int
    idt_base: int
    idt_limit: int
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    cr8: int
    efer: int
    xcr0: int
    dr6: int
    dr7: int
    star: int
    lstar: int
    cstar: int
    fmask: int
    kernel_gs_base: int
    sysenter_cs: int
    sysenter_esp: int
    sysenter_eip: int
    tsc_aux: int
    tsc_offset: int
    tsc_ratio: int
    pat: int
    nested_paging: int
    nested_nx: int
    nested_cr3: int
    nested_fault_gpa: int
    nested_fault_error: int
    apic_base: int
    mode: int
    jump_key: int
    stay: int
    exit_kind: int
    exit_request: int
    tick: int
    irq_pending: int
    intercepts: ctypes.Array[c_uint32]
    shadow: int
    shadow_rip: int
    shadow_count: int
    nmi_blocked: int
    insn_count: int
    exit_record: int
    link_from: int
    exc_vector: int
    exc_has_error: int
    exc_error: int
    exc_cr2: int
    io_port: int
    io_size: int
    io_in: int
    io_count: int
    mmio_gpa: int
    mmio_data: int
    mmio_size: int
    mmio_write: int
    replay_count: int
    replay_next: int
    replay_rip: int
    replay_insn: int
    insn_len: int
    exclusive: int
    bus_lock_exits: int
    code_write_pass: int
    code_write_gpa: int
    code_write_size: int
    physmap: int
    physmap_top: int
    blocks: int
    blocks_mask: int
    records: int
    records_rip: int
    fault_context: int
    fault_record: int
    fault_count: int
    fault_gpa: int
    ring: int
    ring_mask: int
    ring_limit: int
    ring_index: int
    ring_reset: int
    ring_reserve: int
    table_write: int
    table_write_gpa: int
    watch_kinds: int
    watch_abort: int
    debug_hit: int
    untraced: int
    resume_rip: int
    count_tlb_fill: int
    count_lookup: int
    count_exception: int
    count_interrupt: int
    count_flush: int
    count_tlb_filled: int
    count_invlpg: int
    count_page_fault: int
    count_assist: int
    count_nested_run: int
    tlb_listed: int


def _locate(field: str) -> tuple[int, Any]:
    """Byte offset and ctypes type of a field of `State`."""
    name, _, rest = field.partition("[")
    kind: Any = {f[0]: f[1] for f in State._fields_}[name]
    offset = int(getattr(State, name).offset)
    if rest:
        index, _, member = rest.partition("]")
        kind = kind._type_
        offset += int(index) * ctypes.sizeof(kind)
        if member:
            offset += int(getattr(kind, member[1:]).offset)
            kind = {f[0]: f[1] for f in kind._fields_}[member[1:]]
    return offset, kind


def offset_of(field: str) -> int:
    """Byte offset of a field of `State`: `cr3`, `gpr[4]`, `seg[2].base`."""
    return _locate(field)[0]


def width_of(field: str) -> int:
    """Bits of a scalar field, named as for `offset_of`."""
    return 8 * ctypes.sizeof(_locate(field)[1])


ZERO = offset_of("zero") // 8  # the register number of the slot that is always 0
assert offset_of("bounce") < 1 << 16
