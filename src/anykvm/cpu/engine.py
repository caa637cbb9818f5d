"""The engine: what the vCPUs of one VM share. Guest memory, translations, and the gate that stops
them all.

This is the room's face to the room that drives it (x86): `Engine`, `Cpu`, `Exit`, `State`.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from anykvm.cpu import access, dispatch, fpu_image, mmu, mxcsr
from anykvm.cpu.guest import ENTRIES
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.ir import Function
from anykvm.cpu.jit import callable_at, process_jit
from anykvm.cpu.memory import PAGE, PhysicalMap
from anykvm.cpu.processor import Cpu
from anykvm.cpu.state import Exit, Mode, Seg, State
from anykvm.cpu.ticker import TICKER
from anykvm.cpu.translate import MAX_BLOCKS, CodeFull, CodePage, Translator
from anykvm.cpu.unit_cache import UnitCache

__all__ = ["Cpu", "Engine", "Exit", "State"]

PTR, U64 = ctypes.c_void_p, ctypes.c_uint64
SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "run": (None, (PTR,)),
    "deliver": (ctypes.c_bool, (PTR, U64, U64)),
    "fetch_page": (U64, (PTR, U64, U64)),
    "probe_read": (U64, (PTR, U64, U64, U64, U64, U64)),
    "probe_write": (U64, (PTR, U64, U64, U64, U64, U64)),
    "commit": (ctypes.c_bool, (PTR, U64, U64, U64, U64, U64)),
    "flush_tlb": (None, (PTR, U64)),
    "flush_page": (None, (PTR, U64)),
    "protect_page": (None, (PTR, U64)),
}


class Runtime:
    """What the engines of a process share: native routines, handlers, units made before."""

    def __init__(self) -> None:
        routines = (
            mmu.ROUTINES + access.ROUTINES + dispatch.ROUTINES + fpu_image.ROUTINES + mxcsr.ROUTINES
        )
        names = [r.__name__ for r in routines]

        def make(_: list[str]) -> list[Function]:
            return [r() for r in routines]

        jit = process_jit()
        self.address = dict(zip(names, jit.addresses(names, make), strict=True))
        self.call: dict[str, Callable[..., int]] = {
            name: callable_at(self.address[name], result, *params, releases_gil=name == "run")
            for name, (result, params) in SIGNATURES.items()
        }

        self.handlers = Handlers(jit)
        self.units = UnitCache(self.handlers, jit.cache.folder)

    def attach(self, state: State) -> None:
        for n, name in enumerate(ENTRIES):
            state.fn[n] = self.address[name]


@cache
def process_runtime() -> Runtime:
    """The process's one Runtime."""
    return Runtime()


