"""A user at a terminal: a pseudoterminal, what is typed on it, and what appears."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from fcntl import ioctl
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .process import PATIENCE, Anykvm

ROWS, COLUMNS = 40, 200
PROMPT = re.compile(rb"# (?:\x1b\[6n)?\Z")
STATUS = re.compile(rb"\r\n=(\d+)=\r\n")
CTRL_A, CTRL_C = b"\x01", b"\x03"


class Terminal:
    """Runs `anykvm` on a terminal of its own."""

    def __init__(self, anykvm: Anykvm, *arguments: str | Path) -> None:
        self._master, self._slave = pty.openpty()
        ioctl(self._slave, termios.TIOCSWINSZ, struct.pack("4H", ROWS, COLUMNS, 0, 0))
        self.before = self.attributes()
        self._seen = b""
        self.shown = b""
        self.process: subprocess.Popen[bytes] = anykvm.start(
            *arguments, stdin=self._slave, stdout=self._slave, stderr=self._slave
        )

    def attributes(self) -> list[Any]:
        """How the terminal is set now."""
        return termios.tcgetattr(self._slave)

    def type(self, text: bytes) -> None:
        os.write(self._master, text)

    def expect(self, pattern: re.Pattern[bytes], seconds: float = PATIENCE) -> re.Match[bytes]:
        """Wait until it appears; what comes after it counts for the next time."""
        deadline = time.monotonic() + seconds
        while True:
            match = pattern.search(self._seen)
            if match:
                self._seen = self._seen[match.end() :]
                return match
            left = deadline - time.monotonic()
            assert left > 0, f"no {pattern.pattern!r} within {seconds:g} s in {self._seen!r}"
            self._read(min(left, 1.0))

    def _read(self, seconds: float) -> None:
        ready, _, _ = select.select([self._master], [], [], seconds)
        if ready:
            data = os.read(self._master, 65536)
            self._seen += data
            self.shown += data
        elif self.process.poll() is not None:
            raise AssertionError(f"ended with {self.process.returncode}: {self.shown!r}")

    def shell(self, command: str, seconds: float = PATIENCE) -> str:
        """Type a command at the guest's prompt; what it prints. It must succeed."""
        self.type(f"{command}; s=$?; echo; echo =$s=\r".encode())
        self.expect(re.compile(rb"=\$s=\r\n"), seconds)
        start = len(self.shown) - len(self._seen)
        match = self.expect(STATUS, seconds)
        text = self.shown[start : len(self.shown) - len(self._seen) - len(match.group())]
        self.expect(PROMPT, seconds)
        assert match[1] == b"0", f"{command!r} ended with {match[1]!r}: {text!r}"
        return text.decode().replace("\r\n", "\n")

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the process's end; its status. What it still prints is in `shown`."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"still running: {self.shown[-500:]!r}"
            ready, _, _ = select.select([self._master], [], [], 0.1)
            if ready:
                self.shown += os.read(self._master, 65536)
        while select.select([self._master], [], [], 0)[0]:
            self.shown += os.read(self._master, 65536)
        return self.process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._slave)
        os.close(self._master)
