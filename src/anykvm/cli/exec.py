"""`anykvm exec -- CMD ARGS`: run any VMM, unmodified, on anykvm's /dev/kvm."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from anykvm.cli.boot import Backend
from anykvm.cli.errors import CommandError, Status
from anykvm.cli.faults import Lacks

if TYPE_CHECKING:
    from anykvm.proxy.supervisor import Supervisor


def exec_command(
    command: Annotated[list[str], typer.Argument(help="A program and its arguments, after --.")],
    backend: Annotated[
        Backend,
        typer.Option(help="Whose /dev/kvm: anykvm's (soft), Linux's (host), or what fits (auto)."),
    ] = Backend.AUTO,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the way of each KVM call there."),
    ] = None,
    cpu_model: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="What CPUID offers: max, or no more than x86-64-v1, x86-64-v2, …",
        ),
    ] = "max",
    hide_caps: Annotated[
        list[str] | None,
        typer.Option(
            "--hide-cap",
            metavar="NAME",
            help="A KVM without a capability, such as KVM_CAP_IRQFD. May be repeated.",
        ),
    ] = None,
    hide_cpuid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FEATURE",
            help="CPUID without a feature, named as in /proc/cpuinfo. May be repeated.",
        ),
    ] = None,
    failures: Annotated[
        list[str] | None,
        typer.Option(
            "--fail",
            metavar="IOCTL:ERRNO",
            help="Have an ioctl fail; with :call=N, :every=N, :times=N not always.",
        ),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="At the end, count its KVM calls on standard error.")
    ] = False,
) -> int:
    """Run a program that uses KVM, such as qemu-system-x86_64, on anykvm's /dev/kvm.

    Its exit status is this one's; so are its terminal, signals and standard streams.
    """
    from anykvm.fs.backend import choose

    lacks = Lacks(cpu_model, hide_caps or (), hide_cpuid or (), failures or ())
    if choose(backend.value).backend == "host":
        return _on_the_host(command, bool(trace or lacks or stats))
    return _supervised(command, trace, lacks, stats)


def _on_the_host(command: list[str], watched: bool) -> int:
    """The kernel's own KVM needs nobody in between."""
    if watched:
        raise CommandError("this option needs anykvm's KVM in between: add --backend soft")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise CommandError(f"{command[0]}: {error.strerror}", 127) from error


def _supervised(command: list[str], trace: Path | None, lacks: Lacks, stats: bool) -> int:
    from anykvm.proxy.front import LaunchError
    from anykvm.proxy.launch import run

    if trace is not None:
        _check_writable(trace)
    faults = lacks.faults() if lacks else None

    def set_up(_: Supervisor) -> None:
        if faults is not None:
            faults.__enter__()  # for as long as the supervisor lives
        if trace is not None:
            _attach(trace)

    def last_words(supervisor: Supervisor) -> None:
        if stats:
            _report(supervisor)

    try:
        return run(command, set_up, last_words)
    except LaunchError as error:
        raise CommandError(str(error), error.status) from error
    except OSError as error:
        raise CommandError(f"cannot start: {error}", Status.UNAVAILABLE) from error


def _check_writable(path: Path) -> None:
    try:
        path.open("w").close()
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}") from error


def _attach(path: Path) -> None:
    """From now on, in the supervisor."""
    from anykvm.cli.narrate import Narrator
    from anykvm.fs.trace import attach

    file = path.open("w", encoding="utf-8", buffering=1)
    attach(Narrator(lambda line: print(line, file=file)))


def _report(supervisor: Supervisor) -> None:
    counts = supervisor.counts.most_common()
    lines = [f"{count:12,}  {name}" for name, count in counts]
    total = sum(supervisor.counts.values())
    text = "\n".join([f"anykvm: {total:,} calls to KVM", *lines])
    print(text, file=sys.stderr, flush=True)
