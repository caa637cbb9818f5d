"""Guest memory that is not there on the host: native code is left, and KVM_RUN can say EFAULT.

Host memory behind a slot may be unmapped, protected, or past the end of its file, at any time. A
kernel's user accesses are listed in an exception table (arch/x86/mm/extable.c), so that a fault in
one goes on elsewhere; here whatever touches guest memory runs under `guard`, which notes where the
stack was, and a handler for SIGSEGV and SIGBUS goes back there. Any other fault, of any thread, is
the handler's that was installed before, or the end of the process as ever.

Which instruction it was: handlers have their record, vCPU and count in fixed registers wherever
they touch guest memory (`Handler.exposed`); routines of the runtime note them in `State` first
(`Routine.resume_at`).
"""

from __future__ import annotations

import ctypes
import mmap
import signal
import threading
from typing import TYPE_CHECKING

from anykvm.cpu.ir import PTR, Function, Value
from anykvm.cpu.memory import (
    SLOT_COUNT,
    SLOT_GPA,
    SLOT_HVA,
    SLOT_SIZE,
    SLOT_TABLE,
    SLOT_TABLE_ROW,
)
from anykvm.cpu.state import Exit, State, offset_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_CONTEXTS = 1 << 16
# A context: the thread that is in native code or 0, its stack pointer, where to go on, the vCPU
CONTEXT, C_STACK, C_RESUME, C_CPU = 32, 8, 16, 24
# What `catch_fault` looks at: contexts, how many; sigaction(2) and a default action; for SIGBUS and
# for SIGSEGV which handler was there before (0: none), whether it takes three arguments, and
# whether it is called only once
F_CONTEXTS, F_COUNT, F_SIGACTION, F_DEFAULT, F_BEFORE, CONFIG = 0, 8, 16, 24, 32, 96
B_SIGINFO, B_ONCE, BEFORE = 8, 16, 24
SI_ADDR, UC_REGISTERS = 16, 40  # siginfo_t and ucontext_t of x86-64
R12, R13, R14, RSP, RIP = (UC_REGISTERS + 8 * n for n in (4, 5, 6, 15, 16))
SA_SIGINFO, SA_ONSTACK = 4, 0x08000000
SIG_IGN = 1
FAULTS = (signal.SIGBUS, signal.SIGSEGV)


class _Naked(Function):
    """A function that is nothing but assembly."""

    def __init__(
        self, name: str, result: str, params: Sequence[tuple[str, str]], text: str
    ) -> None:
        super().__init__(name, result, params)
        self.text = text

    def render(self) -> str:
        params = ", ".join(f"{t} %{n}" for n, t in self.params)
        lines = r"\0A".join(line.strip() for line in self.text.strip().splitlines())
        return (
            f"define {self.result} @{self.name}({params}) naked nounwind {{\n"
            f'  call void asm sideeffect "{lines}", ""()\n  unreachable\n}}\n'
        )


def guard() -> Function:
    """guard(cpu, a, b, c, d, e, function): function(cpu, a, b, c, d, e), or 0 where guest memory
    was not there; `exit_kind` then says so.
    """
    text = f"""
        pushq %rbp
        pushq %rbx
        pushq %r12
        pushq %r13
        pushq %r14
        pushq %r15
        subq $$8, %rsp
        movq {offset_of("fault_context")}(%rdi), %rbx
        movq %rsp, {C_STACK}(%rbx)
        leaq 2f(%rip), %rax
        movq %rax, {C_RESUME}(%rbx)
        movq %fs:0, %rax
        movq %rax, (%rbx)
        callq *64(%rsp)
        movq $$0, (%rbx)
        1:
        addq $$8, %rsp
        popq %r15
        popq %r14
        popq %r13
        popq %r12
        popq %rbx
        popq %rbp
        retq
        2:
        xorl %eax, %eax
        jmp 1b
    """
    params = [("cpu", PTR), *((n, "i64") for n in "abcde"), ("function", PTR)]
    return _Naked("guard", "i64", params, text)


class _CatchFault(Function):
    """catch_fault(signal, siginfo, ucontext): the signal handler. Its configuration is a global."""

    def __init__(self) -> None:
        super().__init__("catch_fault", "void", [("sig", "i32"), ("info", PTR), ("uc", PTR)])
        self.sig, self.info, self.uc = self.args

    def render(self) -> str:
        return "@fault_config = global ptr null\n" + super().render()

    def config(self, at: int, type_: str) -> Value:
        block = Value(self, "@fault_config", PTR).load(PTR, align=8)
        return block.offset(at).load(type_, align=8)


def configure_faults() -> Function:
    """configure_faults(block): tells `catch_fault` where its configuration is."""
    f = Function("configure_faults", "void", [("block", PTR)])
    Value(f, "@fault_config", PTR).store(f.args[0], align=8)
    f.ret()
    return f


def catch_fault() -> Function:
    f = _CatchFault()
    thread = f.emit('call i64 asm "movq %fs:0, $0", "=r"()', "i64")
    context = f.var(f.config(F_CONTEXTS, PTR))
    end = context.get().offset(f.config(F_COUNT, "i64") * CONTEXT)
    with f.Loop() as loop:
        loop.break_if(context.get().eq_ptr(end))
        found = context.get()
        with f.If(found.load("i64", volatile=True, align=8).eq(thread)):
            _resume(f, found)
            loop.break_()
        context.set(found.offset(CONTEXT))
    _before(f)
    return f


