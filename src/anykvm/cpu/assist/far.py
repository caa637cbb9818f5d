"""Far transfers, software interrupts and segment loads in Python (SDM vol. 3, 5.8 and 6.12)."""

from __future__ import annotations

from anykvm.cpu import events, segments
from anykvm.cpu.assist import vme
from anykvm.cpu.assist.core import MASK64, Assist, microcode
from anykvm.cpu.assist.intercept import check_trap
from anykvm.cpu.assist.system import mov_special
from anykvm.cpu.decode import SEGMENT
from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP, NP, TS, UD
from anykvm.cpu.segments import Descriptor
from anykvm.cpu.state import STATUS_FLAGS, Flag, Mode, Seg
from anykvm.cpu.vmcb import TASK_IRET, TASK_JMP, EventType

VECTORS = {"int3": 3, "into": 4, "int1": 1}
TASKS = frozenset((1, segments.TSS_AVAILABLE, segments.TASK_GATE))


@microcode("int", "int3", "into", "int1")
def software_interrupt(a: Assist) -> None:
    """The gate's DPL must allow it, but for INT1; RIP pushed is that of the next instruction."""
    cpu = a.cpu
    vector = VECTORS.get(a.name)
    if a.name == "int3":
        cpu.debug.breakpoint()
    if a.name == "int1":
        cpu.debug.icebp()
    assert a.next_rip is not None
    if vector is not None:
        check_trap(a, vector)
    kind = EventType.EXCEPTION
    if vector is None:
        vector, kind = int(a.i.immediate8), EventType.SOFT
        if vme.redirected(a, vector):
            vme.interrupt_vm86(a, vector, a.next_rip)
            return
    rip, a.next_rip = a.next_rip, None
    events.deliver(cpu, vector, fault=False, software=a.name != "int1", rip=rip, kind=kind)


def _far_pointer(a: Assist) -> tuple[int, int, int]:
    """Selector, offset and operand size (bytes) of a far jump or call."""
    i = a.i
    if a.code.endswith("PTR1616"):
        return i.far_branch_selector, i.far_branch16, 2
    if a.code.endswith("PTR1632"):
        return i.far_branch_selector, i.far_branch32, 4
    size = int(a.code[-2:]) // 8
    at = a.address(size + 2)
    pointer = a.cpu.read(at, size + 2)
    return int.from_bytes(pointer[size:], "little"), int.from_bytes(pointer[:size], "little"), size


def _go(a: Assist, offset: int, size: int) -> None:
    a.s.rip = offset & ((1 << 8 * size) - 1)
    a.next_rip = None
    a.cpu.mode_changed()


def _code_for_jump(a: Assist, selector: int) -> Descriptor:
    """A code segment that a jump or call without a gate may go to."""
    if not selector & 0xFFFC:
        raise GuestFault(GP, 0)
    found = segments.read_descriptor(a.cpu, selector)
    if found.system:
        raise GuestFault(GP, selector & 0xFFFC)
    cpl = a.cpu.cpl
    allowed = found.dpl <= cpl if found.conforming else found.dpl == cpl and selector & 3 <= cpl
    if not found.code or not allowed:
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    segments.check_code_size(a.cpu, selector, found)
    return segments.mark_accessed(a.cpu, selector, found)


def _gate(a: Assist, selector: int) -> tuple[int, int, int] | None:
    """A call gate's target (selector, offset, operand size) if `selector` names one."""
    if not selector & 0xFFFC:
        return None
    found = segments.read_descriptor(a.cpu, selector)
    kinds = {12: 8} if a.s.mode & Mode.LONG else {4: 2, 12: 4}
    if not found.system:
        return None
    if found.type in TASKS:
        _switch_task(a, selector, found)
    size = kinds.get(found.type)
    if size is None or found.dpl < max(a.cpu.cpl, selector & 3):
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    raw = found.raw
    offset = raw & 0xFFFF | (raw >> 48 & 0xFFFF) << 16
    if size == 8:
        at = segments.address_of(a.cpu, selector) + 8
        offset |= a.cpu.read_int(at, 4, supervisor=True) << 32
    return raw >> 16 & 0xFFFF, offset, size


