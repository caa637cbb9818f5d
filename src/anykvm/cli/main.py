"""The `anykvm` command: the table of commands, and how every one of them ends."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from anykvm import __version__
from anykvm.cli.boot import boot
from anykvm.cli.doctor import doctor
from anykvm.cli.errors import CommandError, Refusal, Status, epilog
from anykvm.cli.exec import exec_command
from anykvm.cli.ps import ps
from anykvm.cli.remarks import show_remarks
from anykvm.cli.stat import stat
from anykvm.cli.trace import trace

P = ParamSpec("P")
R = TypeVar("R")
SHOW_TRACEBACK = "ANYKVM_DEBUG"
# Nearly all that is made stays, translations above all: collecting as often as Python does by
# itself costs a tenth of a boot.
COLLECTING = (100_000, 20, 50)


@dataclass(frozen=True)
class Command:
    """A row: its name, the function whose parameters are its options, what it is in a few words,
    what follows the options in its help, how it parses."""

    name: str
    function: Callable[..., Any]
    summary: str = ""
    epilog: str = ""
    context: dict[str, Any] = field(default_factory=dict)


COMMANDS = (
    Command("boot", boot, "Boot Linux to a shell, or for one command.", epilog()),
    Command(
        "exec",
        exec_command,
        "Run any VMM, unmodified, on anykvm's /dev/kvm.",
        context={"allow_interspersed_args": False},
    ),
    Command("doctor", doctor, "Say what this machine offers, and what is missing."),
    Command("ps", ps, "List the processes that use KVM."),
    Command("stat", stat, "Show live counters of running VMs."),
    Command(
        "trace",
        trace,
        "Show every call that another command makes.",
        context={"allow_interspersed_args": False},
    ),
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"anykvm {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """KVM in Python: a VMM, and the /dev/kvm that it runs on."""


def app() -> typer.Typer:
    """The parser, built from the table."""
    parser = typer.Typer(
        name="anykvm",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    parser.callback()(_options)
    for row in COMMANDS:
        parser.command(
            row.name,
            short_help=row.summary or None,
            epilog=row.epilog or None,
            context_settings=row.context,
        )(_with_last_words(row.function))
    return parser


def _with_last_words(function: Callable[P, R]) -> Callable[P, R]:
    """Ctrl-C and a closed pipe as errors of the command; typer would end without a word."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            raise CommandError("interrupted", Status.INTERRUPTED) from None
        except BrokenPipeError:
            # Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise CommandError("nobody reads the output", Status.INTERNAL_ERROR) from None

    return call


def run(arguments: Sequence[str]) -> int:
    """Run one command line; its exit status. Errors are one line on standard error."""
    try:
        status = app()(list(arguments) or ["--help"], prog_name="anykvm", standalone_mode=False)
        status = status if arguments else Status.USAGE
    except CommandError as error:
        return _fail(str(error), error.status)
    except Exception as error:
        return _unexpected(error)
    return int(status or 0)


def _unexpected(error: Exception) -> int:
    if isinstance(error, Refusal):
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "anykvm"
        return _fail(f"{error.format_message().rstrip('.')}. See {path} --help.", error.exit_code)
    if os.environ.get(SHOW_TRACEBACK):
        raise error
    kind = type(error).__name__
    what = f"{kind}: {error}" if str(error) else kind
    return _fail(f"internal error: {what} ({SHOW_TRACEBACK}=1 shows where)", Status.INTERNAL_ERROR)


def _fail(message: str, status: int) -> int:
    # A terminal that was hung up takes no last words.
    with suppress(OSError):
        print("anykvm:", " ".join(message.split()), file=sys.stderr)
    return int(status)


def main() -> None:
    """The console script."""
    gc.set_threshold(*COLLECTING)
    show_remarks()
    sys.exit(run(sys.argv[1:]))
