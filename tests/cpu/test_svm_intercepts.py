"""Every intercept of SVM's that an instruction or an exception can lead to: with its bit L1 gets
the exit, with RIP at the instruction; without it L2 never leaves for it (AMD APM vol. 2, 15.9 to
15.12).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from anykvm.cpu.engine import Exit
from anykvm.cpu.vmcb import SvmExit, Vmcb

from .assembler import assemble
from .harness import GDT, IDT32, TSS64, machine
from .layout import SCRATCH, Case
from .svm_machine import IOPM, MSRPM, Outcome, leave, prepare, proceed, run

X = SvmExit
DATA = SCRATCH + 0x100
UNMAPPED = SCRATCH - 0x1000
PROLOGUE = "nop; "  # so that RIP says something


class Row(NamedTuple):
    """An instruction, the exit it leads to, and the machine it needs."""

    text: str
    exit: int
    info: tuple[int, int] = (0, 0)
    mode: int | str = 64
    user: bool = False


def _moves(kind: str, numbers: tuple[int, ...], read: int, write: int) -> list[Row]:
    rows = [Row(f"mov rax, {kind}{n}", read + n) for n in numbers]
    return rows + [Row(f"mov {kind}{n}, rdx", write + n) for n in numbers]


INSTRUCTIONS = [
    *_moves("cr", (0, 2, 3, 4, 8), X.READ_CR0, X.WRITE_CR0),
    *_moves("dr", (0, 1, 2, 3, 6, 7), X.READ_DR0, X.WRITE_DR0),
    Row("clts", X.WRITE_CR0),
    Row("lmsw bp", X.WRITE_CR0),
    Row("smsw eax", X.READ_CR0),
    Row("mov cr0, rcx", X.CR0_SEL_WRITE),
    Row("lmsw bp", X.CR0_SEL_WRITE),
    Row("sidt [rbx]", X.IDTR_READ),
    Row("sgdt [rbx]", X.GDTR_READ),
    Row("sldt eax", X.LDTR_READ),
    Row("str eax", X.TR_READ),
    Row("lidt [rbx]", X.IDTR_WRITE),
    Row("lgdt [rbx]", X.GDTR_WRITE),
    Row("lldt si", X.LDTR_WRITE),
    Row("ltr si", X.TR_WRITE),
    Row("rdtsc", X.RDTSC),
    Row("rdtscp", X.RDTSCP),
    Row("rdpmc", X.RDPMC),
    Row("pushfq", X.PUSHF),
    Row("popfq", X.POPF),
    Row("cpuid", X.CPUID),
    Row("rsm", X.RSM),
    Row("iretq", X.IRET),
    Row("int 0x40", X.SWINT),
    Row(".byte 0xf1", X.ICEBP),
    Row("invd", X.INVD),
    Row("wbinvd", X.WBINVD),
    Row("pause", X.PAUSE),
    Row("hlt", X.HLT),
    Row("invlpg [rbx]", X.INVLPG),
    Row(".byte 0x0f,0x01,0xdf", X.INVLPGA),
    Row(".byte 0x0f,0x01,0xd8", X.VMRUN),
    Row(".byte 0x0f,0x01,0xd9", X.VMMCALL),
    Row(".byte 0x0f,0x01,0xda", X.VMLOAD),
    Row(".byte 0x0f,0x01,0xdb", X.VMSAVE),
    Row(".byte 0x0f,0x01,0xdc", X.STGI),
    Row(".byte 0x0f,0x01,0xdd", X.CLGI),
    Row("monitor", X.MONITOR),
    Row("mwait", X.MWAIT),
    Row("xsetbv", X.XSETBV),
]
EXCEPTIONS = [
    Row("div rsi", X.EXCP_BASE + 0),
    Row(".byte 0xf1", X.EXCP_BASE + 1),
    Row("int3", X.EXCP_BASE + 3),
    Row("sub al, 0x80; sub al, 1; into", X.EXCP_BASE + 4, mode=32),
    Row("mov eax, 9; bound eax, [ebx]", X.EXCP_BASE + 5, mode=32),
    Row("ud2", X.EXCP_BASE + 6),
    Row("mov rax, cr0; or al, 8; mov cr0, rax; fninit", X.EXCP_BASE + 7),
    Row("mov ax, 0x77; mov ds, ax", X.EXCP_BASE + 13, (0x74, 0)),
    Row("mov rax, 0x8000000000000000; push rax; pop rsp; pop rax", X.EXCP_BASE + 12),
    Row("mov edi, 0x1ffff000; mov [rdi], al", X.EXCP_BASE + 14, (2, UNMAPPED)),
]
GPR = {"rbx": DATA, "rdx": 0, "rcx": 0x1_0001_0033 & 0xFFFF_FFFF, "rbp": 0x37}


def _case(row: Row) -> Case:
    bits = row.mode if isinstance(row.mode, int) else 32
    return Case(assemble(PROLOGUE + row.text, bits), GPR)


def _last(row: Row) -> int:
    """Offset of the row's last instruction."""
    before = (PROLOGUE + row.text).rpartition(";")[0]
    bits = row.mode if isinstance(row.mode, int) else 32
    return len(assemble(before, bits))


