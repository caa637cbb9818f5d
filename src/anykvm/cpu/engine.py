"""The engine: what the vCPUs of one VM share. Guest memory, translations, and the gate that stops
them all.

This is the room's face to the room that drives it (x86): `Engine`, `Cpu`, `Exit`, `State`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache

from anykvm.cpu import (
    access,
    blocks,
    dirty,
    dispatch,
    extable,
    fpu_image,
    mmu,
    mxcsr,
    nested,
    watch,
)
from anykvm.cpu.blocks import MAX_BLOCKS, CodeFull
from anykvm.cpu.extable import FaultTable
from anykvm.cpu.guest import ENTRIES
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.ir import Function
from anykvm.cpu.jit import callable_at, process_jit
from anykvm.cpu.memory import PAGE, TOP, PhysicalMap
from anykvm.cpu.processor import Cpu
from anykvm.cpu.state import Exit, Mode, Seg, State
from anykvm.cpu.ticker import TICKER
from anykvm.cpu.translate import CodePage, Fetcher, Translator
from anykvm.cpu.unit_cache import UnitCache

__all__ = ["Cpu", "Engine", "Exit", "State"]

ADDRESS_SPACES = 2  # the second is system management mode's
PTR, U64 = ctypes.c_void_p, ctypes.c_uint64
SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "run": (None, (PTR,)),
    "page_entry": (U64, (PTR, U64)),
    "mark_dirty": (None, (PTR, U64)),
    "configure_faults": (None, (PTR,)),
    "publish": (U64, (PTR, PTR, *[U64] * 6)),
    "flush_tlb": (None, (PTR, U64)),
    "flush_page": (None, (PTR, U64)),
    "protect_page": (None, (PTR, U64)),
}


# Those that touch guest memory, and what they give besides 0
GUARDED: dict[str, type] = {
    "inject": ctypes.c_bool,
    "look": U64,
    "nested_look": U64,
    "fetch_page": U64,
    "probe_write": U64,
    "fetch": ctypes.c_bool,
    "commit": ctypes.c_bool,
    "copy_in": ctypes.c_bool,
    "exchange": U64,
}


class Runtime:
    """What the engines of a process share: native routines, handlers, units made before."""

    def __init__(self) -> None:
        rooms = (mmu, nested, dirty, access, watch, dispatch, blocks, fpu_image, mxcsr, extable)
        routines = [routine for room in rooms for routine in room.ROUTINES]
        names = [r.__name__ for r in routines]

        def make(_: list[str]) -> list[Function]:
            return [r() for r in routines]

        jit = process_jit()
        self.address = dict(zip(names, jit.addresses(names, make), strict=True))
        self.call: dict[str, Callable[..., int]] = {
            name: callable_at(self.address[name], result, *params, releases_gil=name == "run")
            for name, (result, params) in SIGNATURES.items()
        }
        self.call |= {name: self._guarded(name, result) for name, result in GUARDED.items()}
        self.faults = FaultTable(self.address["catch_fault"], self.call["configure_faults"])
        self.handlers = Handlers(jit)
        self.units = UnitCache(self.handlers, jit.cache.folder)

    def _guarded(self, name: str, result: type) -> Callable[..., int]:
        """A routine called through `guard`: 0 where guest memory is not there, see extable.py."""
        function = self.address[name]
        guard = callable_at(self.address["guard"], result, PTR, *[U64] * 5, PTR)

        def call(cpu: int, *args: int) -> int:
            return guard(cpu, *args, *(0,) * (5 - len(args)), function)

        return call

    def attach(self, state: State, address: int) -> None:
        for n, name in enumerate(ENTRIES):
            state.fn[n] = self.address[name]
        self.faults.register(state, address)


_making_runtime = threading.Lock()


@cache
def _runtime() -> Runtime:
    return Runtime()


def process_runtime() -> Runtime:
    """The process's one Runtime, also where the first VMs are made at the same time."""
    with _making_runtime:
        return _runtime()


class Gate:
    """Lets vCPUs into native code, or keeps all of them out.

    `enter` and `leave` are on the way of every exit and take no lock: who enters says so before it
    looks whether the gate is closed, who closes it does so before looking who is inside.
    """

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._inside: list[None] = []  # an entry for each vCPU: its methods are atomic
        self._turn = threading.RLock()  # held by who has closed it
        self._holder = 0
        self.closed = 0

    def enter(self) -> None:
        self._inside.append(None)
        if self.closed:
            self._wait()

    def _wait(self) -> None:
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

    def passed(self) -> Passage:
        """Inside, or in a thread that keeps the others out. Not twice in one thread."""
        return Passage(self, threading.get_ident() == self._holder)

    @contextmanager
    def shut(self, kick: Callable[[], None]) -> Iterator[None]:
        """No vCPU is in native code inside this context, nor another thread in this context; `kick`
        makes vCPUs leave. A thread may nest it.
        """
        with self._turn:
            with self._change:
                self.closed += 1
                kick()
                while self._inside:
                    self._change.wait()
            before, self._holder = self._holder, threading.get_ident()
            try:
                yield
            finally:
                self._holder = before
                with self._change:
                    self.closed -= 1
                    self._change.notify_all()


