"""Where the guest's console goes: standard output, byte for byte."""

from __future__ import annotations

import sys
import threading

from anykvm.vmm.terminal import is_terminal, write_all


class Console:
    """Called from vCPU threads; remembers whether the line is at its start."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._last = b"\n"

    def write(self, data: bytes) -> None:
        with self._lock:
            write_all(self._descriptor, data)
            self._last = data[-1:] or self._last

    def show(self, text: str) -> None:
        """Text of ours for the user, between what the guest prints."""
        with self._lock:
            sys.stderr.write(text)
            sys.stderr.flush()

    def end_line(self) -> None:
        """On a terminal, begin a line of our own after the guest's last."""
        if self._last not in (b"\n", b"\r") and is_terminal(self._descriptor):
            self.write(b"\r\n")
