"""The host's own processor, ring 3, as the reference: executes the same code from the same state
as the test machine.

A child process (native_worker.py) maps code, scratch memory and a context block at fixed low
addresses, so the trampoline reaches the context without a base register and can load every
register there is.
"""

from __future__ import annotations

import functools
import select
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, cast

from .assembler import assemble
from .layout import (
    CODE,
    CODE_SIZE,
    GPRS,
    SCRATCH,
    SCRATCH_SIZE,
    WITH_ERROR,
    Case,
    Placement,
    Result,
    fxsave_image,
    x87_of,
    xmm_of,
)
from .native_worker import receive, send

TRAMPOLINE, HANDLER, CONTEXT = 0x1F3A_5000, 0x1F3A_5800, 0x1F3A_6000
# The context: what goes in, what comes out, what the trampoline keeps
FX_IN, GPR_IN, FLAGS_IN, TARGET = 0, 512, 640, 648
FX_OUT, GPR_OUT, FLAGS_OUT, RIP, TRAP, ERROR, CR2, SIGNAL = (
    1024, 1536, 1664, 1672, 1680, 1688, 1696, 1704,
)  # fmt: skip
OUT_SIZE = 688
HOST_FX, HOST_RSP = 2048, 2560
OUT_FORMAT = struct.Struct("<512s16Q6Q")
# Order of the registers in a signal frame's mcontext (asm/sigcontext.h), from its 40th byte on
MCONTEXT = "r8 r9 r10 r11 r12 r13 r14 r15 rdi rsi rbp rbx rdx rax rcx rsp".split()
MCONTEXT_AFTER = {RIP: 16, FLAGS_OUT: 17, ERROR: 19, TRAP: 20, CR2: 22}
SECONDS = 60


def _slot(offset: int) -> str:
    return f"qword ptr [{CONTEXT + offset:#x}]"


def _fx(offset: int) -> str:
    return f"byte ptr [{CONTEXT + offset:#x}]"


def _enter_text() -> list[str]:
    """Loads everything and jumps to the code, whose end jumps to what stores everything."""
    saved = "rbx rbp r12 r13 r14 r15".split()
    lines = [f"push {r}" for r in saved]
    lines += [f"mov {_slot(HOST_RSP)}, rsp", f"fxsave64 {_fx(HOST_FX)}", f"fxrstor64 {_fx(FX_IN)}"]
    lines += [f"mov rsp, {CONTEXT + FLAGS_IN:#x}", "popfq"]
    lines += [f"mov {r}, {_slot(GPR_IN + 8 * n)}" for n, r in enumerate(GPRS)]
    return [*lines, f"jmp {_slot(TARGET)}"]


def _leave_text() -> list[str]:
    lines = [f"mov {_slot(GPR_OUT + 8 * 4)}, rsp"]
    lines += [f"mov rsp, {CONTEXT + FLAGS_OUT + 8:#x}", "pushfq"]
    lines += [f"mov {_slot(GPR_OUT + 8 * n)}, {r}" for n, r in enumerate(GPRS) if r != "rsp"]
    lines += [f"fxsave64 {_fx(FX_OUT)}", f"mov {_slot(SIGNAL)}, 0"]
    return lines + _return_text()


def _return_text() -> list[str]:
    saved = "rbx rbp r12 r13 r14 r15".split()
    lines = [f"fxrstor64 {_fx(HOST_FX)}", f"mov rsp, {_slot(HOST_RSP)}", "push 0x202", "popfq"]
    return [*lines, *(f"pop {r}" for r in reversed(saved)), "ret"]


def _handler_text() -> list[str]:
    """void handler(int signal, siginfo_t *, ucontext_t *): returns to the trampoline's caller."""
    lines = [f"mov {_slot(SIGNAL)}, rdi"]
    for n, register in enumerate(MCONTEXT):
        target = GPR_OUT + 8 * GPRS.index(register)
        lines += [f"mov rax, [rdx + {40 + 8 * n}]", f"mov {_slot(target)}, rax"]
    for target, n in MCONTEXT_AFTER.items():
        lines += [f"mov rax, [rdx + {40 + 8 * n}]", f"mov {_slot(target)}, rax"]
    lines += [f"mov rsi, [rdx + {40 + 8 * 23}]", f"mov edi, {CONTEXT + FX_OUT:#x}"]
    return [*lines, "mov ecx, 64", "cld", "rep movsq", *_return_text()]


