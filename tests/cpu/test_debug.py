"""Debug exceptions (SDM vol. 3, chapter 17): what traps, when, and what DR6 and RIP then say.

A row's text has labels; the trap must come at `1:`, which is where RIP then stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from anykvm.cpu.debug import DebugExit, Debugger
from anykvm.cpu.engine import Cpu, Exit

from . import flow_cases
from .assembler import assemble
from .harness import HANDLERS, MMIO, MODES, SYSTEM, Machine, machine
from .layout import SCRATCH, STACK, Case, Result

TF, RF = 1 << 8, 1 << 16
DR6, DR7 = 0xFFFF_0FF0, 0x400
B0, B1, B2, B3, BD, BS = 1, 2, 4, 8, 1 << 13, 1 << 14
DB, BP, UD = 1, 3, 6
EXECUTE, WRITE, PORT, ACCESS = range(4)  # R/W of DR7
LEN = {1: 0, 2: 1, 8: 2, 4: 3}
AT = SCRATCH + 0x100  # where data breakpoints look
DATA = {SCRATCH: bytes(range(1, 129)) * 4}


def dr7(n: int, kind: int, size: int = 1) -> int:
    """Breakpoint `n`, enabled globally."""
    return DR7 | 2 << 2 * n | (kind | LEN[size] << 2) << 16 + 4 * n


@dataclass
class Armed:
    """The machine with debug registers."""

    m: Machine

    @property
    def cpu(self) -> Cpu:
        return self.m.cpu

    def run(
        self,
        text: str,
        registers: dict[int, int] | None = None,
        control: int = DR7,
        *,
        mode: int | str = 64,
        user: bool = False,
        rflags: int = 2,
        port: int | None = None,
        **gpr: int,
    ) -> tuple[Result, int]:
        """The result, and how far RIP is from the code's beginning."""
        m, s = self.m, self.m.state
        case = Case(assemble(text, bits(mode)), gpr, rflags, memory=DATA)
        at = m.load(case, mode, user=user)
        start = s.rip
        for n, address in (registers or {}).items():
            s.dr[n] = start + address if address < 0x1000 else address
        s.dr6, s.dr7 = DR6, control
        if port is not None:
            s.dr[0] = port
        self.cpu.debug.changed()
        result = m.finish(case, at, mode, answer)
        return result, result.rip - start

    def offset(self, text: str, mode: int | str = 64) -> int:
        """Where the label 1 is."""
        before, after = text.split("1:")
        return len(assemble(before + after, bits(mode))) - len(assemble(after, bits(mode)))


def bits(mode: int | str) -> int:
    return 32 if mode == "compat" else int(mode)


def answer(m: Machine, reason: Exit) -> None:
    """Completes what a VMM completes."""
    cpu, s = m.cpu, m.state
    if reason is Exit.IO:
        cpu.complete_in(b"\x5a" * (s.io_size * s.io_count)) if s.io_in else cpu.complete_out()
    elif reason is Exit.MMIO:
        cpu.complete_mmio_write() if s.mmio_write else cpu.complete_mmio_read(bytes(s.mmio_size))
    elif reason is Exit.CPUID:
        cpu.complete_cpuid(1, 2, 3, 4)
    elif reason is Exit.RDMSR:
        cpu.complete_msr(5)
    else:
        assert reason is Exit.REQUEST, reason


@pytest.fixture
def armed() -> Iterator[Armed]:
    m = machine()
    yield Armed(m)
    m.cpu.debug.attach(Debugger())
    m.state.dr7 = DR7
    m.cpu.debug.reset()
    m.write(SCRATCH, bytes(0x2000))  # other tests find it empty
    m.write(0x20000, bytes(0x1000))


def plain(text: str) -> str:
    return text.replace("1:", "")


