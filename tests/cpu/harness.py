"""A machine for tests: one `Engine`, one vCPU, memory set up without any guest code, and
exception handlers that only halt.

Modes: 64 (long mode), 32 (protected mode), 16 (real mode), and "compat" (32-bit code in long
mode); everything flat, linear addresses as in layout.py. Two programs differ in their address,
so nothing has to be invalidated between them.

    machine().execute(Case(assemble("add eax, ebx"), {"rax": 1, "rbx": 2})).gpr["rax"] == 3
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from iced_x86 import Decoder, Instruction

from anykvm.cpu.engine import Cpu, Engine, Exit
from anykvm.cpu.flags import write_rflags
from anykvm.cpu.forms import Form, build
from anykvm.cpu.guest import Handler
from anykvm.cpu.jit import process_jit
from anykvm.cpu.state import Flag, Seg, State, offset_of
from anykvm.cpu.unit import CODE_MODE

from .layout import (
    CODE,
    CODE_SIZE,
    FCW,
    GPRS,
    MXCSR,
    SCRATCH,
    SCRATCH_SIZE,
    WITH_ERROR,
    X87,
    Case,
    Placement,
    Result,
)

# The first 2 MiB: tables, handlers, real mode's code and data
GDT, IDT64, IDT32, TSS64, TSS32, FAULT_STACK, HANDLERS = (
    0x1000, 0x2000, 0x3000, 0x4000, 0x4800, 0x6000, 0x6000,
)  # fmt: skip
SYSTEM_PDPT, PML4, PDPT, DIRECTORIES, SCRATCH_TABLE, SYSTEM_DIRECTORY = (
    0x7000, 0x8000, 0x9000, 0xA000, 0xE000, 0xF000,
)  # fmt: skip
REAL_CODE, REAL_DATA = 0x10000, 0x20000
LOW_SIZE = 2 << 20
SYSTEM = 0xFFFF_8000_0000_0000  # where paged modes see them
MMIO = 0xD000_0000
P, W, U, A, D, PS, NX = 1, 2, 4, 0x20, 0x40, 0x80, 1 << 63
ALL = P | W | U | A | D

KERNEL64, KERNEL_DATA, KERNEL32, CODE16, DATA16, USER64, USER_DATA, USER32, TASK = range(
    0x08, 0x50, 8
)
DESCRIPTORS = (
    0x0000_0000_0000_0000, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x00CF_9B00_0000_FFFF,
    0x0000_9B00_0000_FFFF, 0x0000_9300_0000_FFFF, 0x00AF_FB00_0000_FFFF, 0x00CF_F300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
)  # fmt: skip
CR0_PROTECTED, CR0_PAGED, CR4_PAE, EFER_LONG = 0x10033, 0x8000_0000, 0x620, 0xD01
HALT = b"\xf4"
FIXED = offset_of("physmap")  # what comes behind belongs to the engine
DEFAULT_X87, NO_XMM = Case(b"").x87, (0,) * 16


@dataclass(frozen=True)
class ModeSetup:
    """How a mode differs: control registers, IDT, selectors of code and data for CPL 0 and 3."""

    bits: int
    cr0: int
    cr4: int
    efer: int
    idt: int
    code: tuple[int, int]
    data: tuple[int, int]
    task: int


MODES: dict[int | str, ModeSetup] = {
    64: ModeSetup(
        64, CR0_PROTECTED | CR0_PAGED, CR4_PAE, EFER_LONG, IDT64,
        (KERNEL64, USER64), (KERNEL_DATA, USER_DATA), TSS64,
    ),
    "compat": ModeSetup(
        32, CR0_PROTECTED | CR0_PAGED, CR4_PAE, EFER_LONG, IDT64,
        (KERNEL32, USER32), (KERNEL_DATA, USER_DATA), TSS64,
    ),
    32: ModeSetup(
        32, CR0_PROTECTED, 0x600, 0, IDT32,
        (KERNEL32, USER32), (KERNEL_DATA, USER_DATA), TSS32,
    ),
    16: ModeSetup(16, 0x32, 0x600, 0, 0, (0, 0), (0, 0), 0),
}  # fmt: skip

Exits = Callable[["Machine", Exit], None]


def refuse(machine: Machine, reason: Exit) -> None:
    """What to do about an exit that the test did not expect."""
    text = machine.cpu.emulation_text
    raise AssertionError(f"unexpected {reason.name} at {machine.state.rip:#x} {text}")


class Region:
    """Host memory behind guest-physical memory; linear addresses are the same."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self.memory = mmap.mmap(-1, size)
        self.hva = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class Machine:
    """The software processor, ready to execute any `Case`."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.regions = [
            Region(0, LOW_SIZE), Region(CODE, CODE_SIZE), Region(SCRATCH, SCRATCH_SIZE),
        ]  # fmt: skip
        for region in self.regions:
            self.engine.map_memory(region.start, region.size, region.hva)
        self._flat = Placement(CODE, CODE_SIZE)
        self._real = Placement(REAL_CODE, 0x10000)
        self._build_tables()
        self._templates: dict[tuple[int | str, bool], bytes] = {}
        self.cpu = self.engine.create_cpu(0)

    @property
    def state(self) -> State:
        return self.cpu.state

    # Memory, from outside
    def hva(self, address: int) -> int:
        """Host address of a linear address."""
        if address >= SYSTEM:
            address -= SYSTEM
        for region in self.regions:
            if region.start <= address < region.start + region.size:
                return region.hva + address - region.start
        raise ValueError(f"expected an address that the machine maps, got {address:#x}")

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(self.hva(address), data, len(data))

    def read(self, address: int, size: int) -> bytes:
        return ctypes.string_at(self.hva(address), size)

    def _build_tables(self) -> None:
        """Nothing is mapped but what the machine has: a stray access faults as on the host."""
        self.write(PML4, struct.pack("<Q", PDPT | ALL))
        self.write(PDPT, struct.pack("<4Q", *(DIRECTORIES + 0x1000 * n | ALL for n in range(4))))
        self.write(PML4 + 2048, struct.pack("<Q", SYSTEM_PDPT | ALL))
        self.write(SYSTEM_PDPT, struct.pack("<Q", SYSTEM_DIRECTORY | ALL))
        self.write(SYSTEM_DIRECTORY, struct.pack("<Q", (ALL | PS) & ~U))
        for address in (CODE, MMIO):
            self._set_directory(address, address & ~0x1F_FFFF | ALL | PS)
        self._set_directory(SCRATCH, SCRATCH_TABLE | ALL)
        for page in range(SCRATCH, SCRATCH + SCRATCH_SIZE, 4096):
            self._set_entry(page, page | ALL)
        self._build_descriptors()
        self.write(CODE, b"\xcc" * CODE_SIZE)

    def _build_descriptors(self) -> None:
        self.write(GDT, struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS))
        self.write(HANDLERS, HALT * 4096)
        for vector in range(256):
            at = HANDLERS + 16 * vector
            low = at & 0xFFFF | (at >> 16) << 48 | 0xEE00 << 32
            gate = low | KERNEL64 << 16 | 1 << 32
            self.write(IDT64 + 16 * vector, struct.pack("<QQ", gate, SYSTEM >> 32))
            self.write(IDT32 + 8 * vector, struct.pack("<Q", low | KERNEL32 << 16))
            self.write(4 * vector, struct.pack("<HH", at & 0xFFFF, at >> 16))
        self.write(TSS64 + 4, struct.pack("<Q", SYSTEM + FAULT_STACK))
        self.write(TSS64 + 36, struct.pack("<Q", SYSTEM + FAULT_STACK))
        for task in (TSS64, TSS32):  # the I/O bitmap begins where the TSS ends
            self.write(task + 102, struct.pack("<H", 104))
        self.write(TSS32 + 4, struct.pack("<II", FAULT_STACK, KERNEL_DATA))

    def _set_directory(self, address: int, entry: int) -> None:
        self.write(DIRECTORIES + (address >> 21) * 8, struct.pack("<Q", entry))

    def _set_entry(self, page: int, entry: int) -> None:
        self.write(SCRATCH_TABLE + (page >> 12 & 511) * 8, struct.pack("<Q", entry))

    def protect(self, page: int, rights: int = ALL) -> None:
        """Rights of one page of scratch memory: bits of a page table entry, 0 for not present."""
        self._set_entry(page, page | rights if rights else 0)
        self.cpu.flush_tlb()

    # Code
    def place(self, code: bytes, mode: int | str = 64) -> int:
        """Where `code` stands, a HLT behind it."""
        area = self._real if mode == 16 else self._flat
        key = code if mode in (64, 16) else code + b"\xcc" * 8  # INT3s are there anyway
        try:
            at, new = area.place(key)
        except MemoryError:
            area.clear()
            self.engine.forget_all()
            self.write(area.start, b"\xcc" * area.size)
            at, new = area.place(key)
        if new:
            self.write(at, code + HALT)
        return at

    def prepare(self, codes: Iterable[bytes], mode: int | str = 64) -> list[Form]:
        """Compiles what the codes need, in large batches, which is much faster than one by one."""
        self._enter_mode(mode, user=True)
        templates = self.engine.translator.decoder(self.state.mode & CODE_MODE)
        forms: dict[str, Form] = {}
        for code in codes:
            padded = code + b"\xcc" * 15
            decoder, instruction = Decoder(templates.bits, padded, ip=CODE), Instruction()
            while (at := decoder.position) < len(code):
                found = templates.decode(decoder, instruction, padded, at)
                assert found is not None
                forms.setdefault(found[0].form.symbol, found[0].form)

        def make(names: list[str]) -> list[Handler]:
            return [build(forms[name]) for name in names]

        names = list(forms)
        for n in range(0, len(names), 100):
            process_jit().addresses(names[n : n + 100], make)
        return list(forms.values())

    # Execution
    def _segment(self, which: int, selector: int, *, real_base: int | None = None) -> None:
        seg = self.state.seg[which]
        if real_base is not None:
            seg.selector, seg.base, seg.limit = real_base >> 4, real_base, 0xFFFF
            seg.attr = 0x9B if which == Seg.CS else 0x93
            return
        descriptor = DESCRIPTORS[selector >> 3]
        dpl = descriptor >> 45 & 3
        seg.selector, seg.base = selector | dpl, 0
        limit = descriptor & 0xFFFF | descriptor >> 32 & 0xF0000
        seg.limit = limit << 12 | 0xFFF if descriptor >> 55 & 1 else limit
        seg.attr = descriptor >> 40 & 0xF0FF

    def _enter_mode(self, mode: int | str, *, user: bool) -> ModeSetup:
        s, setup = self.state, MODES[mode]
        s.cr0, s.cr3, s.cr4, s.efer = setup.cr0, PML4, setup.cr4, setup.efer
        high = SYSTEM if setup.efer else 0
        s.gdt_base, s.gdt_limit = high + GDT, 8 * len(DESCRIPTORS) - 1
        s.idt_base, s.idt_limit = high + setup.idt, 4095 if setup.idt == IDT64 else 0x7FF
        real = mode == 16
        for which in range(6):
            code = which == Seg.CS
            selector = (setup.code if code else setup.data)[user]
            base = (REAL_CODE if code else REAL_DATA) if real else None
            self._segment(which, selector, real_base=base)
        task = s.seg[Seg.TR]
        task.selector, task.base, task.limit, task.attr = TASK, high + setup.task, 0x67, 0x8B
        self.cpu.rflags = 2
        self.cpu.mode_changed()
        return setup

    def _template(self, mode: int | str, *, user: bool) -> bytes:
        """The vCPU's state as every case starts from it."""
        known = self._templates.get((mode, user))
        if known is None:
            s = self.state
            ctypes.memset(ctypes.addressof(s), 0, FIXED)
            s.fpu_tag = 0xFFFF
            s.fpu_cw, s.mxcsr, s.dr7, s.xcr0 = FCW, MXCSR, 0x400, 1
            self._enter_mode(mode, user=user)
            known = self._templates[mode, user] = ctypes.string_at(ctypes.addressof(s), FIXED)
        return known

    def load(self, case: Case, mode: int | str = 64, *, user: bool = False) -> int:
        """Puts a case's state into the vCPU; gives the address of its code."""
        s, cpu = self.state, self.cpu
        at = self.place(case.code, mode)
        template, key = self._template(mode, user=user), s.jump_key
        ctypes.memmove(ctypes.addressof(s), template, FIXED)
        s.jump_key = key
        registers = case.registers()
        if mode == 16 and "rsp" not in case.gpr:
            registers[4] = 0xF000
        ctypes.memmove(ctypes.addressof(s), struct.pack("<16Q", *registers), 128)
        s.rip = at - (REAL_CODE if mode == 16 else 0)
        for n, value in case.xmm.items():
            ctypes.memmove(s.xmm[n], value.to_bytes(16, "little"), 16)
        if case.x87 is not DEFAULT_X87:
            load_x87(s, case.x87)
        for address, data in case.memory.items():
            self.write(address, data)
        s.flags, s.lf_res, s.lf_aux = _flag_words(case.rflags)
        s.mxcsr = case.mxcsr
        if case.mxcsr != MXCSR or case.rflags & Flag.TF:
            cpu.mode_changed()
        return at

    def execute(
        self,
        case: Case,
        mode: int | str = 64,
        *,
        user: bool = False,
        exits: Exits = refuse,
        setup: Callable[[State], None] | None = None,
    ) -> Result:
        """Runs a case until its end or its first exception.

        `exits` deals with exits other than the final HLT; `setup` may change what was loaded.
        """
        at = self.load(case, mode, user=user)
        if setup:
            setup(self.state)
            self.cpu.mode_changed()
        return self.finish(case, at, mode, exits)

    def finish(self, case: Case, at: int, mode: int | str = 64, exits: Exits = refuse) -> Result:
        """Runs on from the present state until the case is over."""
        while (reason := self.cpu.run()) is not Exit.HLT:
            exits(self, reason)
        end = at + len(case.code) - (REAL_CODE if mode == 16 else 0)
        return self._result(case, end, mode)

    def _result(self, case: Case, end: int, mode: int | str) -> Result:
        s = self.state
        gpr = dict(zip(GPRS, s.gpr, strict=True))
        rip, flags, vector, error = s.rip - 1, self.cpu.rflags, None, None
        linear = rip + s.seg[Seg.CS].base
        linear -= SYSTEM if linear >= SYSTEM else 0
        if HANDLERS <= linear < HANDLERS + 4096:
            vector = (linear - HANDLERS) // 16
            rip, flags, error = self._frame(gpr, vector, mode)
            if vector == 13 and rip == end and error == 0:  # HLT at CPL 3: the regular end
                vector = error = None
        return Result(
            gpr=gpr,
            rflags=flags & ~0x10000,
            rip=rip,
            xmm=read_xmm(s),
            mxcsr=s.mxcsr,
            x87=read_x87(s),
            memory={a: self.read(a, len(d)) for a, d in case.memory.items()},
            vector=vector,
            error=error,
            cr2=s.cr2 if vector == 14 else None,
        )

    def _frame(
        self, gpr: dict[str, int], vector: int, mode: int | str
    ) -> tuple[int, int, int | None]:
        """RIP, RFLAGS and error code that were pushed; RSP in `gpr` becomes that of before."""
        s, size = self.state, {64: 8, "compat": 8, 32: 4, 16: 2}[mode]
        has_error = vector in WITH_ERROR and mode != 16
        sp = s.seg[Seg.SS].base + gpr["rsp"] if mode == 16 else gpr["rsp"]
        data = self.read(sp, 6 * size)
        words = [int.from_bytes(data[n : n + size], "little") for n in range(0, 6 * size, size)]
        error = words.pop(0) & 0xFFFF_FFFF if has_error else None
        changed_stack = size == 8 or words[1] & 3
        gpr["rsp"] = words[3] if changed_stack else gpr["rsp"] + size * (3 + has_error)
        return words[0], words[2], error


