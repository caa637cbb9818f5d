"""MXCSR between this vCPU and the host (SDM vol. 1, 10.2.3, 11.5).

While native code runs, the host's MXCSR has the guest's rounding, DAZ and FTZ, all exceptions
masked, and the sticky flags, of which `State.mxcsr` may then lack some.

Where the guest unmasked an exception (`State.sse_unmasked`), an operation stands between
`sse_begin` and `sse_end`: it is done with the flags cleared, and these looked at afterwards. An
unmasked underflow is one even where the denormal result is exact, which FTZ tells. What is not told
is whether a result that over- or underflowed so was also inexact: it is taken to be.
"""

from __future__ import annotations

from anykvm.cpu.guest import UD, XM, Guest, Routine
from anykvm.cpu.ir import Value

STICKY = 0x3F
BEFORE = 7  # invalid, denormal, divide by zero: found before anything is computed
MASKS = 0x1F80
UNDERFLOW_MASK, FTZ = 1 << 11, 1 << 15
WRITABLE = 0xFFFF
OSXMMEXCPT = 1 << 10  # of CR4


def _store_host(g: Guest) -> Value:
    at = g.field("scratch[0]")
    g.intrinsic("llvm.x86.sse.stmxcsr", "void", at)
    return at.load("i32", volatile=True)


def _load_host(g: Guest, value: Value) -> None:
    at = g.field("scratch[0]")
    at.store(value, volatile=True)
    g.intrinsic("llvm.x86.sse.ldmxcsr", "void", at)


def read_mxcsr(g: Guest) -> Value:
    """The guest's MXCSR (i32) with the flags that the host's has collected."""
    return (g.get("mxcsr") & ~STICKY) | (_store_host(g) & STICKY)


def write_mxcsr(g: Guest, value: Value) -> None:
    """Makes `value` (i32) the guest's MXCSR; reserved bits are the caller's to check."""
    g.set("mxcsr", value)
    g.set("sse_unmasked", (~value & MASKS).ne(0).zext(32))
    _load_host(g, value | MASKS)


def sse_begin() -> Routine:
    """sse_begin(): before an operation that may raise an unmasked exception."""
    f = Routine("sse_begin", "void")
    mxcsr = read_mxcsr(f)
    f.set("mxcsr", mxcsr)
    control = (mxcsr & UNDERFLOW_MASK).eq(0).select(mxcsr | FTZ, mxcsr)
    _load_host(f, (control & ~STICKY) | MASKS)
    return f


def sse_end() -> Routine:
    """sse_end(): after it. MXCSR gets the new flags; true if one is unmasked: #XM (or #UD) is
    noted.
    """
    f = Routine("sse_end", "i1")
    mxcsr, new = f.get("mxcsr"), _store_host(f) & STICKY
    unmasked = new & ~(mxcsr >> 7)
    early = (unmasked & BEFORE).ne(0)
    mxcsr = mxcsr | early.select(new & BEFORE, new)
    f.set("mxcsr", mxcsr)
    _load_host(f, mxcsr | MASKS)
    with f.If(unmasked.eq(0)):
        f.ret(f.false())
    f.fault(XM)
    with f.If((f.get("cr4") & OSXMMEXCPT).eq(0)):
        f.fault(UD)
    f.ret(f.true())
    return f


ROUTINES = (sse_begin, sse_end)