# Data breakpoints: text, kind, length, and whether it traps
ACCESSES = [
    ("nop; mov [rbx], al; 1: nop; nop", WRITE, 1),
    ("mov [rbx], rax; 1: nop", WRITE, 8),
    ("mov [rbx - 7], rax; 1: nop", WRITE, 1),
    ("mov [rbx + 7], al; 1: nop", WRITE, 8),
    ("mov [rbx + 3], ax; 1: nop", WRITE, 4),
    ("mov al, [rbx]; 1: nop", ACCESS, 1),
    ("add [rbx], eax; 1: nop", ACCESS, 4),
    ("add [rbx], eax; 1: nop", WRITE, 4),
    ("lock xadd [rbx], rax; 1: nop", WRITE, 2),
    ("xchg [rbx], ecx; 1: nop", WRITE, 2),
    ("cmpxchg [rbx], ecx; 1: nop", WRITE, 2),
    ("movups [rbx - 8], xmm0; 1: nop", WRITE, 8),
    ("movaps xmm0, [rbx]; 1: nop", ACCESS, 1),
    ("fld qword ptr [rbx]; 1: nop", ACCESS, 1),
    ("fxsave [rbx - 64]; 1: nop", WRITE, 1),
    ("lea rsp, [rbx + 8]; push rax; 1: nop", WRITE, 8),
    ("mov rsp, rbx; pop rax; 1: nop", ACCESS, 8),
    ("lea rsp, [rbx + 8]; call 2f; 1: 2: nop", WRITE, 8),
    ("mov rdi, rbx; stosd; 1: nop", WRITE, 4),
    ("mov rsi, rbx; lodsb; 1: nop", ACCESS, 1),
    ("mov rsi, rbx; lea rdi, [rbx + 32]; cmpsq; 1: nop", ACCESS, 1),
    ("mov rdi, rbx; scasw; 1: nop", ACCESS, 2),
    ("sgdt [rbx]; 1: nop", WRITE, 4),
    ("mov rax, rbx; bt [rbx], edx; 1: nop", ACCESS, 1),
    ("inc qword ptr [rbx]; 1: mov [rbx], rax", WRITE, 8),
]


