"""Functions that work on a vCPU: state fields, flags, guest memory, and the ways out of an
instruction.

A `Handler` is the code of one instruction form. Handlers tail-call one another, so each has the
signature

    void (ptr pc, ptr cpu, i64 icount, ptr tlb)     preserve_nonecc

where `pc` is the record being executed, `cpu` the `State`, `icount` the instructions retired and
`tlb` the half of the soft-TLB for the current privilege. A `Routine` is an ordinary function of the
native runtime (C calling convention).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from anykvm.cpu.flags import LazyFlags
from anykvm.cpu.ir import PTR, Function, Value
from anykvm.cpu.state import (
    TLB_ENTRIES,
    TLB_ENTRY,
    Exit,
    Flag,
    Seg,
    offset_of,
    width_of,
)

PARAMS = (("pc", PTR), ("cpu", PTR), ("icount", "i64"), ("tlb", PTR))
CONVENTION = "preserve_nonecc"

# A record of threaded code, 32 bytes
RECORD = 32
R_HANDLER, R_A, R_B, R_BASE, R_INDEX, R_SCALE, R_SEG, R_DISP, R_IMM, R_AUX = (
    0,
    8,
    10,
    12,
    13,
    14,
    15,
    16,
    20,
    24,
)
R_C = R_BASE  # a third register, where no operand is in memory

# Slots of State.fn: what handlers reach of the runtime
ENTRIES = (
    "probe_read",
    "probe_write",
    "commit",
    "abort",
    "lookup",
    "segment_slow",
    "udiv128",
    "fetch",
    "flush_tlb",
    "flush_page",
    "refind",
    "deliver",
    "x87_pack",
    "x87_unpack",
    "x87_infinity",
    "fx_pack",
    "fx_unpack",
    "sse_begin",
    "sse_end",
    "enter",
)

# Vectors (SDM vol. 3, table 6-1)
DE, DB, NMI, BP, OF, BR, UD, NM, DF = range(9)
TS, NP, SS, GP, PF = range(10, 15)
MF, AC, MC, XM = 16, 17, 18, 19

# What `deliver` delivers
EVENT, FAULT, SOFTWARE = 0, 1, 2

TLB_READ, TLB_WRITE, TLB_EXEC, TLB_ADDEND = 0, 8, 16, 24


class Guest(Function):
    """A function with a vCPU in its parameter `cpu`."""

    def __init__(
        self, name: str, result: str, params: tuple[tuple[str, str], ...], convention: str = ""
    ) -> None:
        super().__init__(name, result, params, convention)
        named = {n: v for (n, _), v in zip(self.params, self.args, strict=True)}
        self.cpu = named["cpu"]
        self.named = named
        self.flags = LazyFlags(self)

    def field(self, name: str) -> Value:
        """Pointer to a field of `State`."""
        return self.cpu.offset(offset_of(name))

    def get(self, name: str) -> Value:
        return self.field(name).load(f"i{width_of(name)}", align=width_of(name) // 8)

    def set(self, name: str, value: Value | int) -> None:
        bits = width_of(name)
        if not isinstance(value, Value):
            value = self.const(value, bits)
        self.field(name).store(value, align=bits // 8)

    def add_to(self, name: str, by: int) -> None:
        self.set(name, self.get(name) + by)

    def entry(self, name: str) -> Value:
        """Pointer to a function of the runtime."""
        return self.field(f"fn[{ENTRIES.index(name)}]").load(PTR, align=8)

    def tlb_entry(self, tlb: Value, va: Value) -> Value:
        page = va >> 12
        index = (page ^ (page >> 10)) & (TLB_ENTRIES - 1)
        return tlb.offset(index * TLB_ENTRY)

    def supervisor_tlb(self) -> Value:
        return self.field("tlb")

    def user_tlb(self) -> Value:
        return self.cpu.offset(offset_of("tlb") + TLB_ENTRIES * TLB_ENTRY)

    def cpl(self) -> Value:
        """Current privilege level (SS.DPL), 64 bits."""
        return (self.get(f"seg[{int(Seg.SS)}].attr").zext(64) >> 5) & 3

    def fault(self, vector: int, error: Value | int | None = None) -> None:
        """Notes an exception; the caller aborts the instruction."""
        self.set("exc_vector", vector)
        self.set("exc_has_error", 0 if error is None else 1)
        self.set("exc_error", 0 if error is None else error)

    def resume_at(self, record: Value | int, icount: Value) -> None:
        """Notes where the guest goes on should memory not be there (extable.py): at a record, or
        with 1 at `State.rip`.
        """
        self.set("fault_count", icount)
        self.set("fault_record", record)

    def resumed(self) -> None:
        """Handlers run again, which need no note."""
        self.set("fault_record", 0)


class Place:
    """Somewhere in guest memory that may be written: found, checked, not yet stored to."""

    def __init__(self, h: Handler, va: Value, size: int, ptr: Value, slow: Value) -> None:
        self.h, self.va, self.size, self.ptr, self.slow = h, va, size, ptr, slow

    def load(self, type_: str) -> Value:
        """What is there now (for an instruction that reads and writes)."""
        h = self.h
        with h.If(self.slow):
            done = h.entry("fetch").call(
                "i1", h.cpu, h.tlb, self.va, h.const(self.size, 64), h.pc, h.icount
            )
            h.abort_if(done ^ 1)
        with h.exposed():
            return self.ptr.load(type_, volatile=True)

    def store(self, value: Value) -> None:
        """Stores; where that takes more than a host store and fails, the instruction ends."""
        h = self.h
        with h.exposed():
            self.ptr.store(value, volatile=True)
        with h.If(self.slow):
            done = h.entry("commit").call(
                "i1", h.cpu, h.tlb, self.va, h.const(self.size, 64), h.pc, h.icount
            )
            h.abort_if(done ^ 1)


class Handler(Guest):
    """The code of one instruction form (tier 0): operands come from the record at `pc`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "void", PARAMS, CONVENTION)
        self.pc, _, self.icount, self.tlb = self.args
        self._abort: str | None = None
        self._stack_faults: dict[str, str] = {}
        self._through = ""
        self._stack = 64
        self.code = 64

    # The record
    def record(self, offset: int, type_: str) -> Value:
        return self.pc.offset(offset).load(type_)

    def register_field(self, slot: int) -> Value:
        """Pointer to the register whose offset stands in record slot A, B or C."""
        return self.cpu.offset(self.record(slot, "i16").zext(64))

    def immediate(self, bits: int) -> Value:
        """The immediate, sign-extended from 32 bits or cut."""
        imm = self.record(R_IMM, "i32")
        return imm.sext(bits) if bits >= 32 else imm.trunc(bits)

    def aux(self) -> Value:
        return self.record(R_AUX, "i64")

    def count(self) -> Value:
        """Instructions since the last place that counted, this one included."""
        return self.record(R_B, "i16").zext(64)

    def rip_slot(self, after: int = 0) -> Value:
        """Pointer to the RIP of this record, or of the one `after` it."""
        index = (self.pc.to_int() - self.get("records")) >> 2
        return (self.get("records_rip") + index).to_ptr().offset(8 * after)

    def rip(self) -> Value:
        return self.rip_slot().load("i64")

    def next_rip(self) -> Value:
        return self.rip_slot(1).load("i64")

    # Ways on
    def tail(
        self, callee: Value, pc: Value, icount: Value | None = None, tlb: Value | None = None
    ) -> None:
        icount = self.icount if icount is None else icount
        tlb = self.tlb if tlb is None else tlb
        if self.terminated:
            return
        self.line(
            f"musttail call {CONVENTION} void {callee.text}"
            f"(ptr {pc.text}, ptr {self.cpu.text}, i64 {icount.text}, ptr {tlb.text})"
        )
        self.terminate("ret void")

    def go(self, record: Value, icount: Value | None = None) -> None:
        """On to another record."""
        self.tail(record.offset(R_HANDLER).load(PTR), record, icount)

    def next(self) -> None:
        """On to the next record."""
        self.go(self.pc.offset(RECORD))

    def go_to_rip(self, rip: Value, *, counted: bool = True, tlb: Value | None = None) -> None:
        """On to whatever stands at `rip`, through the jump cache; `State.rip` is set."""
        self.set("rip", rip)
        icount = self.icount + self.count() if counted else self.icount
        self.tail(self.entry("lookup"), self.pc, icount, tlb)

    def abort(self) -> None:
        """Gives up: delivers the noted exception, or leaves if `exit_kind` is set."""
        if self._abort is None:
            self._abort = self.label("abort")
        self.jump(self._abort)

    def abort_if(self, cond: Value) -> None:
        with self.If(cond):
            self.abort()

    @contextmanager
    def through_stack(self, how: str = "always") -> Iterator[None]:
        """Accesses inside go through SS ("always"), or do where the record's operand does
        ("operand"): an address that is not canonical is then #SS (SDM vol. 1, 3.3.7.1).
        """
        before, self._through = self._through, how
        yield
        self._through = before

    def _probe_failed(self, failed: Value) -> None:
        if not self._through:
            self.abort_if(failed)
            return
        label = self._stack_faults.setdefault(self._through, self.label("stack_fault"))
        with self.If(failed):
            self.jump(label)

    def _render_stack_faults(self) -> None:
        for how, label in self._stack_faults.items():
            self.start(label)
            to_ss = self.get("exc_vector").eq(GP)
            if how == "operand":
                to_ss = to_ss & self.record(R_SEG, "i8").eq(int(Seg.SS))
            with self.If(to_ss):
                self.set("exc_vector", SS)
            self.abort()
        self._stack_faults = {}

    def raise_(self, vector: int, error: Value | int | None = None) -> None:
        self.fault(vector, error)
        self.abort()

    def raise_if(self, cond: Value, vector: int, error: Value | int | None = None) -> None:
        with self.If(cond):
            self.raise_(vector, error)

    def leave(self, kind: Exit) -> None:
        """Returns to Python with RIP at this instruction."""
        self.set("exit_kind", int(kind))
        self.abort()

    def call_runtime(self, name: str, *args: Value) -> None:
        self.entry(name).call("void", self.cpu, *args)

    def require_cpl0(self) -> None:
        self.raise_if(self.cpl().ne(0), GP, 0)

    def render(self) -> str:
        self._render_stack_faults()
        if self._abort is not None:
            self.start(self._abort)
            self.tail(self.entry("abort"), self.pc)
            self._abort = None
        return super().render()

    # Guest memory, by linear address
    @contextmanager
    def exposed(self) -> Iterator[None]:
        """Around each access to guest memory: should the host not have it, the record, the vCPU and
        the count are found in the registers that they came in, see extable.py.
        """
        pinned = (("r12", self.pc), ("r13", self.cpu), ("r14", self.icount))
        where = ",".join(f"{{{register}}}" for register, _ in pinned)
        values = ", ".join(f"{value.type} {value.text}" for _, value in pinned)
        pin = f'call void asm sideeffect "", "{where}"({values})'
        self.line(pin)
        yield
        self.line(pin)

    def _probe(self, va: Value, size: int, tag_offset: int, slow: str) -> tuple[Value, Value]:
        """Host pointer to `size` bytes at `va`, and whether it is the bounce buffer (i1)."""
        entry = self.tlb_entry(self.tlb, va)
        tag = entry.offset(tag_offset).load("i64", volatile=True, align=8)
        hit, miss, fail, join = (self.label(s) for s in ("hit", "miss", "got", "join"))
        weights = "!prof !0"
        cond = (va ^ tag).ule(4096 - size)
        self.terminate(f"br i1 {cond.text}, label %{hit}, label %{miss}, {weights}")
        self.start(hit)
        addend = entry.offset(TLB_ADDEND).load("i64", volatile=True, align=8)
        fast = (va + addend).to_ptr()
        self.jump(join)
        self.start(miss)
        found = self.entry(slow).call(
            PTR, self.cpu, self.tlb, va, self.const(size, 64), self.pc, self.icount
        )
        self._probe_failed(found.eq(0))
        bounced = found.eq_ptr(self.field("bounce")) if slow == "probe_write" else self.false()
        self.jump(fail)
        self.start(fail)
        self.jump(join)
        self.start(join)
        ptr = self.emit(f"phi ptr [{fast.text}, %{hit}], [{found.text}, %{fail}]", PTR)
        is_slow = self.emit(f"phi i1 [false, %{hit}], [{bounced.text}, %{fail}]", "i1")
        return ptr, is_slow

    def cached(self, va: Value, tag_offset: int) -> Value:
        """Host address (i64) of `va` if the TLB has it for this kind of access, else 0."""
        entry = self.tlb_entry(self.tlb, va)
        tag = entry.offset(tag_offset).load("i64", volatile=True, align=8)
        addend = entry.offset(TLB_ADDEND).load("i64", volatile=True, align=8)
        return (va ^ tag).ult(4096).select(va + addend, 0)

    def load_type(self, va: Value, type_: str, size: int) -> Value:
        """`size` bytes at linear address `va` as an LLVM type."""
        ptr, _ = self._probe(va, size, TLB_READ, "probe_read")
        with self.exposed():
            return ptr.load(type_, volatile=True)

    def load(self, va: Value, bits: int) -> Value:
        return self.load_type(va, f"i{bits}", bits // 8)

    def place(self, va: Value, size: int) -> Place:
        """Finds and checks `size` bytes for writing; nothing is changed yet."""
        ptr, slow = self._probe(va, size, TLB_WRITE, "probe_write")
        return Place(self, va, size, ptr, slow)

    def store(self, va: Value, value: Value, size: int | None = None) -> None:
        self.place(va, size or value.bits // 8).store(value)

    # Segmentation
    def segment(self, seg: Value | int, member: str) -> Value:
        """A field of a segment register; `seg` is an index known now or an i64."""
        if isinstance(seg, int):
            return self.get(f"seg[{seg}].{member}")
        base = self.cpu.offset(offset_of(f"seg[0].{member}"))
        bits = width_of(f"seg[0].{member}")
        return base.offset(seg * (offset_of("seg[1].base") - offset_of("seg[0].base"))).load(
            f"i{bits}"
        )

    def linear(self, seg: Value | int, ea: Value, size: int, *, write: bool) -> Value:
        """Linear address of `seg:ea` outside 64-bit mode, limit and type checked."""
        attr = self.segment(seg, "attr")
        limit = self.segment(seg, "limit").zext(64)
        plain = (attr & (0x1000E if write else 0x1000C)).eq(2 if write else 0)
        inside = (ea + (size - 1)).ule(limit)
        with self.If((plain & inside) ^ 1):
            index = seg if isinstance(seg, Value) else self.const(seg, 64)
            ok = self.entry("segment_slow").call(
                "i1", self.cpu, index, ea, self.const(size, 64), self.const(int(write), 1)
            )
            self.abort_if(ok ^ 1)
        return (self.segment(seg, "base") + ea) & 0xFFFF_FFFF

    # The stack
    def stack_address(self, offset: int, size: int, *, write: bool) -> Value:
        """Linear address of the stack pointer plus `offset`."""
        rsp = self.get("gpr[4]") + offset
        if self._stack == 64:
            return rsp
        return self.linear(int(Seg.SS), rsp & ((1 << self._stack) - 1), size, write=write)

    def set_rsp(self, value: Value) -> None:
        """RSP, ESP or SP, as wide as the stack is."""
        if self._stack == 16:
            self.field("gpr[4]").store(value.trunc(16))
        else:
            self.set("gpr[4]", value if self._stack == 64 else value & 0xFFFF_FFFF)

    def push(self, value: Value) -> None:
        size = value.bits // 8
        with self.through_stack():
            self.store(self.stack_address(-size, size, write=True), value)
        self.set_rsp(self.get("gpr[4]") - size)

    def peek(self, bits: int, offset: int = 0) -> Value:
        with self.through_stack():
            return self.load(self.stack_address(offset, bits // 8, write=False), bits)

    def drop(self, by: Value | int) -> None:
        self.set_rsp(self.get("gpr[4]") + by)

    def pop(self, bits: int) -> Value:
        value = self.peek(bits)
        self.drop(bits // 8)
        return value

    # Interrupts becoming possible
    def enabling_interrupts(self) -> None:
        """After IF may have been set: leaves soon if something waits for it."""
        with (
            self.If(self.get("irq_pending").ne(0)),
            self.If((self.get("flags") & int(Flag.IF)).ne(0)),
        ):
            self.field("exit_request").store(self.const(1, 32), volatile=True)


class Routine(Guest):
    """A function of the runtime with the C calling convention."""

    def __init__(self, name: str, result: str, *params: tuple[str, str]) -> None:
        super().__init__(name, result, (("cpu", PTR), *params))

    def __getitem__(self, name: str) -> Value:
        return self.named[name]


def noting(name: str, params: tuple[tuple[str, str], ...], result: str) -> Routine:
    """A routine for handlers to call: `name`_inside, after noting its `pc` and `icount`."""
    f = Routine(name, result, *params)
    f.resume_at(f["pc"].to_int(), f["icount"])
    found = f.call(f"@{name}_inside", result, f.cpu, *(f[n] for n, _ in params))
    f.resumed()
    f.ret(found)
    return f
