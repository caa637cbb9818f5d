"""What Python microcode raises."""

from __future__ import annotations

from anykvm.cpu.state import Exit


class GuestFault(Exception):
    """An exception of the guest's, to be delivered to it."""

    def __init__(self, vector: int, error: int | None = None, cr2: int | None = None) -> None:
        super().__init__(f"vector {vector}, error code {error}")
        self.vector, self.error, self.cr2 = vector, error, cr2


class Leave(Exception):
    """The instruction cannot go on before the caller of `Cpu.run` did something."""

    def __init__(self, exit_: Exit) -> None:
        super().__init__(exit_.name)
        self.exit = exit_


class Shutdown(Exception):
    """A triple fault."""
