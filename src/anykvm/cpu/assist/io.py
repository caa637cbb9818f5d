"""Port I/O where the permission bitmap decides, and the string forms INS and OUTS (SDM vol. 1,
chapter 19).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu.assist.core import Assist, microcode, register_name
from anykvm.cpu.decode import SEGMENT, STRING_16, STRING_32
from anykvm.cpu.faults import GuestFault, Leave
from anykvm.cpu.guest import GP, PF
from anykvm.cpu.state import Exit, Flag, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

RDX, RCX, RSI, RDI = 2, 1, 6, 7
WRITE = 2  # in a page fault's error code
CHUNK = 1024  # bytes of one string exit at most; kvm_run has a page for them


def check_port(a: Assist, port: int, size: int) -> None:
    """#GP(0) unless IOPL or the TSS's bitmap allows the access."""
    cpu, tr = a.cpu, a.s.seg[Seg.TR]
    if not a.s.cr0 & 1 or (cpu.cpl <= cpu.rflags >> 12 & 3 and not cpu.rflags & Flag.VM):
        return
    if tr.attr & 0x10000 or tr.attr & 15 not in (9, 11) or tr.limit < 103:
        raise GuestFault(GP, 0)
    base = cpu.read_int(tr.base + 102, 2, supervisor=True)
    at = base + port // 8
    if at + 1 > tr.limit:
        raise GuestFault(GP, 0)
    bits = cpu.read_int(tr.base + at, 2, supervisor=True) >> port % 8
    if bits & ((1 << size) - 1):
        raise GuestFault(GP, 0)


@microcode("in", "out")
def port(a: Assist) -> None:
    """The access was found to need the bitmap's permission; with it, it leaves as every other."""
    data, where = (0, 1) if a.name == "in" else (1, 0)
    number = a.value(where) & 0xFFFF
    size = {"AL": 1, "AX": 2}.get(register_name(a.i, data), 4)
    check_port(a, number, size)
    s = a.s
    s.io_port, s.io_size, s.io_in, s.io_count = number, size, int(a.name == "in"), 1
    raise Leave(Exit.IO)


def _mask(a: Assist) -> int:
    """How much of RSI, RDI and RCX the address size uses."""
    kinds = {a.i.op_kind(n) for n in range(a.i.op_count)}
    if kinds & set(STRING_16):
        return 0xFFFF
    return 0xFFFF_FFFF if kinds & set(STRING_32) else 2**64 - 1


@microcode("insb", "insw", "insd", "outsb", "outsw", "outsd")
def port_string(a: Assist) -> None:
    """As many elements at once as lie in a page and in a chunk; with REP the instruction is
    executed again for the rest.
    """
    s, cpu = a.s, a.cpu
    size = {"b": 1, "w": 2, "d": 4}[a.name[-1]]
    number, mask = s.gpr[RDX] & 0xFFFF, _mask(a)
    check_port(a, number, size)
    rep = a.i.has_rep_prefix or a.i.has_repne_prefix
    left = s.gpr[RCX] & mask if rep else 1
    if not left:
        return
    incoming = a.name.startswith("in")
    register = RDI if incoming else RSI
    offset = s.gpr[register] & mask
    seg = Seg.ES if incoming else SEGMENT[a.i.memory_segment]
    backward = bool(cpu.rflags & Flag.DF)
    room = (4096 - offset % 4096) // size
    single = backward or room == 0 or cpu.debug.one_at_a_time()
    count = 1 if single else min(left, room, CHUNK // size)
    linear = a.linear(seg, offset, size * count, write=incoming)
    next_rip, done = a.next_rip, count == left
    step = -size if backward else size * count

    def finish() -> None:
        _write_masked(a, register, offset + step, mask)
        if rep:
            _write_masked(a, RCX, left - count, mask)
        cpu._outs = None
        s.replay_count = 0
        if done:
            s.rip = next_rip or 0
        cpu.debug.repeating = not done
        cpu.count_exited()

    if incoming:
        _require_writable(cpu, linear, size * count)  # a fault comes before the port is read

        def arrived(data: bytes) -> None:
            nonlocal left, count, done, step
            if rep and s.gpr[RCX] & mask != left:  # the VMM has changed it meanwhile
                left = s.gpr[RCX] & mask
                count = min(count, left)
                done, step = count == left, step if single else size * count
            cpu.write(linear, data[: size * count])
            finish()

        cpu._completion = arrived
    else:
        cpu._outs = cpu.read(linear, size * count)
        cpu._completion = lambda _: finish()
    s.io_port, s.io_size, s.io_in, s.io_count = number, size, int(incoming), count
    raise Leave(Exit.IO)


def _require_writable(cpu: Cpu, linear: int, size: int) -> None:
    """Faults as a store there would."""
    try:
        data = cpu.read(linear, size)
    except GuestFault as fault:
        if fault.vector != PF or fault.error is None:
            raise
        raise GuestFault(PF, fault.error | WRITE, fault.cr2) from None
    cpu.write(linear, data)


def _write_masked(a: Assist, register: int, value: int, mask: int) -> None:
    keep = a.s.gpr[register] & ~mask if mask == 0xFFFF else 0
    a.s.gpr[register] = keep | value & mask