def _resume(f: _CatchFault, context: Value) -> None:
    """Leaves native code if this is guest memory; else on to who was here before."""
    cpu = context.offset(C_CPU).load(PTR, align=8)
    address = f.info.offset(SI_ADDR).load("i64", align=8)
    physmap = cpu.offset(offset_of("physmap")).load(PTR, align=8)
    count = physmap.offset(SLOT_COUNT).load("i64", align=8)
    at = f.var(f.const(0, 64))
    with f.Loop() as loop:
        loop.break_if(at.get().eq(count))
        row = physmap.offset(at.get() * SLOT_TABLE_ROW).offset(SLOT_TABLE + 8)
        slot = row.load(PTR, align=8)
        inside = address - (slot.offset(SLOT_HVA).load("i64", align=8) & ~0xFFF)
        with f.If(inside.ult(slot.offset(SLOT_SIZE).load("i64", align=8))):
            _leave(f, context, cpu, slot.offset(SLOT_GPA).load("i64", align=8) + inside)
        at.set(at.get() + 1)


def _leave(f: _CatchFault, context: Value, cpu: Value, gpa: Value) -> None:
    def field(name: str) -> Value:
        return cpu.offset(offset_of(name))

    with f.If(field("fault_record").load("i64", align=8).eq(0)):
        with f.If(f.uc.offset(R13).load("i64", align=8).ne(cpu.to_int())):
            _before(f)  # no handler: where it would have to go on is not known
        for register, name in ((R12, "fault_record"), (R14, "fault_count")):
            field(name).store(f.uc.offset(register).load("i64", align=8), align=8)
    field("fault_gpa").store(gpa & ~0xFFF, align=8)
    field("exit_kind").store(f.const(int(Exit.MEMORY_FAULT), 32), align=4)
    for register, at in ((RSP, C_STACK), (RIP, C_RESUME)):
        f.uc.offset(register).store(context.offset(at).load("i64", align=8), align=8)
    context.store(f.const(0, 64), volatile=True, align=8)
    f.ret()


def _before(f: _CatchFault) -> None:
    """To the handler that was there before. Without one the fault happens again, to its default."""
    if f.terminated:
        return
    at = f.sig.eq(int(signal.SIGSEGV)).select(f.const(BEFORE, 64), f.const(0, 64)) + F_BEFORE
    before = Value(f, "@fault_config", PTR).load(PTR, align=8).offset(at)
    handler = before.load(PTR, align=8)
    with f.If(handler.eq(0)):
        action = f.config(F_DEFAULT, PTR)
        f.config(F_SIGACTION, PTR).call("i32", f.sig, action, f.null())
        f.ret()
    with f.If(before.offset(B_ONCE).load("i64", align=8).ne(0)):
        before.store(f.const(0, 64), align=8)
    with f.If(before.offset(B_SIGINFO).load("i64", align=8).ne(0)):
        handler.call("void", f.sig, f.info, f.uc)
        f.ret()
    handler.call("void", f.sig)
    f.ret()


ROUTINES: tuple[Callable[[], Function], ...] = (guard, catch_fault, configure_faults)


class _Sigaction(ctypes.Structure):
    """libc's struct sigaction."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint64 * 16),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]
    handler: int | None
    flags: int


class FaultTable:
    """The contexts of a process, and its signal handler. Memory for both is never given back, for
    the handler may run at any time.
    """

    def __init__(self, handler: int, configure: Callable[..., object]) -> None:
        self._handler = handler
        self._lock = threading.Lock()
        self._memory = mmap.mmap(-1, CONFIG + MAX_CONTEXTS * CONTEXT)
        self._words = memoryview(self._memory).cast("Q")
        block = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._contexts = block + CONFIG
        self._free: list[int] = []
        self._installed = False
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._default = _Sigaction()
        sigaction = ctypes.cast(self._libc.sigaction, ctypes.c_void_p).value
        assert sigaction is not None
        self._set(F_CONTEXTS, self._contexts)
        self._set(F_SIGACTION, sigaction)
        self._set(F_DEFAULT, ctypes.addressof(self._default))
        configure(block)

    def _set(self, at: int, value: int) -> None:
        self._words[at // 8] = value

    def register(self, state: State, address: int) -> None:
        """A vCPU gets a context; the handler is there from then on."""
        with self._lock:
            number = self._free.pop() if self._free else self._words[F_COUNT // 8]
            if number == MAX_CONTEXTS:
                raise MemoryError(f"a process can have {MAX_CONTEXTS} vCPUs, not more")
            context = CONFIG + number * CONTEXT
            self._set(context + C_CPU, address)
            self._set(F_COUNT, max(self._words[F_COUNT // 8], number + 1))
            state.fault_context = self._contexts + number * CONTEXT
            self._install()

    def unregister(self, state: State) -> None:
        """The vCPU does not run any more."""
        with self._lock:
            self._free.append((state.fault_context - self._contexts) // CONTEXT)

    def _install(self) -> None:
        """Puts the handler in front of whatever handles these signals now.

        One that came after ours may well go on to ours, so it is called no second time.
        """
        for n, sig in enumerate(FAULTS):
            now = _Sigaction()
            self._libc.sigaction(int(sig), None, ctypes.byref(now))
            if now.handler == self._handler:
                continue
            before = now.handler or 0
            at = F_BEFORE + BEFORE * n
            self._set(at, 0 if before == SIG_IGN else before)
            self._set(at + B_SIGINFO, now.flags & SA_SIGINFO)
            self._set(at + B_ONCE, self._installed)
            ours = _Sigaction(handler=self._handler, flags=SA_SIGINFO | SA_ONSTACK)
            self._libc.sigaction(int(sig), ctypes.byref(ours), None)
        self._installed = True