@functools.cache
def _flag_words(rflags: int) -> tuple[int, int, int]:
    """How a vCPU's state holds RFLAGS."""
    state = State()
    write_rflags(state, rflags)
    return state.flags, state.lf_res, state.lf_aux


def read_xmm(state: State) -> tuple[int, ...]:
    data = bytes(state.xmm)[: 16 * 64]
    if not any(data):
        return NO_XMM
    return tuple(int.from_bytes(data[n : n + 16], "little") for n in range(0, 16 * 64, 64))


def load_x87(state: State, x: X87) -> None:
    """From FXSAVE's view: ST order to physical order, a bit a register to two."""
    state.fpu_cw, state.fpu_sw = x.cw, x.sw
    top = x.sw >> 11 & 7
    state.fpu_tag = 0
    for n in range(8):
        physical = (top + n) & 7
        ctypes.memmove(state.st[physical], x.st[n], 10)
        state.fpu_tag |= 0 if x.tag >> physical & 1 else 3 << 2 * physical


def read_x87(state: State) -> X87:
    unused = state.fpu_tag == 0xFFFF and not state.fpu_sw and state.fpu_cw == FCW
    if unused and not any(bytes(state.st)):
        return DEFAULT_X87
    top = state.fpu_sw >> 11 & 7
    tag = sum((state.fpu_tag >> 2 * n & 3 != 3) << n for n in range(8))
    st = tuple(bytes(state.st[(top + n) & 7][:10]) for n in range(8))
    return X87(state.fpu_cw, state.fpu_sw, tag, st)


@functools.cache
def machine() -> Machine:
    """The process's one machine: engines hold large tables and are worth sharing."""
    return Machine()


__all__ = ["Cpu", "Exit", "Machine", "machine"]