class Passage:
    """The inside of a gate, for a `with`; whoever holds the gate need not pass it."""

    def __init__(self, gate: Gate, held: bool) -> None:
        self._gate, self._held = gate, held

    def __enter__(self) -> None:
        if not self._held:
            self._gate.enter()

    def __exit__(self, *error: object) -> None:
        if not self._held:
            self._gate.leave()


class Engine:
    """Guest memory and translations of one VM. Methods may be called from any thread."""

    def __init__(self) -> None:
        self.runtime = process_runtime()
        self.translator = Translator(
            self.runtime.handlers, self.runtime.units, self.runtime.call["publish"]
        )
        self.spaces = tuple(PhysicalMap() for _ in range(ADDRESS_SPACES))
        self.memory = self.spaces[0]
        self.gate = Gate()
        self.cpus: list[Cpu] = []

    def create_cpu(self, index: int, *, ticks: bool = False) -> Cpu:
        """A vCPU; with `ticks` its `run` returns REQUEST every few milliseconds at least."""
        cpu = Cpu(self, index)
        state = cpu.state
        self.runtime.attach(state, cpu.address)
        state.physmap, state.physmap_top = cpu.memory.address, TOP
        t = self.translator
        state.blocks, state.blocks_mask = t.blocks.address, MAX_BLOCKS - 1
        state.records, state.records_rip = t.records, t.rips
        state.exit_record = t.records  # events may be delivered before anything has left
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
        """Puts `size` bytes of host memory at `hva` to guest-physical `gpa` (page aligned), in
        place of a slot that begins there.

        `number` is the slot's in the dirty ring, its upper half the address space. With `all_dirty`
        every page of a logging slot counts as written.
        """
        with self.stopped(), self.translator.lock:
            self._forget_code(hva, size)
            self.spaces[number >> 16].map(
                *(gpa, size, hva),
                readonly=readonly,
                log_dirty=log_dirty,
                all_dirty=all_dirty,
                number=number,
            )
            self._restore_code(hva, size)

    def unmap_memory(self, gpa: int, size: int, space: int = 0) -> None:
        memory = self.spaces[space]
        with self.stopped(), self.translator.lock:
            for slot in memory.inside(gpa, size):
                self._forget_code(slot.hva, slot.size)
            memory.unmap(gpa, size)

    def _forget_code(self, hva: int, size: int) -> None:
        for host in [h for h in self.translator.pages if hva <= h < hva + size]:
            self.translator.drop(host, 0, PAGE)

    def _restore_code(self, hva: int, size: int) -> None:
        for host, page in self.translator.pages.items():
            if hva <= host < hva + size:
                self._set_code(host, page.map_address)

    def _set_code(self, host: int, bitmap: int) -> None:
        for memory in self.spaces:
            memory.set_code(host, bitmap)

    def take_dirty(self, gpa: int, space: int = 0) -> bytes:
        """Pages of the slot at `gpa` that were written since the last call, a bit a page. A store
        is either reported by this call, and done, or by the next.
        """
        with self.stopped():
            return self.spaces[space].take_dirty(gpa)

    def reset_dirty(self, pages: Iterable[tuple[int, int, int]]) -> None:
        """Pages (address space, slot's address, page of the slot) will be noted again when they are
        written.
        """
        with self.stopped():
            for space, gpa, page in pages:
                self.spaces[space].reset_dirty(gpa, page)

    # Translations
    def translate(self, cpu: Cpu, rip: int, mode: int, link: int = 0) -> int | None:
        """The record for `rip`, translated if need be, with the record `link` leading to it.

        None where fetching faults (noted in the state).
        """
        base = 0 if mode & Mode.CODE64 else cpu.state.seg[Seg.CS].base
        with self.gate.passed(), self.translator.lock:  # no slot is half changed
            host = cpu.fetch_page(rip + base)
            if host is None:
                return None
            self._mark(host)
            try:
                fetcher = Fetcher(cpu.host_bytes, lambda: self._second(cpu, rip + base))
                record = self.translator.translate(rip, mode, base, host, fetcher)
                if link and record is not None and cpu.resets == self.translator.resets:
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
        self._set_code(host, page.map_address)
        for cpu in self.cpus:
            self.runtime.call["protect_page"](cpu.address, host)

    def code_written(self, gpa: int, size: int, space: int = 0) -> None:
        """Drops the translations of bytes that are about to change, or have."""
        memory = self.spaces[space]
        with self.translator.lock:
            while size > 0:
                host = memory.host(gpa)
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
                self._set_code(host, 0)
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
                self.runtime.faults.unregister(cpu.state)
            self.cpus.clear()
        self.runtime.units.save()