class Gate:
    """Lets vCPUs into native code, or keeps all of them out.

    `enter` and `leave` are on the way of every exit and take no lock: who enters says so before it
    looks whether the gate is closed, who closes it does so before looking who is inside.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._inside: list[None] = []  # an entry for each vCPU: its methods are atomic
        self.closed = 0

    def enter(self) -> None:
        self._inside.append(None)
        while self.closed:
            self.leave()
            with self._change:
                while self.closed:
                    self._change.wait()
            self._inside.append(None)

    def leave(self) -> None:
        self._inside.pop()
        if self.closed:
            with self._change:
                self._change.notify_all()

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Inside."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def shut(self, kick: Callable[[], None]) -> Iterator[None]:
        """No vCPU is in native code inside this context; `kick` makes those that are leave."""
        with self._change:
            self.closed += 1
            kick()
            while self._inside:
                self._change.wait()
        try:
            yield
        finally:
            with self._change:
                self.closed -= 1
                self._change.notify_all()


class Engine:
    """Guest memory and translations of one VM. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.runtime = process_runtime()
        self.translator = Translator(self.runtime.handlers, self.runtime.units)
        self.memory = PhysicalMap()
        self.gate = Gate()
        self.cpus: list[Cpu] = []
        self._stays = itertools.count(1)

    def next_stay(self) -> int:
        """A number for a stay in the guest, different from all before."""
        return next(self._stays)

    def create_cpu(self, index: int, *, ticks: bool = False) -> Cpu:
        """A vCPU; with `ticks` its `run` returns REQUEST every few milliseconds at least."""
        cpu = Cpu(self, index)
        state = cpu.state
        self.runtime.attach(state)
        state.physmap, state.physmap_top = self.memory.address, mmu_top()
        t = self.translator
        state.blocks, state.blocks_mask = t.table, MAX_BLOCKS - 1
        state.records, state.records_rip = t.records, t.rips
        cpu.flush_tlb()
        with t.lock:
            self.cpus.append(cpu)
        if ticks:
            TICKER.register(state)
        return cpu

    def _kick_all(self) -> None:
        for cpu in self.cpus:
            cpu.state.exit_request = 1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No vCPU is in native code but for the caller's."""
        with self.gate.shut(self._kick_all):
            yield

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Every vCPU is out of native code; afterwards their TLBs are empty."""
        with self.gate.shut(self._kick_all):
            yield
            for cpu in self.cpus:
                cpu.flush_tlb()

    def map_memory(
        self, gpa: int, size: int, hva: int, readonly: bool = False, log_dirty: bool = False
    ) -> None:
        """Puts `size` bytes of host memory at `hva` to guest-physical `gpa` (page aligned)."""
        with self.stopped(), self.translator.lock:
            self._forget_code(hva, size)
            self.memory.map(gpa, size, hva, readonly=readonly, log_dirty=log_dirty)
            self._restore_code(hva, size)

    def unmap_memory(self, gpa: int, size: int) -> None:
        with self.stopped(), self.translator.lock:
            for slot in list(self.memory.slots.values()):
                if gpa <= slot.gpa < gpa + size:
                    self._forget_code(slot.hva, slot.size)
            self.memory.unmap(gpa, size)

    def _forget_code(self, hva: int, size: int) -> None:
        for host in [h for h in self.translator.pages if hva <= h < hva + size]:
            self.translator.drop(host, 0, PAGE)

    def _restore_code(self, hva: int, size: int) -> None:
        for host, page in self.translator.pages.items():
            if hva <= host < hva + size:
                self.memory.set_code(host, page.map_address)

    def take_dirty(self, gpa: int) -> bytes:
        """Pages of the slot at `gpa` that were written since the last call, a bit a page."""
        return self.memory.take_dirty(gpa)

    # Translations
    def translate(self, cpu: Cpu, rip: int, mode: int, link: int = 0) -> int | None:
        """The record for `rip`, translated if need be, with the record `link` leading to it.

        None where fetching faults (noted in the state).
        """
        base = 0 if mode & Mode.CODE64 else cpu.state.seg[Seg.CS].base
        host = cpu.fetch_page(rip + base)
        if host is None:
            return None
        with self.translator.lock:
            self._mark(host)
            try:
                record = self.translator.translate(
                    rip, mode, base, host, lambda: self._second(cpu, rip + base)
                )
                if link and record is not None:
                    self.translator.set_aux(link, record)
                return record
            except CodeFull:
                pass
        self.forget_all()  # and with everything else the record that was to be linked
        return self.translate(cpu, rip, mode)

    def _second(self, cpu: Cpu, rip: int) -> int | None:
        host = cpu.fetch_page((rip | (PAGE - 1)) + 1)
        if host is not None:
            self._mark(host)
        return host

    def _mark(self, host: int) -> None:
        """From now on stores to this page are watched. Before its bytes are read."""
        if host in self.translator.pages:
            return
        page = self.translator.pages[host] = CodePage()
        self.memory.set_code(host, page.map_address)
        for cpu in self.cpus:
            self.runtime.call["protect_page"](cpu.address, host)

    def code_written(self, gpa: int, size: int) -> None:
        """Drops the translations of bytes that are about to change, or have."""
        with self.translator.lock:
            while size > 0:
                host = self.memory.host(gpa)
                length = min(size, PAGE - gpa % PAGE)
                if host is not None:
                    start = host % PAGE
                    self.translator.drop(host - start, start, start + length)
                gpa, size = gpa + length, size - length

    def code_changed(self, host: int) -> None:
        """Drops the translations of a host page whose bytes are not what they were."""
        with self.translator.lock:
            self.translator.drop(host, 0, PAGE)

    def forget_all(self) -> None:
        """Drops every translation."""
        with self.stopped(), self.translator.lock:
            for host in self.translator.pages:
                self.memory.set_code(host, 0)
            self.translator.reset()

    def statistics(self) -> dict[str, float]:
        """Counters of translation: units, instructions, handlers, seconds."""
        t, jit = self.translator, process_jit()
        return {
            "units_translated": t.units,
            "instructions_translated": t.insns,
            "handlers_compiled": jit.compiled,
            "handlers_loaded": jit.loaded,
            "seconds_translating": t.seconds,
            "seconds_compiling": jit.seconds,
        }

    def close(self) -> None:
        """Nothing runs any more; what the tables hold goes with the last reference."""
        with self.stopped():
            for cpu in self.cpus:
                TICKER.unregister(cpu.state)
            self.cpus.clear()
        self.runtime.units.save()


def mmu_top() -> int:
    """How many GiB the physical map covers."""
    return 1 << (mmu.PHYSICAL_BITS - 30)
