"""`anykvm ps`: who on this machine holds KVM descriptors, with VMs, vCPUs, threads and memory."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from anykvm.cli.processes import Descriptor, KvmProcess

Justify = Literal["left", "right"]
Overflow = Literal["fold", "ellipsis"]

MIB = 1 << 20
COLUMNS: tuple[tuple[str, Justify, Overflow], ...] = (
    ("PID", "right", "fold"),
    ("USER", "left", "fold"),
    ("KVM", "left", "fold"),
    ("VMS", "right", "fold"),
    ("VCPUS", "right", "fold"),
    ("MEMORY", "right", "fold"),
    ("DESCRIPTORS", "left", "fold"),
    ("THREADS", "left", "fold"),
    ("COMMAND", "left", "ellipsis"),
)
"""Heading, and how a cell is set and what becomes of text that is too long for the terminal."""

PIPE_WIDTH = 10_000


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """List the processes that hold KVM descriptors, of anykvm and of Linux."""
    from anykvm.cli.processes import census

    found = census()
    if as_json:
        print(json.dumps([_record(process) for process in found.processes], indent=2))
    elif found.processes:
        _print_table(found.processes)
    else:
        print("no process holds KVM descriptors")
    if found.unreadable:
        print(f"anykvm: not allowed to look into {found.unreadable} more", file=sys.stderr)


def _record(process: KvmProcess) -> dict[str, object]:
    return {**asdict(process), "descriptors": [d._asdict() for d in process.descriptors]}


def _print_table(processes: list[KvmProcess]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, justify, overflow in COLUMNS:
        whole = overflow == "ellipsis"
        table.add_column(
            name, justify=justify, overflow=overflow, no_wrap=whole, min_width=len(name)
        )
    for process in processes:
        table.add_row(*_cells(process))
    # What goes to a pipe is for grep: each process in one line.
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(markup=False, highlight=False, width=width).print(table)


def _cells(process: KvmProcess) -> tuple[str, ...]:
    return (
        str(process.pid),
        process.user,
        process.backend,
        str(process.vms),
        str(process.vcpus),
        f"{process.memory / MIB:.0f} MiB",
        _descriptors(process.descriptors),
        _threads(process.threads),
        process.command,
    )


def _descriptors(descriptors: tuple[Descriptor, ...]) -> str:
    return ", ".join(f"{d.fd} {d.name}" for d in descriptors)


def _threads(names: tuple[str, ...]) -> str:
    """Each name once, with how many threads bear it where that is more than one."""
    counted = Counter(names)
    return ", ".join(f"{name} ×{n}" if n > 1 else name for name, n in counted.items())
