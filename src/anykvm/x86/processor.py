"""What x86 needs of a processor, and the one place that makes one.

`anykvm.cpu` is the processor; tests put a scripted one in its place with `use_engine`. Register
state is `State`, shared with native code. `Exit` says why `Cpu.run` came back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Protocol

from anykvm.cpu.debug import DebugExit, Debugger
from anykvm.cpu.state import Exit, State

if TYPE_CHECKING:
    from anykvm.cpu.svm import SvmUnit


class DebugUnit(Protocol):
    """Debug exceptions of a processor, and who debugs it from outside."""

    exit: DebugExit  # what the last DEBUG exit was for

    def attach(self, debugger: Debugger, *, finishing: bool) -> None:
        """Whose debug exceptions are; `finishing`: what a completion ends counts as a step."""

    def changed(self) -> None:
        """DR0 to DR3 or DR7 were written."""

    def drop_trap(self) -> None:
        """#DB does not come any more."""

    def trap_pending(self) -> bool:
        """#DB comes before the next instruction, and before any interrupt."""

    def take_trap(self) -> int:
        """That #DB is the caller's to inject now: its bits of DR6, 0 if there is none."""

    def entered(self, bits: int) -> None:
        """#DB's handler is about to be entered: DR6 says why."""

    def take_step(self) -> bool:
        """The debugger's single step is done, and `exit` says so."""


class Cpu(Protocol):
    """One vCPU's processor. Only `request_exit` may be called from another thread."""

    @property
    def state(self) -> State: ...

    @property
    def debug(self) -> DebugUnit: ...

    @property
    def svm(self) -> SvmUnit: ...

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

    # What the short way of KVM_RUN needs, see fastpath.py.

    @property
    def native_run(self) -> int:
        """The address of the native routine behind `run`."""

    def busy(self) -> bool:
        """Whether `run` has more to do than to enter native code."""

    def enter(self, native: Callable[..., int], *arguments: int) -> int:
        """Calls a native routine on this vCPU that runs the guest."""

    def resume(self) -> Exit:
        """Goes on as `run` after `enter` has left native code for something."""

    def rip_behind(self) -> int: ...

    def uncounted(self) -> int: ...

    def string_io(self) -> bool:
        """Whether the port access that left is of INS or OUTS."""

    def set_dirty_ring(self, address: int, entries: int, limit: int) -> None:
        """Written pages of logging slots are noted in the ring; with `limit` entries it is full."""

    def dirty_ring_full(self) -> bool: ...

    def mark_dirty(self, gpa: int, space: int) -> None:
        """KVM wrote to a page of a logging slot."""

    def request_exit(self) -> None: ...

    def pending_interrupt(self, pending: bool) -> None: ...

    def can_take_interrupt(self) -> bool: ...

    def in_shadow(self) -> bool: ...

    def mid_instruction(self) -> bool: ...

    def finish_instruction(self) -> None: ...

    def inject_interrupt(self, vector: int) -> None: ...

    def inject_nmi(self) -> None: ...

    def inject_exception(
        self,
        vector: int,
        error_code: int | None = None,
        cr2: int | None = None,
        *,
        injected: bool = False,
    ) -> None:
        """`injected`: its delivery had begun, so a hypervisor in the guest cannot intercept it."""

    def inject_breakpoint(self) -> None: ...

    def inject_debug(self, dr6: int | None) -> None: ...

    def exchange(self, gpa: int, value: int) -> int:
        """Puts a byte into guest memory, in one step; gives what was there, 0 where nothing is."""

    def translate(self, va: int) -> int | None:
        """The physical address that a supervisor reads from; None if it would fault."""

    def flush_tlb(self) -> None: ...

    def use_address_space(self, space: int) -> None:
        """From now on guest-physical addresses are those of this address space."""

    def mode_changed(self) -> None: ...

    def complete_in(self, data: bytes) -> None: ...

    def complete_out(self) -> None: ...

    def drop_io(self) -> None:
        """The port access that left will not be completed."""

    def complete_mmio_read(self, data: bytes) -> None: ...

    def complete_mmio_write(self) -> None: ...

    def complete_msr(self, value: int | None) -> None: ...

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None: ...

    def advance(self) -> None: ...

    def patch_instruction(self, data: bytes) -> None:
        """Writes over the instruction that left, with the guest's rights; a fault is delivered."""


class Engine(Protocol):
    """One VM's processors: the guest-physical map and what was translated from it."""

    def map_memory(
        self,
        gpa: int,
        size: int,
        hva: int,
        readonly: bool = False,
        log_dirty: bool = False,
        *,
        all_dirty: bool = False,
        number: int = 0,
    ) -> None:
        """`number` is the slot's, address space << 16 | slot."""

    def unmap_memory(self, gpa: int, size: int, space: int = 0) -> None: ...

    def stopped(self) -> AbstractContextManager[None]:
        """No vCPU executes the guest inside."""

    def take_dirty(self, gpa: int, space: int = 0) -> bytes:
        """Pages of the slot at `gpa` written since the last call, a bit a page."""

    def reset_dirty(self, pages: Iterable[tuple[int, int, int]]) -> None:
        """Pages (address space, slot's address, page) are noted again when they are written."""

    def code_written(self, gpa: int, size: int, space: int = 0) -> None:
        """Memory was written other than by the guest: translations of what was there go."""

    def create_cpu(self, index: int, *, ticks: bool) -> Cpu: ...

    def statistics(self) -> dict[str, float]:
        """Counters of translation: units, instructions, handlers, seconds."""

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
