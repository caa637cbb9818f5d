"""A processor that follows a script, in place of the software processor.

Each step is what one stay in the guest does: an Exit, or a function of the cpu that returns one. A
cpu whose script has ended runs on until it is asked to leave.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from anykvm.cpu.debug import DebugExit, Debugger
from anykvm.cpu.flags import read_rflags, write_rflags
from anykvm.cpu.state import Exit, State
from anykvm.cpu.svm import SvmUnit

IF = 1 << 9
TICK_SECONDS = 0.005
Step = Exit | Callable[["FakeCpu"], Exit]


class FakeDebugUnit:
    """Nothing is ever trapped."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log, self.exit = log, DebugExit(1, 0, 0, 0)

    def attach(self, debugger: Debugger, *, finishing: bool) -> None:
        self.log.append(("debugger", debugger, finishing))

    def changed(self) -> None:
        self.log.append(("debug_registers",))

    def drop_trap(self) -> None:
        pass

    def trap_pending(self) -> bool:
        return False

    def take_trap(self) -> int:
        return 0

    def entered(self, bits: int) -> None:
        self.log.append(("dr6", bits))

    def take_step(self) -> bool:
        return False


@dataclass
class FakeCpu:
    """`log` notes the calls that change the guest, in order."""

    index: int
    state: State = field(default_factory=State)
    script: list[Step] = field(default_factory=list)
    log: list[tuple[Any, ...]] = field(default_factory=list)
    emulation_text: str = "ud0 eax, eax"
    out: bytes = b""
    window: bool = False
    entered: threading.Event = field(default_factory=threading.Event)
    host: Callable[[int], int | None] = lambda _: None  # of a guest-physical address
    _asked: threading.Event = field(default_factory=threading.Event)

    native_run: int = 0

    def __post_init__(self) -> None:
        self.debug = FakeDebugUnit(self.log)
        self.svm = SvmUnit(self)  # type: ignore[arg-type]

    def busy(self) -> bool:
        """So that nothing takes the short way into native code."""
        return True

    def string_io(self) -> bool:
        return True

    @property
    def rflags(self) -> int:
        return read_rflags(self.state)

    @rflags.setter
    def rflags(self, value: int) -> None:
        write_rflags(self.state, value)

    @property
    def io_data(self) -> bytes:
        return self.out

    def memory_may_have_changed(self) -> None:
        """Nothing is translated here."""

    def run(self) -> Exit:
        if self.window and self.can_take_interrupt():
            return Exit.IRQ_WINDOW
        if self.script:
            step = self.script.pop(0)
            return step if isinstance(step, Exit) else step(self)
        self.entered.set()
        self._asked.wait(TICK_SECONDS)
        self._asked.clear()
        self.entered.clear()
        return Exit.REQUEST

    def request_exit(self) -> None:
        self._asked.set()

    def pending_interrupt(self, pending: bool) -> None:
        self.window = pending

    def can_take_interrupt(self) -> bool:
        return bool(self.rflags & IF) and not self.in_shadow()

    def in_shadow(self) -> bool:
        return bool(self.state.shadow)

    def mid_instruction(self) -> bool:
        return False

    def finish_instruction(self) -> None:
        """The next scripted step is past whatever held events off."""
        self.state.shadow = 0

    def inject_interrupt(self, vector: int) -> None:
        self.rflags &= ~IF
        self.log.append(("interrupt", vector))

    def inject_nmi(self) -> None:
        self.log.append(("nmi",))

    def inject_exception(
        self,
        vector: int,
        error_code: int | None = None,
        cr2: int | None = None,
        *,
        injected: bool = False,
    ) -> None:
        self.log.append(("exception", vector, error_code))

    def inject_breakpoint(self) -> None:
        self.log.append(("breakpoint",))

    def inject_debug(self, dr6: int | None) -> None:
        self.log.append(("debug", dr6))

    def translate(self, va: int) -> int | None:
        return va

    def exchange(self, gpa: int, value: int) -> int:
        host = self.host(gpa)
        if host is None:
            return 0
        byte = ctypes.c_uint8.from_address(host)
        before, byte.value = byte.value, value
        return before

    def use_address_space(self, space: int) -> None:
        self.log.append(("address_space", space))

    def flush_tlb(self) -> None:
        self.log.append(("flush_tlb",))

    def mode_changed(self) -> None:
        self.log.append(("mode_changed",))

    def complete_in(self, data: bytes) -> None:
        self.log.append(("in", data))

    def drop_io(self) -> None:
        self.log.append(("drop_io",))

    def complete_out(self) -> None:
        self.log.append(("out",))

    def complete_mmio_read(self, data: bytes) -> None:
        self.log.append(("mmio_read", data))

    def complete_mmio_write(self) -> None:
        self.log.append(("mmio_write",))

    def complete_msr(self, value: int | None) -> None:
        self.log.append(("msr", value))

    def complete_cpuid(self, eax: int, ebx: int, ecx: int, edx: int) -> None:
        self.log.append(("cpuid", eax, ebx, ecx, edx))

    def advance(self) -> None:
        self.log.append(("advance",))

    def patch_instruction(self, data: bytes) -> None:
        self.log.append(("patch", data))

    def did(self, *names: str) -> list[tuple[Any, ...]]:
        """The log without what every reset and register write does."""
        return [e for e in self.log if e[0] in names or (not names and e[0] not in _ROUTINE)]


