"""How an x87 instruction is executed: by the host's own x87 unit, on the guest's registers (SDM
vol. 1, chapter 8).

An `Operation` is the instruction's text and what it does to the register stack. Its usual case
loads the registers that it reads, computes with every exception masked, and stores what it wrote.
An empty or full stack, and an exception that the guest has unmasked, take the other way: the
guest's whole x87 state is put into the host's unit, the instruction is executed there as it is,
and the state is taken back. So responses to exceptions, masked or not, are the processor's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from anykvm.cpu import fpu_image
from anykvm.cpu.forms import Insn, Memory, StackRegister, row
from anykvm.cpu.fpu_image import MASKS, SW_EXCEPTION, SW_TOP
from anykvm.cpu.guest import MF
from anykvm.cpu.ir import Value

C1, C_ALL, C2 = 0x0200, 0x4700, 0x0400
PRECISION, UNDERFLOW = 0x20, 4  # a flag, a bit's number
NEW = -1  # the register that becomes ST(0)
SIZES = {16: "word", 32: "dword", 64: "qword", 80: "tbyte"}


class Operation(NamedTuple):
    """An instruction as far as the register stack is concerned."""

    text: str  # {r}: the last register of `reads`; {m}: the memory operand
    reads: tuple[int, ...] = (0,)  # ST(n) that must not be empty
    results: tuple[int, ...] = (0,)  # ST(n) that are written; numbers as before the instruction
    pops: int = 0
    push: bool = False
    conditions: int = C1  # condition codes that it sets
    takes_flags: bool = False  # reads EFLAGS
    gives_flags: bool = False  # writes EFLAGS
    partial: bool = False  # pushes nothing if it sets C2

    @property
    def delta(self) -> int:
        """What is added to TOP."""
        return self.pops - self.push


def x87(*names: str) -> Callable[[Callable[[Insn, str], None]], Callable[..., None]]:
    """Declares instructions of the x87 unit; the function always gets the mnemonic."""

    def declare(function: Callable[[Insn, str], None]) -> Callable[..., None]:
        for name in names:

            def semantics(i: Insn, name: str = name) -> None:
                function(i, name)

            row(name, writes=(0,) if name.startswith(STORES) else (), feature="x87")(semantics)
        return function

    return declare


STORES = ("fst", "fist", "fbstp", "fnst", "fnsave", "fxsave")


def operations(table: dict[str, Operation]) -> None:
    """Declares instructions that always are the same operation."""

    def semantics(i: Insn, name: str) -> None:
        operate(i, table[name])

    x87(*table)(semantics)


class Stack:
    """The register stack at the beginning of an instruction."""

    def __init__(self, i: Insn) -> None:
        self.h = i.h
        self.sw, self.tags = i.h.get("fpu_sw"), i.h.get("fpu_tag")
        self.top = i.h.get("fpu_top")

    def number(self, n: int) -> Value:
        return fpu_image.physical(self.h, self.top, n)

    def at(self, n: int) -> Value:
        """Pointer to ST(n)."""
        return fpu_image.register(self.h, self.number(n))

    def legal(self, reads: Collection[int], *, push: bool) -> Value:
        """Whether the registers that are read are in use, and the one to be pushed on is free."""
        h = self.h
        if push and 7 in reads:  # one and the same
            return h.false()
        turn = (self.top << 1).trunc(16)
        turned = h.intrinsic("llvm.fshr.i16", "i16", self.tags, self.tags, turn)
        wanted = 0x4000 if push else 0
        care = wanted | sum(1 << 2 * n for n in set(reads))
        return ((turned & (turned >> 1) & care) ^ wanted).eq(0)

    def moved_tags(self, op: Operation) -> Value:
        tags = self.tags
        for n in set(op.results) - set(op.reads):
            tags = tags & ~self.tag(n)
        for n in range(op.pops):
            tags = tags | self.tag(n)
        return tags

    def tag(self, n: int) -> Value:
        return self.h.const(3, 16) << (self.number(n) << 1).trunc(16)

    def turn(self, sw: Value, delta: int) -> None:
        """Adds `delta` to TOP and stores the status word, of whose TOP nothing is taken."""
        h = self.h
        if delta:
            top = self.number(delta)
            h.set("fpu_top", top)
            h.set("fpu_sw", (sw & ~SW_TOP) | (top.trunc(16) << 11))
        else:
            h.set("fpu_sw", sw)

    def commit(self, op: Operation, conditions: Value) -> None:
        """What an operation does to TOP and the tags; `conditions` is the new status word but for
        TOP.
        """
        h = self.h
        if op.pops or set(op.results) - set(op.reads):
            h.set("fpu_tag", self.moved_tags(op))
        self.turn(conditions, op.delta)


def require_no_pending(i: Insn) -> None:
    """What a waiting instruction begins with."""
    i.h.raise_if((i.h.get("fpu_sw") & SW_EXCEPTION).ne(0), MF)


def note_pointers(i: Insn) -> None:
    """FIP, FOP and FDP (SDM vol. 1, 8.1.8). The selectors read as 0, of which CPUID.7.0:EBX[13]
    tells.
    """
    h = i.h
    h.set("fpu_pc", h.pc.to_int())
    if memory := memory_operand(i):
        h.set("fpu_dp", memory.offset)


def memory_operand(i: Insn) -> Memory | None:
    return next((op for op in i.ops if isinstance(op, Memory)), None)


def stack_operand(i: Insn, position: int = -1) -> int:
    """n of the operand ST(n)."""
    op = i.ops[position]
    assert isinstance(op, StackRegister)
    return op.n


Shortcut = Callable[[Insn, Operation, Stack], None]


def operate(i: Insn, op: Operation, shortcut: Shortcut | None = None) -> None:
    """Executes an operation in either way; `shortcut` may do so itself and go on where it knows
    better.
    """
    h, memory = i.h, memory_operand(i)
    require_no_pending(i)
    if memory and memory.writes:
        memory.place()
    elif memory:
        h.field("x87_operand").store(memory.read())
    note_pointers(i)
    stack = Stack(i)
    if not (op.pops and op.results and op.results[0] < op.pops and not op.push):
        # An exact denormal result is an underflow only to those who have unmasked it.
        masked = h.get("fpu_cw").bit(UNDERFLOW)
        with h.If(stack.legal(op.reads, push=op.push) & masked):
            if shortcut:
                shortcut(i, op, stack)
            _usual(i, op, stack, memory)
    whole(i, op, memory)


def _memory_text(memory: Memory | None, pointer: str) -> str:
    return f"{SIZES[memory.bits]} ptr [{pointer}]" if memory else ""


def _sequence(op: Operation, window: list[int], pointers: dict[int, str], memory: str) -> str:
    """The usual case as assembly: `window` are the registers to load, top first."""
    lines = [f"fld tbyte ptr [{pointers[n]}]" for n in reversed(window)]
    if op.takes_flags:
        lines.append("sahf")
    last = window.index(op.reads[-1]) if op.reads else 0
    lines.append(op.text.format(r=last, m=memory))
    if op.gives_flags:
        lines += ["lahf", "shl eax, 8"]
    # What must be answered otherwise has no effect here.
    lines += ["fnstsw ax", "test eax, $1", "jz .Lgood${:uid}", "fninit", "jmp .Lend${:uid}"]
    lines.append(".Lgood${:uid}:")
    after = [NEW] * op.push + window[op.pops :]
    lines += [f"fstp tbyte ptr [{pointers[n]}]" if n in op.results else "fstp st(0)" for n in after]
    lines.append(".Lend${:uid}:")
    return "\\0A".join(lines)


def _usual(i: Insn, op: Operation, stack: Stack, memory: Memory | None) -> None:
    """Goes on to the next instruction if no unmasked exception came up, and has changed nothing
    otherwise.
    """
    h = i.h
    window = list(dict.fromkeys(op.reads))
    outputs = [n for n in op.results if n not in window]
    named = [*window, *outputs]
    arguments = [stack.at(n) for n in named]
    pointers = {n: f"${3 + k}" for k, n in enumerate(named)}
    memory_text = _memory_text(memory, f"${3 + len(named)}")
    if memory:
        arguments.append(h.field("x87_operand"))
    text = _sequence(op, window, pointers, memory_text)
    constraints = ",".join(["={eax}", "r", "{eax}", *["r"] * len(arguments)])
    arguments.insert(0, _flags_for_sahf(i) if op.takes_flags else h.const(0, 32))
    unusual = (~h.get("fpu_cw") & MASKS).zext(32)
    if op.partial:
        unusual = unusual | C2
    out = fpu_image.assembly(h, text, "i32", constraints, unusual, *arguments)
    sw = out.trunc(16)
    with h.If((out & unusual).eq(0)):
        if memory and memory.writes:
            _store(i, memory)
        kept = stack.sw & ~op.conditions
        stack.commit(op, kept | (sw & (op.conditions | MASKS)))
        if op.gives_flags:
            _flags_from_lahf(i, out)
        h.next()


def _flags_for_sahf(i: Insn) -> Value:
    return (i.h.flags.read().trunc(32) & 0xFF) << 8


def _flags_from_lahf(i: Insn, out: Value) -> None:
    """ZF, PF and CF as compared; the others are cleared."""
    flags, no = out >> 16, i.h.false()
    i.h.flags.pack(flags.bit(0), flags.bit(2), no, flags.bit(6), no, no)


def _store(i: Insn, memory: Memory) -> None:
    memory.write(i.h.field("x87_operand").load(f"i{memory.bits}"))


def whole(i: Insn, op: Operation, memory: Memory | None) -> None:
    """Executes the instruction itself on the guest's whole x87 state."""
    h = i.h
    h.call_runtime("x87_pack")
    lines = ["frstor [$2]"]
    if op.takes_flags:
        lines.append("sahf")
    lines.append(op.text.format(r=op.reads[-1] if op.reads else 0, m=_memory_text(memory, "$3")))
    if op.gives_flags:
        lines += ["lahf", "shl eax, 8"]
    lines.append("fnsave [$2]")
    flags_in = _flags_for_sahf(i) if op.takes_flags else h.const(0, 32)
    image = h.field("x87_image")
    out = fpu_image.assembly(
        h, "; ".join(lines), "i32", "={eax},{eax},r,r", flags_in, image, h.field("x87_operand")
    )
    fpu_image.load_control(h)
    if memory and memory.writes:
        sw = image.offset(fpu_image.I_SW).load("i16")
        with h.If((sw & ~h.get("fpu_cw") & (MASKS & ~PRECISION)).eq(0)):
            _store(i, memory)
    h.call_runtime("x87_unpack")
    if op.gives_flags:
        _flags_from_lahf(i, out)
