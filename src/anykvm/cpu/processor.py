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
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from anykvm.cpu import assist, events, mmu, stepping
from anykvm.cpu.debug import DebugFault, DebugUnit
from anykvm.cpu.faults import GuestFault, Leave, Shutdown, VmExit
from anykvm.cpu.flags import read_rflags, write_rflags
from anykvm.cpu.guest import BP, DB, EVENT, NMI, OF, PF, UD
from anykvm.cpu.memory import LOG, READONLY
from anykvm.cpu.state import (
    BOUNCE,
    PAGE,
    REPLAY,
    STAY,
    TLB_ENTRIES,
    TLB_ENTRY,
    TLB_LIST,
    TSC_RATIO_BITS,
    Exit,
    Flag,
    Mode,
    Seg,
    State,
    offset_of,
)
from anykvm.cpu.svm import PHYSICAL, VIRTUAL, SvmUnit
from anykvm.cpu.vmcb import EventType, SvmExit

if TYPE_CHECKING:
    from anykvm.cpu.engine import Engine

CR0_PE, CR0_MP, CR0_EM, CR0_TS, CR0_PG = 1, 2, 4, 8, 1 << 31
CR4_PAE, CR4_OSFXSR = 1 << 5, 1 << 9
EFER_LMA = 1 << 10
DR6_FIXED = 0xFFFF_0FF0
MASK64 = 2**64 - 1
STEP, CODE64 = int(Mode.STEP), int(Mode.CODE64)
TF, RF, IF, VM = (int(f) for f in (Flag.TF, Flag.RF, Flag.IF, Flag.VM))
RAX, RCX, RDX, RBX = range(4)
TRAPS = frozenset((DB, BP, OF))


