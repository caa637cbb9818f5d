"""How a run of a guest ends."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class OutcomeKind(Enum):
    POWER_OFF = "power off"
    EXIT = "exit"
    RESET = "reset"
    GUEST_PANIC = "guest panic"
    TRIPLE_FAULT = "triple fault"
    INTERNAL_ERROR = "internal error"
    TIMEOUT = "timeout"
    STOPPED = "stopped"
    SUSPENDED = "suspended"


# 124 is what timeout(1) gives, 130 what shells give for SIGINT; 121 to 123 are nobody's.
EXIT_STATUS = {
    OutcomeKind.POWER_OFF: 0,
    OutcomeKind.EXIT: 0,
    OutcomeKind.RESET: 0,
    OutcomeKind.GUEST_PANIC: 121,
    OutcomeKind.TRIPLE_FAULT: 122,
    OutcomeKind.INTERNAL_ERROR: 123,
    OutcomeKind.TIMEOUT: 124,
    OutcomeKind.STOPPED: 130,
    OutcomeKind.SUSPENDED: 0,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ended the run: its kind, the status for the shell, and one sentence for people."""

    kind: OutcomeKind
    status: int
    message: str


def ended(kind: OutcomeKind, message: str) -> Outcome:
    """An outcome with the usual status of its kind."""
    return Outcome(kind, EXIT_STATUS[kind], message)


def exited(status: int) -> Outcome:
    """The guest named its own exit status."""
    return Outcome(OutcomeKind.EXIT, status & 0xFF, f"the guest ended with status {status & 0xFF}")