def _name(row: Row) -> str:
    return f"{row.text}-{row.exit:#x}"


@pytest.mark.parametrize("row", INSTRUCTIONS, ids=_name)
def test_an_instruction_is_intercepted(row: Row) -> None:
    outcome = run(_case(row), row.exit, mode=row.mode)
    assert (outcome.exit_code, outcome.info) == (row.exit, row.info)
    assert outcome.save.rip == outcome.at + _last(row)
    assert outcome.control.next_rip == outcome.at + len(_case(row).code)
    assert outcome.control.exit_int_info == 0


OTHERS = [row for row in INSTRUCTIONS if row.exit not in (X.HLT, X.VMRUN)]


@pytest.mark.parametrize("row", OTHERS, ids=_name)
def test_without_its_bit_it_is_not(row: Row) -> None:
    """It is executed, faults, or leaves for the caller as it would in L1."""
    outcome = run(_case(row), mode=row.mode)
    left = outcome.reason is not Exit.HLT
    assert left or outcome.exit_code == X.HLT


@pytest.mark.parametrize("row", EXCEPTIONS, ids=_name)
def test_an_exception_is_intercepted(row: Row) -> None:
    """CR2 stays as it was, and no frame is pushed."""
    outcome = run(_case(row), row.exit, mode=row.mode)
    assert (outcome.exit_code, outcome.info) == (row.exit, row.info)
    assert outcome.save.rip == outcome.at + _last(row)
    assert outcome.save.cr2 == 0


@pytest.mark.parametrize("row", EXCEPTIONS, ids=_name)
def test_an_exception_of_another_vector_is_delivered_to_l2(row: Row) -> None:
    """The handlers of the test machine halt."""
    everything = {X.EXCP_BASE + n for n in range(32)} - {row.exit}
    outcome = run(_case(row), *everything, mode=row.mode)
    assert outcome.exit_code == X.HLT


def test_faults_come_before_the_intercept() -> None:
    """Of what only CPL 0 may do, #GP; CPUID and PAUSE come first at any level."""
    for text in ("hlt", "rdmsr", "mov rax, cr0", "invd", "lgdt [rbx]"):
        outcome = run(Case(assemble(text), GPR), *range(0x100 >> 1), X.HLT, user=True)
        assert outcome.exit_code == X.EXCP_BASE + 13, text
    assert run("cpuid", X.CPUID, user=True).exit_code == X.CPUID


def test_ts_and_mp_are_not_selected() -> None:
    """A write of CR0 that changes no other bit is only intercepted by the bit for all writes."""
    text = "mov rax, cr0; xor al, 10; mov cr0, rax"
    assert run(text, X.CR0_SEL_WRITE).exit_code == X.HLT
    assert run(text, X.CR0_SEL_WRITE, X.WRITE_CR0).exit_code == X.WRITE_CR0


# Permission maps.


def _with_map(text: str, exit_: int, at: int, byte: int, **gpr: int) -> Outcome:
    m, code = prepare(Case(assemble(text), gpr), (exit_,))
    m.write(at, bytes([byte]))
    return proceed(m, code)


IN, STRING, REP, A64, A32 = 1, 4, 8, 1 << 9, 1 << 8
PORTS = [
    ("in al, 0x71", 0x71, 1, IN | 1 << 4 | A64, {}),
    ("out 0x71, al", 0x71, 1, 1 << 4 | A64, {}),
    ("in ax, dx", 0x1234, 2, IN | 2 << 4 | A64, {"rdx": 0x1234}),
    ("out dx, eax", 0xFFFC, 4, 4 << 4 | A64, {"rdx": 0xFFFC}),
    ("rep insb", 0x60, 1, IN | STRING | REP | 1 << 4 | A64, {"rdx": 0x60, "rcx": 3, "rdi": DATA}),
    ("outsw", 0x60, 2, STRING | 2 << 4 | A64, {"rdx": 0x60, "rsi": DATA}),
]


