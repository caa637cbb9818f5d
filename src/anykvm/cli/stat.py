"""`anykvm stat`: what the VMs of this machine count, live, in the manner of kvm_stat."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from anykvm.cli.errors import CommandError, Status

if TYPE_CHECKING:
    from anykvm.cli.counters import Sample
    from anykvm.cli.rates import Period

Show = Callable[[list["Period"]], None]


def stat(
    once: Annotated[bool, typer.Option("--once", help="Print totals once, and end.")] = False,
    interval: Annotated[
        float, typer.Option("--interval", min=0.05, metavar="SECONDS", help="Between two samples.")
    ] = 1.0,
    count: Annotated[
        int | None, typer.Option("--count", min=1, metavar="N", help="End after N intervals.")
    ] = None,
    pids: Annotated[
        list[int] | None,
        typer.Option("--pid", metavar="PID", help="Only VMs of this process. May be repeated."),
    ] = None,
    fields: Annotated[
        str, typer.Option("--fields", metavar="REGEX", help="Only statistics with such names.")
    ] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line and sample, for programs.")
    ] = False,
) -> None:
    """Show live counters of running VMs: exits by reason, interrupts, page faults, instructions.

    On a terminal a table for each VM, the busiest counters first, until Ctrl-C; elsewhere a line
    for each counter that has changed.
    """
    from anykvm.cli import stat_output
    from anykvm.cli.counters import take_sample

    wanted = _pattern(fields)
    first = take_sample(pids or ())
    if not first.vms:
        raise CommandError(_nobody(first, pids or ()), Status.UNAVAILABLE)
    with stat_output.output(as_json, once, interval, wanted) as show:
        try:
            if once:
                show(_periods(first, None))
            else:
                _watch(first, lambda: take_sample(pids or ()), interval, count, show)
        except KeyboardInterrupt:
            return  # the usual way to end it


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise CommandError(f"--fields {text}: {error}") from error


def _nobody(sample: Sample, pids: list[int] | tuple[()]) -> str:
    which = f" of process {', '.join(map(str, pids))}" if pids else ""
    hidden = sample.unreadable
    more = f"; {hidden} processes are not this user's to look into" if hidden else ""
    return f"no VM{which} runs on anykvm's KVM{more} (for Linux's KVM there is kvm_stat)"


def _watch(
    before: Sample, sample: Callable[[], Sample], interval: float, count: int | None, show: Show
) -> None:
    """Show each interval until as many have passed, or the last VM has ended."""
    show(_periods(before, None))
    for _ in _ticks(interval, count):
        now = sample()
        if not now.vms:
            print("anykvm: the last VM has ended", file=sys.stderr)
            return
        show(_periods(now, before))
        before = now


def _ticks(interval: float, count: int | None) -> Iterator[None]:
    """After each interval, on time however long what is done in between takes."""
    due, done = time.monotonic(), 0
    while count is None or done < count:
        due = max(due + interval, time.monotonic())
        time.sleep(max(due - time.monotonic(), 0))
        yield
        done += 1


def _periods(now: Sample, before: Sample | None) -> list[Period]:
    from anykvm.cli.rates import Period

    if before is None:
        return [Period(vm) for vm in now.vms]
    known = {vm.id: vm for vm in before.vms}
    return [Period(vm, known.get(vm.id), now.moment - before.moment) for vm in now.vms]
