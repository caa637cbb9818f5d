"""Where things stand in the test machine, and what goes into an instruction under test and comes
out of it.

The same linear addresses hold on the software processor (harness.py) and on the host's own
(native.py), so that results which contain an address agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

GPRS = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()

CODE, CODE_SIZE = 0x1020_0000, 1 << 21
SCRATCH, SCRATCH_SIZE = 0x2000_0000, 1 << 16  # what follows is not mapped, nor what is before
STACK = SCRATCH + 0xF000  # where RSP points unless told otherwise
SLOT = 64  # code is placed in multiples of this, and padded with INT3

FCW, MXCSR, RFLAGS = 0x37F, 0x1F80, 0x202
WITH_ERROR = frozenset((8, 10, 11, 12, 13, 14, 17))  # vectors that push an error code
STATUS = {"cf": 0, "pf": 2, "af": 4, "zf": 6, "sf": 7, "of": 11}


@dataclass(frozen=True)
class X87:
    """The x87 as FXSAVE shows it: `tag` a bit for each physical register used, `st` from ST(0)."""

    cw: int = FCW
    sw: int = 0
    tag: int = 0
    st: tuple[bytes, ...] = (bytes(10),) * 8


@dataclass(frozen=True)
class Case:
    """Instructions and the state they start from; registers not named are 0, RSP is `STACK`."""

    code: bytes
    gpr: Mapping[str, int] = field(default_factory=dict)
    rflags: int = RFLAGS
    xmm: Mapping[int, int] = field(default_factory=dict)
    mxcsr: int = MXCSR
    x87: X87 = X87()
    memory: Mapping[int, bytes] = field(default_factory=dict)

    def registers(self) -> list[int]:
        """The sixteen general registers in encoding order."""
        unknown = set(self.gpr) - set(GPRS)
        if unknown:
            raise KeyError(f"expected 64-bit register names, got {sorted(unknown)}")
        named = {"rsp": STACK, **self.gpr}
        return [named.get(name, 0) & 2**64 - 1 for name in GPRS]


@dataclass(frozen=True)
class Result:
    """The state afterwards; `vector` is that of an exception, RIP then what that pushed."""

    gpr: dict[str, int]
    rflags: int
    rip: int
    xmm: tuple[int, ...]
    mxcsr: int
    x87: X87
    memory: dict[int, bytes]
    vector: int | None = None
    error: int | None = None
    cr2: int | None = None

    def flag(self, name: str) -> int:
        return self.rflags >> STATUS[name] & 1


class Placement:
    """Gives each piece of code an address of its own; the same bytes get the same one again."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size
        self._known: dict[bytes, int] = {}
        self._next = start

    def place(self, code: bytes) -> tuple[int, bool]:
        """The address, and whether the code is new there; MemoryError where the area is full."""
        known = self._known.get(code)
        if known is not None:
            return known, False
        size = -(-(len(code) + 8) // SLOT) * SLOT
        at = self._next
        if at + size > self.start + self.size:
            raise MemoryError("the code area is full")
        self._next += size
        self._known[code] = at
        return at, True

    def clear(self) -> None:
        self._known.clear()
        self._next = self.start


def fxsave_image(case: Case) -> bytes:
    """The 512 bytes that FXRSTOR64 loads for a case."""
    x = case.x87
    image = bytearray(512)
    image[0:5] = x.cw.to_bytes(2, "little") + x.sw.to_bytes(2, "little") + bytes([x.tag])
    image[24:28] = case.mxcsr.to_bytes(4, "little")
    for n, value in enumerate(x.st):
        image[32 + 16 * n : 42 + 16 * n] = value
    for n, number in case.xmm.items():
        image[160 + 16 * n : 176 + 16 * n] = number.to_bytes(16, "little")
    return bytes(image)


def x87_of(image: bytes) -> X87:
    """The x87 part of an FXSAVE image."""
    st = tuple(image[32 + 16 * n : 42 + 16 * n] for n in range(8))
    word = int.from_bytes
    return X87(word(image[0:2], "little"), word(image[2:4], "little"), image[4], st)


def xmm_of(image: bytes) -> tuple[int, ...]:
    """The XMM registers of an FXSAVE image."""
    return tuple(int.from_bytes(image[160 + 16 * n : 176 + 16 * n], "little") for n in range(16))