def _switch_task(a: Assist, selector: int, found: Descriptor) -> None:
    """To a task that is not busy, directly or through a gate: L1's if that intercepts it."""
    if a.s.mode & Mode.LONG or found.dpl < max(a.cpu.cpl, selector & 3):
        return
    task = found.raw >> 16 & 0xFFFF if found.type == segments.TASK_GATE else selector
    reason = TASK_JMP if a.name == "jmp" else 0
    a.cpu.svm.check_task_switch(task, reason, a.next_rip or 0)


@microcode("jmp", "call")
def far_transfer(a: Assist) -> None:
    """JMP and CALL to another segment; between privilege levels through a call gate. Task switches
    raise #GP.
    """
    selector, offset, size = _far_pointer(a)
    call = a.name == "call"
    assert a.next_rip is not None
    if segments.is_real(a.cpu):
        if call:
            a.push(a.s.seg[Seg.CS].selector, size)
            a.push(a.next_rip, size)
        segments.load_real(a.cpu, Seg.CS, selector)
        _go(a, offset, size)
        return
    through = _gate(a, selector)
    if through:
        selector, offset, size = through
        _through_gate(a, selector, offset, size, call=call)
        return
    found = _code_for_jump(a, selector)
    if call:
        a.push(a.s.seg[Seg.CS].selector, size)
        a.push(a.next_rip, size)
    segments.set_code(a.cpu, selector, found, a.cpu.cpl)
    _go(a, offset, size)


def _through_gate(a: Assist, selector: int, offset: int, size: int, *, call: bool) -> None:
    cpu, s = a.cpu, a.s
    if not selector & 0xFFFC:
        raise GuestFault(GP, 0)
    found = segments.read_descriptor(cpu, selector)
    cpl = cpu.cpl
    if (
        not found.code
        or found.dpl > cpl
        or (not call and not found.conforming and found.dpl != cpl)
    ):
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    new = cpl if found.conforming else found.dpl
    assert a.next_rip is not None
    if call:
        if new < cpl:
            _inner_stack(a, new, size)
        a.push(s.seg[Seg.CS].selector, size)
        a.push(a.next_rip, size)
    segments.set_code(cpu, selector, segments.mark_accessed(cpu, selector, found), new)
    _go(a, offset, size)


def _inner_stack(a: Assist, new: int, size: int) -> None:
    """The stack of privilege level `new`, with the old one's SS:RSP on it. Gates with parameters
    copy none in IA-32e mode.
    """
    cpu, s = a.cpu, a.s
    old_ss, old_sp = s.seg[Seg.SS].selector, s.gpr[4]
    if size == 8:
        tr = s.seg[Seg.TR]
        if 4 + 8 * new + 7 > tr.limit:
            raise GuestFault(TS, tr.selector & 0xFFFC)
        s.gpr[4] = cpu.read_int(tr.base + 4 + 8 * new, 8, supervisor=True)
        segments.set_null(cpu, Seg.SS, new, new)
    else:
        events.switch_stack(cpu, new, 0)
    a.push(old_ss, size)
    a.push(old_sp, size)


@microcode("retf")
def far_return(a: Assist) -> None:
    code = a.code
    size = {"W": 2, "D": 4, "Q": 8}[code[4]]
    extra = int(a.i.immediate16) if a.i.op_count else 0
    offset, selector = a.peek(0, size), a.peek(size, size) & 0xFFFF
    if segments.is_real(a.cpu):
        a.drop(2 * size + extra)
        segments.load_real(a.cpu, Seg.CS, selector)
        _go(a, offset, size)
        return
    if selector & 3 > a.cpu.cpl:
        rsp = a.peek(2 * size + extra, size)
        ss = a.peek(3 * size + extra, size) & 0xFFFF
        _return_outward(a, selector, ss)
        a.set_sp(rsp + extra)
    else:
        found = _return_code(a, selector)
        a.drop(2 * size + extra)
        segments.set_code(a.cpu, selector, found, selector & 3)
    _go(a, offset, size)


