"""Debug exceptions (SDM vol. 3, chapter 17), and whoever debugs the guest from outside.

What an instruction does that is to be trapped gathers in `trace` (it began under RFLAGS.TF, or
under a debugger's single step) and `State.debug_hit` (data and I/O breakpoints). When the
instruction, or one turn of it under REP, is complete, `retired` makes it `pending`, and the trap
comes before anything else is executed or delivered. An instruction that leaves is complete only
after its completion, so nothing is trapped early.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, NoReturn

from anykvm.cpu import watch
from anykvm.cpu.faults import GuestFault, Leave
from anykvm.cpu.guest import BP, DB
from anykvm.cpu.state import WATCHES, Exit, Flag, Mode, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

TF, RF = int(Flag.TF), int(Flag.RF)
DR6_BD, DR6_BS = 1 << 13, 1 << 14
DR6_TRAPS = 0xF
DR7_ENABLED, DR7_GD = 0xFF, 1 << 13
CR4_DE = 1 << 3
STEPPED = 1 << 32  # beside the bits of DR6: the debugger's single step is done
MOV_SS = 2  # State.shadow
KINDS = (watch.EXECUTE, watch.WRITE, watch.PORT, watch.READ | watch.WRITE)  # by R/W of DR7
LENGTHS = (1, 2, 8, 4)  # by LEN of DR7


class Debugger(NamedTuple):
    """What a debugger outside wants."""

    single_step: bool = False
    breakpoints: bool = False  # INT3 is its own
    registers: tuple[int, ...] | None = None  # DR0 to DR3 and DR7 in place of the guest's


class DebugExit(NamedTuple):
    """Why `run` returned DEBUG; `dr6` has only what happened now, `pc` is a linear address."""

    vector: int
    dr6: int
    dr7: int
    pc: int


class DebugFault(GuestFault):
    """#DB; `dr6` are the bits that it sets, `resume` whether RF is to be set on return."""

    def __init__(self, dr6: int, *, resume: bool = False) -> None:
        super().__init__(DB)
        self.dr6, self.resume = dr6, resume


