"""Interrupt windows, shadows and kicks: exactly when, and never lost. Several vCPUs on one
engine.
"""

from __future__ import annotations

import ctypes
import random
import threading
import time

import pytest

from anykvm.cpu.debug import Debugger
from anykvm.cpu.engine import Cpu, Exit

from .assembler import assemble
from .harness import FIXED, HANDLERS, MODES, SYSTEM, machine
from .layout import SCRATCH, STACK, Case

IF = 1 << 9
KICKS = 1000


def _start(text: str, rflags: int = 2, **gpr: int) -> tuple[Cpu, int]:
    m = machine()
    at = m.load(Case(assemble(text), gpr, rflags))
    return m.cpu, at


def _offset(cpu: Cpu, at: int) -> int:
    return cpu.state.rip - at


SS = MODES[64].data[0]
WINDOWS = [
    ("sti; nop; nop; nop", 2),
    ("cli; sti; nop; nop", 3),
    ("nop; sti; inc rax; nop; nop", 5),
    ("sti; mov ss, ebx; nop; nop", 4),
    ("mov ss, ebx; sti; nop; nop", 4),
    ("push 0x202; popfq; nop; nop", 6),
    ("sti; cli; nop; nop; sti; nop; nop", 6),
    ("sti; jmp 1f; nop; 1: nop; nop", 4),
    ("sti; hlt; nop", 2),
    ("sti; sti; nop; nop", 2),
]


@pytest.mark.parametrize(("text", "offset"), WINDOWS, ids=[w[0] for w in WINDOWS])
def test_the_window_opens_at_the_right_instruction(text: str, offset: int) -> None:
    """STI and MOV SS hold interrupts off until the next instruction is done; POPF does not."""
    cpu, at = _start(text, rbx=SS)
    cpu.pending_interrupt(True)
    reason = cpu.run()
    if "hlt" in text:
        assert reason is Exit.HLT
        assert cpu.can_take_interrupt()
        reason = cpu.run()
    assert (reason, _offset(cpu, at)) == (Exit.IRQ_WINDOW, offset)
    assert cpu.can_take_interrupt()


def test_no_window_while_interrupts_are_off() -> None:
    cpu, at = _start("nop; sti; cli; nop; pushfq; pop rax")
    cpu.pending_interrupt(True)
    assert cpu.run() is Exit.HLT
    assert _offset(cpu, at) == len(assemble("nop; sti; cli; nop; pushfq; pop rax")) + 1


def test_a_window_at_once_where_interrupts_are_on() -> None:
    cpu, at = _start("nop; nop", 0x202)
    cpu.pending_interrupt(True)
    assert (cpu.run(), _offset(cpu, at)) == (Exit.IRQ_WINDOW, 0)


def test_mov_ss_holds_off_an_interrupt_that_comes_in_between() -> None:
    """Single steps through `mov ss`; the state at its end says that an interrupt must wait."""
    cpu, at = _start("mov ss, ebx; nop; nop", 0x202, rbx=SS)
    cpu.debug.attach(Debugger(single_step=True))
    try:
        seen = []
        for _ in range(3):
            assert cpu.run() is Exit.DEBUG
            seen.append((_offset(cpu, at), cpu.can_take_interrupt()))
    finally:
        cpu.debug.attach(Debugger())
    assert seen == [(2, False), (3, True), (4, True)]


@pytest.mark.parametrize("vector", [0x20, 0x40, 0xFF])
def test_injection_goes_through_the_idt_and_iret_comes_back(vector: int) -> None:
    m = machine()
    code = assemble("sti; nop; inc rax; inc rax")
    cpu, at = _start("sti; nop; inc rax; inc rax", rsp=STACK)
    cpu.pending_interrupt(True)
    assert cpu.run() is Exit.IRQ_WINDOW
    cpu.pending_interrupt(False)
    cpu.inject_interrupt(vector)
    assert cpu.state.rip == SYSTEM + HANDLERS + 16 * vector
    assert not cpu.rflags & IF
    frame = m.read(cpu.state.gpr[4], 40)
    words = [int.from_bytes(frame[n : n + 8], "little") for n in range(0, 40, 8)]
    assert (words[0], words[2] & IF, words[3]) == (at + 2, IF, STACK)
    m.write(HANDLERS + 16 * vector, assemble("iretq"))
    m.engine.code_written(HANDLERS + 16 * vector, 2)
    try:
        assert cpu.run() is Exit.HLT
    finally:
        m.write(HANDLERS + 16 * vector, b"\xf4\xf4")
        m.engine.code_written(HANDLERS + 16 * vector, 2)
    assert (cpu.state.gpr[0], cpu.state.gpr[4]) == (2, STACK)
    assert _offset(cpu, at) == len(code) + 1
    assert cpu.rflags & IF


