"""How a caller answers what a vCPU left native code for: the second half of the instruction.

RIP still points at the instruction that left (past it for HLT) until one of the `complete_`
methods, or `advance`, steps over it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from anykvm.cpu.guest_access import GuestAccess
from anykvm.cpu.state import REPLAY, Exit, Mode

if TYPE_CHECKING:
    from anykvm.cpu.debug import DebugUnit
    from anykvm.cpu.engine import Engine

MASK64 = 2**64 - 1
CODE64 = int(Mode.CODE64)
RAX, RCX, RDX, RBX = range(4)


class Completion(GuestAccess, ABC):
    """The instruction that a vCPU left native code for."""

    debug: DebugUnit

    def __init__(self, engine: Engine, index: int) -> None:
        super().__init__(engine, index)
        self._completion: Callable[[bytes], None] | None = None  # of a string I/O instruction
        self._outs: bytes | None = None  # what OUTS sends
        self.on_advance: Callable[[], None] | None = None  # the rest of the instruction that left

    @abstractmethod
    def _begin(self, unfinished: Callable[[], None]) -> Exit | None:
        """Something whose accesses are its own, not those of the instruction at RIP."""

    def advance(self, length: int | None = None) -> None:
        """Steps over the instruction that left, which is `length` bytes long if the caller knows
        better.
        """
        s = self.state
        if self.on_advance:
            done, self.on_advance = self.on_advance, None
            done()
        s.rip = self.rip_behind(length)
        self.count_exited()
        s.replay_count = 0

    def rip_behind(self, length: int | None = None) -> int:
        """RIP behind the instruction that left, which has so many bytes if the caller knows."""
        s = self.state
        if length is None:
            length = self.engine.translator.length_of(s.exit_record)
        return (s.rip + length) & (MASK64 if s.mode & CODE64 else 0xFFFF_FFFF)

    def uncounted(self) -> int:
        """The instruction that left, and those before it that no branch has counted."""
        return self.engine.translator.uncounted.get(self.state.exit_record, 1)

    def count_exited(self) -> None:
        """Counts the instruction that left."""
        self.state.insn_count += self.uncounted()
        if self.debug.trace or self.debug.armed:
            self.debug.retired()

    def complete_in(self, data: bytes) -> None:
        """Data that the port gave: `io_size * io_count` bytes."""
        if self.debug.armed:
            self.debug.note_port()
        if self._completion:
            end, self._completion = partial(self._completion, data), None
            self._shutdown = self._begin(end) is Exit.SHUTDOWN
            return
        s = self.state
        size, value = s.io_size, int.from_bytes(data[: s.io_size], "little")
        keep = 0 if size == 4 else s.gpr[RAX] & ~((1 << 8 * size) - 1)
        s.gpr[RAX] = keep | value
        self.advance()

    def complete_out(self) -> None:
        """The data reached the port."""
        if self.debug.armed:
            self.debug.note_port()
        if self._completion:
            done, self._completion = self._completion, None
            done(b"")
        else:
            self.advance()

    def string_io(self) -> bool:
        """Whether the port access that left is of INS or OUTS."""
        return self._completion is not None

    def drop_io(self) -> None:
        """The port access that left will not be completed."""
        self._completion = self._outs = None
        self.debug.trace = 0

    @property
    def io_data(self) -> bytes:
        """What OUT or OUTS sends: `io_size * io_count` bytes."""
        s = self.state
        if self._outs is not None:
            return self._outs
        return (s.gpr[RAX] & ((1 << 8 * s.io_size) - 1)).to_bytes(s.io_size, "little")

    def complete_mmio_read(self, data: bytes) -> None:
        """Data of the pending MMIO read: `mmio_size` bytes. The instruction is executed again and
        takes them.
        """
        self._replayed(int.from_bytes(data, "little"))

    def complete_mmio_write(self) -> None:
        self._replayed(0)

    def _replayed(self, data: int) -> None:
        s = self.state
        if s.replay_count >= REPLAY:
            raise RuntimeError("an instruction made more MMIO accesses than any can")
        s.replay[s.replay_count].data = data
        s.replay_count += 1

    def complete_msr(self, value: int | None) -> None:
        """RDMSR's result, or None for WRMSR."""
        if value is not None:
            self.state.gpr[RAX] = value & 0xFFFF_FFFF
            self.state.gpr[RDX] = value >> 32 & 0xFFFF_FFFF
        self.advance(2)

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None:
        for n, value in ((RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)):
            self.state.gpr[n] = value
        self.advance()
