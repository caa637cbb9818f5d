"""What x86 needs of a processor, and the one place that makes one.

`anykvm.cpu` is the processor; tests put a scripted one in its place with `use_engine`. Register
state is `State`, shared with native code. `Exit` says why `Cpu.run` came back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from anykvm.cpu.state import Exit, State


class Cpu(Protocol):
    """One vCPU's processor. Only `request_exit` may be called from another thread."""

    @property
    def state(self) -> State: ...

    @property
    def rflags(self) -> int: ...

    @rflags.setter
    def rflags(self, value: int) -> None: ...

    @property
    def io_data(self) -> bytes:
        """What a pending OUT, or OUTS of `io_count` items, writes."""

    @property
    def emulation_text(self) -> str:
        """The instruction of an EMULATION exit, for people."""

    def memory_may_have_changed(self) -> None: ...

    def run(self) -> Exit: ...

    def request_exit(self) -> None: ...

    def pending_interrupt(self, pending: bool) -> None: ...

    def can_take_interrupt(self) -> bool: ...

    def in_shadow(self) -> bool: ...

    def mid_instruction(self) -> bool: ...

    def finish_instruction(self) -> None: ...

    def inject_interrupt(self, vector: int) -> None: ...

    def inject_nmi(self) -> None: ...

    def inject_exception(
        self, vector: int, error_code: int | None = None, cr2: int | None = None
    ) -> None: ...

    def flush_tlb(self) -> None: ...

    def mode_changed(self) -> None: ...

    def complete_in(self, data: bytes) -> None: ...

    def complete_out(self) -> None: ...

    def complete_mmio_read(self, data: bytes) -> None: ...

    def complete_mmio_write(self) -> None: ...

    def complete_msr(self, value: int | None) -> None: ...

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None: ...

    def advance(self) -> None: ...


class Engine(Protocol):
    """One VM's processors: the guest-physical map and what was translated from it."""

    def map_memory(
        self, gpa: int, size: int, hva: int, readonly: bool = False, log_dirty: bool = False
    ) -> None: ...

    def unmap_memory(self, gpa: int, size: int) -> None: ...

    def take_dirty(self, gpa: int) -> bytes:
        """Pages of the slot at `gpa` written since the last call, a bit a page."""

    def create_cpu(self, index: int, *, ticks: bool) -> Cpu: ...

    def close(self) -> None: ...


def _software_engine() -> Engine:
    from anykvm.cpu.engine import Engine as SoftwareEngine  # costs what importing LLVM costs

    return SoftwareEngine()


_make: Callable[[], Engine] = _software_engine


def new_engine() -> Engine:
    """The engine of a new VM."""
    return _make()


@contextmanager
def use_engine(make: Callable[[], Engine]) -> Iterator[None]:
    """VMs created meanwhile get their engine from `make`."""
    global _make
    before, _make = _make, make
    try:
        yield
    finally:
        _make = before
