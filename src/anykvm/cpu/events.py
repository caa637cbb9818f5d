"""Delivery of interrupts and exceptions, written out in full (SDM vol. 3, chapter 6; vol. 1, 6.4).

Native code delivers the usual case itself (`dispatch.deliver`). Here are real mode, 16- and 32-bit
gates, stack switches with their checks, faults during delivery, the double fault, and the triple
fault.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu import segments
from anykvm.cpu.faults import GuestFault, Leave, VmExit
from anykvm.cpu.guest import DE, DF, GP, NP, PF, SS, TS
from anykvm.cpu.segments import Descriptor
from anykvm.cpu.state import Flag, Mode, Seg
from anykvm.cpu.vmcb import TASK_HAS_ERROR, EventType, SvmExit, event

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

CONTRIBUTORY = frozenset((DE, TS, NP, SS, GP))
BENIGN = -1  # an event that is no exception
INTERRUPT_GATES = {
    0xE: 4,
    0xF: 4,
    0x6: 2,
    0x7: 2,
}  # type → bytes a pushed word, outside IA-32e mode
TRAP_BIT = 1
EXT = 1  # error codes: caused by an event from outside the program
IDT = 2


def deliver(
    cpu: Cpu,
    vector: int,
    error: int | None = None,
    *,
    fault: bool,
    software: bool = False,
    rip: int | None = None,
    kind: EventType = EventType.EXCEPTION,
) -> None:
    """Delivers an event. `software` is INT n, whose gate's DPL counts; `rip` is what to push where
    not the current one; `kind` is for EXITINTINFO, should L1 intercept what happens on the way.

    Faults on the way are delivered instead, as a double fault where the manual says so. Raises
    Shutdown and VmExit.
    """
    cpu.debug.delivering()
    while True:
        saved = _snapshot(cpu)
        # An exception in L2 is no external event (on AMD's processors never).
        inside = software or (cpu.svm.guest_mode and kind is EventType.EXCEPTION)
        try:
            _deliver_once(
                cpu, vector, error, fault=fault, software=software, rip=rip, external=not inside
            )
            break
        except Leave:
            _restore(cpu, saved)
            raise
        except VmExit as exit_:  # of nested paging, or a task gate
            _restore(cpu, saved)
            exit_.during = event(kind, vector, error)
            if exit_.code == SvmExit.TASK_SWITCH and error is not None:
                exit_.info_2 = error | TASK_HAS_ERROR
            raise
        except GuestFault as next_:
            _restore(cpu, saved)
            during = event(kind, vector, error)
            cpu.svm.check_fault(next_, during)
            if next_.cr2 is not None:
                cpu.state.cr2 = next_.cr2
            exception = kind is EventType.EXCEPTION and not software
            if exception and vector == DF:
                cpu.svm.triple_fault(during)
            vector, error = _escalate(vector if exception else BENIGN, next_, external=not inside)
            if vector == DF:
                cpu.svm.check_fault(GuestFault(DF, 0), during)
            fault, software, rip, kind = True, False, None, EventType.EXCEPTION
    cpu.state.shadow = 0
    cpu.mode_changed()
    cpu.debug.retired()


def _escalate(first: int, second: GuestFault, *, external: bool) -> tuple[int, int | None]:
    """What a fault during delivery becomes (SDM vol. 3, table 6-5)."""
    benign = first not in CONTRIBUTORY | {PF}
    both = second.vector in CONTRIBUTORY or (first == PF and second.vector == PF)
    if benign or not both or (first != PF and second.vector == PF):
        bit = EXT if external and second.error is not None and second.vector != PF else 0
        return second.vector, None if second.error is None else second.error | bit
    return DF, 0


def _snapshot(cpu: Cpu) -> tuple[int, ...]:
    s = cpu.state
    cs, ss = s.seg[Seg.CS], s.seg[Seg.SS]
    return (
        *(s.rip, s.gpr[4], cpu.rflags, s.mode),
        *(cs.selector, cs.base, cs.limit, cs.attr),
        *(ss.selector, ss.base, ss.limit, ss.attr),
    )


def _restore(cpu: Cpu, saved: tuple[int, ...]) -> None:
    s = cpu.state
    s.rip, s.gpr[4], cpu.rflags, s.mode = saved[:4]
    for r, values in ((s.seg[Seg.CS], saved[4:8]), (s.seg[Seg.SS], saved[8:])):
        r.selector, r.base, r.limit, r.attr = values


def _deliver_once(
    cpu: Cpu,
    vector: int,
    error: int | None,
    *,
    fault: bool,
    software: bool,
    rip: int | None,
    external: bool,
) -> None:
    """`external`: error codes of faults on the way have EXT."""
    rip = cpu.state.rip if rip is None else rip
    if not cpu.state.cr0 & segments.CR0_PE:
        _real(cpu, vector, rip)
    elif cpu.state.mode & Mode.LONG:
        _long(cpu, vector, error, rip, fault=fault, software=software, external=external)
    else:
        _protected(cpu, vector, error, rip, fault=fault, software=software, external=external)


def _real(cpu: Cpu, vector: int, rip: int) -> None:
    """Through the vector table; no error code."""
    s = cpu.state
    if vector * 4 + 3 > s.idt_limit:
        raise GuestFault(GP)
    entry = cpu.read_int(s.idt_base + vector * 4, 4)
    flags = cpu.rflags
    sp = s.gpr[4]
    for value in (flags, s.seg[Seg.CS].selector, rip):
        sp = sp & ~0xFFFF | (sp - 2) & 0xFFFF
        cpu.write(s.seg[Seg.SS].base + (sp & 0xFFFF), (value & 0xFFFF).to_bytes(2, "little"))
    s.gpr[4] = sp
    cpu.rflags = flags & ~int(Flag.IF | Flag.TF | Flag.AC | Flag.RF)
    s.rip = entry & 0xFFFF
    s.seg[Seg.CS].selector, s.seg[Seg.CS].base = entry >> 16, (entry >> 16) << 4


def _read_gate(cpu: Cpu, vector: int, size: int, *, software: bool, external: bool) -> int:
    s = cpu.state
    error = vector * 8 | IDT | (EXT if external else 0)
    if vector * size + size - 1 > s.idt_limit:
        raise GuestFault(GP, error)
    gate = cpu.read_int(s.idt_base + vector * size, size, supervisor=True)
    kind = gate >> 40 & 0x1F
    known = {0xE, 0xF} if size == 16 else INTERRUPT_GATES
    allowed = not software or (gate >> 45 & 3) >= cpu.cpl
    if kind == segments.TASK_GATE and size == 8 and allowed and gate >> 47 & 1:
        cpu.svm.check_task_switch(gate >> 16 & 0xFFFF)
    if kind not in known or not allowed:
        raise GuestFault(GP, error)
    if not gate >> 47 & 1:
        raise GuestFault(NP, error)
    return gate


def _target(cpu: Cpu, selector: int, external: int) -> Descriptor:
    """The gate's code segment, checked."""
    if not selector & 0xFFFC:
        raise GuestFault(GP, external)
    try:
        found = segments.read_descriptor(cpu, selector)
    except GuestFault as problem:
        if problem.vector == GP and problem.error is not None:
            raise GuestFault(GP, problem.error | external) from None
        raise
    error = selector & 0xFFFC | external
    if not found.code or found.dpl > cpu.cpl:
        raise GuestFault(GP, error)
    if not found.present:
        raise GuestFault(NP, error)
    return found


