"""One vCPU: its state, its way in and out of native code, and the completion of what it left for.

`run` returns with an `Exit` when the caller is needed; everything else (translation, microcode in
Python, single steps) happens inside. RIP then still points at the instruction that left (past it
for HLT); one of the `complete_` methods, or `advance`, steps over it. All methods but
`request_exit` belong to the thread that runs the vCPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

from anykvm.cpu import assist, events, stepping
from anykvm.cpu.faults import GuestFault, Leave, Shutdown
from anykvm.cpu.flags import read_rflags, write_rflags
from anykvm.cpu.guest import DB, EVENT
from anykvm.cpu.state import (
    REPLAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_LIST,
    Exit,
    Flag,
    Mode,
    Seg,
    State,
    offset_of,
)

if TYPE_CHECKING:
    from anykvm.cpu.engine import Engine

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_PG = 1, 2, 4, 8, 1 << 31
CR4_DE, CR4_PAE, CR4_OSFXSR = 1 << 3, 1 << 5, 1 << 9
EFER_LMA = 1 << 10
DR6_FIXED = 0xFFFF_0FF0
MASK64 = 2**64 - 1
STEP, CODE64, TF, RF, IF = (int(f) for f in (Mode.STEP, Mode.CODE64, Flag.TF, Flag.RF, Flag.IF))
RAX, RCX, RDX, RBX = range(4)


class Cpu:
    """A vCPU of an `Engine`."""

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine, self.index = engine, index
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(State) + 64)
        self.address = (ctypes.addressof(self._memory) + 63) & ~63
        self.state = State.from_address(self.address)
        self._call = engine.runtime.call
        self._native = self._call["run"]
        self._requested = False
        self._shutdown = False
        self._one_first = False
        self._completion: Callable[[bytes], None] | None = None  # of a string I/O instruction
        self._outs: bytes | None = None  # what OUTS sends
        self.on_advance: Callable[[], None] | None = None  # the rest of the instruction that left
        self.state.tlb_listed = TLB_LIST + 1
        self.single_step = False  # leave with DEBUG after each instruction
        self.emulation_text = ""
        self._supervisor = self.address + offset_of("tlb")
        self._user = self._supervisor + TLB_ENTRIES * TLB_ENTRY
        self.reset()

    def reset(self) -> None:
        """As after power-on (SDM vol. 3, 9.1.1)."""
        s = self.state
        for n in range(16):
            s.gpr[n] = 0
        s.gpr[RDX] = 0x600
        s.flags = 2
        self.rflags = 2
        s.rip = 0xFFF0
        for n, seg in enumerate(s.seg):
            seg.selector, seg.base, seg.limit, seg.attr = 0, 0, 0xFFFF, 0x93
            if n >= Seg.LDTR:
                seg.attr = 0x82 if n == Seg.LDTR else 0x8B
        s.seg[Seg.CS].selector, s.seg[Seg.CS].base, s.seg[Seg.CS].attr = 0xF000, 0xFFFF0000, 0x9B
        s.gdt_base = s.idt_base = 0
        s.gdt_limit = s.idt_limit = 0xFFFF
        s.cr0, s.cr2, s.cr3, s.cr4, s.cr8, s.efer, s.xcr0 = 0x60000010, 0, 0, 0, 0, 0, 1
        s.dr6, s.dr7 = DR6_FIXED, 0x400
        s.fpu_cw, s.fpu_sw, s.fpu_tag, s.mxcsr = 0x40, 0, 0x5555, 0x1F80
        s.pat = 0x0007_0406_0007_0406
        self.mode_changed()

    # What the caller sees of the state
    @property
    def rflags(self) -> int:
        return read_rflags(self.state)

    @rflags.setter
    def rflags(self, value: int) -> None:
        write_rflags(self.state, value)

    @property
    def cpl(self) -> int:
        s = self.state
        if not s.cr0 & CR0_PE:
            return 0
        return 3 if self.rflags & Flag.VM else (s.seg[Seg.SS].attr >> 5) & 3

    def can_take_interrupt(self) -> bool:
        """IF is set, and no STI, MOV SS or unfinished instruction holds interrupts off."""
        return bool(self.state.flags & IF) and not (self.in_shadow() or self.mid_instruction())

    def in_shadow(self) -> bool:
        s = self.state
        return bool(s.shadow and s.rip == s.shadow_rip and s.insn_count == s.shadow_count)

    def mid_instruction(self) -> bool:
        """The instruction at RIP has made an MMIO access: an event now would have it made twice."""
        s = self.state
        done = s.replay_count and s.rip == s.replay_rip and s.insn_count == s.replay_insn
        return bool(done)

    def mode_changed(self) -> None:
        """Recomputes what translations depend on, after control registers, segments or flags were
        written.
        """
        s = self.state
        mode = Mode(0)
        cs = s.seg[Seg.CS].attr
        if s.efer & EFER_LMA:
            mode |= Mode.LONG
        if s.efer & EFER_LMA and cs & (1 << 13):
            mode |= Mode.CODE64
        else:
            if cs & (1 << 14) and s.cr0 & CR0_PE:
                mode |= Mode.CODE32
            if s.seg[Seg.SS].attr & (1 << 14):
                mode |= Mode.STACK32
        if s.cr0 & CR0_PE:
            mode |= Mode.PROTECTED
        if s.cr0 & (CR0_EM | CR0_TS):
            mode |= Mode.NM
        if s.cr0 & CR0_TS:
            mode |= Mode.SSE_NM
        if s.cr0 & CR0_EM or not s.cr4 & CR4_OSFXSR:
            mode |= Mode.SSE_UD
        if s.flags & TF or s.dr7 & 0xFF or self.single_step:
            mode |= Mode.STEP
        if not mode & Mode.CODE64:
            mode_word = int(mode) | (s.seg[Seg.CS].base & 0xFFF) << 16
        else:
            mode_word = int(mode)
        s.mode = mode_word
        s.jump_key += 1 << 32
        s.sse_unmasked = int(~s.mxcsr & 0x1F80 != 0)

    def flush_tlb(self) -> None:
        self._call["flush_tlb"](self.address, 0)

    # Requests
    def request_exit(self) -> None:
        """Any thread: `run` returns REQUEST soon. Not lost if the vCPU is not running; then the
        next `run` returns at once.
        """
        self._requested = True
        self.state.exit_request = 1

    def pending_interrupt(self, pending: bool) -> None:
        """Whether `run` is to return IRQ_WINDOW as soon as an interrupt can be taken."""
        self.state.irq_pending = int(pending)

    def memory_may_have_changed(self) -> None:
        """Userspace ran, and may have written code: pages are compared when next entered."""
        self.state.stay = self.engine.next_stay()
        self.state.jump_key += 1 << 32

    def finish_instruction(self) -> None:
        """The next `run` executes the one instruction that holds events off, and says REQUEST."""
        self._one_first = True

    # Running
    def run(self) -> Exit:
        """Executes the guest until the caller is needed."""
        while True:
            if self._shutdown:
                self._shutdown = False
                return Exit.SHUTDOWN
            if self._requested:
                self._requested = False
                return Exit.REQUEST
            if self.state.tick:
                self.state.tick = 0
                return Exit.REQUEST
            waiting = self.state.irq_pending and self.state.flags & IF
            if waiting and self.can_take_interrupt():
                return Exit.IRQ_WINDOW
            try:
                if self.state.mode & STEP:
                    found = stepping.step(self)
                elif self._one_first:
                    self._one_first = False
                    found = self._out_of_shadow() or Exit.REQUEST
                elif waiting:
                    found = self._out_of_shadow()
                else:
                    self._enter()
                    found = self.deal_with_exit()
            except GuestFault as fault:
                found = self._deliver(fault)
            except Leave as leave:
                found = leave.exit
            except Shutdown:
                found = Exit.SHUTDOWN
            if found is not None:
                return found

    def _enter(self) -> None:
        state, gate = self.state, self.engine.gate
        gate.enter()
        state.exit_request = 0
        if self._requested or state.tick or gate.closed:
            state.exit_request = 1
        self._native(self.address)
        gate.leave()

    def deal_with_exit(self) -> Exit | None:
        """Deals with why native code was left; an Exit if the caller must."""
        kind = self.state.exit_kind
        handler = INTERNAL.get(kind)
        return handler(self) if handler else EXITS[kind]

    def _requested_exit(self) -> Exit | None:
        return None  # `run` looks at what was requested

    def _translate(self) -> Exit | None:
        s = self.state
        if self.engine.translate(self, s.rip, s.mode, s.link_from) is None:
            return self._noted()
        return None

    def _noted(self) -> Exit | None:
        """What a native routine noted: an exit, or a fault to deliver."""
        s = self.state
        if s.exit_kind not in (Exit.NONE, Exit.TRANSLATE):
            return self.deal_with_exit()
        raise self.noted_fault()

    def noted_fault(self) -> GuestFault:
        """The fault that native code left in the state."""
        s = self.state
        error = s.exc_error if s.exc_has_error else None
        return GuestFault(s.exc_vector, error, s.exc_cr2 if s.exc_vector == 14 else None)

    def _emulation(self) -> Exit:
        """An instruction that cannot be executed: its bytes, for whoever is told."""
        s = self.state
        if not s.insn_len:
            self.emulation_text = "instruction fetch from memory that no slot covers"
        return Exit.EMULATION

    def _halt(self) -> Exit:
        self.advance()
        return Exit.HLT

    def _assist(self) -> Exit | None:
        assist.execute(self)
        return None

    def _code_changed(self) -> Exit | None:
        """Userspace changed code: what was translated from that page goes."""
        self.engine.code_changed(self.state.code_write_gpa)
        return None

    def _code_write(self) -> Exit | None:
        """A store to translated code: drops that code, then lets this one instruction store."""
        s = self.state
        gpa, size = s.code_write_gpa, s.code_write_size
        self.engine.code_written(gpa, size)
        s.code_write_pass = 1
        try:
            self.execute_one()
        finally:
            s.code_write_pass = 0
        found = self.deal_with_exit()
        self.engine.code_written(gpa, size)
        return found

    def execute_one(self, *, alone: bool = False) -> None:
        """Executes one instruction natively, or finds out that it leaves."""
        s = self.state
        before = s.mode & STEP
        s.mode |= STEP
        try:
            while True:
                with nullcontext() if alone else self.engine.gate.passed():
                    s.exit_request = 1
                    self._call["run"](self.address)
                if s.exit_kind != Exit.TRANSLATE:
                    return
                s.link_from = 0
                if self.engine.translate(self, s.rip, s.mode) is None:
                    return
        finally:
            if not before:
                s.mode &= ~STEP

    def _exclusive(self) -> Exit | None:
        """A locked access across pages, or to MMIO: made while no other vCPU runs."""
        s = self.state
        s.exclusive = 1
        try:
            with self.engine.alone():
                self.execute_one(alone=True)
        finally:
            s.exclusive = 0
        return self.deal_with_exit()

    def _out_of_shadow(self) -> Exit | None:
        """Just the instruction that holds interrupts off, or its rest."""
        self.execute_one()
        return None if self.state.exit_kind == Exit.REQUEST else self.deal_with_exit()

    # Memory, for microcode in Python
    def _probe(self, name: str, va: int, size: int, *, supervisor: bool) -> int:
        s = self.state
        tlb = self._supervisor if supervisor or self.cpl != 3 else self._user
        s.replay_next = 0 if name == "start" else s.replay_next
        found = self._call[name](self.address, tlb, va & MASK64, size, s.exit_record, s.insn_count)
        if not found:
            if s.exit_kind in (Exit.MMIO, Exit.CODE_WRITE):
                raise Leave(Exit(s.exit_kind))
            raise self.noted_fault()
        return int(found)

    def read(self, va: int, size: int, *, supervisor: bool = False) -> bytes:
        """`size` bytes at a linear address; raises GuestFault."""
        s = self.state
        s.exit_kind = 0
        return ctypes.string_at(self._probe("probe_read", va, size, supervisor=supervisor), size)

    def write(self, va: int, data: bytes, *, supervisor: bool = False) -> None:
        """Writes bytes at a linear address; raises GuestFault."""
        s = self.state
        s.exit_kind = 0
        size = len(data)
        try:
            at = self._probe("probe_write", va, size, supervisor=supervisor)
        except Leave as leave:
            if leave.exit is not Exit.CODE_WRITE:
                raise
            self.engine.code_written(s.code_write_gpa, s.code_write_size)
            return self.write(va, data, supervisor=supervisor)
        ctypes.memmove(at, data, size)
        if at == self.address + offset_of("bounce"):
            self._probe("commit", va, size, supervisor=supervisor)

    def read_int(self, va: int, size: int, *, supervisor: bool = False) -> int:
        return int.from_bytes(self.read(va, size, supervisor=supervisor), "little")

    def fetch_page(self, va: int) -> int | None:
        """Host address of the page that code at `va` is in; None with the fault noted."""
        s = self.state
        s.exit_kind = 0
        tlb = self._user if self.cpl == 3 else self._supervisor
        return int(self._call["fetch_page"](self.address, tlb, va & MASK64)) or None

    # Events
    def _deliver(self, fault: GuestFault) -> Exit | None:
        s = self.state
        s.exc_vector, s.exc_has_error = fault.vector, int(fault.error is not None)
        s.exc_error = fault.error or 0
        if fault.cr2 is not None:
            s.cr2 = fault.cr2
        try:
            events.deliver(self, fault.vector, fault.error, fault=fault.vector != DB)
        except Shutdown:
            return Exit.SHUTDOWN
        return None

    def _deliver_noted(self) -> Exit | None:
        return self._deliver(self.noted_fault())

    def inject_interrupt(self, vector: int) -> None:
        """Delivers an external interrupt; the caller made sure with `can_take_interrupt`."""
        s = self.state
        s.count_interrupt += 1
        s.exc_has_error = 0
        if not self._call["deliver"](self.address, vector, EVENT):
            self._inject(vector, None, fault=False)

    def inject_nmi(self) -> None:
        """Delivers an NMI; further ones are blocked until IRET."""
        self.state.nmi_blocked = 1
        self._inject(2, None, fault=False)

    def inject_exception(
        self, vector: int, error_code: int | None = None, cr2: int | None = None
    ) -> None:
        if cr2 is not None:
            self.state.cr2 = cr2
        self._inject(vector, error_code, fault=True)

    def _inject(self, vector: int, error: int | None, *, fault: bool) -> None:
        """Delivery between two runs; a triple fault shows in the next one."""
        try:
            events.deliver(self, vector, error, fault=fault)
        except Shutdown:
            self._shutdown = True

    # Completion
    def advance(self, length: int | None = None) -> None:
        """Steps over the instruction that left, which is `length` bytes long if the caller knows
        better.
        """
        s = self.state
        if self.on_advance:
            done, self.on_advance = self.on_advance, None
            done()
        if length is None:
            length = self.engine.translator.length_of(s.exit_record)
        mask = MASK64 if s.mode & CODE64 else 0xFFFF_FFFF
        s.rip = (s.rip + length) & mask
        self.count_exited()
        s.replay_count = 0

    def count_exited(self) -> None:
        """Counts the instruction that left, and those before it that no branch has counted."""
        s = self.state
        s.insn_count += self.engine.translator.uncounted.get(s.exit_record, 1)

    def complete_in(self, data: bytes) -> None:
        """Data that the port gave: `io_size * io_count` bytes."""
        if self._completion:
            done, self._completion = self._completion, None
            done(data)
            return
        s = self.state
        size, value = s.io_size, int.from_bytes(data[: s.io_size], "little")
        keep = 0 if size == 4 else s.gpr[RAX] & ~((1 << 8 * size) - 1)
        s.gpr[RAX] = keep | value
        self.advance()

    def complete_out(self) -> None:
        """The data reached the port."""
        if self._completion:
            done, self._completion = self._completion, None
            done(b"")
        else:
            self.advance()

    @property
    def io_data(self) -> bytes:
        """What OUT or OUTS sends: `io_size * io_count` bytes."""
        s = self.state
        if self._outs is not None:
            return self._outs
        return (s.gpr[RAX] & ((1 << 8 * s.io_size) - 1)).to_bytes(s.io_size, "little")

    def complete_mmio_read(self, data: bytes) -> None:
        """Data of the pending MMIO read: `mmio_size` bytes. The instruction is executed again and
        takes them.
        """
        self._replayed(int.from_bytes(data, "little"))

    def complete_mmio_write(self) -> None:
        self._replayed(0)

    def _replayed(self, data: int) -> None:
        s = self.state
        if s.replay_count >= REPLAY:
            raise RuntimeError("an instruction made more MMIO accesses than any can")
        s.replay[s.replay_count].data = data
        s.replay_count += 1

    def complete_msr(self, value: int | None) -> None:
        """RDMSR's result, or None for WRMSR."""
        if value is not None:
            self.state.gpr[RAX] = value & 0xFFFF_FFFF
            self.state.gpr[RDX] = value >> 32 & 0xFFFF_FFFF
        self.advance(2)

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None:
        for n, value in ((RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)):
            self.state.gpr[n] = value
        self.advance()


EXITS: dict[int, Exit] = {int(kind): kind for kind in Exit}
INTERNAL: dict[int, Callable[[Cpu], Exit | None]] = {
    Exit.TRANSLATE: Cpu._translate,
    Exit.ASSIST: Cpu._assist,
    Exit.CODE_WRITE: Cpu._code_write,
    Exit.CODE_CHANGED: Cpu._code_changed,
    Exit.EXCLUSIVE: Cpu._exclusive,
    Exit.DELIVER: Cpu._deliver_noted,
    Exit.REQUEST: Cpu._requested_exit,
    Exit.EMULATION: Cpu._emulation,
    Exit.HLT: Cpu._halt,
}
