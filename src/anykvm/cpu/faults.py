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


class VmExit(Exception):
    """An exit of L2's that its hypervisor intercepts (svm.py): exit code, EXITINFO1 and EXITINFO2,
    EXITINTINFO with its error code, and where the next instruction stands if one was intercepted.
    """

    def __init__(
        self,
        code: int,
        info_1: int = 0,
        info_2: int = 0,
        *,
        next_rip: int = 0,
        during: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(f"exit {code:#x}")
        self.code, self.info_1, self.info_2 = code, info_1, info_2
        self.next_rip, self.during = next_rip, during


class Shutdown(Exception):
    """A triple fault."""