def _clear_flags(cpu: Cpu, flags: int, *, interrupt_gate: bool) -> None:
    gone = Flag.TF | Flag.NT | Flag.RF | Flag.VM
    if interrupt_gate:
        gone |= Flag.IF
    cpu.rflags = flags & ~int(gone)


def _long(
    cpu: Cpu,
    vector: int,
    error: int | None,
    rip: int,
    *,
    fault: bool,
    software: bool,
    external: bool,
) -> None:
    s, ext = cpu.state, EXT if external else 0
    gate = _read_gate(cpu, vector, 16, software=software, external=external)
    selector = gate >> 16 & 0xFFFF
    code = _target(cpu, selector, ext)
    if not code.attr & segments.LONG or code.attr & segments.BIG:
        raise GuestFault(GP, selector & 0xFFFC | ext)
    cpl = cpu.cpl
    new = cpl if code.conforming else code.dpl
    ist = gate >> 32 & 7
    rsp = s.gpr[4]
    if ist or new < cpl:
        rsp = _tss_stack64(cpu, 28 + 8 * ist if ist else 4 + 8 * new)
    rsp &= ~15
    flags = cpu.rflags
    frame = [
        s.seg[Seg.SS].selector,
        s.gpr[4],
        flags | (int(Flag.RF) if fault else 0),
        s.seg[Seg.CS].selector,
        rip,
    ]
    if error is not None:
        frame.append(error)
    rsp -= 8 * len(frame)
    if rsp >> 47 not in (0, (1 << 17) - 1):
        raise GuestFault(SS, 0)
    # The new privilege level decides who writes the frame.
    data = b"".join((v & 2**64 - 1).to_bytes(8, "little") for v in reversed(frame))
    cpu.write(rsp & 2**64 - 1, data, supervisor=True)
    s.gpr[4] = rsp
    s.rip = gate & 0xFFFF | (gate >> 48 & 0xFFFF) << 16 | (gate >> 64 & 0xFFFF_FFFF) << 32
    if new < cpl:
        segments.set_null(cpu, Seg.SS, new, new)
    segments.set_code(cpu, selector, segments.mark_accessed(cpu, selector, code), new)
    _clear_flags(cpu, flags, interrupt_gate=not gate >> 40 & TRAP_BIT)


