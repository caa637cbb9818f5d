"""How `anykvm stat` shows its counters: a screen that refreshes, tables, lines, or JSON."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING

from anykvm.cli.rates import EVERYTHING, Period, Row

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from anykvm.api.stats import Stats

Show = Callable[[list[Period]], None]
COLUMNS_OF_VCPUS = 8
LINES_AROUND = 4  # a table's heading, columns' names, rule and the line after it
PIPE_WIDTH = 10_000
NSEC_PER_SEC = 1_000_000_000


@contextmanager
def output(as_json: bool, once: bool, interval: float, wanted: re.Pattern[str]) -> Iterator[Show]:
    """A function that shows what one interval brought."""
    if as_json:
        yield lambda periods: print(json.dumps(record(periods, wanted)), flush=True)
    elif once:
        yield lambda periods: _print_tables(periods, wanted)
    elif not sys.stdout.isatty():
        yield lambda periods: _log(periods, wanted)
    else:
        with _screen(interval, wanted) as show:
            yield show


# Terminals.


@contextmanager
def _screen(interval: float, wanted: re.Pattern[str]) -> Iterator[Show]:
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(markup=False, highlight=False)
    with Live(console=console, screen=True, auto_refresh=False) as live:

        def show(periods: list[Period]) -> None:
            room = shutil.get_terminal_size().lines - 1
            rows = max(room // len(periods) - LINES_AROUND, 3)
            foot = f"every {interval:g} s; Ctrl-C ends"
            parts = [part for p in periods for part in (heading(p), table(p, wanted, rows))]
            live.update(Group(*parts, foot), refresh=True)

        yield show


def _print_tables(periods: list[Period], wanted: re.Pattern[str]) -> None:
    from rich.console import Console

    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(markup=False, highlight=False, width=width)
    for period in periods:
        console.print(heading(period))
        console.print(table(period, wanted))


def heading(period: Period) -> Text:
    """Which VM it is, in one line."""
    from rich.text import Text

    words = " ".join(f"{period.now.id}  {period.now.command}".split())
    return Text(words, style="bold", no_wrap=True, overflow="ellipsis")


def table(period: Period, wanted: re.Pattern[str] = EVERYTHING, most: int | None = None) -> Table:
    """A VM's counters, as many rows as there is room for; a column for each of the first vCPUs."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    vcpus = [stats.id.rpartition("/")[2] for stats in period.now.vcpus][:COLUMNS_OF_VCPUS]
    live = bool(period.seconds)
    made.add_column("STATISTIC", no_wrap=True)
    for name in ["TOTAL", *(["/S"] if live else []), *vcpus]:
        made.add_column(name, justify="right", no_wrap=True)
    for row in period.rows(wanted)[:most]:
        made.add_row(*_cells(row, live, len(vcpus)))
    return made


def _cells(row: Row, live: bool, vcpus: int) -> Iterator[str]:
    yield row.name
    yield _total(row.total, row.is_time)
    if live:
        yield _rate(row.rate, row.is_time)
    for total, rate in zip(row.vcpu_totals[:vcpus], row.vcpu_rates[:vcpus], strict=True):
        yield _rate(rate, row.is_time) if live else _total(total, row.is_time)


def _total(total: int, is_time: bool) -> str:
    return f"{total / NSEC_PER_SEC:,.2f} s" if is_time else f"{total:,}"


def _rate(rate: float | None, is_time: bool) -> str:
    """A second's worth; of time, how much of the second it was."""
    if rate is None:
        return ""
    return f"{rate / NSEC_PER_SEC:.1%}" if is_time else f"{rate:,.0f}"


# Files and pipes.


def _log(periods: list[Period], wanted: re.Pattern[str]) -> None:
    """Moment, VM, statistic, total, rate: a line for what has changed."""
    moment = datetime.now().astimezone().isoformat(timespec="milliseconds")
    for period in periods:
        for row in period.rows(wanted):
            if row.rate:
                print(moment, period.now.id, row.name, row.total, f"{row.rate:.1f}")
    sys.stdout.flush()


def record(periods: list[Period], wanted: re.Pattern[str] = EVERYTHING) -> dict[str, object]:
    """A sample for programs: every value, histograms as lists, and rates once there are any."""
    return {
        "time": datetime.now().astimezone().isoformat(),
        "vms": [_vm_record(period, wanted) for period in periods],
    }


def _vm_record(period: Period, wanted: re.Pattern[str]) -> dict[str, object]:
    now = period.now
    rates = {row.name: row.rate for row in period.rows(wanted) if row.rate is not None}
    return {
        "id": now.id,
        "pid": now.pid,
        "command": now.command,
        "statistics": _values(now.stats, wanted),
        "vcpus": [{"id": s.id, "statistics": _values(s, wanted)} for s in now.vcpus],
        **({"rates": rates} if period.seconds else {}),
    }


def _values(stats: Stats, wanted: re.Pattern[str]) -> dict[str, int | list[int]]:
    return {
        name: stat.value if stat.descriptor.size == 1 else list(stat.values)
        for name, stat in stats.items()
        if wanted.search(name)
    }
