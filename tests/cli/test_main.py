"""The command line itself: what it costs, how it refuses, how it ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from anykvm import __version__
from anykvm.cli import main
from anykvm.cli.errors import MEANINGS, CommandError, Status
from anykvm.vmm.outcome import EXIT_STATUS, OutcomeKind

HEAVY = ("llvmlite", "iced_x86", "rich", "elftools", "anykvm.cpu", "anykvm.kvm", "anykvm.vmm")


def run_process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from anykvm.cli.main import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version(capsys):
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"anykvm {__version__}\n"


def test_help_names_every_command(capsys):
    assert main.run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {row.name} " in out for row in main.COMMANDS)


def test_no_command_shows_the_help_and_is_an_error(capsys):
    assert main.run([]) == Status.USAGE
    assert "Usage: anykvm" in capsys.readouterr().out


def test_boot_help_lists_the_exit_statuses(capsys):
    assert main.run(["boot", "--help"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"{int(status)} {text}" in out for status, text in MEANINGS.items())


def test_the_parser_loads_nothing_heavy():
    program = (
        "import sys; from anykvm.cli import main; main.app()\n"
        f"print([m for m in sys.modules if m.startswith({HEAVY!r})])"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert printed.stdout == "[]\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nope"], "No such command 'nope'"),
        (["--nope"], "No such option: --nope"),
        (["boot", "--nope"], "No such option: --nope"),
        (["boot", "--kernel"], "requires an argument"),
        (["boot", "--backend", "vax"], "'vax' is not one of"),
        (["ps", "more"], "unexpected extra argument"),
        (["trace"], "Missing argument"),
    ],
)
def test_a_bad_option_is_one_line_and_status_2(arguments, complaint):
    ended = run_process(*arguments)
    assert (ended.returncode, ended.stdout) == (Status.USAGE, "")
    assert ended.stderr.startswith("anykvm: ")
    assert complaint in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (CommandError("no\nway"), 2, "anykvm: no way\n"),
        (CommandError("none", Status.UNAVAILABLE), 120, "anykvm: none\n"),
        (KeyboardInterrupt(), 130, "anykvm: interrupted\n"),
        (
            ZeroDivisionError("by zero"),
            123,
            "anykvm: internal error: ZeroDivisionError: by zero (ANYKVM_DEBUG=1 shows where)\n",
        ),
    ],
)
def test_how_errors_end(monkeypatch, capsys, error, status, said):
    def fail() -> None:
        raise error

    monkeypatch.delenv("ANYKVM_DEBUG", raising=False)
    monkeypatch.setattr(main, "COMMANDS", (main.Command("x", fail), main.Command("y", fail)))
    assert main.run(["x"]) == status
    assert capsys.readouterr().err == said


def test_debugging_shows_where(monkeypatch):
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("ANYKVM_DEBUG", "1")
    monkeypatch.setattr(main, "COMMANDS", (main.Command("x", fail), main.Command("y", fail)))
    with pytest.raises(ZeroDivisionError):
        main.run(["x"])


def test_the_machine_and_the_command_line_agree_on_statuses():
    assert EXIT_STATUS[OutcomeKind.GUEST_PANIC] == Status.GUEST_FAILED
    assert EXIT_STATUS[OutcomeKind.TRIPLE_FAULT] == Status.TRIPLE_FAULT
    assert EXIT_STATUS[OutcomeKind.INTERNAL_ERROR] == Status.INTERNAL_ERROR
    assert EXIT_STATUS[OutcomeKind.TIMEOUT] == Status.TIMEOUT
    assert EXIT_STATUS[OutcomeKind.STOPPED] == Status.INTERRUPTED


def test_a_reader_that_goes_away():
    pipeline = f"{sys.executable} -c 'from anykvm.cli.main import main; main()' boot --help | true"
    ended = subprocess.run(["bash", "-c", pipeline], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in ended.stderr