def _return_code(a: Assist, selector: int) -> Descriptor:
    """The code segment that a return goes to."""
    if not selector & 0xFFFC:
        raise GuestFault(GP, 0)
    found = segments.read_descriptor(a.cpu, selector)
    rpl = selector & 3
    allowed = found.dpl <= rpl if found.conforming else found.dpl == rpl
    if not found.code or rpl < a.cpu.cpl or not allowed:
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    segments.check_code_size(a.cpu, selector, found)
    return segments.mark_accessed(a.cpu, selector, found)


def _return_outward(a: Assist, selector: int, ss: int) -> None:
    found = _return_code(a, selector)
    rpl = selector & 3
    if not ss & 0xFFFC and found.attr & segments.LONG and rpl != 3 and ss & 3 == rpl:
        segments.set_null(a.cpu, Seg.SS, ss, rpl)
    elif not ss & 0xFFFC:
        raise GuestFault(GP, 0)
    else:
        stack = segments.check_stack(a.cpu, ss, rpl)
        segments.set_segment(a.cpu, Seg.SS, ss, stack)
    segments.set_code(a.cpu, selector, found, rpl)
    segments.drop_outer_segments(a.cpu, rpl)
    a.cpu.mode_changed()
    a.code64 = bool(a.s.mode & Mode.CODE64)


@microcode("iret")
def interrupt_return(a: Assist) -> None:
    size = {"W": 2, "D": 4, "Q": 8}[a.code[4]]
    rip, selector, flags = (a.peek(n * size, size) for n in range(3))
    selector &= 0xFFFF
    cpu, s = a.cpu, a.s
    s.nmi_blocked = 0
    if vme.needs_vif(a):
        vme.interrupt_return_vm86(a, size)
        s.resume_rip = s.rip
        return
    if segments.is_real(cpu):
        a.drop(3 * size)
        segments.load_real(cpu, Seg.CS, selector)
        _write_flags(a, flags, size, cpl=0 if not s.cr0 & 1 else 3)
        _go(a, rip, size)
        s.resume_rip = s.rip
        return
    if cpu.rflags & Flag.NT:
        if not s.mode & Mode.LONG:  # to the task that the current one's link names
            link = cpu.read_int(s.seg[Seg.TR].base, 2, supervisor=True)
            cpu.svm.check_task_switch(link, TASK_IRET, a.next_rip or 0)
        raise GuestFault(GP, 0)
    cpl = cpu.cpl
    if flags & Flag.VM and not cpl and not s.mode & Mode.LONG:
        _return_to_vm86(a, rip, selector, flags)
        return
    if a.code64 or selector & 3 > cpl:
        rsp, ss = a.peek(3 * size, size), a.peek(4 * size, size) & 0xFFFF
        _check_rip(a, selector, rip)
        _return_outward(a, selector, ss)  # in 64-bit mode SS:RSP are popped whatever the level
        a.set_sp(rsp)
    else:
        found = _return_code(a, selector)
        a.drop(3 * size)
        segments.set_code(cpu, selector, found, selector & 3)
    _write_flags(a, flags, size, cpl=cpl)
    _go(a, rip, size)
    s.resume_rip = s.rip


def _check_rip(a: Assist, selector: int, rip: int) -> None:
    found = _return_code(a, selector)
    if found.attr & segments.LONG and rip >> 47 not in (0, (1 << 17) - 1):
        raise GuestFault(GP, 0)


def _write_flags(a: Assist, image: int, size: int, *, cpl: int) -> None:
    """What IRET may change: IOPL at CPL 0, IF where CPL <= IOPL."""
    cpu = a.cpu
    old = cpu.rflags
    mask = int(STATUS_FLAGS | Flag.TF | Flag.DF | Flag.NT)
    if size > 2:
        mask |= int(Flag.RF | Flag.AC | Flag.ID)
    if cpl <= old >> 12 & 3:
        mask |= int(Flag.IF)
    if cpl == 0:
        mask |= int(Flag.IOPL)
        if size > 2:
            mask |= int(Flag.VIF | Flag.VIP)
    cpu.rflags = old & ~mask | image & mask