_ROUTINE = ("flush_tlb", "mode_changed", "debug_registers")


@dataclass
class FakeEngine:
    """`slots` is the guest-physical map: gpa to (size, hva, readonly, log_dirty)."""

    cpus: list[FakeCpu] = field(default_factory=list)
    slots: dict[int, tuple[int, int, bool, bool]] = field(default_factory=dict)
    dirty: dict[int, bytes] = field(default_factory=dict)
    closed: bool = False

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
        self.slots[gpa] = (size, hva, readonly, log_dirty)

    def unmap_memory(self, gpa: int, size: int, space: int = 0) -> None:
        del self.slots[gpa]

    @contextmanager
    def stopped(self) -> Iterator[None]:
        yield

    def host(self, gpa: int) -> int | None:
        found = (
            (hva, gpa - at) for at, (size, hva, _, _) in self.slots.items() if at <= gpa < at + size
        )
        return next((hva + offset for hva, offset in found), None)

    def code_written(self, gpa: int, size: int, space: int = 0) -> None:
        """Nothing is translated here."""

    def take_dirty(self, gpa: int, space: int = 0) -> bytes:
        return self.dirty.pop(gpa, b"")

    def create_cpu(self, index: int, *, ticks: bool) -> FakeCpu:
        cpu = FakeCpu(index, host=self.host)
        self.cpus.append(cpu)
        return cpu

    def statistics(self) -> dict[str, float]:
        names = ("units_translated", "instructions_translated", "seconds_translating")
        compiled = ("handlers_compiled", "handlers_loaded", "seconds_compiling")
        return dict.fromkeys(names + compiled, 0)

    def close(self) -> None:
        self.closed = True


def port_in(port: int, size: int = 1, count: int = 1) -> Step:
    """The guest executes IN, or INS of `count` items."""

    def step(cpu: FakeCpu) -> Exit:
        s = cpu.state
        s.io_port, s.io_size, s.io_count, s.io_in = port, size, count, 1
        return Exit.IO

    return step


def port_out(port: int, data: bytes, size: int = 1) -> Step:
    """The guest executes OUT, or OUTS of as many items as there is data."""

    def step(cpu: FakeCpu) -> Exit:
        s = cpu.state
        s.io_port, s.io_size, s.io_count, s.io_in = port, size, len(data) // size, 0
        cpu.out = data
        return Exit.IO

    return step


def load(gpa: int, size: int) -> Step:
    """The guest reads memory that nothing backs."""

    def step(cpu: FakeCpu) -> Exit:
        cpu.state.mmio_gpa, cpu.state.mmio_size, cpu.state.mmio_write = gpa, size, 0
        return Exit.MMIO

    return step


def store(gpa: int, data: bytes) -> Step:
    """The guest writes memory that nothing backs."""

    def step(cpu: FakeCpu) -> Exit:
        s = cpu.state
        s.mmio_gpa, s.mmio_size, s.mmio_write = gpa, len(data), 1
        s.mmio_data = int.from_bytes(data, "little")
        return Exit.MMIO

    return step


def rdmsr(index: int) -> Step:
    """The guest executes RDMSR."""

    def step(cpu: FakeCpu) -> Exit:
        cpu.state.gpr[1] = index
        return Exit.RDMSR

    return step


def wrmsr(index: int, value: int) -> Step:
    """The guest executes WRMSR."""

    def step(cpu: FakeCpu) -> Exit:
        gpr = cpu.state.gpr
        gpr[0], gpr[1], gpr[2] = value & 0xFFFFFFFF, index, value >> 32
        return Exit.WRMSR

    return step


def sti(then: Exit = Exit.HLT) -> Step:
    """The guest enables interrupts and does something else."""

    def step(cpu: FakeCpu) -> Exit:
        cpu.rflags |= IF
        return then

    return step