@functools.cache
def _trampoline() -> tuple[bytes, bytes, int]:
    """Entry, handler, and the offset of the part that stores everything."""
    enter, leave = (assemble(";".join(t)) for t in (_enter_text(), _leave_text()))
    handler = assemble(";".join(_handler_text()))
    assert len(enter) + len(leave) <= HANDLER - TRAMPOLINE
    assert len(handler) <= CONTEXT - HANDLER
    return enter + leave, handler, len(enter)


class Native:
    """The host's processor. `close` ends the child process."""

    def __init__(self) -> None:
        self._placement = Placement(CODE, CODE_SIZE)
        code, handler, leave = _trampoline()
        self._leave = TRAMPOLINE + leave
        self._process = self._start(code, handler)

    def _start(self, code: bytes, handler: bytes) -> subprocess.Popen[bytes]:
        script = str(Path(__file__).with_name("native_worker.py"))
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        setup = {
            "maps": [
                (TRAMPOLINE, 0x2000, True),
                (CODE, CODE_SIZE, True),
                (SCRATCH, SCRATCH_SIZE, False),
            ],
            "data": [(TRAMPOLINE, code), (HANDLER, handler), (CODE, b"\xcc" * CODE_SIZE)],
            "enter": TRAMPOLINE,
            "handler": HANDLER,
            "given": CONTEXT,
            "taken": CONTEXT + FX_OUT,
            "size": OUT_SIZE,
        }
        send(cast(BinaryIO, process.stdin), setup)
        return process

    def place(self, code: bytes) -> tuple[int, list[tuple[int, bytes]]]:
        """Where the code stands, and what must be written for that."""
        try:
            at, new = self._placement.place(code)
        except MemoryError:
            self._placement.clear()
            at, _ = self._placement.place(code)
            return at, [(CODE, b"\xcc" * CODE_SIZE), *self._writes(at, code)]
        return at, self._writes(at, code) if new else []

    def _writes(self, at: int, code: bytes) -> list[tuple[int, bytes]]:
        end = at + len(code)
        jump = b"\xe9" + struct.pack("<i", self._leave - (end + 5))
        return [(at, code + jump)]

    def _message(self, case: Case, at: int | None) -> tuple[int, object]:
        if at is None:
            at, writes = self.place(case.code)
        else:
            writes = self._writes(at, case.code)
        words = struct.pack("<16QQQ", *case.registers(), case.rflags | 0x202, at)
        memory = list(case.memory.items())
        reads = [(a, len(d)) for a, d in memory]
        return at, (fxsave_image(case) + words, writes + memory, reads)

    def run_many(self, cases: Sequence[Case], at: Sequence[int] | None = None) -> list[Result]:
        """Executes each case, at the given addresses or at ones of its own."""
        places: Sequence[int | None] = at or [None] * len(cases)
        messages = [self._message(c, p) for c, p in zip(cases, places, strict=True)]
        process = self._process
        stdin, stdout = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        send(stdin, [m for _, m in messages])
        if not select.select([stdout], [], [], SECONDS)[0]:
            process.kill()
            raise TimeoutError(f"the host did not finish {len(cases)} cases in {SECONDS} s")
        outcomes = receive(stdout)
        if not isinstance(outcomes, list):
            raise ChildProcessError(f"the child process ended with {process.wait()}")
        return [
            self._result(case, start, *outcome)
            for case, (start, _), outcome in zip(cases, messages, outcomes, strict=True)
        ]

    def execute(self, case: Case, at: int | None = None) -> Result:
        return self.run_many([case], None if at is None else [at])[0]

    def _result(self, case: Case, start: int, out: bytes, memory: list[bytes]) -> Result:
        image, *words = OUT_FORMAT.unpack(out[: OUT_FORMAT.size])
        flags, rip, trap, error, cr2, signal = words[16:]
        gone = not signal
        return Result(
            gpr=dict(zip(GPRS, words, strict=False)),
            rflags=flags & ~0x10000,
            rip=start + len(case.code) if gone else rip,
            xmm=xmm_of(image),
            mxcsr=int.from_bytes(image[24:28], "little"),
            x87=x87_of(image),
            memory=dict(zip(case.memory, memory, strict=True)),
            vector=None if gone else trap,
            error=error if trap in WITH_ERROR and not gone else None,
            cr2=cr2 if trap == 14 and not gone else None,
        )

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(10)
        if self._process.stdout:
            self._process.stdout.close()
