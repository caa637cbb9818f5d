"""Running tests on the host's /dev/kvm: each in a child of its own, with a time limit.

The children come from a fork server, which is forked before any test has run, when this process has
one thread and everything is imported. A KVM that crashes or stalls its caller costs one child.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from .machine import NotAvailable

LIMIT = 3.0  # seconds for a test
DEATH = 2.0  # seconds that a killed child may take to go


@dataclass(frozen=True)
class Outcome:
    """How a test ended: passed, FAILED, not available, crashed, stalled or differs; and why."""

    status: str
    text: str = ""
    details: str = ""


PASSED = Outcome("passed")


def outcome_of(test: Callable[[], None]) -> Outcome:
    """Run a test here."""
    try:
        test()
    except NotAvailable as why:
        return Outcome("not available", str(why))
    except Exception as error:
        last = str(error).splitlines() or [""]
        text = f"{type(error).__name__}: {last[0]}"
        return Outcome("FAILED", text, traceback.format_exc())
    return PASSED


def _child(test: Callable[[], None], result: int) -> None:
    """In the child: run the test, tell how it ended, be gone."""
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.write(result, json.dumps(asdict(outcome_of(test))).encode())


def _collect(pid: int, result: int, limit: float) -> Outcome:
    """Wait for a child: what it told, or how it died."""
    told = _read_all(result, time.monotonic() + limit)
    if told is None:
        os.kill(pid, signal.SIGKILL)
        gone = "" if _reap(pid, DEATH) is not None else ", and cannot be killed"
        return Outcome("stalled", f"no answer in {limit:g} s{gone}")
    status = _reap(pid, DEATH)
    if not told:
        died = "does not end" if status is None else f"{os.waitstatus_to_exitcode(status)}"
        return Outcome("crashed", f"the process died with status {died}")
    return Outcome(**json.loads(told))


def _read_all(fd: int, deadline: float) -> bytes | None:
    """Everything until the other end is closed; None where that takes too long."""
    data = b""
    while True:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        piece = os.read(fd, 1 << 16)
        if not piece:
            return data
        data += piece


def _reap(pid: int, seconds: float) -> int | None:
    """The wait status of a child that ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.002)
    return None


def run_in_child(test: Callable[[], None], limit: float = LIMIT) -> Outcome:
    """Fork, run the test there, and say how it ended."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(reader)
            _child(test, writer)
        finally:
            os._exit(0)
    os.close(writer)
    try:
        return _collect(pid, reader, limit)
    finally:
        os.close(reader)


class ForkServer:
    """A process that runs `tests[n]` in a child on request."""

    def __init__(self, tests: Sequence[Callable[[], None]]) -> None:
        requests, self._ask = os.pipe()
        self._answers, answers = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            try:
                os.close(self._ask)
                os.close(self._answers)
                self._serve(tests, requests, answers)
            finally:
                os._exit(0)
        os.close(requests)
        os.close(answers)

    @staticmethod
    def _serve(tests: Sequence[Callable[[], None]], requests: int, answers: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        silent = os.open(os.devnull, os.O_RDWR)
        for standard in range(3):
            os.dup2(silent, standard)
        while len(request := os.read(requests, 4)) == 4:
            outcome = run_in_child(tests[int.from_bytes(request, "little")])
            answer = json.dumps(asdict(outcome)).encode()
            os.write(answers, len(answer).to_bytes(4, "little") + answer)

    def run(self, index: int) -> Outcome:
        """Run one test in a child of the server."""
        os.write(self._ask, index.to_bytes(4, "little"))
        ready, _, _ = select.select([self._answers], [], [], LIMIT + 3 * DEATH)
        if not ready:
            return Outcome("stalled", "the server of children does not answer")
        length = int.from_bytes(os.read(self._answers, 4), "little")
        data = b""
        while len(data) < length:
            piece = os.read(self._answers, length - len(data))
            if not piece:
                return Outcome("crashed", "the server of children has gone")
            data += piece
        return Outcome(**json.loads(data))

    def close(self) -> None:
        """No more requests: the server ends."""
        os.close(self._ask)
        os.close(self._answers)
        os.waitpid(self._pid, 0)
