"""`anykvm` as a user starts it: a child process, in a session of its own, that must leave nothing
behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COMMAND = (sys.executable, "-c", "from anykvm.cli.main import main; main()")
PATIENCE = 120.0
"""Seconds for what is quick on an idle machine."""


@dataclass
class Anykvm:
    """Starts `anykvm` with a temporary folder and environment of the test's own."""

    scratch: Path
    environment: dict[str, str] = field(default_factory=dict)
    sessions: list[int] = field(default_factory=list)

    def _environment(self) -> dict[str, str]:
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("ANYKVM_BACKEND")}
        return {**inherited, "TMPDIR": str(self.scratch), **self.environment}

    def start(
        self,
        *arguments: str | Path,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> subprocess.Popen[bytes]:
        """The process, running."""
        process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env=self._environment(),
            start_new_session=True,
        )
        self.sessions.append(process.pid)
        return process

    @contextmanager
    def running(self, *arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
        """The process, which ends with the block at the latest."""
        with self.start(*arguments) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *arguments: str | Path, timeout: float = PATIENCE) -> Result:
        """Run to the end."""
        with self.running(*arguments) as process:
            return finished(process, timeout)

    def leftovers(self) -> list[str]:
        """Files in the temporary folder, and processes of our sessions."""
        files = [str(path) for path in self.scratch.iterdir()]
        return files + [f"process {pid}" for pid in _processes_of(set(self.sessions))]


@dataclass(frozen=True)
class Result:
    """What a user gets to see."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The last line on standard error."""
        return self.err.splitlines()[-1] if self.err else ""


def finished(process: subprocess.Popen[bytes], timeout: float = PATIENCE) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out.decode(), err.decode())


def _processes_of(sessions: set[int]) -> list[int]:
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # proc(5): the name is in parentheses and may hold anything; the session is field 6.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) in sessions:
            found.append(int(folder.name))
    return found


def wait_until_none_left(anykvm: Anykvm, seconds: float = 5.0) -> list[str]:
    """What is left behind after a moment of grace for processes that are about to end."""
    deadline = time.monotonic() + seconds
    while anykvm.leftovers() and time.monotonic() < deadline:
        time.sleep(0.1)
    return anykvm.leftovers()
