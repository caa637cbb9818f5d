"""Exit statuses of the command line, and the errors that carry one.

Where a guest ends by itself, its own status is the command's; `anykvm.vmm.outcome` has the rest.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol, runtime_checkable


class Status(IntEnum):
    """What `anykvm` exits with when no guest says otherwise."""

    OK = 0
    USAGE = 2
    UNAVAILABLE = 120
    GUEST_FAILED = 121
    TRIPLE_FAULT = 122
    INTERNAL_ERROR = 123
    TIMEOUT = 124
    INTERRUPTED = 130


MEANINGS: dict[Status, str] = {
    Status.OK: "done, or the guest's own status",
    Status.USAGE: "a bad option, or a file that is not what it should be",
    Status.UNAVAILABLE: "no kernel could be obtained, or the KVM asked for is not there",
    Status.GUEST_FAILED: "the guest panicked, or ended before its command did",
    Status.TRIPLE_FAULT: "the guest's processor shut down",
    Status.INTERNAL_ERROR: "KVM or anykvm could not go on",
    Status.TIMEOUT: "the time of --timeout is up",
    Status.INTERRUPTED: "Ctrl-C, or Ctrl-A X",
}


class CommandError(Exception):
    """Ends the command: one line for standard error, and the exit status (128 + a signal's too)."""

    def __init__(self, message: str, status: int = Status.USAGE) -> None:
        super().__init__(message)
        self.status = status


@runtime_checkable
class Refusal(Protocol):
    """What the option parser raises; its classes moved between versions of typer."""

    exit_code: int

    def format_message(self) -> str: ...


def epilog() -> str:
    """The exit statuses, for --help."""
    return "Exit statuses: " + "; ".join(f"{int(s)} {text}" for s, text in MEANINGS.items()) + "."
