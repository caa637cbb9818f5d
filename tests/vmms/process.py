"""A VMM as a child process with a serial console: started, listened to, answered, ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

ANYKVM = (sys.executable, "-c", "from anykvm.cli.main import main; main()")
EXEC = (*ANYKVM, "exec", "--backend", "soft", "--")
SHOWN = 6000  # enough for a kernel's last words
ENDING = 20.0


class CaseError(AssertionError):
    """The guest or its VMM did not do what the case says."""


class Console:
    """A program whose standard input and output are the guest's serial line."""

    def __init__(
        self, command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._deadline = time.monotonic() + limit
        self.output = b""
        self._read_to = 0
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        self._errors = b""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self._pipes = [self.process.stdout.fileno(), self.process.stderr.fileno()]

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def left(self) -> float:
        """Seconds until the case's limit."""
        return self._deadline - time.monotonic()

    def kill(self) -> None:
        """Ask it to end; then end it with all its children."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(ENDING)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()

    def send(self, text: str) -> None:
        """Type on the serial line."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def expect(self, text: str) -> str:
        """What comes up to and with `text`, after what was expected before."""
        wanted = text.encode()
        while (found := self.output.find(wanted, self._read_to)) < 0:
            self._read(f"no {text!r}")
        start, self._read_to = self._read_to, found + len(wanted)
        return self.output[start : self._read_to].decode(errors="replace")

    def silent(self, seconds: float) -> bool:
        """Whether it says nothing for so long."""
        before = len(self.output)
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(self.output) == before:
            self._fill(until - time.monotonic())
        return len(self.output) == before

    def ended(self) -> int:
        """Wait for its end: its status."""
        while self._pipes:
            self._read("it did not end")
        return self.process.wait(max(self.left, 0.1))

    def _read(self, complaint: str) -> None:
        if not self._pipes or self.left <= 0:
            raise CaseError(self.report(complaint))
        self._fill(min(self.left, 1.0))

    def _fill(self, seconds: float) -> None:
        for pipe in select.select(self._pipes, [], [], max(seconds, 0))[0]:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                self._pipes.remove(pipe)
            elif pipe == self.process.stdout.fileno():  # type: ignore[union-attr]
                self.output += piece
            else:
                self._errors += piece

    def report(self, complaint: str) -> str:
        """The complaint with the last that it wrote."""
        why = "it ended" if not self._pipes else "time is over"
        serial = self.output[-SHOWN:].decode(errors="replace")
        errors = self._errors[-SHOWN:].decode(errors="replace")
        return f"{complaint}: {why}\n--- console\n{serial}\n--- standard error\n{errors}"