def _return_to_vm86(a: Assist, rip: int, selector: int, flags: int) -> None:
    cpu, s = a.cpu, a.s
    esp, ss, es, ds, fs, gs = (a.peek(4 * n, 4) for n in range(3, 9))
    cpu.rflags = flags & 0x3F7FD7
    s.gpr[4] = esp
    order = (Seg.CS, selector), (Seg.SS, ss), (Seg.ES, es), (Seg.DS, ds), (Seg.FS, fs), (Seg.GS, gs)
    for seg, value in order:
        segments.load_real(cpu, seg, value & 0xFFFF)
    _go(a, rip & 0xFFFF, 4)
    s.resume_rip = s.rip


@microcode("mov")
def mov_segment(a: Assist) -> None:
    """MOV to a segment register, control register or debug register (see assist_system)."""
    if a.is_reg(0) and a.i.op_register(0) in SEGMENT:
        _load(a, SEGMENT[a.i.op_register(0)], a.value(1, 2) & 0xFFFF)
    else:
        mov_special(a)


def _load(a: Assist, seg: int, selector: int) -> None:
    if seg == Seg.CS:
        raise GuestFault(UD)
    segments.load_data(a.cpu, seg, selector)
    if seg == Seg.SS:
        a.holds_interrupts = True
    a.cpu.mode_changed()


@microcode("pop")
def pop_segment(a: Assist) -> None:
    size = abs(a.i.stack_pointer_increment)
    selector = a.peek(0, size) & 0xFFFF
    _load(a, SEGMENT[a.i.op_register(0)], selector)
    a.drop(size)


@microcode("lds", "les", "lss", "lfs", "lgs")
def load_far_pointer(a: Assist) -> None:
    size = int(a.code.rsplit("_M16", 1)[1]) // 8
    pointer = a.cpu.read(a.address(size + 2), size + 2)
    seg = {"lds": Seg.DS, "les": Seg.ES, "lss": Seg.SS, "lfs": Seg.FS, "lgs": Seg.GS}[a.name]
    _load(a, seg, int.from_bytes(pointer[size:], "little"))
    a.set_reg(0, int.from_bytes(pointer[:size], "little"))


@microcode("syscall", "sysret", "sysexit", "sysenter")
def fast_call(a: Assist) -> None:
    if a.name == "sysenter":
        _sysenter(a)
    elif a.name == "sysexit":
        _sysexit(a)
    else:
        raise GuestFault(UD)


def _flat(attr: int) -> Descriptor:
    return Descriptor(0, 0, 0xFFFF_FFFF, attr)


def _sysenter(a: Assist) -> None:
    a.require_protected()
    s, cpu = a.s, a.cpu
    selector = s.sysenter_cs & 0xFFFC
    if not selector:
        raise GuestFault(GP, 0)
    wide = bool(s.mode & Mode.LONG)
    cpu.rflags &= ~int(Flag.VM | Flag.IF | Flag.RF)
    segments.set_segment(cpu, Seg.CS, selector, _flat(0xA09B if wide else 0xC09B))
    segments.set_segment(cpu, Seg.SS, selector + 8, _flat(0xC093))
    s.gpr[4] = s.sysenter_esp if wide else s.sysenter_esp & 0xFFFF_FFFF
    _go(a, s.sysenter_eip, 8 if wide else 4)


def _sysexit(a: Assist) -> None:
    a.require_protected()
    a.require_cpl0()
    s, cpu = a.s, a.cpu
    if not s.sysenter_cs & 0xFFFC:
        raise GuestFault(GP, 0)
    wide = a.code.endswith("Q")
    base = (s.sysenter_cs & 0xFFFC) + (32 if wide else 16) | 3
    rip, rsp = s.gpr[2], s.gpr[1]
    if wide and any(v >> 47 not in (0, (1 << 17) - 1) for v in (rip, rsp)):
        raise GuestFault(GP, 0)
    segments.set_segment(cpu, Seg.CS, base, _flat(0xA0FB if wide else 0xC0FB))
    segments.set_segment(cpu, Seg.SS, base + 8, _flat(0xC0F3))
    s.gpr[4] = rsp & MASK64 if wide else rsp & 0xFFFF_FFFF
    _go(a, rip, 8 if wide else 4)