class Cpu:
    """A vCPU of an `Engine`."""

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine, self.index = engine, index
        self.space = 0  # the address space in use, and its memory
        self.memory = engine.memory
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(State) + 64)
        self.address = (ctypes.addressof(self._memory) + 63) & ~63
        self.state = State.from_address(self.address)
        page = (ctypes.c_uint8 * PAGE)()
        self._page, self._page_address = memoryview(page).cast("B"), ctypes.addressof(page)
        self._call = engine.runtime.call
        self._native = self._call["run"]
        self.native_run = engine.runtime.address["run"]  # for other native code to call
        self._requested = False
        self._shutdown = False
        self._unfinished: Callable[[], None] | None = None  # what memory was missing for
        self._one_first = False
        self.resets = 0  # of the translator, when native code was last entered
        self._completion: Callable[[bytes], None] | None = None  # of a string I/O instruction
        self._outs: bytes | None = None  # what OUTS sends
        self.on_advance: Callable[[], None] | None = None  # the rest of the instruction that left
        self.state.stay = index  # and so differs from the other vCPUs'
        self.state.tlb_listed = TLB_LIST + 1
        self.state.tsc_ratio = 1 << TSC_RATIO_BITS
        self.debug = DebugUnit(self)
        self.svm = SvmUnit(self)
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
        self.debug.reset()
        self.svm.reset()
        self.mode_changed()

    # What the caller sees of the state
    @property
    def rflags(self) -> int:
        value = read_rflags(self.state)
        return value if not value & RF or self.debug.resumes() else value & ~RF

    @rflags.setter
    def rflags(self, value: int) -> None:
        write_rflags(self.state, value)
        if value & RF:
            self.state.resume_rip = self.state.rip

    @property
    def cpl(self) -> int:
        s = self.state
        if not s.cr0 & CR0_PE:
            return 0
        return 3 if s.flags & VM else (s.seg[Seg.SS].attr >> 5) & 3

    def can_take_interrupt(self) -> bool:
        """IF is set, and no STI, MOV SS or unfinished instruction holds interrupts off."""
        if self.mid_instruction() or self.debug.pending:
            return False
        if not self.svm.idle:
            return self.svm.can_take_interrupt()
        return bool(self.state.flags & IF) and not self.in_shadow()

    def in_shadow(self) -> bool:
        s = self.state
        return bool(s.shadow and s.rip == s.shadow_rip and s.insn_count == s.shadow_count)

    def mid_instruction(self) -> bool:
        """The instruction at RIP has made an MMIO access: an event now would have it made twice. Or
        delivering an event has shut the processor down, which the next `run` says.
        """
        s = self.state
        done = s.replay_count and s.rip == s.replay_rip and s.insn_count == s.replay_insn
        return bool(done) or self._shutdown or self._unfinished is not None

    def mode_changed(self) -> None:
        """Recomputes what translations depend on, after control registers, segments or flags were
        written.
        """
        s = self.state
        mode = 0
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
        if s.flags & TF or self.debug.debugger.single_step:
            mode |= Mode.STEP
        if self.svm.guest_mode:
            mode |= Mode.GUEST
        if not mode & Mode.CODE64:
            mode |= (s.seg[Seg.CS].base & 0xFFF) << 16
        s.mode = mode
        s.jump_key += 1 << 32
        s.sse_unmasked = int(~s.mxcsr & 0x1F80 != 0)

    def use_address_space(self, space: int) -> None:
        """From now on guest-physical addresses are those of the engine's map `space`."""
        self.space, self.memory = space, self.engine.spaces[space]
        self.state.physmap = self.memory.address
        self.flush_tlb()

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
        s = self.state
        s.irq_pending = s.irq_pending & ~PHYSICAL | (PHYSICAL if pending else 0)

    def memory_may_have_changed(self) -> None:
        """Userspace ran, and may have written code: pages are compared when next entered."""
        self.state.stay += STAY
        self.state.jump_key += 1 << 32

    # The dirty ring
    def set_dirty_ring(self, address: int, entries: int, limit: int) -> None:
        """Written pages of logging slots are noted in a ring of struct kvm_dirty_gfn, whose size is
        a power of two; with `limit` entries it counts as full.
        """
        s = self.state
        s.ring, s.ring_mask, s.ring_limit = address, entries - 1, limit
        s.ring_index = s.ring_reset = 0

    def dirty_ring_full(self) -> bool:
        """Whether entries must be collected before the guest goes on."""
        s = self.state
        return bool(s.ring_mask) and s.ring_index - s.ring_reset >= s.ring_limit

    def mark_dirty(self, gpa: int, space: int) -> None:
        """The page at `gpa` of an address space was written other than by the guest."""
        with self.engine.gate.passed(), self.engine.translator.lock:
            entry = self.engine.spaces[space].entry(gpa)
            if entry is not None:
                self._call["mark_dirty"](self.address, entry)

    def finish_instruction(self) -> None:
        """The next `run` executes the one instruction that holds events off, and says REQUEST."""
        self._one_first = True

    # Running
    def run(self) -> Exit:
        """Executes the guest until the caller is needed."""
        if not self.state.mode & CODE64:
            self.state.rip &= 0xFFFF_FFFF  # EIP; userspace may have written more
        while True:
            if self._shutdown:
                self._shutdown = False
                return Exit.SHUTDOWN
            if self._unfinished is not None:
                found = self._finish_pending()
                if found is None and self._one_first:
                    self._one_first, found = False, Exit.REQUEST
                if found is not None:
                    return found
            if self._requested:
                self._requested = False
                return Exit.REQUEST
            if self.state.tick:
                self.state.tick = 0
                return Exit.REQUEST
            if self._awaited() & PHYSICAL and self.can_take_interrupt():
                return Exit.IRQ_WINDOW
            found = self._outcome(self._go_on)
            if self._one_first:
                self._one_first = False
                found = found or Exit.REQUEST
            if found is not None:
                return found

    def resume(self) -> Exit:
        """Deals with what the guest has left native code for, that was entered by `enter`, and goes
        on as `run`.
        """
        found = self._outcome(self.deal_with_exit)
        return self.run() if found is None else found

    def busy(self) -> bool:
        """Whether `run` has more to do than to enter native code."""
        debug = self.debug
        return bool(
            self._requested
            or self._shutdown
            or self._one_first
            or self._unfinished is not None
            or self._completion is not None
            or self.on_advance is not None
            or debug.pending
            or debug.armed
            or debug.trace
            or not self.svm.idle
        )

    def _outcome(self, go: Callable[[], Exit | None]) -> Exit | None:
        """What `go` comes to: an exit for the caller, or None; faults are the guest's."""
        try:
            return go()
        except GuestFault as fault:
            self._count_fault(fault)
            return self._deliver(fault)
        except VmExit as exit_:
            return self._vmexit(exit_)
        except Leave as leave:
            return leave.exit
        except Shutdown:
            return Exit.SHUTDOWN

    def _go_on(self) -> Exit | None:
        """Enters native code, or does what has to be done in its place."""
        waiting = self._awaited()
        if waiting & VIRTUAL and not (self.in_shadow() or self.debug.pending):
            self.svm.take_virtual_interrupt()
            return None
        if self.debug.pending:
            self.debug.trap()
        if self.state.mode & STEP or self.debug.pending:
            return stepping.step(self)
        if waiting or self._one_first:
            return self._out_of_shadow()
        if armed := self.debug.armed:
            self.state.watch_abort = 1
        self.enter(self._native)
        if armed:
            self.state.watch_abort = 0
        return self.deal_with_exit()

    def _awaited(self) -> int:
        """The kinds of interrupt that are pending and held off by a shadow at most."""
        s = self.state
        if not s.irq_pending:
            return 0
        if not self.svm.idle:
            return self.svm.awaited()
        return PHYSICAL if s.flags & IF else 0

    def enter(self, native: Callable[..., int], *arguments: int) -> int:
        """Calls a native routine on this vCPU that runs the guest."""
        state, engine = self.state, self.engine
        engine.gate.enter()
        state.exit_request = 0
        self.resets = engine.translator.resets
        if self._requested or state.tick or engine.gate.closed:
            state.exit_request = 1
        result = native(self.address, *arguments)
        engine.gate.leave()
        return result

    def deal_with_exit(self) -> Exit | None:
        """Deals with why native code was left; an Exit if the caller must."""
        kind = self.state.exit_kind
        handler = INTERNAL.get(kind)
        return handler(self) if handler else EXITS[kind]

    def _requested_exit(self) -> Exit | None:
        """`run` looks at what was requested."""
        s = self.state
        if s.table_write:  # accessed and dirty bits in bytes that were translated
            several, s.table_write = s.table_write > 1, 0
            if several:
                self.engine.forget_all()
            self.engine.code_written(s.table_write_gpa, 8, self.space)
        if s.debug_hit:  # SYSRET loaded TF
            self.debug.retired()
        return None

    def _step(self) -> Exit | None:
        return stepping.step(self)

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
        self.state.count_assist += 1
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
        self.engine.code_written(gpa, size, self.space)
        s.code_write_pass = 1
        try:
            self.execute_one()
        finally:
            s.code_write_pass = 0
        found = self.deal_with_exit()
        self.engine.code_written(gpa, size, self.space)
        return found

    def execute_one(self, *, alone: bool = False) -> None:
        """Executes one instruction natively, or finds out that it leaves."""
        s = self.state
        before, faults = s.mode & STEP, s.count_exception
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
            if not before and not s.flags & TF:
                s.mode &= ~STEP
            if s.exit_kind == Exit.REQUEST:
                if s.count_exception != faults:
                    self.debug.delivering()
                self.debug.retired()

    def _exclusive(self) -> Exit | None:
        """A locked access across pages, or to MMIO: made while no other vCPU runs. Whoever wants to
        know of bus locks gets all that come here, and those across cache lines.
        """
        s = self.state
        faults = s.count_exception
        s.exclusive = 1
        try:
            with self.engine.alone():
                self.execute_one(alone=True)
        finally:
            s.exclusive = 0
        done = s.exit_kind == Exit.REQUEST and s.count_exception == faults
        return self.deal_with_exit() or (Exit.BUS_LOCK if done and s.bus_lock_exits else None)

    def _out_of_shadow(self) -> Exit | None:
        """Just the instruction that holds interrupts off, or its rest."""
        if self.debug.armed:
            return stepping.step(self)
        self.execute_one()
        return None if self.state.exit_kind == Exit.REQUEST else self.deal_with_exit()

    # Memory, for microcode in Python
    def _native_access(self, name: str, va: int, size: int, *, supervisor: bool) -> None:
        """A native access between guest memory and the bounce buffer. Raises GuestFault, and Leave
        where only the caller of `run` can help.
        """
        s = self.state
        s.exit_kind = 0
        tlb = self._supervisor if supervisor or self.cpl != 3 else self._user
        with self.engine.gate.passed():  # no slot is half changed
            made = self._call[name](
                self.address, tlb, va & MASK64, size, s.exit_record, s.insn_count
            )
        if made:
            return
        if s.exit_kind == Exit.NESTED_FAULT:
            raise self.nested_fault()
        if s.exit_kind:
            raise Leave(Exit(s.exit_kind))
        raise self.noted_fault()

    def nested_fault(self) -> VmExit:
        """The fault of nested paging that native code left in the state."""
        s = self.state
        return VmExit(SvmExit.NPF, s.nested_fault_error, s.nested_fault_gpa)

    def _nested_fault(self) -> NoReturn:
        raise self.nested_fault()

    def read(self, va: int, size: int, *, supervisor: bool = False) -> bytes:
        """`size` bytes at a linear address; raises GuestFault."""
        data = b""
        while len(data) < size:
            part = min(size - len(data), BOUNCE)
            self._native_access("fetch", va + len(data), part, supervisor=supervisor)
            data += bytes(self.state.bounce[:part])
        return data

    def write(self, va: int, data: bytes, *, supervisor: bool = False) -> None:
        """Writes bytes at a linear address; raises GuestFault, with nothing written."""
        parts = [(at, data[at : at + BOUNCE]) for at in range(0, len(data), BOUNCE)]
        for at, part in parts:
            self._write_access("probe_write", va + at, len(part), supervisor=supervisor)
        for at, part in parts:
            ctypes.memmove(self.state.bounce, part, len(part))
            self._write_access("commit", va + at, len(part), supervisor=supervisor)

    def _write_access(self, name: str, va: int, size: int, *, supervisor: bool) -> None:
        """Where translated code is in the way, it goes first."""
        s = self.state
        while True:
            try:
                return self._native_access(name, va, size, supervisor=supervisor)
            except Leave as leave:
                if leave.exit is not Exit.CODE_WRITE:
                    raise
            self.engine.code_written(s.code_write_gpa, s.code_write_size, self.space)

    def host_bytes(self, address: int, size: int) -> bytes:
        """Guest memory by its host address, such as `fetch_page` gives, at most a page; Leave where
        the host has none there.
        """
        if not self._call["copy_in"](self.address, self._page_address, address, size):
            raise Leave(Exit.MEMORY_FAULT)
        return bytes(self._page[:size])

    def read_guest_physical(self, gpa: int, size: int) -> bytes | None:
        """As `read_physical`, by an address of what runs: nested paging may come in between."""
        s = self.state
        if s.nested_paging:
            with self.engine.gate.passed():
                s.exit_kind = 0
                found = self._call["nested_look"](self.address, gpa)
            if not found and s.exit_kind == Exit.NESTED_FAULT:
                raise self.nested_fault()
            if not found:
                raise Leave(Exit(s.exit_kind))
            gpa = found & mmu.ADDRESS_MASK | gpa & 0xFFF
        return self.read_physical(gpa, size)

    def read_physical(self, gpa: int, size: int) -> bytes | None:
        """Guest memory within a page; None where no slot has it."""
        with self.engine.gate.passed():  # no slot is half changed
            host = self.memory.host(gpa)
            return self.host_bytes(host, size) if host is not None else None

    def write_physical(self, gpa: int, data: bytes) -> bool:
        """Writes within a page of guest memory; false where there is none that may be written."""
        source = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        with self.engine.gate.passed(), self.engine.translator.lock:
            slot, entry = self.memory.slot_at(gpa), self.memory.entry(gpa)
            if slot is None or entry is None or slot.flags & READONLY:
                return False
            if slot.flags & LOG:
                self._call["mark_dirty"](self.address, entry)
            host = slot.hva + gpa - slot.gpa
            if not self._call["copy_in"](self.address, host, ctypes.addressof(source), len(data)):
                raise Leave(Exit.MEMORY_FAULT)
        self.engine.code_written(gpa, len(data), self.space)
        return True

    def exchange(self, gpa: int, value: int) -> int:
        """Puts a byte into guest memory, in one step; gives what was there, 0 where nothing is."""
        with self.engine.gate.passed():
            host = self.engine.memory.host(gpa)
            return self._call["exchange"](self.address, host, value) if host is not None else 0

    def read_int(self, va: int, size: int, *, supervisor: bool = False) -> int:
        return int.from_bytes(self.read(va, size, supervisor=supervisor), "little")

    def fetch_page(self, va: int) -> int | None:
        """Host address of the page that code at `va` is in; None with the fault noted."""
        s = self.state
        s.exit_kind = 0
        tlb = self._user if self.cpl == 3 else self._supervisor
        return int(self._call["fetch_page"](self.address, tlb, va & MASK64)) or None

    # Events
    def _count_fault(self, fault: GuestFault) -> None:
        """Counts an exception that Python found; native code has counted its own."""
        self.state.count_exception += 1
        self.state.count_page_fault += fault.vector == PF

    def _vmexit(self, exit_: VmExit) -> Exit | None:
        """#VMEXIT; what was under way for L2 is over."""
        try:
            self.svm.vmexit(exit_)
        except Leave as leave:
            return leave.exit
        except Shutdown:
            return Exit.SHUTDOWN
        self._unfinished = None
        return None

    def leave_guest(self, exit_: VmExit) -> None:
        """#VMEXIT between two runs; where it fails the next run says so."""
        self._shutdown = self._vmexit(exit_) is not None

    def _intercepted(self, fault: GuestFault) -> bool:
        """Whether an exception from outside led to #VMEXIT."""
        try:
            self.svm.check_fault(fault)
        except VmExit as exit_:
            self.leave_guest(exit_)
            return True
        return False

    def _deliver(self, fault: GuestFault) -> Exit | None:
        try:
            self.svm.check_fault(fault)
        except VmExit as exit_:
            return self._vmexit(exit_)
        s = self.state
        s.exc_vector, s.exc_has_error = fault.vector, int(fault.error is not None)
        s.exc_error = fault.error or 0
        if fault.cr2 is not None:
            s.cr2 = fault.cr2
        resume = fault.vector != DB
        if isinstance(fault, DebugFault):
            self.debug.entered(fault.dr6)
            resume = fault.resume
        return self._begin(partial(events.deliver, self, fault.vector, fault.error, fault=resume))

    def _deliver_noted(self) -> Exit | None:
        return self._deliver(self.noted_fault())

    def inject_interrupt(self, vector: int) -> None:
        """Delivers an external interrupt; the caller made sure with `can_take_interrupt`."""
        s = self.state
        s.count_interrupt += 1
        s.exc_has_error = 0
        self.debug.drop_stale_rf()
        with self.engine.gate.passed():
            delivered = self._call["inject"](self.address, vector, EVENT)
        if not delivered:
            self._inject(vector, None, fault=False, kind=EventType.INTR)

    def inject_nmi(self) -> None:
        """Delivers an NMI; further ones are blocked until IRET."""
        self.state.nmi_blocked = 1
        self._inject(NMI, None, fault=False, kind=EventType.NMI)

    def inject_exception(
        self,
        vector: int,
        error_code: int | None = None,
        cr2: int | None = None,
        *,
        injected: bool = False,
    ) -> None:
        """Delivers an exception; with `injected` it was on its way before, past L1's intercept."""
        if not injected and self._intercepted(GuestFault(vector, error_code, cr2)):
            return
        if cr2 is not None:
            self.state.cr2 = cr2
        self._inject(vector, error_code, fault=vector not in TRAPS)

    def inject_breakpoint(self) -> None:
        """#BP of the INT3 at RIP."""
        if self._intercepted(GuestFault(BP)):
            return
        self._inject(BP, None, fault=False, software=True, rip=self.state.rip + 1 & MASK64)

    def inject_debug(self, dr6: int | None) -> None:
        """#DB for these reasons, bits of DR6; None where that says them already."""
        fault = GuestFault(DB) if dr6 is None else DebugFault(dr6)
        if self._intercepted(fault):
            return
        self.debug.entered(dr6)
        self._inject(DB, None, fault=False)

    def _inject(
        self,
        vector: int,
        error: int | None,
        *,
        fault: bool,
        software: bool = False,
        rip: int | None = None,
        kind: EventType = EventType.EXCEPTION,
    ) -> None:
        """Delivery between two runs; a triple fault shows in the next one."""
        self.debug.drop_stale_rf()
        deliver = partial(
            events.deliver, self, vector, error, fault=fault, software=software, rip=rip, kind=kind
        )
        self._shutdown = self._begin(deliver) is Exit.SHUTDOWN

    def _begin(self, unfinished: Callable[[], None]) -> Exit | None:
        """Something whose accesses are its own, not those of the instruction at RIP."""
        self.deliver_next(unfinished)
        return self._finish_pending()

    def deliver_next(self, unfinished: Callable[[], None]) -> None:
        """As `_begin`, before the next instruction."""
        self._unfinished, self.state.replay_count = unfinished, 0

    def _finish_pending(self) -> Exit | None:
        """Delivers an event, or ends an instruction; or why that cannot be yet."""
        assert self._unfinished is not None
        self.state.replay_next = 0
        try:
            self._unfinished()
        except Leave as leave:
            return leave.exit
        except VmExit as exit_:
            return self._vmexit(exit_)
        except Shutdown:
            self._unfinished = None
            return Exit.SHUTDOWN
        self._unfinished = None
        self.state.replay_count = 0  # its accesses are over, also where RIP is as before
        return None

    # Completion
    def patch_instruction(self, data: bytes) -> None:
        """Writes over the instruction that left, with the guest's rights; where it may not be
        written the guest gets the fault.
        """
        try:
            self.write(assist.linear_rip(self), data)
        except GuestFault as fault:
            self.inject_exception(fault.vector, fault.error, fault.cr2)
        except Leave:  # to read-only memory, which nothing changes
            self.inject_exception(UD)

    def advance(self, length: int | None = None) -> None:
        """Steps over the instruction that left, which is `length` bytes long if the caller knows
        better.
        """
        s = self.state
        if self.on_advance:
            done, self.on_advance = self.on_advance, None
            done()
        s.rip = self.rip_behind(length)
        self.count_exited()
        s.replay_count = 0

    def rip_behind(self, length: int | None = None) -> int:
        """RIP behind the instruction that left, which has so many bytes if the caller knows."""
        s = self.state
        if length is None:
            length = self.engine.translator.length_of(s.exit_record)
        return (s.rip + length) & (MASK64 if s.mode & CODE64 else 0xFFFF_FFFF)

    def uncounted(self) -> int:
        """The instruction that left, and those before it that no branch has counted."""
        return self.engine.translator.uncounted.get(self.state.exit_record, 1)

    def count_exited(self) -> None:
        """Counts the instruction that left."""
        self.state.insn_count += self.uncounted()
        if self.debug.trace or self.debug.armed:
            self.debug.retired()

    def complete_in(self, data: bytes) -> None:
        """Data that the port gave: `io_size * io_count` bytes."""
        if self.debug.armed:
            self.debug.note_port()
        if self._completion:
            end, self._completion = partial(self._completion, data), None
            self._shutdown = self._begin(end) is Exit.SHUTDOWN
            return
        s = self.state
        size, value = s.io_size, int.from_bytes(data[: s.io_size], "little")
        keep = 0 if size == 4 else s.gpr[RAX] & ~((1 << 8 * size) - 1)
        s.gpr[RAX] = keep | value
        self.advance()

    def complete_out(self) -> None:
        """The data reached the port."""
        if self.debug.armed:
            self.debug.note_port()
        if self._completion:
            done, self._completion = self._completion, None
            done(b"")
        else:
            self.advance()

    def string_io(self) -> bool:
        """Whether the port access that left is of INS or OUTS."""
        return self._completion is not None

    def drop_io(self) -> None:
        """The port access that left will not be completed."""
        self._completion = self._outs = None
        self.debug.trace = 0

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

    def translate(self, va: int) -> int | None:
        """The physical address that a supervisor reads from at a linear one; None if it cannot."""
        s = self.state
        if not s.cr0 & CR0_PG:
            return va
        if not s.efer & EFER_LMA:
            va &= 0xFFFF_FFFF
        with self.engine.gate.passed():  # no slot is half changed
            found = self._call["look"](self.address, va)
        return found & mmu.ADDRESS_MASK | va & 0xFFF if found else None

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None:
        for n, value in ((RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)):
            self.state.gpr[n] = value
        self.advance()


EXITS: dict[int, Exit] = {int(kind): kind for kind in Exit}
INTERNAL: dict[int, Callable[[Cpu], Exit | None]] = {
    Exit.NONE: Cpu._noted,
    Exit.TRANSLATE: Cpu._translate,
    Exit.ASSIST: Cpu._assist,
    Exit.CODE_WRITE: Cpu._code_write,
    Exit.CODE_CHANGED: Cpu._code_changed,
    Exit.EXCLUSIVE: Cpu._exclusive,
    Exit.WATCH: Cpu._step,
    Exit.STEP_HERE: Cpu._step,
    Exit.DELIVER: Cpu._deliver_noted,
    Exit.NESTED_FAULT: Cpu._nested_fault,
    Exit.REQUEST: Cpu._requested_exit,
    Exit.EMULATION: Cpu._emulation,
    Exit.HLT: Cpu._halt,
}
