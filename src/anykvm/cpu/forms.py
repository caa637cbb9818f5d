"""Instruction forms, and how a form's operands are reached.

A form is a mnemonic, the kinds of its operands and a few attributes; everything else about an
instruction (which registers, displacement, immediate, successor) stands in its record. Written as
text, `add m64i,r64 lock` is the form of `lock add [rax+rcx*8+16], rdx`. The operand kinds:

    r8 r16 r32 r64   general register                 x    XMM register           d    MMX register
    s                segment register                 i    immediate, sign-extended from 32 bits;
                                                           iN where its value N belongs to the form
    st0 ... st7      x87 stack register
    mN or mN plus    N bits in memory, and of the     j    64-bit immediate, in the aux field
                     shape that the letters tell      k    constant 1 (shifts by one)

    i   base + index << scale + displacement (otherwise base + displacement)
    a   absolute, 64 bits in aux (RIP-relative, moffs)
    s   plus the base of a segment (64-bit mode: FS, GS)
    w   the address is cut to 32 bits (64-bit mode with a 67 prefix)
    l h segmented, with limit checks, addresses of 32 (l) or 16 (h) bits: outside 64-bit mode

Attributes: `lock`, `rep`, `repne`; `s32` and `s16` for the stack's width (64 where absent); `o16`,
`o32`, `o64` where the operand size is not told by an operand; `a32`, `a16` likewise for addresses;
`back` for a jump that polls; `guest` for an instruction that SVM's guest mode may intercept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

from anykvm.cpu.guest import (
    GP,
    MF,
    R_A,
    R_B,
    R_BASE,
    R_C,
    R_DISP,
    R_INDEX,
    R_SCALE,
    R_SEG,
    Handler,
    Place,
)
from anykvm.cpu.ir import Value
from anykvm.cpu.state import Exit
from anykvm.cpu.vmcb import SvmExit

CACHE_LINE = 64
# What has a handler and can be intercepted, by the exits (vmcb.py) that it may lead to; which of
# them it does is for Python to find out.
INTERCEPTED: dict[str, tuple[int, ...]] = {
    "mov_from_cr": tuple(range(SvmExit.READ_CR0, SvmExit.READ_CR0 + 16)),
    "mov_to_cr3": (SvmExit.WRITE_CR3,),
    "rdtsc": (SvmExit.RDTSC,),
    "rdtscp": (SvmExit.RDTSCP,),
    "pushf": (SvmExit.PUSHF,),
    "popf": (SvmExit.POPF,),
    "cpuid": (SvmExit.CPUID,),
    "rsm": (SvmExit.RSM,),
    "iret": (SvmExit.IRET,),
    "int": (SvmExit.SWINT,),
    "pause": (SvmExit.PAUSE,),
    "hlt": (SvmExit.HLT,),
    "invlpg": (SvmExit.INVLPG,),
    "in": (SvmExit.IOIO,),
    "out": (SvmExit.IOIO,),
    "rdmsr": (SvmExit.MSR,),
    "wrmsr": (SvmExit.MSR,),
    "vmmcall": (SvmExit.VMMCALL,),
    "monitor": (SvmExit.MONITOR,),
    "mwait": (SvmExit.MWAIT,),
}


class Form(NamedTuple):
    """What a handler is compiled for."""

    name: str
    operands: tuple[str, ...] = ()
    attrs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " ".join(p for p in (self.name, ",".join(self.operands), ".".join(self.attrs)) if p)

    @property
    def symbol(self) -> str:
        """The name of the handler's function."""
        return "h_" + str(self).replace(" ", "__").replace(",", "_").replace(".", "_")


class Operand:
    """An operand of a handler under construction: `read`, `write`, `bits`."""

    bits: int
    is_memory = False

    def __init__(self, h: Handler, spec: str) -> None:
        self.h, self.spec = h, spec

    def read(self, type_: str | None = None) -> Value:
        raise TypeError(f"operand {self.spec} cannot be read")

    def write(self, value: Value) -> None:
        raise TypeError(f"operand {self.spec} cannot be written")

    def update(self, change: Callable[[Value], Value]) -> tuple[Value, Value]:
        """Reads, changes and writes back, atomically under LOCK; gives old and new value."""
        old = self.read()
        new = change(old)
        self.write(new)
        return old, new


class Register(Operand):
    """A register whose offset stands in the record."""

    def __init__(self, h: Handler, spec: str, slot: int) -> None:
        super().__init__(h, spec)
        self.slot = slot
        self.bits = {"x": 128, "d": 64, "s": 16}.get(spec[0]) or int(spec[1:])

    @cached_property
    def ptr(self) -> Value:
        return self.h.register_field(self.slot)

    def read(self, type_: str | None = None) -> Value:
        return self.ptr.load(type_ or f"i{self.bits}")

    def write(self, value: Value) -> None:
        if self.spec == "r32":
            value = value.zext(64)
        self.ptr.store(value)
        if self.spec == "d":  # to the x87, sign and exponent of all ones
            self.ptr.offset(8).store(self.h.const(0xFFFF, 16))