def test_an_nmi_blocks_others_until_iret() -> None:
    cpu, _ = _start("nop; nop", rsp=STACK)
    cpu.inject_nmi()
    assert cpu.state.nmi_blocked
    assert cpu.state.rip == SYSTEM + HANDLERS + 32


# Kicks

LOOPS = [
    "1: jmp 1b",
    "1: inc rax; jmp 1b",
    "1: dec rax; jnz 1b; jmp 1b",
    "1: call 2f; jmp 1b; 2: ret",
    "lea rbx, [rip]; jmp rbx",
    "1: mov rcx, 100000000; rep lodsb; jmp 1b",
    "1: mov ecx, 1000; 2: loop 2b; push rax; popfq; jmp 1b",
]


@pytest.mark.parametrize("text", LOOPS)
def test_every_kick_arrives(text: str) -> None:
    """From another thread, at random moments, whether the vCPU runs at that moment or not."""
    cpu, _ = _start(text, rsi=SCRATCH, rax=2)
    kicks = KICKS // len(LOOPS)
    ready = threading.Semaphore(0)
    rng = random.Random(text)

    def kick() -> None:
        for _ in range(kicks):
            ready.acquire()
            time.sleep(rng.choice((0, 0, 1e-5, 1e-4, 3e-4)))
            cpu.request_exit()

    thread = threading.Thread(target=kick, daemon=True)
    thread.start()
    for _ in range(kicks):
        ready.release()
        while (reason := cpu.run()) is Exit.HLT:  # LODS ran off its memory
            machine().load(Case(assemble(text), {"rsi": SCRATCH}))
        assert reason is Exit.REQUEST
    thread.join(10)
    assert not thread.is_alive()


def test_a_kick_before_run_returns_at_once() -> None:
    cpu, at = _start("nop; nop")
    cpu.request_exit()
    assert (cpu.run(), _offset(cpu, at)) == (Exit.REQUEST, 0)
    assert cpu.run() is Exit.HLT


@pytest.mark.parametrize("text", ["std; rep movsb", "rep stosw", "repe cmpsb", "repne scasb"])
def test_kicks_in_the_middle_of_a_string_change_nothing(text: str) -> None:
    """Again and again while it runs: the outcome is that of an undisturbed run."""
    m = machine()
    backward = text.startswith("std")
    source, target, size = SCRATCH + 0x1000, SCRATCH + 0x6000, 0x4000
    start = size - 1 if backward else 0
    gpr = {"rsi": source + start, "rdi": target + start, "rcx": size >> ("w" in text), "rax": 0x41}
    memory = {source: bytes(size), target: bytes(size)}
    turns = 5000 if "stos" in text else 200
    case = Case(
        assemble(
            f"mov rbx, {turns}; 2: mov r8, rsi; mov r9, rdi; mov r10, rcx; {text};"
            " mov rsi, r8; mov rdi, r9; mov rcx, r10; dec rbx; jnz 2b"
        ),
        gpr,
        memory=memory,
    )
    expected = m.execute(case)
    at = m.load(case)
    over = threading.Event()

    def kick() -> None:
        while not over.wait(2e-5):
            m.cpu.request_exit()

    thread = threading.Thread(target=kick, daemon=True)
    thread.start()
    kicks = 0
    while (reason := m.cpu.run()) is Exit.REQUEST:
        kicks += 1
    over.set()
    thread.join()
    assert reason is Exit.HLT
    assert kicks > 2
    m.cpu.state.exit_request = 0
    m.cpu._requested = False
    assert m._result(case, at + len(case.code), 64) == expected


def test_an_interrupt_that_becomes_pending_while_running() -> None:
    """Raised and kicked from another thread: the next run returns the window."""
    cpu, _ = _start("1: jmp 1b", 0x202)

    def raise_interrupt() -> None:
        time.sleep(0.01)
        cpu.pending_interrupt(True)
        cpu.request_exit()

    thread = threading.Thread(target=raise_interrupt, daemon=True)
    thread.start()
    assert cpu.run() is Exit.REQUEST
    thread.join()
    assert cpu.run() is Exit.IRQ_WINDOW


