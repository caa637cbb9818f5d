"""Accesses that a device answers: each reaches it once, in order, whatever instruction makes
them; and port I/O.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from anykvm.cpu.engine import Exit

from .assembler import assemble
from .harness import MMIO, Machine, machine
from .layout import SCRATCH, STACK, Case, Result

IN, OUT = "in", "out"


class Access(NamedTuple):
    write: bool
    address: int
    size: int
    data: int


class Device:
    """Answers reads with the low bytes of `value`, which counts on; remembers every access."""

    def __init__(self, value: int = 0x1122334455667788) -> None:
        self.value = value
        self.seen: list[Access] = []

    def __call__(self, machine: Machine, reason: Exit) -> None:
        s, cpu = machine.state, machine.cpu
        assert reason is Exit.MMIO
        if s.mmio_write:
            self.seen.append(Access(True, s.mmio_gpa - MMIO, s.mmio_size, s.mmio_data))
            cpu.complete_mmio_write()
        else:
            data = (self.value & (1 << 8 * s.mmio_size) - 1).to_bytes(s.mmio_size, "little")
            self.seen.append(Access(False, s.mmio_gpa - MMIO, s.mmio_size, self.value))
            self.value += 1
            cpu.complete_mmio_read(data)


def _run(text: str, device: Device, **gpr: int) -> Result:
    memory = {SCRATCH: bytes(range(1, 33)), STACK - 8: bytes(8)}
    state = {"rsi": MMIO + 0x10, "rdi": MMIO + 0x20, "rax": 0x55, **gpr}
    code = assemble(text)
    return machine().execute(
        Case(code, state, memory=memory, xmm={0: int.from_bytes(bytes(range(16)), "little")}),
        exits=device,
    )


V = 0x1122334455667788
MASK32 = 0xFFFF_FFFF
ROWS = [
    ("mov eax, [rsi]", [(0, 0x10, 4, V)], {"rax": V & MASK32}),
    ("mov rax, [rsi]; mov rbx, [rsi]",
     [(0, 0x10, 8, V), (0, 0x10, 8, V + 1)], {"rax": V, "rbx": V + 1}),
    ("mov [rsi], ax", [(1, 0x10, 2, 0x55)], {}),
    ("add [rsi], rax", [(0, 0x10, 8, V), (1, 0x10, 8, V + 0x55)], {"rax": 0x55}),
    ("add rax, [rsi]", [(0, 0x10, 8, V)], {"rax": V + 0x55}),
    ("lock add [rsi], rax", [(0, 0x10, 8, V), (1, 0x10, 8, V + 0x55)], {}),
    ("xchg [rsi], rax", [(0, 0x10, 8, V), (1, 0x10, 8, 0x55)], {"rax": V}),
    ("xadd [rsi], rax", [(0, 0x10, 8, V), (1, 0x10, 8, V + 0x55)], {"rax": V}),
    ("cmpxchg [rsi], rbx", [(0, 0x10, 8, V), (1, 0x10, 8, V)], {"rax": V}),
    ("movsq", [(0, 0x10, 8, V), (1, 0x20, 8, V)], {"rsi": MMIO + 0x18, "rdi": MMIO + 0x28}),
    ("push qword ptr [rsi]; pop rbx", [(0, 0x10, 8, V)], {"rbx": V}),
    ("push rax; pop qword ptr [rsi]", [(1, 0x10, 8, 0x55)], {"rsp": STACK}),
    ("movups [rsi], xmm0",
     [(1, 0x10, 8, 0x0706050403020100), (1, 0x18, 8, 0x0F0E0D0C0B0A0908)], {}),
    ("cmp [rsi], eax; setne bl", [(0, 0x10, 4, V)], {"rbx": 1}),
    ("inc dword ptr [rsi]; inc dword ptr [rdi]",
     [(0, 0x10, 4, V), (1, 0x10, 4, 0x55667789),
      (0, 0x20, 4, V + 1), (1, 0x20, 4, 0x5566778A)], {}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "accesses", "after"), ROWS, ids=[r[0] for r in ROWS])
def test_each_access_reaches_the_device_once(
    text: str, accesses: list[tuple[int, ...]], after: dict[str, int]
) -> None:
    device = Device()
    result = _run(text, device)
    assert device.seen == [Access(bool(w), at, size, data) for w, at, size, data in accesses]
    assert result.vector is None
    assert {name: result.gpr[name] for name in after} == after


@pytest.mark.parametrize("backward", [False, True])
def test_rep_movs_between_device_and_memory(backward: bool) -> None:
    device = Device(0x41)
    direction = "std; " if backward else ""
    result = _run(direction + "rep movsb", device, rdi=SCRATCH + 8, rcx=5)
    step = -1 if backward else 1
    assert [a.address for a in device.seen] == [0x10 + step * n for n in range(5)]
    start = 8 - 4 if backward else 8
    moved = result.memory[SCRATCH][start : start + 5]
    assert moved == (b"EDCBA" if backward else b"ABCDE")
    assert result.gpr["rcx"] == 0
    device = Device()
    _run("rep movsw", device, rsi=SCRATCH, rcx=3)
    assert [a.data for a in device.seen] == [0x0201, 0x0403, 0x0605]


def test_rep_stos_and_scas_on_a_device() -> None:
    device = Device()
    assert _run("rep stosd", device, rcx=3).gpr["rcx"] == 0
    assert [(a.write, a.address, a.data) for a in device.seen] == [
        (True, 0x20 + 4 * n, 0x55) for n in range(3)
    ]
    device = Device(0x52)
    assert _run("repne scasb", device, rcx=9).gpr["rcx"] == 5
    assert len(device.seen) == 4


def test_a_faulting_second_operand_after_a_device_read() -> None:
    """The store of MOVS faults; executed anew later, the instruction reads the device anew."""
    device = Device()
    result = _run("movsq", device, rdi=SCRATCH + 0x10000)
    assert (result.vector, result.error) == (14, 2)
    assert (result.gpr["rsi"], len(device.seen)) == (MMIO + 0x10, 1)
    again = Device()
    assert _run("movsq", again, rdi=SCRATCH).vector is None
    assert len(again.seen) == 1


# Ports


class Ports:
    """Answers IN with consecutive bytes."""

    def __init__(self) -> None:
        self.next = 0x30
        self.seen: list[tuple[str, int, int, bytes]] = []

    def __call__(self, machine: Machine, reason: Exit) -> None:
        assert reason is Exit.IO
        s, cpu = machine.state, machine.cpu
        size = s.io_size * s.io_count
        if s.io_in:
            data = bytes((self.next + n) & 0xFF for n in range(size))
            self.next += size
            self.seen.append((IN, s.io_port, s.io_size, data))
            cpu.complete_in(data)
        else:
            self.seen.append((OUT, s.io_port, s.io_size, cpu.io_data))
            assert len(cpu.io_data) == size
            cpu.complete_out()


def _ports(text: str, **gpr: int) -> tuple[Ports, Result]:
    ports = Ports()
    memory = {SCRATCH + 0xFE0: bytes(range(64)), SCRATCH: bytes(16)}
    state = {"rax": 0x1111222233334444, "rdx": 0x3F8, "rsi": SCRATCH, "rdi": SCRATCH, **gpr}
    return ports, machine().execute(Case(assemble(text), state, memory=memory), exits=ports)


@pytest.mark.parametrize(
    ("text", "port", "rax"),
    [
        ("in al, dx", 0x3F8, 0x1111222233334430),
        ("in ax, 0x60", 0x60, 0x1111222233333130),
        ("in eax, dx", 0x3F8, 0x33323130),
    ],
)
def test_in(text: str, port: int, rax: int) -> None:
    ports, result = _ports(text)
    assert [p[1] for p in ports.seen] == [port]
    assert result.gpr["rax"] == rax


@pytest.mark.parametrize(
    ("text", "data"), [("out dx, al", "44"), ("out 0x80, ax", "4444"), ("out dx, eax", "44443333")]
)
def test_out(text: str, data: str) -> None:
    ports, result = _ports(text)
    assert [p[3].hex() for p in ports.seen] == [data]
    assert result.vector is None


@pytest.mark.parametrize(("letter", "size"), [("b", 1), ("w", 2), ("d", 4)])
def test_rep_outs_and_ins_lose_nothing(letter: str, size: int) -> None:
    """Also across a page; how many elements come at a time is the processor's affair."""
    start, count = SCRATCH + 0xFF0, 32 // size
    ports, result = _ports(f"rep outs{letter}", rsi=start, rcx=count)
    assert b"".join(p[3] for p in ports.seen) == bytes(range(16, 48))
    assert all(p[:3] == (OUT, 0x3F8, size) for p in ports.seen)
    assert (result.gpr["rcx"], result.gpr["rsi"]) == (0, start + 32)
    ports, result = _ports(f"rep ins{letter}", rdi=start, rcx=count)
    expected = bytes(range(16)) + bytes(range(0x30, 0x50)) + bytes(range(48, 64))
    assert result.memory[SCRATCH + 0xFE0] == expected
    assert (result.gpr["rcx"], result.gpr["rdi"]) == (0, start + 32)


def test_single_and_backward_outs_and_ins() -> None:
    ports, result = _ports("outsb; outsw", rsi=SCRATCH + 0xFE1)
    assert [p[3].hex() for p in ports.seen] == ["01", "0203"]
    assert result.gpr["rsi"] == SCRATCH + 0xFE4
    ports, result = _ports("std; rep outsb", rsi=SCRATCH + 0xFE3, rcx=3)
    assert b"".join(p[3] for p in ports.seen).hex() == "030201"
    ports, result = _ports("std; rep insb", rdi=SCRATCH + 2, rcx=3)
    assert result.memory[SCRATCH][:3] == b"210"
    ports, result = _ports("rep insb; rep outsb", rcx=0)
    assert not ports.seen


def test_ins_to_a_missing_page_faults() -> None:
    _, result = _ports("insb", rdi=SCRATCH + 0x10000)
    assert (result.vector, result.error, result.gpr["rdi"]) == (14, 2, SCRATCH + 0x10000)
