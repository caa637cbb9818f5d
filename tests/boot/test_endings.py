"""How a run ends from outside or by the guest's fault, each with a status and a line of its own.

The guests are a few instructions, so this is about anykvm's process: signals, terminal, statistics.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable

import pytest

from anykvm.vmm.images import Images

from .process import Anykvm, Result, finished
from .terminal import CTRL_A, CTRL_C, Terminal
from .tiny_kernel import NO_CODE, SPIN, TRIPLE_FAULT, exit_with

Tiny = Callable[[bytes], list[str]]
READY = re.compile(rb"ready\r?\n")


def ready(process: subprocess.Popen[bytes]) -> None:
    """The guest runs."""
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"


def test_the_guests_own_status(anykvm: Anykvm, tiny: Tiny) -> None:
    result = anykvm.run(*tiny(exit_with(42)))
    assert (result.status, result.out) == (42, "ready\n")
    assert re.fullmatch(r"anykvm: KVM: soft .* 1 CPU, 64 MiB; Ctrl-A X leaves\n", result.err)


def test_a_triple_fault(anykvm: Anykvm, tiny: Tiny) -> None:
    result = anykvm.run(*tiny(TRIPLE_FAULT))
    assert (result.status, result.out) == (122, "ready\n")
    assert result.complaint == "anykvm: CPU 0 of the guest had a triple fault"


def test_code_that_cannot_be_executed(anykvm: Anykvm, tiny: Tiny) -> None:
    """The processor's line says what it met, the machine's where."""
    result = anykvm.run(*tiny(NO_CODE))
    assert (result.status, result.out) == (123, "ready\n")
    _, met, where = result.err.splitlines()
    assert met == (
        "anykvm: vCPU 0 at 0xd0000000: instruction fetch from memory that no slot covers"
    )
    assert where.startswith("anykvm: CPU 0: KVM internal error: an instruction that cannot be ")
    assert where.endswith(", at 0x10:0xd0000000 (cs base 0x0)")


def test_a_timeout(anykvm: Anykvm, tiny: Tiny) -> None:
    result = anykvm.run(*tiny(SPIN), "--timeout", "1.5")
    assert (result.status, result.out) == (124, "ready\n")
    assert result.complaint == "anykvm: the guest was still running after 1.5 s"


@pytest.mark.parametrize(
    ("number", "status", "complaint"),
    [
        (signal.SIGINT, 130, "anykvm: interrupted"),
        (signal.SIGTERM, 143, "anykvm: ended by SIGTERM"),
        (signal.SIGHUP, 129, "anykvm: ended by SIGHUP"),
        (signal.SIGQUIT, 131, "anykvm: ended by SIGQUIT"),
    ],
)
def test_a_signal(
    anykvm: Anykvm, tiny: Tiny, number: signal.Signals, status: int, complaint: str
) -> None:
    with anykvm.running(*tiny(SPIN)) as process:
        ready(process)
        began = time.monotonic()
        process.send_signal(number)
        result = finished(process)
    assert time.monotonic() - began < 15
    assert (result.status, result.complaint) == (status, complaint)


def test_ctrl_c_while_linux_boots(anykvm: Anykvm, images: Images) -> None:
    """With --exec no guest reads the terminal, so Ctrl-C is a signal."""
    with anykvm.running("boot", "--backend", "soft", "--exec", "sleep 1000") as process:
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        result = finished(process)
    assert result == Result(130, "", "anykvm: interrupted\n")


def test_the_terminal_is_raw_and_given_back(anykvm: Anykvm, tiny: Tiny) -> None:
    with Terminal(anykvm, *tiny(SPIN)) as terminal:
        terminal.expect(READY)
        assert terminal.attributes() != terminal.before
        terminal.type(CTRL_C)
        terminal.type(CTRL_A + b"h")
        terminal.expect(re.compile(rb"Ctrl-A X +leave: stop the guest at once\r\n"))
        assert terminal.process.poll() is None
        terminal.type(CTRL_A + b"x")
        assert terminal.end() == 130
        assert terminal.attributes() == terminal.before
        assert terminal.shown.endswith(b"anykvm: stopped by the user\r\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_terminal_is_given_back_on_a_signal(
    anykvm: Anykvm, tiny: Tiny, number: signal.Signals
) -> None:
    with Terminal(anykvm, *tiny(SPIN)) as terminal:
        terminal.expect(READY)
        terminal.process.send_signal(number)
        assert terminal.end() == 128 + number
        assert terminal.attributes() == terminal.before


def test_who_reads_the_output_goes_away(anykvm: Anykvm, tiny: Tiny) -> None:
    with anykvm.running(*tiny(exit_with(0))) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.wait(60) == 123
        assert process.stderr.read().endswith(b"anykvm: nobody reads the output\n")


def test_statistics(anykvm: Anykvm, tiny: Tiny) -> None:
    text = anykvm.run(*tiny(exit_with(3)), "--stats")
    rows = [line.split() for line in text.err.splitlines()]
    assert ["port", "0x03f8", "out", "6"] in rows
    assert ["port", "0x00f4", "out", "1"] in rows
    result = anykvm.run(*tiny(exit_with(3)), "--json")
    record = json.loads(result.err[result.err.index("{") :])
    assert record["port"] == {"0x03f8 out": 6, "0x00f4 out": 1}
    assert 0 < record["cpu"]["instructions_executed"] < 20