class SegmentRegister(Operand):
    """A segment register as an operand: its index stands in slot A or B."""

    bits = 16

    def __init__(self, h: Handler, spec: str, slot: int) -> None:
        super().__init__(h, spec)
        self.slot = slot

    @cached_property
    def index(self) -> Value:
        return self.h.record(self.slot, "i16").zext(64)

    def read(self, type_: str | None = None) -> Value:
        return self.h.segment(self.index, "selector")


class StackRegister(Operand):
    """ST(n), relative to the top of the x87 register stack; `n` is part of the form."""

    bits = 80

    def __init__(self, h: Handler, spec: str) -> None:
        super().__init__(h, spec)
        self.n = int(spec[2:])


class Immediate(Operand):
    """A constant in the record; as wide as `bits`, which the reader sets."""

    bits = 64

    def read(self, type_: str | None = None) -> Value:
        if self.spec == "j":
            return self.h.aux()
        if self.spec == "k":
            return self.h.const(1, self.bits)
        if self.spec != "i":
            return self.h.const(int(self.spec[1:]), self.bits)
        return self.h.immediate(self.bits)


class Memory(Operand):
    """An operand in guest memory."""

    is_memory = True

    def __init__(self, h: Handler, spec: str, *, lock: bool, writes: bool) -> None:
        super().__init__(h, spec)
        digits = spec[1:].rstrip("iaswlh")
        self.bits = int(digits)
        self.shape = spec[1 + len(digits) :]
        self.lock, self.writes = lock, writes
        self.alignment = 1  # bytes
        self._place: Place | None = None

    def gpr(self, slot: int) -> Value:
        """The register whose number stands in the record."""
        return self.h.cpu.offset(self.h.record(slot, "i8").zext(64) << 3).load("i64", align=8)

    @cached_property
    def offset(self) -> Value:
        """The effective address, without segment."""
        h = self.h
        if "a" in self.shape:
            ea = h.aux()
        else:
            ea = self.gpr(R_BASE) + h.record(R_DISP, "i32").sext(64)
            if "i" in self.shape:
                ea = ea + (self.gpr(R_INDEX) << h.record(R_SCALE, "i8").zext(64))
        if "h" in self.shape:
            return ea & 0xFFFF
        return ea & 0xFFFF_FFFF if set(self.shape) & {"w", "l"} else ea

    @property
    def segment_index(self) -> Value:
        return self.h.record(R_SEG, "i8").zext(64)

    def linear(self, ea: Value, size: int, *, write: bool) -> Value:
        """Linear address of effective address `ea` through this operand's segment."""
        h = self.h
        if set(self.shape) & {"l", "h"}:
            return h.linear(self.segment_index, ea, size, write=write)
        return h.segment(self.segment_index, "base") + ea if "s" in self.shape else ea

    @cached_property
    def address(self) -> Value:
        linear = self.linear(self.offset, self.bits // 8, write=self.writes)
        if self.alignment > 1:
            self.h.raise_if((linear & (self.alignment - 1)).ne(0), GP, 0)
        return linear

    def place(self) -> Place:
        """This operand, found and checked for writing (once)."""
        if self._place is None:
            address = self.address
            with self.h.through_stack("operand"):
                self._place = self.h.place(address, self.bits // 8)
            if self.lock:
                shared = self.h.get("exclusive").eq(0)
                with self.h.If((self._place.slow | self._bus_lock(address)) & shared):
                    self.h.leave(Exit.EXCLUSIVE)
        return self._place

    def _bus_lock(self, address: Value) -> Value:
        """Whether a locked access goes across cache lines, and that is to be told."""
        last = (address & (CACHE_LINE - 1)) + (self.bits // 8 - 1)
        return last.uge(CACHE_LINE) & self.h.get("bus_lock_exits").ne(0)

    def read(self, type_: str | None = None) -> Value:
        type_ = type_ or f"i{self.bits}"
        if self.writes:
            return self.place().load(type_)
        address = self.address
        with self.h.through_stack("operand"):
            return self.h.load_type(address, type_, self.bits // 8)

    def require_aligned(self, size: int) -> None:
        self.h.raise_if((self.address & (size - 1)).ne(0), GP, 0)

    def write(self, value: Value) -> None:
        self.place().store(value)

    def update(self, change: Callable[[Value], Value]) -> tuple[Value, Value]:
        if not self.lock:
            return super().update(change)
        h, place = self.h, self.place()
        first = place.load(f"i{self.bits}")
        old = h.var(first)
        with h.Loop() as loop:
            seen, done = compare_exchange(h, place.ptr, old.get(), change(old.get()))
            loop.break_if(done)
            old.set(seen)
        # The value computed inside the loop does not dominate what follows: compute it again from
        # what was exchanged.
        before = old.get()
        after = change(before)
        with h.If(place.slow):
            place.store(after)
        return before, after


def compare_exchange(h: Handler, ptr: Value, expected: Value, new: Value) -> tuple[Value, Value]:
    """A locked compare-and-exchange on host memory: the value seen, and success."""
    align = expected.bits // 8
    with h.exposed():
        pair = h.emit(
            f"cmpxchg volatile ptr {ptr.text}, {expected.type} {expected.text}, {new.type}"
            f" {new.text} seq_cst seq_cst, align {align}",
            f"{{ {expected.type}, i1 }}",
        )
    seen = h.emit(f"extractvalue {pair.type} {pair.text}, 0", expected.type)
    done = h.emit(f"extractvalue {pair.type} {pair.text}, 1", "i1")
    return seen, done


class Insn:
    """An instruction form being given its meaning: the handler and its operands."""

    def __init__(self, form: Form, *, writes: frozenset[int]) -> None:
        h = Handler(form.symbol)
        self.h, self.form = h, form
        self.attrs = frozenset(form.attrs)
        for attr, bits in (("s32", 32), ("s16", 16)):
            if attr in self.attrs:
                h._stack = bits
        self.lock = "lock" in self.attrs
        self.ops: list[Operand] = []
        has_memory = any(s[0] == "m" for s in form.operands)
        slots = iter((R_A, R_B) if has_memory else (R_A, R_B, R_C))
        for n, spec in enumerate(form.operands):
            match spec[0]:
                case "m":
                    op: Operand = Memory(h, spec, lock=self.lock, writes=n in writes)
                case "s" if spec != "s":
                    op = StackRegister(h, spec)
                case "s":
                    op = SegmentRegister(h, spec, next(slots))
                case "i" | "j" | "k":
                    op = Immediate(h, spec)
                case _:
                    op = Register(h, spec, next(slots))
            self.ops.append(op)
        width = next((o.bits for o in self.ops if not isinstance(o, Immediate)), None)
        self.bits = self.operand_size or width or 32
        for op in self.ops:
            if isinstance(op, Immediate):
                op.bits = self.bits

    @property
    def operand_size(self) -> int | None:
        return next((int(a[1:]) for a in self.form.attrs if a in ("o8", "o16", "o32", "o64")), None)

    @property
    def address_size(self) -> int:
        return next((int(a[1:]) for a in self.form.attrs if a in ("a16", "a32")), 64)

    def require_no_x87_error(self) -> None:
        """MMX instructions first report an x87 exception that is pending (SDM vol. 1, 9.6.3)."""
        self.h.raise_if(self.h.get("fpu_sw").bit(7), MF)

    def take_x87_registers(self) -> None:
        """After an MMX instruction TOP is 0 and every register in use (SDM vol. 1, 9.6.2)."""
        h = self.h
        h.set("fpu_sw", h.get("fpu_sw") & ~0x3800)
        h.set("fpu_top", 0)
        h.set("fpu_tag", 0)


Semantics = Callable[[Insn], None]


class Row(NamedTuple):
    """One instruction of the table: what it computes, and which operands it writes."""

    name: str
    semantics: Semantics
    writes: frozenset[int]
    lockable: bool
    ends: bool  # control may leave the straight line after it
    feature: (
        str  # CPUID feature that it belongs to; behind a slash, that of its form with MMX operands
    )
    constant: bool  # a handler is compiled for each value of its immediate
    unaligned: bool  # its 128-bit operands in memory need no alignment

    @property
    def alignment(self) -> int:
        """What 128-bit operands in memory must be multiples of."""
        return 16 if self.feature.startswith(("sse", "ssse")) and not self.unaligned else 1


ROWS: dict[str, Row] = {}


def row(
    *names: str,
    writes: tuple[int, ...] = (0,),
    lock: bool = False,
    ends: bool = False,
    feature: str = "",
    constant: bool = False,
    unaligned: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Declares the semantics of instructions. A function for several gets the mnemonic as its
    second argument.
    """

    def declare(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:

            def semantics(insn: Insn, name: str = name) -> None:
                if len(names) == 1:
                    function(insn)
                else:
                    function(insn, name)

            assert name not in ROWS, f"{name} is described twice"
            ROWS[name] = Row(
                name, semantics, frozenset(writes), lock, ends, feature, constant, unaligned
            )
        return function

    return declare


def _leave_if_intercepted(insn: Insn) -> None:
    """In guest mode, where L1 may want the instruction: Python decides."""
    exits = INTERCEPTED[insn.form.name]
    mask = sum(1 << (exit_ & 31) for exit_ in exits)
    wanted = insn.h.get(f"intercepts[{exits[0] >> 5}]") & mask
    with insn.h.If(wanted.ne(0)):
        insn.h.leave(Exit.ASSIST)


def build(form: Form) -> Handler:
    """The handler of a form."""
    described = ROWS[form.name]
    insn = Insn(form, writes=described.writes)
    for op in insn.ops:
        if isinstance(op, Memory) and op.bits == 128:
            op.alignment = described.alignment
    if "guest" in form.attrs:
        _leave_if_intercepted(insn)
    mmx = described.feature == "mmx" or "d" in form.operands
    if mmx:
        insn.require_no_x87_error()
    described.semantics(insn)
    if mmx and form.name != "emms":
        insn.take_x87_registers()
    if not insn.h.terminated:
        insn.h.next()
    return insn.h