# Several vCPUs

COUNTED = 300_000
ATOMICS = {
    "lock inc qword ptr [rsi]": (0, COUNTED * 2),
    "lock add dword ptr [rsi+1], 3": (1, COUNTED * 6),
    "mov eax, 1; lock xadd [rsi], rax": (0, COUNTED * 2),
    "lock dec word ptr [rsi]": (0, -COUNTED * 2),
    "2: mov rax, [rsi]; lea rbx, [rax+1]; lock cmpxchg [rsi], rbx; jnz 2b": (0, COUNTED * 2),
    "2: mov eax, 1; xchg [rsi+8], eax; test eax, eax; jnz 2b; inc qword ptr [rsi];"
    " mov dword ptr [rsi+8], 0":
        (0, COUNTED * 2),
    "2: mov rax, [rsi]; mov rdx, [rsi+8]; lea rbx, [rax+1]; mov r8, rcx; lea rcx, [rdx+1];"
    " lock cmpxchg16b [rsi]; mov rcx, r8; jnz 2b": (8, COUNTED * 2),
}  # fmt: skip
_second: list[Cpu] = []


def _twin() -> Cpu:
    """A second vCPU of the same engine, in the state of the first."""
    m = machine()
    if not _second:
        _second.append(m.engine.create_cpu(1))
    cpu = _second[0]
    key = cpu.state.jump_key
    ctypes.memmove(cpu.address, m.cpu.address, FIXED)
    cpu.state.jump_key = key + (1 << 32)
    cpu.flush_tlb()
    return cpu


def _run_together(*cpus: Cpu) -> None:
    """Each on a thread of its own, until all have halted."""
    ended: list[Exit] = []
    threads = [
        threading.Thread(target=lambda cpu=cpu: ended.append(cpu.run()), daemon=True)
        for cpu in cpus
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert ended == [Exit.HLT] * len(cpus)


@pytest.mark.parametrize("text", ATOMICS, ids=[t.split(";")[-1] for t in ATOMICS])
def test_locked_instructions_are_atomic_between_vcpus(text: str) -> None:
    at, expected = ATOMICS[text]
    size = 2 if "word" in text.split() else 4 if "dword" in text.split()[:3] else 8
    counter = SCRATCH + 0x40
    loop = f"mov ecx, {COUNTED}; 1: {text}; dec ecx; jnz 1b"
    first, _ = _start(loop, rsi=counter)
    second = _twin()
    machine().write(counter, bytes(24))
    _run_together(first, second)
    total = int.from_bytes(machine().read(counter + at, size), "little")
    assert total == expected & (1 << 8 * size) - 1


@pytest.mark.parametrize(
    "text",
    ["lock inc qword ptr [rsi]", "mov eax, 1; lock xadd [rsi], rax", "lock dec qword ptr [rsi]"],
)
def test_locked_instructions_across_pages_are_atomic(text: str) -> None:
    """Two pages, so no host instruction can do it: the other vCPU is held."""
    turns = 300
    counter = SCRATCH + 0x2000 - 3
    first, _ = _start(f"mov ecx, {turns}; 1: {text}; dec ecx; jnz 1b", rsi=counter)
    second = _twin()
    machine().write(counter, bytes(8))
    _run_together(first, second)
    expected = 2 * turns * (-1 if "dec" in text else 1)
    assert int.from_bytes(machine().read(counter, 8), "little", signed=True) == expected


def test_code_changed_by_one_vcpu_is_seen_by_the_other() -> None:
    """The second turns until the first rewrites the jump that it turns in."""
    m = machine()
    at = SCRATCH + 0xA000
    m.write(at, assemble("1: inc rax; jmp 1b; nop; hlt"))
    m.load(Case(assemble("jmp rbx"), {"rbx": at}))
    second = _twin()
    ended: list[Exit] = []
    thread = threading.Thread(target=lambda: ended.append(second.run()), daemon=True)
    thread.start()
    time.sleep(0.02)
    cpu, _ = _start("mov word ptr [rbx], 0x9090", rbx=at + 3)
    assert cpu.run() is Exit.HLT
    thread.join(10)
    assert ended == [Exit.HLT]