def _tss_stack64(cpu: Cpu, offset: int) -> int:
    tr = cpu.state.seg[Seg.TR]
    if offset + 7 > tr.limit:
        raise GuestFault(TS, tr.selector & 0xFFFC)
    rsp = cpu.read_int(tr.base + offset, 8, supervisor=True)
    if rsp >> 47 not in (0, (1 << 17) - 1):
        raise GuestFault(SS, 0)
    return rsp


def _protected(
    cpu: Cpu,
    vector: int,
    error: int | None,
    rip: int,
    *,
    fault: bool,
    software: bool,
    external: bool,
) -> None:
    s, ext = cpu.state, EXT if external else 0
    gate = _read_gate(cpu, vector, 8, software=software, external=external)
    size = INTERRUPT_GATES[gate >> 40 & 0xF]
    selector = gate >> 16 & 0xFFFF
    code = _target(cpu, selector, ext)
    cpl = cpu.cpl
    new = cpl if code.conforming else code.dpl
    flags = cpu.rflags
    frame = [flags | (int(Flag.RF) if fault else 0), s.seg[Seg.CS].selector, rip]
    if error is not None:
        frame.append(error)
    if new < cpl:
        frame = [s.seg[Seg.SS].selector, s.gpr[4], *frame]
        if flags & Flag.VM:
            outer = [s.seg[n].selector for n in (Seg.GS, Seg.FS, Seg.DS, Seg.ES)]
            frame = [*outer, *frame]
        switch_stack(cpu, new, ext)
    elif flags & Flag.VM:
        raise GuestFault(GP, selector & 0xFFFC | ext)
    _push_frame(cpu, frame, size)
    if flags & Flag.VM:
        for seg in (Seg.GS, Seg.FS, Seg.DS, Seg.ES):
            segments.set_null(cpu, seg, 0)
    segments.set_code(cpu, selector, segments.mark_accessed(cpu, selector, code), new)
    s.rip = gate & 0xFFFF | ((gate >> 48 & 0xFFFF) << 16 if size == 4 else 0)
    _clear_flags(cpu, flags, interrupt_gate=not gate >> 40 & TRAP_BIT)


def switch_stack(cpu: Cpu, new: int, external: int) -> None:
    """SS:ESP for privilege level `new` from the TSS."""
    s = cpu.state
    tr = s.seg[Seg.TR]
    wide = tr.attr & 8
    size, offset = (4, 4 + 8 * new) if wide else (2, 2 + 4 * new)
    if offset + size + 1 > tr.limit:
        raise GuestFault(TS, tr.selector & 0xFFFC | external)
    esp = cpu.read_int(tr.base + offset, size, supervisor=True)
    selector = cpu.read_int(tr.base + offset + size, 2, supervisor=True)
    if not selector & 0xFFFC:
        raise GuestFault(TS, external)
    stack = segments.check_stack(cpu, selector, new, vector=TS)
    segments.set_segment(cpu, Seg.SS, selector, stack)
    s.gpr[4] = esp


def _push_frame(cpu: Cpu, frame: list[int], size: int) -> None:
    s = cpu.state
    ss = s.seg[Seg.SS]
    mask = 0xFFFF_FFFF if ss.attr & segments.BIG else 0xFFFF
    sp = s.gpr[4]
    for value in frame:
        sp = sp & ~mask | (sp - size) & mask
        if (sp & mask) + size - 1 > ss.limit and not ss.attr & 4:
            raise GuestFault(SS, 0)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        cpu.write((ss.base + (sp & mask)) & 0xFFFF_FFFF, data, supervisor=True)
    s.gpr[4] = sp
