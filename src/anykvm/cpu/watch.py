"""Breakpoints in native code (SDM vol. 3, 17.2): accesses against `State.watch`.

A page with a data breakpoint stays out of the soft-TLB, so that each access to it comes to
`probe_read` or `probe_write`, which ask here; all other pages are accessed as ever. An access that
meets a breakpoint is abandoned where `watch_abort` is set, and the instruction executed alone; then
what it meets is noted in `debug_hit`, and the trap comes after it. Code in a page with an
instruction breakpoint is executed one instruction at a time by Python (stepping.py): `find` does
not enter it.
"""

from __future__ import annotations

from anykvm.cpu.guest import TLB_READ, TLB_WRITE, Routine
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.state import WATCHES, Exit, Mode

# What a breakpoint is for: bits of `Watch.kinds`
EXECUTE, WRITE, READ, PORT = 1, 2, 4, 8


def _kinds(f: Routine, n: int) -> Value:
    return f.get(f"watch[{n}].kinds")


def _same_page(f: Routine, n: int, va: Value) -> Value:
    """Whether breakpoint `n` looks at the page of `va`; aligned as they are, none crosses one."""
    return ((f.get(f"watch[{n}].first") ^ va) >> 12).eq(0)


def watched() -> Routine:
    """watched(va, size, kinds): false where the access is to be abandoned."""
    f = Routine("watched", "i1", ("va", "i64"), ("size", "i64"), ("kinds", "i32"))
    va, end = f["va"], f["va"] + (f["size"] - 1)
    hit = f.var(f.const(0, 32), 32)
    for n in range(WATCHES):
        meets = va.ule(f.get(f"watch[{n}].last")) & end.uge(f.get(f"watch[{n}].first"))
        with f.If(meets & (_kinds(f, n) & f["kinds"]).ne(0)):
            hit.set(hit.get() | 1 << n)
    with f.If(hit.get().eq(0)):
        f.ret(f.true())
    with f.If(f.get("watch_abort").ne(0)):
        f.set("exit_kind", int(Exit.WATCH))
        f.ret(f.false())
    f.set("debug_hit", f.get("debug_hit") | hit.get())
    f.ret(f.true())
    return f


def keep_out() -> Routine:
    """keep_out(slot, va, never): takes the tags of a watched page out of its new TLB entry."""
    f = Routine("keep_out", "void", ("slot", PTR), ("va", "i64"), ("never", "i64"))
    for n in range(WATCHES):
        for kind, tag in ((READ, TLB_READ), (WRITE, TLB_WRITE)):
            with f.If(_same_page(f, n, f["va"]) & (_kinds(f, n) & kind).ne(0)):
                f["slot"].offset(tag).store(f["never"], volatile=True, align=8)
    f.ret()
    return f


def breaks_in() -> Routine:
    """breaks_in(linear): whether the page has an instruction breakpoint, and is not stepped through
    already.
    """
    f = Routine("breaks_in", "i1", ("linear", "i64"))
    found = f.false()
    for n in range(WATCHES):
        found = found | (_same_page(f, n, f["linear"]) & (_kinds(f, n) & EXECUTE).ne(0))
    f.ret(found & (f.get("mode") & int(Mode.STEP)).eq(0))
    return f


def abandon_if_watched(f: Routine, kind: int, abandoned: Value) -> None:
    """The function returns `abandoned` where its access (`va`, `size`) has to wait."""
    with f.If(f.get("watch_kinds").ne(0)):
        done = f.call("@watched", "i1", f.cpu, f["va"], f["size"], f.const(kind, 32))
        with f.If(done ^ 1):
            f.ret(abandoned)


ROUTINES = (watched, keep_out, breaks_in)
