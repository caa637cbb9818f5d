"""Rounds of hostile calls in a child process, which may crash, hang or leak: then that is told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SILENCE = 90.0  # seconds without a call before the child counts as hung
LEAK_KIB = 48 * 1024  # growth in the later half of the rounds that counts as a leak
WARM_ROUNDS = 2  # at least, until translations, caches and the heap have their size
MAX_WRONG = 20


@dataclass
class Report:
    """All rounds together."""

    calls: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    resident: list[int] = field(default_factory=list)


def child(calls: int, round_calls: int, seed: str) -> None:
    """In the child: rounds, each told in one line of JSON; dots between them are heartbeats."""
    import faulthandler

    from .fuzzer import THREADS, resources, run

    faulthandler.register(signal.SIGUSR2, all_threads=True)
    faulthandler.enable()
    last = [0.0]

    def beat() -> None:
        if time.monotonic() - last[0] > 1:
            last[0] = time.monotonic()
            print(".", flush=True)

    made, number = 0, 0
    run(300, f"{seed}-warm", beat)  # loads the driver, starts what stays
    before = resources()[:2]
    while calls - made >= THREADS:
        found = run(min(round_calls, calls - made), f"{seed}-{number}", beat)
        made, number = made + found.calls, number + 1
        after = resources()
        if after[:2] != before:
            found.wrong.append(f"left over: {before} became {after[:2]}")
        outcomes = Counter(
            {f"{name} {outcome}": n for (name, outcome), n in found.outcomes.items()}
        )
        told = {"calls": found.calls, "outcomes": outcomes, "wrong": found.wrong[:MAX_WRONG]}
        print(json.dumps({**told, "resident": after[2]}), flush=True)


def hostile_calls(
    calls: int, seed: str, round_calls: int, progress: Callable[[Report], None] | None = None
) -> Report:
    """Make about `calls` calls in a child. A crash or a hang is among what is `wrong`."""
    report = Report()
    code = f"from tests.fuzz.hostile import child; child({calls}, {round_calls}, {seed!r})"
    with tempfile.TemporaryFile() as log:  # a pipe would fill up
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "ANYKVM_BACKEND": "soft"},
        )
        try:
            _listen(process, report, progress)
        finally:
            process.kill()
            process.communicate()
        log.seek(0)
        errors = "\n".join(_interesting(log.read().decode(errors="replace")))
    if process.returncode not in (0, -signal.SIGKILL) or report.calls < calls * 0.9:
        report.wrong.append(f"the child ended with {process.returncode}: {errors[:8000]}")
    _check_memory(report)
    return report


def _interesting(log: str) -> list[str]:
    """The lines of a log that do not just tell what a guest cannot execute."""
    return [line for line in log.splitlines() if not line.startswith("vCPU ")]


def _listen(
    process: subprocess.Popen[bytes], report: Report, progress: Callable[[Report], None] | None
) -> None:
    import select

    assert process.stdout is not None
    while True:
        ready, _, _ = select.select([process.stdout], [], [], SILENCE)
        if not ready:
            report.wrong.append(f"hung: no call in {SILENCE:g} s")
            process.send_signal(signal.SIGUSR2)  # its stacks
            time.sleep(2)
            return
        line = process.stdout.readline()
        if not line:
            process.wait(30)
            return
        if line.startswith(b"{"):
            _enter(report, json.loads(line))
            if progress:
                progress(report)


def _enter(report: Report, told: dict[str, object]) -> None:
    report.calls += int(str(told["calls"]))
    report.outcomes.update(told["outcomes"])  # type: ignore[arg-type]
    report.wrong.extend(told["wrong"])  # type: ignore[arg-type]
    report.resident.append(int(str(told["resident"])))


def _check_memory(report: Report) -> None:
    settled = report.resident[max(WARM_ROUNDS, len(report.resident) // 2) :]
    if settled and settled[-1] - settled[0] > LEAK_KIB:
        report.wrong.append(f"resident memory grew: {report.resident} KiB")
