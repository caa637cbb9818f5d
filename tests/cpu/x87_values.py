"""States of the x87 unit to try instructions on: corner values, every rounding and precision,
stacks in every condition."""

from __future__ import annotations

import random
import struct

from .layout import SCRATCH, X87, Case

MANTISSAS = (
    1 << 63, 0, 1, 2**64 - 1, 0xC000_0000_0000_0000, 0xA000_0000_0000_0000, 2**63 - 1,
    0x8000_0000_0000_0001, 0xC90F_DAA2_2168_C235, 0x8000_0000_0000_0400, 0x8000_0080_0000_0000,
    0xAAAA_AAAA_AAAA_AAAB, 0x4000_0000_0000_0000,
)  # fmt: skip
EXPONENTS = (
    0, 1, 2, 0x3FFF, 0x3FFE, 0x3FFD, 0x4000, 0x4001, 0x403E, 0x403F, 0x401E, 0x400E, 0x7FFF, 0x7FFE,
    0x3F81, 0x3F6A, 0x407E, 0x407F, 0x3C01, 0x3BCD, 0x43FE, 0x43FF, 0x3FBE, 0x4010,
)  # fmt: skip
DOUBLES = (0.0, -0.0, 1.0, -1.5, 0.1, 1e300, -1e-300, 5e-324, float("inf"), float("-inf"), 3.0)
MEMORY = SCRATCH + 0x100


def value(r: random.Random) -> bytes:
    """An 80-bit value: mostly ordinary, often a corner, sometimes an unsupported encoding."""
    kind = r.random()
    if kind < 0.25:
        mantissa, exponent = r.getrandbits(64) | 1 << 63, 0x3FFF + r.randint(-40, 40)
    elif kind < 0.4:
        mantissa = (r.getrandbits(16) | 1 << 15) << 48
        exponent = 0x3FFF + r.randint(-5, 20)
    elif kind < 0.85:
        mantissa, exponent = r.choice(MANTISSAS), r.choice(EXPONENTS)
        if exponent and r.random() < 0.7:
            mantissa |= 1 << 63
    else:
        mantissa, exponent = r.getrandbits(64), r.getrandbits(15)
        mantissa |= 1 << 63
    return struct.pack("<QH", mantissa, exponent | r.getrandbits(1) << 15)


def control_word(r: random.Random, *, unmasked: bool) -> int:
    masks = r.getrandbits(6) if unmasked else 0x3F
    return 0x40 | masks | r.choice((0, 2, 3, 3, 3)) << 8 | r.getrandbits(2) << 10


def state(r: random.Random, *, unmasked: bool = False) -> X87:
    """A state without pending exceptions: full, empty or in between."""
    cw = control_word(r, unmasked=unmasked)
    sw = r.getrandbits(16) & 0x7F7F & (cw | 0xFFC0)
    tag = r.choice((0, 0xFF, r.getrandbits(8), r.getrandbits(8) | 3 << 6))
    if r.random() < 0.6:  # usually what is near the top is in use, and one register is free
        top = sw >> 11 & 7
        for n in range(3):
            tag |= 1 << ((top + n) & 7)
        tag &= ~(1 << ((top - 1) & 7))
    return X87(cw, sw, tag, tuple(value(r) for _ in range(8)))


def memory(r: random.Random, size: int) -> bytes:
    """An operand of `size` bytes: float, integer or packed decimal."""
    kind = r.random()
    if size == 10:
        if kind < 0.5:
            digits = [r.randint(0, 9) << 4 | r.randint(0, 9) for _ in range(9)]
            return bytes([*digits, r.choice((0, 0x80))])
        return value(r)
    if kind < 0.4 and size in (4, 8):
        number = r.choice(DOUBLES)
        if size == 4 and 1e38 < abs(number) < float("inf"):
            number = 2.5
        return struct.pack("<f" if size == 4 else "<d", number)
    if kind < 0.6:
        small = r.choice((0, 1, -1, 2, 100, -(1 << 8 * size - 1), (1 << 8 * size - 1) - 1))
        return small.to_bytes(size, "little", signed=True)
    return r.randbytes(size)


def case(r: random.Random, code: bytes, size: int = 0, *, unmasked: bool = False) -> Case:
    """`code` in a random state; `size` bytes of memory at RBX if it has an operand there."""
    data = {MEMORY: memory(r, size) + bytes(16 - size % 16)} if size else {}
    flags = 0x202 | r.getrandbits(12) & 0x8D5
    return Case(code, {"rbx": MEMORY}, rflags=flags, x87=state(r, unmasked=unmasked), memory=data)
