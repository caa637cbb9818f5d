"""`anykvm boot`: boot Linux to a shell, or run one command in it and exit with its status."""

from __future__ import annotations

import threading
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from anykvm.cli.errors import CommandError

UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
MAX_TIMEOUT = threading.TIMEOUT_MAX


class Backend(StrEnum):
    """Whose /dev/kvm."""

    AUTO = "auto"
    SOFT = "soft"
    HOST = "host"


def memory_size(text: str) -> int:
    """Bytes from a number with K, M, G or T; a bare number counts MiB. CommandError."""
    number, unit = (text[:-1], text[-1:].upper()) if text[-1:].isalpha() else (text, "M")
    if not number.isdecimal() or unit not in UNITS:
        raise CommandError(f"--memory {text}: expected a size such as 512M or 2G")
    return int(number) * UNITS[unit]


def boot(
    kernel: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A bzImage or vmlinux instead of Debian's."),
    ] = None,
    initrd: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An initrd instead of one with busybox."),
    ] = None,
    append: Annotated[
        str, typer.Option(metavar="TEXT", help="More for the kernel's command line.")
    ] = "",
    memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Such as 512M or 2G; a bare number counts MiB.")
    ] = "512M",
    cpus: Annotated[
        int | None, typer.Option(metavar="N", help="Processors: 1, and 2 for the demo.")
    ] = None,
    backend: Annotated[
        Backend,
        typer.Option(help="Whose /dev/kvm: anykvm's (soft), Linux's (host), or what fits (auto)."),
    ] = Backend.AUTO,
    command: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            help="Run this shell text in the guest, then exit with its status. It has no input.",
        ),
    ] = None,
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Instead of Linux, a tiny guest of anykvm's own that needs nothing from outside.",
        ),
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="Stop a guest that runs longer."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="At the end, tell on standard error what was done.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The statistics as JSON (implies --stats).")
    ] = False,
) -> int:
    """Boot Linux: an interactive shell (Ctrl-A X leaves), or one command with --exec.

    Without --kernel, Debian's newest cloud kernel and busybox are obtained once, through apt;
    --demo needs neither.
    """
    from anykvm.cli import guest, statistics

    cpus = guest.default_cpus(demo) if cpus is None else cpus
    check(cpus, timeout)
    if demo and (kernel or initrd or append or command is not None):
        raise CommandError("--demo excludes --kernel, --initrd, --append and --exec")
    check_readable("kernel", kernel)
    check_readable("initrd", initrd)
    if command is not None and initrd is not None:
        raise CommandError("--exec makes an initrd of its own: it excludes --initrd")
    size = memory_size(memory)
    chosen = guest.Choices(
        kernel, initrd, append, size, cpus, backend.value, command, timeout, demo
    )
    with guest.running(chosen) as (machine, result):
        if stats or as_json:
            counters = statistics.processor_counters(machine.vm.fd)
            statistics.report(result, counters, guest.backend_text(chosen), as_json)
    return guest.conclude(result.outcome, command is not None)


def check(cpus: int, timeout: float | None) -> None:
    """Numbers out of range. CommandError."""
    if cpus < 1:
        raise CommandError(f"--cpus {cpus}: expected 1 or more")
    if timeout is not None and not 0 < timeout < MAX_TIMEOUT:
        raise CommandError(f"--timeout {timeout:g}: expected seconds above 0")


def check_readable(what: str, path: Path | None) -> None:
    """Before anything is downloaded for the sake of a file that is not there. CommandError."""
    try:
        if path is not None:
            path.open("rb").close()
    except OSError as error:
        raise CommandError(f"cannot read the {what} {path}: {error.strerror}") from error
