"""XGETBV and XSETBV (SDM vol. 1, 13.3): the register that says which state XSAVE manages."""

from __future__ import annotations

from anykvm.cpu.assist.core import Assist, microcode
from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP, UD

CR4_OSXSAVE = 1 << 18
XCR0_X87, XCR0_SSE = 1, 2
XCR0, XINUSE = 0, 1
RAX, RCX, RDX = 0, 1, 2
MASK32 = (1 << 32) - 1


def _require_enabled(a: Assist) -> None:
    if not a.s.cr4 & CR4_OSXSAVE:
        raise GuestFault(UD)


@microcode("xgetbv")
def xgetbv(a: Assist) -> None:
    """XCR0; as register 1, what of it is in use, which is all."""
    _require_enabled(a)
    if a.s.gpr[RCX] & MASK32 not in (XCR0, XINUSE):
        raise GuestFault(GP, 0)
    a.s.gpr[RAX], a.s.gpr[RDX] = a.s.xcr0 & MASK32, a.s.xcr0 >> 32


@microcode("xsetbv")
def xsetbv(a: Assist) -> None:
    _require_enabled(a)
    a.require_cpl0()
    value = (a.s.gpr[RDX] & MASK32) << 32 | a.s.gpr[RAX] & MASK32
    valid = value & XCR0_X87 and not value & ~(XCR0_X87 | XCR0_SSE)
    if a.s.gpr[RCX] & MASK32 != XCR0 or not valid:
        raise GuestFault(GP, 0)
    a.s.xcr0 = value
    a.cpu.mode_changed()