@pytest.mark.parametrize(("text", "kind", "size"), ACCESSES, ids=[a[0] for a in ACCESSES])
def test_an_access_traps_after_its_instruction(
    armed: Armed, text: str, kind: int, size: int
) -> None:
    result, offset = armed.run(plain(text), {2: AT}, dr7(2, kind, size), rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (DB, DR6 | B2)
    assert offset == armed.offset(text)
    assert not armed.cpu.debug.pending


MISSES = [
    ("mov al, [rbx]", WRITE, 1),
    ("mov [rbx + 1], al; mov [rbx - 1], al", WRITE, 1),
    ("mov [rbx - 8], rax; mov [rbx + 8], rax", ACCESS, 8),
    ("lea rax, [rbx]; prefetcht0 [rbx]; nop dword ptr [rbx]", ACCESS, 8),
    ("mov [rbx + 4], eax", WRITE, 4),
    ("mov rcx, 0; mov rdi, rbx; rep stosb", WRITE, 8),
]


@pytest.mark.parametrize(("text", "kind", "size"), MISSES, ids=[m[0] for m in MISSES])
def test_other_accesses_do_not_trap(armed: Armed, text: str, kind: int, size: int) -> None:
    result, _ = armed.run(text, {1: AT}, dr7(1, kind, size), rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (None, DR6)


def test_an_address_is_aligned_to_its_length(armed: Armed) -> None:
    result, _ = armed.run("mov [rbx], al", {0: AT + 3}, dr7(0, WRITE, 4), rbx=AT)
    assert result.vector == DB


def test_two_breakpoints_at_once(armed: Armed) -> None:
    control = dr7(0, WRITE) | dr7(3, ACCESS, 8)
    result, _ = armed.run("mov [rbx], rax", {0: AT + 1, 3: AT}, control, rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (DB, DR6 | B0 | B3)


@pytest.mark.parametrize("mode", [64, "compat", 32, 16])
def test_rep_stops_after_the_turn_that_met_the_breakpoint(armed: Armed, mode: int | str) -> None:
    """RIP stays, RF is set on return, and the rest is done when it comes back."""
    address = 0x20000 + 0x100 if mode == 16 else AT
    base = 0x100 if mode == 16 else AT
    result, offset = armed.run(
        "rep stosb", {0: address + 5}, dr7(0, WRITE), mode=mode, rdi=base, rcx=20, rax=0x77
    )
    assert (result.vector, offset) == (DB, 0)
    assert (result.gpr["rcx"], result.gpr["rdi"]) == (14, base + 6)
    assert armed.m.read(address, 8) == b"\x77" * 6 + armed.m.read(address + 6, 2)


def test_the_last_turn_of_rep_ends_it(armed: Armed) -> None:
    result, offset = armed.run("rep stosb; nop", {0: AT + 3}, dr7(0, WRITE), rdi=AT, rcx=4)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 0, 2)


def test_a_faulting_instruction_does_not_trap(armed: Armed) -> None:
    """It accessed the watched byte before it faulted."""
    text = "push qword ptr [rbx]"
    result, _ = armed.run(text, {0: AT}, dr7(0, ACCESS), rbx=AT, rsp=0x1234_5678_0000_0000)
    assert (result.vector, armed.cpu.state.dr6) == (12, DR6)
    assert not armed.cpu.debug.pending


def test_a_breakpoint_costs_nothing_elsewhere(armed: Armed) -> None:
    """Only the watched page is out of the TLB: a loop on another one stays in native code."""
    runs = 0
    original = armed.cpu.enter

    def counting(native: Callable[..., int], *arguments: int) -> int:
        nonlocal runs
        runs += 1
        return original(native, *arguments)

    armed.cpu.enter = counting  # type: ignore[method-assign]
    try:
        text = "2: mov [rbx + rcx], al; dec ecx; jnz 2b"
        result, _ = armed.run(text, {0: AT}, dr7(0, WRITE), rbx=SCRATCH + 0x1000, rcx=4000)
    finally:
        del armed.cpu.enter
    assert result.vector is None
    assert runs < 20


def test_breakpoints_of_disabled_registers_are_silent(armed: Armed) -> None:
    result, _ = armed.run("mov [rbx], al", {0: AT}, DR7 | 0x1_0000, rbx=AT)
    assert result.vector is None


# Instruction breakpoints
def test_an_instruction_breakpoint_is_a_fault(armed: Armed) -> None:
    result, offset = armed.run("nop; inc eax; inc eax", {1: 1}, dr7(1, EXECUTE))
    assert (result.vector, offset, result.gpr["rax"]) == (DB, 1, 0)
    assert armed.cpu.state.dr6 == DR6 | B1


def test_iret_with_rf_goes_past_it_once(armed: Armed) -> None:
    """RF holds one instruction: the loop comes back to the breakpoint."""
    text = (
        "mov ax, ss; push rax; push r8; pushfq; or dword ptr [rsp + 2], 1; mov ax, cs; push rax;"
        "lea rax, [rip + 3f]; push rax; iretq; 3: inc ecx; jmp 3b"
    )
    at = len(assemble(text)) - len(assemble("3: inc ecx; jmp 3b"))
    result, offset = armed.run(text, {0: at}, dr7(0, EXECUTE), r8=STACK)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 1, at)


def test_rf_lasts_while_an_instruction_makes_its_mmio_access(armed: Armed) -> None:
    text = "mov eax, [rbx]; inc ecx"
    m = armed.m
    case = Case(assemble(text), {"rbx": MMIO}, memory=DATA)
    at = m.load(case)
    m.state.dr[0], m.state.dr7 = m.state.rip, dr7(0, EXECUTE)
    m.cpu.rflags = 2 | RF
    m.cpu.debug.changed()
    result = m.finish(case, at, 64, answer)
    assert (result.vector, result.gpr["rcx"]) == (None, 1)


# I/O breakpoints
PORTS = [
    ("in al, 0x60; 1: nop", 0x60, 1, B0),
    ("in eax, 0x5e; 1: nop", 0x60, 1, B0),
    ("out 0x61, al; 1: nop", 0x60, 2, B0),
    ("mov dx, 0x60; out dx, ax; 1: nop", 0x60, 4, B0),
    ("mov dx, 0x60; mov rdi, rbx; insb; 1: nop", 0x60, 1, B0),
    ("in al, 0x61", 0x60, 1, 0),
    ("out 0x5f, al", 0x60, 4, 0),
]


@pytest.mark.parametrize(("text", "port", "size", "hit"), PORTS, ids=[p[0] for p in PORTS])
def test_io_breakpoints(armed: Armed, text: str, port: int, size: int, hit: int) -> None:
    setup = "mov rax, cr4; or eax, 8; mov cr4, rax;"
    result, offset = armed.run(setup + plain(text), {}, dr7(0, PORT, size), port=port, rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (DB if hit else None, DR6 | hit)
    if hit:
        assert offset == armed.offset(setup + text)


def test_an_io_breakpoint_stops_each_turn_of_a_string(armed: Armed) -> None:
    text = "mov rax, cr4; or eax, 8; mov cr4, rax; mov dx, 0x60; rep insb"
    result, offset = armed.run(text, {}, dr7(0, PORT), port=0x60, rdi=AT, rcx=3)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 2, len(assemble(text)) - 2)
    assert armed.m.read(AT, 1) == b"\x5a"


def test_without_cr4_de_there_are_none(armed: Armed) -> None:
    result, _ = armed.run("in al, 0x60", {}, dr7(0, PORT), port=0x60)
    assert result.vector is None


# Single step
STEPS = [
    "nop; 1: nop",
    "mov eax, [rbx]; 1: nop",
    "jmp 2f; nop; 1: 2: nop",
    "out 0x61, al; 1: nop",
    "in al, 0x61; 1: nop",
    "cpuid; 1: nop",
    "rdmsr; 1: nop",
    "mov rdi, rbx; 1: insb",
    "push 2; 1: popfq",
    "str ax; 1: nop",
    "lock inc dword ptr [rbx + 0xefe]; 1: nop",
]


@pytest.mark.parametrize("text", STEPS)
def test_tf_traps_after_each_instruction(armed: Armed, text: str) -> None:
    result, offset = armed.run(plain(text), rflags=2 | TF, rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (DB, DR6 | BS)
    assert offset == armed.offset(text)
    assert result.rflags & TF


def test_popf_begins_and_ends_single_steps(armed: Armed) -> None:
    """The instruction that sets TF is not traced, the one that clears it is."""
    text = "push 0x102; popfq; nop; nop"
    for _ in range(3):
        result, offset = armed.run(text)
        assert (result.vector, offset) == (DB, len(assemble("push 0x102; popfq; nop")))
    result, offset = armed.run("popfq; nop", rflags=2 | TF, rsp=AT)
    assert (result.vector, offset) == (DB, 1)
    assert not result.rflags & TF


def test_a_step_is_one_turn_of_rep(armed: Armed) -> None:
    result, offset = armed.run("rep movsb", rflags=2 | TF, rcx=5, rsi=AT, rdi=AT + 64)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 4, 0)
    result, offset = armed.run("rep movsb; nop", rflags=2 | TF, rcx=1, rsi=AT, rdi=AT + 64)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 0, 2)
    result, offset = armed.run("repne scasb; nop", rflags=2 | TF, rcx=7, rdi=AT)
    assert (result.vector, result.gpr["rcx"], offset) == (DB, 6, 0)


