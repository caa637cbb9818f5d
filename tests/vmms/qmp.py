"""QEMU's machine protocol over a Unix socket (docs/interop/qmp-spec.txt)."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

from .process import CaseError


def connect(path: Path, seconds: float) -> socket.socket:
    """A client's socket, as soon as there is a server."""
    deadline = time.monotonic() + seconds
    while True:
        client = socket.socket(socket.AF_UNIX)
        try:
            client.connect(str(path))
        except OSError:
            client.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            client.settimeout(seconds)
            return client


class Qmp:
    """One session. Commands return their result; events are kept by name."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._socket = connect(path, seconds)
        self._file = self._socket.makefile("rw")
        self.events: list[str] = []
        self._receive()
        self.command("qmp_capabilities")

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def command(self, name: str, **arguments: object) -> Any:
        """Raises CaseError where QEMU reports an error."""
        self._file.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._file.flush()
        while True:
            answer = self._receive()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise CaseError(f"{name}: {answer['error']['desc']}")

    def monitor(self, line: str) -> str:
        """A command of the human monitor: what it prints."""
        return str(self.command("human-monitor-command", **{"command-line": line}))

    def status(self) -> str:
        return str(self.command("query-status")["status"])

    def wait_for(self, event: str) -> None:
        while event not in self.events:
            self._receive()

    def _receive(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise CaseError("QEMU closed its monitor")
        answer: dict[str, Any] = json.loads(line)
        if "event" in answer:
            self.events.append(answer["event"])
        return answer
