"""The same cases on the software processor and on the host's: what differs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import fields

from .harness import machine
from .layout import STATUS, Case, Result
from .native import Native

BATCH = 2000
Undefined = Callable[[Case, Result], int]  # RFLAGS bits that the manual leaves undefined


@functools.cache
def host() -> Native:
    """The process's one child on the host's processor; it ends when this process does."""
    return Native()


def nothing_undefined(case: Case, result: Result) -> int:
    return 0


def differences(guest: Result, native: Result, undefined: int = 0) -> list[str]:
    """`field: guest's, host's` for each part that differs."""
    found = []
    for field in (f.name for f in fields(Result)):
        ours, theirs = getattr(guest, field), getattr(native, field)
        if field == "rflags":
            ours, theirs = ours & ~undefined, theirs & ~undefined
        if ours != theirs:
            found.append(f"{field}: {_show(field, ours, theirs)}")
    return found


def _show(field: str, ours: object, theirs: object) -> str:
    if field == "rflags":
        assert isinstance(ours, int)
        assert isinstance(theirs, int)
        names = [n for n, bit in STATUS.items() if (ours ^ theirs) >> bit & 1]
        return f"{ours:#x}, host {theirs:#x} ({' '.join(names)})"
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return ", ".join(
            f"{_text(k)}={_text(ours[k])} host {_text(theirs[k])}"
            for k in ours
            if ours[k] != theirs[k]
        )
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        return ", ".join(
            f"[{n}]={_text(a)} host {_text(b)}"
            for n, (a, b) in enumerate(zip(ours, theirs, strict=True))
            if a != b
        )
    return f"{_text(ours)}, host {_text(theirs)}"


def _text(value: object) -> str:
    if isinstance(value, bytes):
        return value.hex()
    return hex(value) if isinstance(value, int) else str(value)


def _describe(case: Case) -> str:
    registers = " ".join(f"{n}={v:#x}" for n, v in case.gpr.items())
    xmm = " ".join(f"xmm{n}={v:#x}" for n, v in case.xmm.items())
    memory = " ".join(f"[{a:#x}]={d.hex()}" for a, d in case.memory.items())
    flags = f"rflags={case.rflags:#x}"
    return " ".join(p for p in (case.code.hex(), registers, xmm, memory, flags) if p)


def run_both(cases: Sequence[Case]) -> list[tuple[Case, Result, Result]]:
    """Each case with the software processor's and the host's result."""
    ours, theirs = machine(), host()
    ours.prepare({c.code for c in cases})
    done: list[tuple[Case, Result, Result]] = []
    for n in range(0, len(cases), BATCH):
        batch = cases[n : n + BATCH]
        guest, places = [], []
        for case in batch:
            places.append(ours.place(case.code))
            guest.append(ours.execute(case, user=True))
        done += zip(batch, guest, theirs.run_many(batch, places), strict=True)
    return done


def compare(
    cases: Sequence[Case],
    undefined: Undefined = nothing_undefined,
    name: Callable[[Case], str] = lambda case: "",
) -> list[str]:
    """A line for each case whose results differ."""
    lines = []
    for case, guest, native in run_both(cases):
        found = differences(guest, native, undefined(case, native))
        if found:
            lines.append(f"{name(case)}: {'; '.join(found)} -- {_describe(case)}")
    return lines
