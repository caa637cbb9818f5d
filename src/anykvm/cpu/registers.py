"""The registers of a vCPU: `State` and what follows from it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from anykvm.cpu.faults import GuestFault
from anykvm.cpu.flags import read_rflags, write_rflags
from anykvm.cpu.state import STAY, TLB_LIST, TSC_RATIO_BITS, Flag, Mode, Seg, State

if TYPE_CHECKING:
    from anykvm.cpu.debug import DebugUnit
    from anykvm.cpu.engine import Engine
    from anykvm.cpu.svm import SvmUnit

CR0_PE, CR0_EM, CR0_TS = 1, 4, 8
CR4_OSFXSR = 1 << 9
EFER_LMA = 1 << 10
DR6_FIXED = 0xFFFF_0FF0
TF, RF, IF, VM = (int(f) for f in (Flag.TF, Flag.RF, Flag.IF, Flag.VM))
RDX = 2


class Registers:
    """What a vCPU of an `Engine` holds, and what it means."""

    debug: DebugUnit
    svm: SvmUnit

    def __init__(self, engine: Engine, index: int) -> None:
        self.engine, self.index = engine, index
        self.space = 0  # the address space in use, and its memory
        self.memory = engine.memory
        self._memory = ctypes.create_string_buffer(ctypes.sizeof(State) + 64)
        self.address = (ctypes.addressof(self._memory) + 63) & ~63
        self.state = State.from_address(self.address)
        self._call = engine.runtime.call
        self._shutdown = False
        self._unfinished: Callable[[], None] | None = None  # what memory was missing for
        self.state.stay = index  # and so differs from the other vCPUs'
        self.state.tlb_listed = TLB_LIST + 1
        self.state.tsc_ratio = 1 << TSC_RATIO_BITS

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
        idle = self.svm.idle
        if (idle and not self.state.flags & IF) or self.mid_instruction() or self.debug.pending:
            return False
        return not self.in_shadow() if idle else self.svm.can_take_interrupt()

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

    def memory_may_have_changed(self) -> None:
        """Userspace ran, and may have written code: pages are compared when next entered."""
        self.state.stay += STAY
        self.state.jump_key += 1 << 32

    def noted_fault(self) -> GuestFault:
        """The fault that native code left in the state."""
        s = self.state
        error = s.exc_error if s.exc_has_error else None
        return GuestFault(s.exc_vector, error, s.exc_cr2 if s.exc_vector == 14 else None)