class DebugUnit:
    """The debug unit of one vCPU."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.debugger = Debugger()
        self.exit = DebugExit(DB, 0, 0, 0)  # of the last DEBUG
        self.armed = False  # some breakpoint is enabled
        self.trace = 0  # what completing the instruction at hand will trap for
        self.pending = 0
        self.repeating = False  # the pending trap is between two turns of REP
        # RIP, and which of the debugger's instruction breakpoints stopped it there
        self.stopped: tuple[int, int] | None = None

    def reset(self) -> None:
        self.trace = self.pending = self.cpu.state.debug_hit = 0
        self.changed()

    # The registers
    @property
    def dr7(self) -> int:
        """The one in force."""
        own = self.debugger.registers
        return own[4] if own else self.cpu.state.dr7

    def changed(self) -> None:
        """The debug registers, or which of them are in force, changed."""
        s, dr7 = self.cpu.state, self.dr7
        if not dr7 & DR7_ENABLED and not s.watch_kinds:  # nor was any
            self.drop_stale_rf()
            return
        addresses = (self.debugger.registers or s.dr)[:WATCHES]
        all_kinds = 0
        for n, address in enumerate(addresses):
            enabled, size = dr7 >> 2 * n & 3, LENGTHS[dr7 >> 18 + 4 * n & 3]
            kinds = KINDS[dr7 >> 16 + 4 * n & 3] if enabled else 0
            s.watch[n].first, s.watch[n].kinds = address & ~(size - 1), kinds
            s.watch[n].last = address | size - 1
            all_kinds |= kinds
        self.armed = bool(all_kinds)
        before, s.watch_kinds = s.watch_kinds, all_kinds
        if before or all_kinds:
            self.cpu.flush_tlb()
        self.drop_stale_rf()

    def attach(self, debugger: Debugger, *, finishing: bool = False) -> None:
        """From now on this debugger; `finishing`: an instruction that left is still to be
        completed, and counts as a step.
        """
        s, self.debugger = self.cpu.state, debugger
        self.pending &= ~STEPPED
        stepping = STEPPED if finishing and debugger.single_step else 0
        self.trace = self.trace & ~STEPPED | stepping
        self.changed()
        if self.stopped and s.rip == self.stopped[0] and self._at_rip() & ~self.stopped[1]:
            s.flags &= ~RF  # that was for another breakpoint there
        self.cpu.mode_changed()

    # RF is not cleared by native code: it counts where it was loaded and nowhere else.
    def resumes(self) -> bool:
        """RF holds instruction breakpoints off."""
        s = self.cpu.state
        return bool(s.flags & RF and s.rip == s.resume_rip)

    def drop_stale_rf(self) -> None:
        if self.cpu.state.flags & RF and not self.resumes():
            self.cpu.state.flags &= ~RF

    # Before, during and after an instruction
    def after_mov_ss(self) -> bool:
        return self.cpu.state.shadow == MOV_SS and self.cpu.in_shadow()

    def check_instruction(self) -> None:
        """Instruction breakpoints at RIP: a fault, unless RF or a MOV SS before holds it off."""
        cpu = self.cpu
        if not cpu.state.watch_kinds & watch.EXECUTE or self.resumes() or self.after_mov_ss():
            return
        hit = self._at_rip()
        if hit and self.intercepts():
            # VMX saves the RFLAGS that the fault would have pushed (SDM vol. 3, 28.3.3), so a
            # debugger that goes on without more ado gets past its breakpoint.
            cpu.state.flags |= RF
            cpu.state.resume_rip = cpu.state.rip
            self.stopped = cpu.state.rip, hit
        if hit:
            self.report(hit)

    def _at_rip(self) -> int:
        """The instruction breakpoints there, as DR6 tells them."""
        linear = self.pc()
        found = enumerate(self.cpu.state.watch)
        return sum(1 << n for n, w in found if w.kinds & watch.EXECUTE and w.first == linear)

    def begin(self) -> None:
        """An instruction begins that is executed alone."""
        s = self.cpu.state
        self.trace = DR6_BS if s.flags & TF else 0
        if self.debugger.single_step:
            self.trace |= STEPPED
        s.debug_hit = s.untraced = 0
        self.repeating = False

    def retired(self) -> None:
        """An instruction is complete, or a turn of it."""
        s = self.cpu.state
        trace = self.trace & ~DR6_BS if s.untraced else self.trace
        self.pending |= trace | s.debug_hit
        self.trace = s.debug_hit = 0

    def delivering(self) -> None:
        """An event is delivered in place of what the instruction at hand would have been."""
        self.trace &= STEPPED | DR6_TRAPS
        self.cpu.state.debug_hit = 0

    def note_port(self) -> None:
        """I/O breakpoints (CR4.DE), for the port access that is complete."""
        s = self.cpu.state
        if not s.cr4 & CR4_DE:
            return
        first, end = s.io_port, s.io_port + s.io_size
        for n, found in enumerate(s.watch):
            if found.kinds & watch.PORT and first <= found.last and found.first < end:
                s.debug_hit |= 1 << n

    def one_at_a_time(self) -> bool:
        """Whether string instructions stop after each turn."""
        return self.armed or bool(self.trace)

    # Traps
    def trap(self) -> None:
        """Raises for what is pending. After MOV SS it waits for one more instruction, and the
        single step of MOV SS itself is lost (SDM vol. 3, 6.8.3), but not the debugger's.
        """
        bits = self.pending
        if self.after_mov_ss() and not bits & STEPPED:
            self.pending = bits & ~DR6_BS
            return
        self.pending = 0
        self.report(bits, resume=self.repeating)

    def held(self) -> int:
        """Takes what waits behind MOV SS, to be added to what the next instruction does."""
        held, self.pending = self.pending, 0
        return held

    def drop_trap(self) -> None:
        """The registers are written: a trap that is pending is not theirs."""
        self.pending = 0

    def trap_pending(self) -> bool:
        """#DB comes before the next instruction, and before any interrupt."""
        return bool(self.pending)

    def take_trap(self) -> int:
        """The guest's trap, for who saves its state before it can be delivered; 0 for none."""
        if self.after_mov_ss() or self.intercepts():
            return 0
        bits, self.pending = self.pending, 0
        return bits

    def take_step(self) -> bool:
        """Whether the debugger's single step is done; then `exit` says so."""
        if not self.pending & STEPPED:
            return False
        bits, self.pending = self.pending, 0
        self.leave(DB, bits)
        return True

    def intercepts(self) -> bool:
        """Whether #DB is the debugger's."""
        return self.debugger.single_step or self.debugger.registers is not None

    def report(self, bits: int, *, resume: bool = False) -> NoReturn:
        """#DB, for the debugger if it asked for any, else for the guest."""
        if self.intercepts() and not (bits & DR6_BD and self.debugger.registers is None):
            self.leave(DB, bits)
            raise Leave(Exit.DEBUG)
        raise DebugFault(bits, resume=resume)

    def leave(self, vector: int, bits: int = 0) -> None:
        """Fills in `exit`."""
        dr6 = bits & ~STEPPED | (DR6_BS if bits & STEPPED else 0)
        self.exit = DebugExit(vector, dr6, self.dr7, self.pc())

    def breakpoint(self) -> None:
        """INT3: leaves if it is the debugger's."""
        if self.debugger.breakpoints:
            self.leave(BP)
            raise Leave(Exit.DEBUG)

    def icebp(self) -> None:
        """INT1: leaves, with RIP at it, where #DB is the debugger's."""
        if self.intercepts():
            self.leave(DB)
            raise Leave(Exit.DEBUG)
        self.entered(0)

    def entered(self, bits: int | None) -> None:
        """#DB is delivered: DR6 tells why, and the handler may touch debug registers."""
        s = self.cpu.state
        if bits is not None:
            s.dr6 = s.dr6 & ~DR6_TRAPS | bits
        if s.dr7 & DR7_GD:
            s.dr7 &= ~DR7_GD
            self.changed()

    def pc(self) -> int:
        """RIP as a linear address."""
        s = self.cpu.state
        if s.mode & Mode.CODE64:
            return s.rip
        return (s.rip + s.seg[Seg.CS].base) & 0xFFFF_FFFF