def test_mov_ss_holds_traps_off_until_the_next_instruction(armed: Armed) -> None:
    """The step of MOV SS itself is lost, the data breakpoint that it met is not."""
    ss = MODES[64].data[0]
    text = "mov ss, ecx; nop; nop"
    result, offset = armed.run(text, rflags=2 | TF, rcx=ss)
    assert (result.vector, offset) == (DB, 3)
    armed.m.write(AT, ss.to_bytes(2, "little"))
    held = dict(DATA)
    held[SCRATCH] = held[SCRATCH][:256] + ss.to_bytes(2, "little")
    case = Case(assemble("mov ss, [rbx]; nop; nop"), {"rbx": AT}, memory=held)
    at = armed.m.load(case)
    armed.m.state.dr[0], armed.m.state.dr6, armed.m.state.dr7 = AT, DR6, dr7(0, ACCESS)
    armed.cpu.debug.changed()
    result = armed.m.finish(case, at)
    assert (result.vector, result.rip - at) == (DB, 3)
    assert armed.cpu.state.dr6 == DR6 | B0


@pytest.mark.parametrize("text", ["int 0x30", "int3", "int 0x30; nop"])
def test_a_gate_clears_tf_and_is_not_traced(armed: Armed, text: str) -> None:
    result, _ = armed.run(text, rflags=2 | TF)
    assert result.vector == (BP if text == "int3" else 0x30)
    assert armed.cpu.state.dr6 == DR6


