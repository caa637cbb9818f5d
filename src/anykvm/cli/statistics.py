"""`anykvm boot --stats`: what made the guest leave, and what the processor did in between."""

from __future__ import annotations

import json
import sys
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from anykvm.vmm.machine import RunResult

SHOWN_OF_A_KIND = 12
Counters = dict[str, float]


@runtime_checkable
class Counting(Protocol):
    """An engine that counts what it translates."""

    def statistics(self) -> Counters: ...


def processor_counters(vm: int) -> Counters:
    """What the software processor of a VM, given by descriptor, has done; none for the host's."""
    from anykvm import fs

    file = fs.fget(vm)
    if file is None:
        return {}
    try:
        from anykvm.x86.kvm_host import KvmX86

        kvm = file.private_data
        if not isinstance(kvm, KvmX86):
            return {}
        executed = sum(vcpu.state.insn_count for vcpu in kvm.x86_vcpus())
        translated = kvm.engine.statistics() if isinstance(kvm.engine, Counting) else {}
        return {"instructions_executed": executed, **translated}
    finally:
        fs.fput(file)


def report(result: RunResult, counters: Counters, backend: str, as_json: bool) -> None:
    """Print to standard error, which the guest's console does not use."""
    make = _json if as_json else _text
    print(make(result, counters, backend), file=sys.stderr)


def _json(result: RunResult, counters: Counters, backend: str) -> str:
    rows = result.stats.rows()
    record: dict[str, object] = {
        "backend": backend,
        "seconds": result.seconds,
        "outcome": result.outcome.kind.value,
        "status": result.outcome.status,
        "cpu": counters,
    }
    for kind, group in groupby(rows, key=lambda row: row[0]):
        record[kind] = {what: count for _, what, count in group}
    return json.dumps(record, indent=2)


def _text(result: RunResult, counters: Counters, backend: str) -> str:
    lines = [f"{backend}; {result.seconds:.2f} s; {result.outcome.message}"]
    for kind, group in groupby(result.stats.rows(), key=lambda row: row[0]):
        rows = list(group)
        lines += [f"{kind:<6}{what:<32}{count:>12,}" for _, what, count in rows[:SHOWN_OF_A_KIND]]
        left = rows[SHOWN_OF_A_KIND:]
        if left:
            rest = sum(count for _, _, count in left)
            lines.append(f"{kind:<6}{f'({len(left)} others)':<32}{rest:>12,}")
    for name, count in counters.items():
        shown = f"{count:,.2f}" if isinstance(count, float) else f"{count:,}"
        lines.append(f"{'cpu':<6}{name.replace('_', ' '):<32}{shown:>12}")
    return "\n".join(lines)
