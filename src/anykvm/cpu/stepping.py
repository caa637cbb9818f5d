"""One instruction at a time: RFLAGS.TF, instruction breakpoints, a debugger's single step (SDM
vol. 3, 17.2 and 17.3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import DB
from anykvm.cpu.state import Exit, Flag, Mode, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

CODE64, TF, RF = int(Mode.CODE64), int(Flag.TF), int(Flag.RF)
DR6_BS = 1 << 14


def step(cpu: Cpu) -> Exit | None:
    """One instruction under TF, breakpoints or a debugger."""
    s = cpu.state
    check_breakpoints(cpu)
    tf = bool(s.flags & TF)
    s.flags &= ~RF
    faults, rip = s.count_exception, s.rip
    cpu.execute_one()
    done = s.exit_kind == Exit.REQUEST
    if not done:
        found = cpu.deal_with_exit()
        done = found is None and s.exit_kind == Exit.ASSIST
    else:
        found = None
    cpu.mode_changed()
    if found is None and done and tf and faults == s.count_exception:
        s.dr6 |= DR6_BS
        raise GuestFault(DB)
    if cpu.single_step and found is None and s.rip != rip:
        s.dr6 |= DR6_BS
        return Exit.DEBUG
    return found


def check_breakpoints(cpu: Cpu) -> None:
    """Instruction breakpoints (SDM vol. 3, 17.2) at RIP: a fault, unless RF holds it off."""
    s = cpu.state
    if s.flags & RF:
        return
    linear = s.rip if s.mode & CODE64 else (s.rip + s.seg[Seg.CS].base) & 0xFFFF_FFFF
    hit = 0
    for n in range(4):
        enabled = s.dr7 >> (2 * n) & 3
        kind = s.dr7 >> (16 + 4 * n) & 3
        if enabled and kind == 0 and s.dr[n] == linear:
            hit |= 1 << n
    if hit:
        s.dr6 = (s.dr6 & ~0xF) | hit
        raise GuestFault(DB)
