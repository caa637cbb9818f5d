"""The demo on the software processor, whole: what it prints and how it ends."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from anykvm.cli import main
from anykvm.vmm.demo import Demo, DemoError, DemoOptions, image, run
from anykvm.vmm.machine import RunResult
from anykvm.vmm.outcome import OutcomeKind

TOOL = Path(__file__).resolve().parents[2] / "tools/assemble_demo.py"
TICKS = 10
MODES = ("real mode", "protected mode", "long mode")
TICK = re.compile(r"CPU (\d+): timer interrupt (\d+), counted to (\d+)")
SUM = re.compile(r"(\d+) CPUs counted (\d+) together and (\d+) in all")


def play(cpus: int) -> tuple[list[str], RunResult]:
    printed = bytearray()
    result = run(DemoOptions(cpus, backend="soft", timeout=60), printed.extend)
    return printed.decode("ascii").splitlines(), result


def booting(cpu: int) -> list[str]:
    return [f"CPU {cpu}: {mode}" for mode in MODES]


@pytest.fixture(scope="module")
def two() -> tuple[list[str], RunResult]:
    return play(2)


def test_each_processor_takes_itself_to_long_mode(two: tuple[list[str], RunResult]) -> None:
    lines, result = two
    assert lines[:7] == [*booting(0), "CPU 0: INIT and SIPI to CPU 1", *booting(1)]
    assert (result.outcome.kind, result.outcome.status) == (OutcomeKind.EXIT, 0)


def test_each_processor_takes_its_timer_interrupts(two: tuple[list[str], RunResult]) -> None:
    lines, _ = two
    ticks = [match for line in lines if (match := TICK.fullmatch(line))]
    for cpu in "01":
        own = [match for match in ticks if match[1] == cpu]
        assert [int(match[2]) for match in own] == list(range(1, TICKS + 1))
        turns = [int(match[3]) for match in own]
        assert turns == sorted(set(turns))
        assert f"CPU {cpu}: long mode, {TICKS} timer interrupts" in lines


def test_no_locked_increment_is_lost(two: tuple[list[str], RunResult]) -> None:
    lines, _ = two
    last = SUM.fullmatch(lines[-1])
    assert last is not None
    assert last[1] == "2"
    assert int(last[2]) == int(last[3]) > 2 * TICKS


def test_one_processor_wakes_no_other() -> None:
    lines, result = play(1)
    assert lines[:3] == booting(0)
    kinds = Counter("tick" if TICK.fullmatch(line) else "other" for line in lines[3:])
    assert kinds == {"tick": TICKS, "other": 2}
    assert (result.outcome.kind, result.outcome.status) == (OutcomeKind.EXIT, 0)


def test_the_command_line_runs_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["boot", "--demo", "--backend", "soft", "--timeout", "60"]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("CPU 0: real mode\n")
    assert "2 CPU" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--exec", "true"], "--demo excludes"),
        (["--append", "quiet"], "--demo excludes"),
        (["--cpus", "65"], "65 CPUs: the demo takes 1 to 64"),
        (["--memory", "1M"], "2097152 at least"),
    ],
)
def test_what_the_demo_does_not_take(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["boot", "--demo", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err


def test_options_are_checked_before_there_is_a_machine() -> None:
    with pytest.raises(DemoError, match="0 CPUs"):
        Demo(DemoOptions(cpus=0))


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("assemble_demo", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_committed_binary_is_what_the_source_gives() -> None:
    assert tool().assemble() == image()