@pytest.mark.parametrize(("text", "port", "size", "info", "gpr"), PORTS, ids=[p[0] for p in PORTS])
def test_ports_by_their_map(
    text: str, port: int, size: int, info: int, gpr: dict[str, int]
) -> None:
    """Any port of the access counts; EXITINFO2 is the next instruction."""
    last = port + size - 1
    outcome = _with_map(text, X.IOIO, IOPM + last // 8, 1 << last % 8, **gpr)
    assert outcome.exit_code == X.IOIO
    assert outcome.info == (port << 16 | info, outcome.at + len(assemble(text)))
    others = 0xFF & ~(1 << last % 8) if size == 1 else 0
    free = _with_map(text, X.IOIO, IOPM + last // 8, others, **gpr)
    assert free.reason is Exit.IO
    assert machine().state.io_port == port


MSRS = [(0x10, 4), (0x1FFF, 0x7FF), (0xC0000080, 0x820), (0xC0010117, 0x1045)]


@pytest.mark.parametrize(("msr", "place"), MSRS)
@pytest.mark.parametrize("write", [0, 1])
def test_msrs_by_their_map(msr: int, place: int, write: int) -> None:
    """Two bits a register: reads, writes."""
    text, leaves = ("wrmsr", Exit.WRMSR) if write else ("rdmsr", Exit.RDMSR)
    bit = 1 << (2 * (msr & 3) + write)
    outcome = _with_map(text, X.MSR, MSRPM + place, bit, rcx=msr)
    assert (outcome.exit_code, outcome.info) == (X.MSR, (write, 0))
    assert _with_map(text, X.MSR, MSRPM + place, 0xFF & ~bit, rcx=msr).reason is leaves
    assert _with_map(text, X.MSR, MSRPM, 0, rcx=0x4000_0000).exit_code == X.MSR


def test_permission_maps_beyond_memory_intercept_everything() -> None:
    def nowhere(vmcb: Vmcb) -> None:
        vmcb.control.iopm_base_pa = vmcb.control.msrpm_base_pa = 1 << 40

    assert run("in al, 0x10", X.IOIO, change=nowhere).exit_code == X.IOIO
    assert run("rdmsr", X.MSR, change=nowhere).exit_code == X.MSR


# Task switches.

TSS, GATE, LINK = 0x48, 0x50, 0x1234
IRET_REASON, JMP_REASON, HAS_ERROR = 1 << 36, 1 << 38, 1 << 44
TASKS = [
    ("ljmp 0x48, 0", {}, (TSS, JMP_REASON), 0),
    ("lcall 0x48, 0", {}, (TSS, 0), 0),
    ("ljmp 0x50, 0", {}, (TSS, JMP_REASON), 0),
    ("push 0x4002; popfd; iretd", {}, (LINK, IRET_REASON), 0),
    ("nop", {"event_inj": 0x80000B0C, "event_inj_err": 0x70}, (TSS, HAS_ERROR | 0x70), 0x80000B0C),
]


@pytest.mark.parametrize(("text", "fields", "info", "during"), TASKS, ids=[t[0] for t in TASKS])
def test_task_switches_are_l1s(
    text: str, fields: dict[str, int], info: tuple[int, int], during: int
) -> None:
    """By a jump, a call, a task gate, the link of a nested task, or an event through a gate."""

    def change(vmcb: Vmcb) -> None:
        vmcb.save.gdtr.limit = GATE + 7
        for name, value in fields.items():
            setattr(vmcb.control, name, value)

    m, at = prepare(text, (X.TASK_SWITCH,), mode=32, change=change)
    task_gate = (0x85 << 40 | TSS << 16).to_bytes(8, "little")
    before = m.read(GDT + TSS, 16), m.read(IDT32 + 8 * 12, 8), m.read(TSS64, 2)
    m.write(GDT + TSS, (0x89 << 40 | TSS64 << 16 | 0x67).to_bytes(8, "little") + task_gate)
    m.write(IDT32 + 8 * 12, task_gate)
    m.write(TSS64, LINK.to_bytes(2, "little"))
    outcome = proceed(m, at)
    for place, data in zip((GDT + TSS, IDT32 + 8 * 12, TSS64), before, strict=True):
        m.write(place, data)
    assert (outcome.exit_code, outcome.info) == (X.TASK_SWITCH, info)
    assert outcome.control.exit_int_info == during


# What is not intercepted and leaves for the caller.


def test_a_port_that_l1_leaves_to_the_vmm() -> None:
    m, at = prepare("in al, 0x55; add al, 1; out 0x56, al")
    assert leave(m) is Exit.IO
    m.cpu.complete_in(b"\x41")
    assert m.cpu.run() is Exit.IO
    assert (m.cpu.svm.guest_mode, m.cpu.io_data) == (True, b"\x42")
    m.cpu.complete_out()
    assert proceed(m, at).exit_code == X.HLT


def test_a_device_that_l1_leaves_to_the_vmm() -> None:
    m, at = prepare("mov ebx, 0xd0000000; mov eax, [rbx]; mov [rbx + 8], rax")
    assert (leave(m), m.state.mmio_gpa, m.state.mmio_write) == (Exit.MMIO, 0xD000_0000, 0)
    m.cpu.complete_mmio_read(b"\x78\x56\x34\x12")
    assert m.cpu.run() is Exit.MMIO
    assert (m.state.mmio_data, m.state.mmio_write) == (0x12345678, 1)
    m.cpu.complete_mmio_write()
    assert proceed(m, at).save.rax == 0x12345678
