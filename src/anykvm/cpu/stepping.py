"""One instruction by itself: under RFLAGS.TF or a debugger's single step, and where a breakpoint
may be met (SDM vol. 3, 17.2 and 17.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu.debug import RF
from anykvm.cpu.state import Exit, Mode

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu


def step(cpu: Cpu) -> Exit | None:
    """Executes the instruction at RIP, or one turn of it under REP; an Exit if it leaves.

    RF counts until the instruction is complete, so it stays where that was left or faulted.
    """
    s, debug = cpu.state, cpu.debug
    debug.check_instruction()
    resumes, rip, count = debug.resumes(), s.rip, s.insn_count
    held = debug.held()
    s.flags &= ~RF
    debug.begin()
    debug.trace |= held
    try:
        cpu.execute_one()
        return cpu.deal_with_exit()
    finally:
        if s.rip == rip and s.insn_count == count:
            debug.repeating = s.exit_kind == Exit.REQUEST
            if resumes:
                s.flags |= RF
        if s.mode & Mode.STEP:
            cpu.mode_changed()
