"""`anykvm trace -- boot …`: run another command here, and write the way of each of its calls."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated

import typer

from anykvm.cli.errors import CommandError


def trace(
    command: Annotated[
        list[str], typer.Argument(help="An anykvm command and its options, after --.")
    ],
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="PATTERN",
            help="Show only what matches: an ioctl (KVM_SET_*), a descriptor (kvm-vm), a call or "
            "an event (kvm_pio); !PATTERN leaves out. May be repeated.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="Write there instead of standard error."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for programs.")
    ] = False,
) -> int:
    """Show the way of each call, from open(/dev/kvm) down to every KVM_RUN and its exit."""
    from anykvm.cli import main, narrate
    from anykvm.cli.filter import Filter, filtered
    from anykvm.fs.trace import attached

    if command[0] == "trace":
        raise CommandError("trace cannot trace itself: give another command, such as boot")
    with _lines(output) as write:
        sink = narrate.as_json(write) if as_json else narrate.Narrator(write)
        with attached(filtered(sink, Filter.parse(patterns or ()))):
            return main.run(command)


@contextmanager
def _lines(output: Path | None) -> Iterator[Callable[[str], None]]:
    """A function that writes whole lines, from any thread."""
    if output is None:
        # A terminal may be raw while a guest has it, where a line feed only goes down.
        yield _writer(sys.stderr, "\r\n" if sys.stderr.isatty() else "\n")
        return
    try:
        file = output.open("w", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {output}: {error.strerror}") from error
    with file:
        yield _writer(file, "\n")


def _writer(file: IO[str], end: str) -> Callable[[str], None]:
    lock = threading.Lock()

    def write(line: str) -> None:
        with lock:
            file.write(line + end)

    return write
