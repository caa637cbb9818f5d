"""Progress, console and statistics: what the user sees besides the guest."""

from __future__ import annotations

import io
import os
import pty
import tty

import pytest

from anykvm import fs
from anykvm.cli.console import Console
from anykvm.cli.progress import ProgressLine
from anykvm.cli.statistics import processor_counters, report
from anykvm.uapi import kvm as abi
from anykvm.vmm.machine import RunResult
from anykvm.vmm.outcome import exited
from anykvm.vmm.stats import ExitStats

STEPS = [("lists", None), ("kernel", 0.0), ("kernel", 0.5), ("kernel", 0.501), ("kernel", 1.0)]


class TerminalText(io.StringIO):
    def isatty(self) -> bool:
        return True


def progress_over(file: io.StringIO) -> str:
    with ProgressLine(file) as line:
        for what, fraction in STEPS:
            line.show(what, fraction)
    return file.getvalue()


def test_progress_in_a_log_is_one_line_a_step():
    assert progress_over(io.StringIO()) == "anykvm: lists\nanykvm: kernel\n"


def test_progress_on_a_terminal_is_in_place():
    new = "\r\x1b[Kanykvm: "
    assert progress_over(TerminalText()) == (
        f"{new}lists\n{new}kernel 0 %{new}kernel 50 %{new}kernel 100 %\n"
    )


def test_no_progress_prints_nothing():
    with ProgressLine(file := TerminalText()):
        pass
    assert file.getvalue() == ""


@pytest.mark.parametrize(
    ("printed", "ends_with"),
    [(b"/ # ", b"/ # \r\n"), (b"done\r\n", b"done\r\n"), (b"", b"")],
)
def test_the_console_ends_its_line_on_a_terminal(printed, ends_with):
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    tty.setraw(theirs)
    console = Console(theirs)
    console.write(printed)
    console.end_line()
    seen = os.read(ours, 100) if ends_with else b""
    assert seen == ends_with
    os.close(ours)
    os.close(theirs)


def test_the_console_adds_nothing_to_a_pipe():
    read, write = os.pipe()
    console = Console(write)
    console.write(b"no newline")
    console.end_line()
    os.close(write)
    assert os.read(read, 100) == b"no newline"
    os.close(read)


def test_text_of_ours_goes_to_standard_error(capsys):
    Console(1).show("help\r\n")
    assert capsys.readouterr() == ("", "help\r\n")


def test_counters_of_what_is_no_software_vm():
    read, write = os.pipe()
    assert processor_counters(read) == {}
    os.close(read)
    os.close(write)
    fd = fs.anon_inode_getfd("kvm-vm", fs.FileOperations(), object())
    assert processor_counters(fd) == {}
    fs.close(fd)


def test_counters_are_printed(capsys):
    stats = ExitStats()
    for port in range(20):
        stats.ports[port, abi.KVM_EXIT_IO_IN] = 100 - port
    result = RunResult(exited(0), stats, 2.0)
    counters = {"instructions_executed": 12345, "seconds_translating": 1.25}
    report(result, counters, "KVM: soft (why)", as_json=False)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "KVM: soft (why); 2.00 s; the guest ended with status 0"
    assert [line.split() for line in lines[-2:]] == [
        ["cpu", "instructions", "executed", "12,345"],
        ["cpu", "seconds", "translating", "1.25"],
    ]
    assert lines[-3].split() == ["port", "(8", "others)", str(sum(100 - n for n in range(12, 20)))]
