"""Virtual-8086 mode with its extensions, and protected-mode virtual interrupts (SDM vol. 3, 21.2,
21.3 and 21.4): where IOPL does not let a program have IF, it has VIF instead.
"""

from __future__ import annotations

from anykvm.cpu import segments
from anykvm.cpu.assist.core import Assist, microcode
from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP
from anykvm.cpu.state import STATUS_FLAGS, Flag, Seg

CR4_VME, CR4_PVI = 1, 2
IOPL_3 = 3 << 12
TSS_MAP_BASE, REDIRECTION_BYTES = 102, 32


def _iopl(a: Assist) -> int:
    return a.cpu.rflags >> 12 & 3


def needs_vif(a: Assist) -> bool:
    """Whether this is virtual-8086 mode with IOPL below 3."""
    return bool(a.cpu.rflags & Flag.VM) and _iopl(a) < 3


def _require_vme(a: Assist, size: int) -> None:
    """The 32-bit forms, and all without the extensions, are for the monitor."""
    if not a.s.cr4 & CR4_VME or size != 2:
        raise GuestFault(GP, 0)


def _set_vif(a: Assist, on: int, *, image: int = 0) -> None:
    """#GP where interrupts wait for being enabled, and where single-stepping would begin."""
    flags = a.cpu.rflags
    if (on and flags & Flag.VIP) or image & Flag.TF:
        raise GuestFault(GP, 0)
    a.cpu.rflags = flags & ~int(Flag.VIF) | (int(Flag.VIF) if on else 0)


@microcode("cli", "sti")
def virtual_interrupt_flag(a: Assist) -> None:
    virtual = a.s.cr4 & CR4_VME if a.cpu.rflags & Flag.VM else a.s.cr4 & CR4_PVI
    if not virtual or a.cpu.cpl != 3:
        raise GuestFault(GP, 0)
    _set_vif(a, a.name == "sti")


def _image(a: Assist) -> int:
    """FLAGS as a program in virtual-8086 mode sees them: IF is VIF, IOPL 3."""
    flags = a.cpu.rflags
    vif = int(Flag.IF) if flags & Flag.VIF else 0
    return flags & 0xFFFF & ~int(Flag.IF) | vif | IOPL_3


@microcode("pushf")
def push_flags(a: Assist) -> None:
    _require_vme(a, a.operand_size)
    a.push(_image(a), 2)


@microcode("popf")
def pop_flags(a: Assist) -> None:
    _require_vme(a, a.operand_size)
    image = a.peek(0, 2)
    _set_vif(a, image & Flag.IF, image=image)
    _write_flags(a, image)
    a.drop(2)


def _write_flags(a: Assist, image: int) -> None:
    mask = int(STATUS_FLAGS | Flag.DF | Flag.NT)
    a.cpu.rflags = a.cpu.rflags & ~mask & ~int(Flag.RF) | image & mask


def interrupt_return_vm86(a: Assist, size: int) -> None:
    """IRET with IOPL below 3, to another place in virtual-8086 mode."""
    _require_vme(a, size)
    ip, cs, image = (a.peek(2 * n, 2) for n in range(3))
    _set_vif(a, image & Flag.IF, image=image)
    _write_flags(a, image)
    a.drop(6)
    segments.load_real(a.cpu, Seg.CS, cs)
    a.s.rip, a.next_rip = ip, None


def redirected(a: Assist, vector: int) -> bool:
    """Whether INT goes to the program's own handler, as the bitmap in the TSS says; #GP for one
    that is the monitor's.
    """
    cpu, tr = a.cpu, a.s.seg[Seg.TR]
    if not cpu.rflags & Flag.VM:
        return False
    if a.s.cr4 & CR4_VME:
        at = cpu.read_int(tr.base + TSS_MAP_BASE, 2, supervisor=True)
        at += vector // 8 - REDIRECTION_BYTES
        if at > tr.limit:
            raise GuestFault(GP, 0)
        if not cpu.read_int(tr.base + at, 1, supervisor=True) >> vector % 8 & 1:
            return True
    if _iopl(a) < 3:
        raise GuestFault(GP, 0)
    return False


def interrupt_vm86(a: Assist, vector: int, next_rip: int) -> None:
    """Through the vector table at linear address 0, as in real mode."""
    cpu = a.cpu
    image, gone = cpu.rflags & 0xFFFF, Flag.TF | Flag.IF
    if _iopl(a) < 3:
        image, gone = _image(a), Flag.TF | Flag.VIF
    pointer = cpu.read_int(4 * vector, 4)
    before = a.s.gpr[4]
    try:
        for value in (image, a.s.seg[Seg.CS].selector, next_rip):
            a.push(value, 2)
    except GuestFault:
        a.s.gpr[4] = before
        raise
    cpu.rflags &= ~int(gone)
    segments.load_real(cpu, Seg.CS, pointer >> 16)
    a.s.rip, a.next_rip = pointer & 0xFFFF, None