def test_an_exception_comes_instead_of_the_step(armed: Armed) -> None:
    result, _ = armed.run("ud2", rflags=2 | TF)
    assert (result.vector, armed.cpu.state.dr6) == (UD, DR6)
    assert result.rflags & TF


# Others
def test_int1_is_a_trap_without_a_reason(armed: Armed) -> None:
    result, offset = armed.run(".byte 0xf1; nop")
    assert (result.vector, offset, armed.cpu.state.dr6) == (DB, 1, DR6)


def test_general_detect_is_a_fault_and_off_in_the_handler(armed: Armed) -> None:
    result, offset = armed.run("nop; mov rax, dr0", control=DR7 | 1 << 13)
    assert (result.vector, offset) == (DB, 1)
    assert (armed.cpu.state.dr6, armed.cpu.state.dr7) == (DR6 | BD, DR7)


def test_a_guest_sets_its_breakpoint_itself(armed: Armed) -> None:
    text = f"mov dr1, rbx; mov eax, {dr7(1, WRITE, 4)}; mov dr7, rax; mov [rbx], al; nop"
    result, offset = armed.run(text, rbx=AT)
    assert (result.vector, armed.cpu.state.dr6) == (DB, DR6 | B1)
    assert offset == len(assemble(text)) - 1


# A debugger outside
def stops(armed: Armed, text: str, count: int, debugger: Debugger, **gpr: int) -> list[DebugExit]:
    """Where the debugger is told of the guest."""
    m = armed.m
    at = m.load(Case(assemble(text), gpr, memory=DATA))
    armed.cpu.debug.attach(debugger)
    seen: list[DebugExit] = []
    while len(seen) < count:
        reason = armed.cpu.run()
        if reason is Exit.DEBUG:
            found = armed.cpu.debug.exit
            assert armed.cpu.state.dr6 == m.state.dr6
            seen.append(found._replace(pc=found.pc - at))
        else:
            answer(m, reason)
    return seen


def test_the_debuggers_step_is_each_instruction(armed: Armed) -> None:
    """Also MOV SS, POPF, a device access, each turn of REP; the guest sees no TF."""
    ss = MODES[64].data[0]
    text = "mov ss, ecx; pushfq; pop rax; out 0x61, al; cpuid; mov ecx, 2; rep stosb; nop"
    seen = stops(armed, text, 9, Debugger(single_step=True), rcx=ss, rdi=AT)
    assert [s.pc for s in seen] == [2, 3, 4, 6, 8, 13, 13, 15, 16]
    assert {(s.vector, s.dr6) for s in seen} == {(DB, BS)}
    assert not armed.m.read(STACK - 8, 2)[1] & 1
    assert armed.cpu.state.dr6 == 0


def test_a_step_into_a_handler_stops_there(armed: Armed) -> None:
    at = armed.m.place(assemble("ud2"))
    seen = stops(armed, "ud2", 1, Debugger(single_step=True))
    assert (seen[0].vector, seen[0].dr6) == (DB, BS)
    assert seen[0].pc + at == armed.cpu.state.rip > 1 << 47


def test_the_debuggers_registers_are_in_force_instead_of_the_guests(armed: Armed) -> None:
    text = "mov dr0, rbx; mov eax, 0x10402; mov dr7, rax; mov [rbx], al; mov [rbx + 1], al; nop"
    own = Debugger(registers=(AT + 1, 0, 0, 0, dr7(0, WRITE)))
    seen = stops(armed, text, 1, own, rbx=AT)
    assert seen == [DebugExit(DB, B0, dr7(0, WRITE), len(assemble(text)) - 1)]
    assert (armed.cpu.state.dr[0], armed.cpu.state.dr7) == (AT, 0x10402)


def test_int3_is_the_debuggers_where_it_wants_it(armed: Armed) -> None:
    seen = stops(armed, "nop; int3", 2, Debugger(breakpoints=True))
    assert [(s.vector, s.pc) for s in seen] == [(BP, 1), (BP, 1)]
    armed.cpu.inject_breakpoint()
    assert armed.cpu.run() is Exit.HLT
    assert armed.m.read(armed.cpu.state.gpr[4], 8) == (
        armed.m.place(assemble("nop; int3")) + 2
    ).to_bytes(8, "little")


