"""One vCPU: its way in and out of native code, and the events that are delivered to it.

`run` returns with an `Exit` when the caller is needed; everything else (translation, microcode in
Python, single steps) happens inside. How the caller answers is in completion.py. All methods but
`request_exit` belong to the thread that runs the vCPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from anykvm.cpu import assist, events, stepping
from anykvm.cpu.completion import Completion
from anykvm.cpu.debug import DebugFault, DebugUnit
from anykvm.cpu.faults import GuestFault, Leave, Shutdown, VmExit
from anykvm.cpu.guest import BP, DB, EVENT, NMI, OF, PF, UD
from anykvm.cpu.state import Exit, Flag, Mode
from anykvm.cpu.svm import PHYSICAL, VIRTUAL, SvmUnit
from anykvm.cpu.vmcb import EventType

if TYPE_CHECKING:
    from anykvm.cpu.engine import Engine

MASK64 = 2**64 - 1
STEP, CODE64 = int(Mode.STEP), int(Mode.CODE64)
TF, IF = int(Flag.TF), int(Flag.IF)
TRAPS = frozenset((DB, BP, OF))


class Cpu(Completion):
    """A vCPU of an `Engine`."""

    def __init__(self, engine: Engine, index: int) -> None:
        super().__init__(engine, index)
        self._native = self._call["run"]
        self.native_run = engine.runtime.address["run"]  # for other native code to call
        self._requested = False
        self._one_first = False
        self.resets = 0  # of the translator, when native code was last entered
        self.debug = DebugUnit(self)
        self.svm = SvmUnit(self)
        self.emulation_text = ""
        self.reset()

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

    def _nested_fault(self) -> NoReturn:
        raise self.nested_fault()

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