def test_int1_and_general_detect_are_the_debuggers(armed: Armed) -> None:
    own = Debugger(registers=(0, 0, 0, 0, DR7 | 1 << 13))
    assert stops(armed, "nop; .byte 0xf1", 1, own)[0][:2] == (DB, 0)
    assert stops(armed, "nop; mov rax, dr3", 1, own) == [DebugExit(DB, BD, DR7 | 1 << 13, 1)]


def test_an_instruction_that_is_finished_later_counts_as_a_step(armed: Armed) -> None:
    m = armed.m
    at = m.load(Case(assemble("out 0x61, al; nop; nop")))
    assert armed.cpu.run() is Exit.IO
    armed.cpu.debug.attach(Debugger(single_step=True), finishing=True)
    armed.cpu.complete_out()
    assert armed.cpu.run() is Exit.DEBUG
    assert armed.cpu.debug.exit.pc == at + 2


# System calls
LSTAR = SYSTEM + HANDLERS + 16 * 0x77


@pytest.mark.parametrize(("fmask", "vector"), [(TF, 0x77), (0, DB)])
def test_syscall_is_traced_if_tf_is_left(armed: Armed, fmask: int, vector: int) -> None:
    m = armed.m
    case = Case(assemble("syscall"), {}, 2 | TF, memory=DATA)
    at = m.load(case, user=True)
    s = m.state
    s.lstar, s.star, s.fmask, s.dr6 = LSTAR, 8 << 32, fmask, DR6
    m.cpu.mode_changed()
    while m.cpu.run() is not Exit.HLT:
        pass
    assert (s.rip - SYSTEM - HANDLERS) // 16 == vector
    assert s.dr6 == (DR6 | BS if vector == DB else DR6)
    assert s.gpr[11] & TF
    assert s.gpr[1] == at + 2


def test_sysret_that_loads_tf_traps_before_the_next_instruction(armed: Armed) -> None:
    for _ in range(2):
        target = armed.m.place(assemble("inc eax; inc eax"))
        result, _ = armed.run("sysretq", r11=2 | TF, rcx=target)
        assert (result.vector, result.rip, result.gpr["rax"]) == (DB, target, 0)
        assert armed.cpu.state.dr6 == DR6 | BS


def test_the_debuggers_step_enters_a_system_call(armed: Armed) -> None:
    m = armed.m
    at = m.load(Case(assemble("syscall")), user=True)
    m.state.lstar, m.state.star, m.state.fmask = LSTAR, 8 << 32, TF
    armed.cpu.debug.attach(Debugger(single_step=True))
    assert armed.cpu.run() is Exit.DEBUG
    assert (m.state.rip, m.state.gpr[1], m.state.gpr[11] & TF) == (LSTAR, at + 2, 0)


# Debugged or not, a guest computes the same
MIDDLE = SCRATCH + 0x1000
WATCHED = (MIDDLE, MIDDLE + 8, SCRATCH + 0x800, STACK - 8, DR7 | 0xAA | 0xBBFB0000)
DEBUGGERS = {
    "steps": lambda at: Debugger(single_step=True),
    "watches": lambda at: Debugger(registers=WATCHED),
    "breaks": lambda at: Debugger(registers=(at ^ 0x800, 0, 0, 0, DR7 | 2)),
}


def undisturbed(m: Machine, reason: Exit) -> None:
    assert reason in (Exit.DEBUG, Exit.REQUEST), reason


@pytest.mark.parametrize("how", DEBUGGERS)
@pytest.mark.parametrize("family", flow_cases.FAMILIES)
def test_a_debugger_changes_nothing(armed: Armed, family: str, how: str) -> None:
    m = armed.m
    for name, case in list(flow_cases.FAMILIES[family](1))[::3]:
        armed.cpu.debug.attach(Debugger())
        expected = m.execute(case, user=True, exits=undisturbed)
        at = m.place(case.code)
        armed.cpu.debug.attach(DEBUGGERS[how](at))
        assert m.execute(case, user=True, exits=undisturbed) == expected, name
