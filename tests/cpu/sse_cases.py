"""Cases for MMX and SSE up to SSE4.2: every encoding that iced-x86 knows of, registers and memory,
corner and random values.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from iced_x86 import (
    Code,
    CpuidFeature,
    Encoder,
    EncodingKind,
    Instruction,
    Mnemonic,
    OpCodeInfo,
    OpCodeOperandKind,
    OpKind,
    Register,
)

from anykvm.cpu.forms import ROWS

from .layout import MXCSR, SCRATCH, X87, Case

FEATURES = ("MMX", "SSE", "SSE2", "SSE3", "SSSE3", "SSE4_1", "SSE4_2")
# Tested elsewhere, or they have no result
NOT_HERE = frozenset(
    "fisttp prefetchnta prefetcht0 prefetcht1 prefetcht2 sfence lfence mfence ldmxcsr".split()
)
DATA = SCRATCH + 0x800


def _names(module: object) -> dict[Any, str]:
    return {v: k for k, v in vars(module).items() if isinstance(v, int) and k.isupper()}


FEATURE_NAMES = _names(CpuidFeature)
MNEMONIC_NAMES = {v: k.lower() for v, k in _names(Mnemonic).items()}
KINDS = _names(OpCodeOperandKind)
# General registers as operands leave RBX, the address, alone
REGISTERS = {
    "R8": (Register.CL, Register.R9L),
    "R16": (Register.CX, Register.R9W),
    "R32": (Register.ECX, Register.R9D),
    "R64": (Register.RCX, Register.R9),
    "MM": tuple(getattr(Register, f"MM{n}") for n in (1, 5)),
    "XMM": tuple(getattr(Register, f"XMM{n}") for n in (1, 10)),
}

Generator = Callable[[random.Random], int]


class Line(NamedTuple):
    """One instruction under test."""

    name: str
    feature: str
    code: bytes
    constant: bool  # its immediate belongs to the form


def features_of(code: Any) -> list[str]:
    i = Instruction()
    i.code = code
    return [FEATURE_NAMES[f] for f in i.cpuid_features()]


def codes(feature: str) -> list[Any]:
    """The legacy encodings of a feature that 64-bit mode has."""
    found = []
    for code in _names(Code):
        info = OpCodeInfo(code)
        name = MNEMONIC_NAMES[info.mnemonic]
        if info.encoding != EncodingKind.LEGACY or not info.mode64 or name in NOT_HERE:
            continue
        if feature in features_of(code):
            found.append(code)
    return found


def _instruction(code: Any, *, memory: bool, immediate: int, same: bool) -> Instruction | None:
    """The code with operands filled in; None where it has no such variant."""
    info = OpCodeInfo(code)
    i = Instruction()
    i.code = code
    used = 0
    for n in range(info.op_count):
        kind = KINDS[info.op_kind(n)]
        if kind == "IMM8":
            i.set_op_kind(n, OpKind.IMMEDIATE8)
            i.immediate8 = immediate
        elif kind == "SEG_RDI":
            i.set_op_kind(n, OpKind.MEMORY_SEG_RDI)
        elif kind.endswith("MEM"):
            if kind == "MEM" and not memory:
                return None
            if memory:
                i.set_op_kind(n, OpKind.MEMORY)
                i.memory_base, i.memory_displacement, i.memory_displ_size = Register.RBX, 16, 1
                memory = False
                continue
        if kind.endswith(("REG", "_RM")) or (kind.endswith("OR_MEM") and not memory):
            i.set_op_kind(n, OpKind.REGISTER)
            i.set_op_register(n, REGISTERS[kind.split("_")[0]][0 if same else min(used, 1)])
            used += 1
    return None if memory else i


def lines(feature: str, rng: random.Random, immediates: int = 4) -> Iterator[Line]:
    """Every encoding with register operands, with one register twice, and with memory."""
    for code in codes(feature):
        name = MNEMONIC_NAMES[OpCodeInfo(code).mnemonic]
        row = ROWS[name]
        has_immediate = "IMM8" in (
            KINDS[OpCodeInfo(code).op_kind(n)] for n in range(OpCodeInfo(code).op_count)
        )
        values = [0]
        if has_immediate:
            values = (
                rng.sample(range(256), immediates) if row.constant else [0, 1, 7, 15, 31, 32, 255]
            )
        for value in values:
            for memory, same in ((False, False), (False, True), (True, False)):
                made = _instruction(code, memory=memory, immediate=value, same=same)
                if made is not None:
                    encoder = Encoder(64)
                    encoder.encode(made, 0)
                    yield Line(name, feature, encoder.take_buffer(), row.constant)


# Values
SINGLES = (
    0x0000_0000, 0x8000_0000, 0x3F80_0000, 0xBF80_0000, 0x7F80_0000, 0xFF80_0000, 0x7FC0_0000,
    0xFFC1_2345, 0x7F81_2345, 0xFF80_0001, 0x0000_0001, 0x807F_FFFF, 0x0080_0000, 0x7F7F_FFFF,
    0x4F00_0000, 0xCF00_0000, 0x5F00_0000, 0x3F00_0000, 0x4020_0000, 0x3FFF_FFFF, 0xC060_0000,
    0x2000_0000, 0x1F80_0001,
)  # fmt: skip
DOUBLES = (
    0x0000_0000_0000_0000, 0x8000_0000_0000_0000, 0x3FF0_0000_0000_0000, 0xBFF0_0000_0000_0000,
    0x7FF0_0000_0000_0000, 0xFFF0_0000_0000_0000, 0x7FF8_0000_0000_0000, 0xFFF8_1234_5678_9ABC,
    0x7FF0_0000_0000_1234, 0xFFF4_0000_0000_0001, 0x0000_0000_0000_0001, 0x800F_FFFF_FFFF_FFFF,
    0x0010_0000_0000_0000, 0x7FEF_FFFF_FFFF_FFFF, 0x41DF_FFFF_FFC0_0000, 0x41E0_0000_0000_0000,
    0xC1E0_0000_0010_0000, 0x43E0_0000_0000_0000, 0xC3E0_0000_0000_0000, 0x3FE0_0000_0000_0000,
    0x4004_0000_0000_0000, 0x3690_0000_0000_0000, 0x47EF_FFFF_F000_0000, 0x3810_0000_0000_0001,
)  # fmt: skip


def _singles(rng: random.Random) -> int:
    words = [
        rng.choice(SINGLES)
        if rng.random() < 0.6
        else struct.unpack("<I", struct.pack("<f", rng.uniform(-1e5, 1e5)))[0]
        for _ in range(4)
    ]
    return sum(w << 32 * n for n, w in enumerate(words))


def _doubles(rng: random.Random) -> int:
    words = [
        rng.choice(DOUBLES)
        if rng.random() < 0.6
        else struct.unpack("<Q", struct.pack("<d", rng.uniform(-1e5, 1e5)))[0]
        for _ in range(2)
    ]
    return words[0] | words[1] << 64


def _limits(rng: random.Random) -> int:
    """Elements at the limits of a size."""
    bits = rng.choice((8, 16, 32, 64))
    top = 1 << (bits - 1)
    pool = (0, 1, 2, top - 1, top, top + 1, 2 * top - 1, rng.getrandbits(bits))
    return sum(rng.choice(pool) << bits * n for n in range(128 // bits))


def _small(rng: random.Random) -> int:
    """A number that makes a shift count."""
    return rng.choice((0, 1, 7, 15, 16, 31, 32, 63, 64, 2**32, 2**63)) | rng.getrandbits(64) << 64


def _text(rng: random.Random) -> int:
    """Bytes of few values, so that strings match now and then."""
    return int.from_bytes(bytes(rng.choice(b"\0aabc\xff") for _ in range(16)), "little")


INTEGERS: tuple[Generator, ...] = (
    _limits,
    _limits,
    _small,
    lambda rng: rng.getrandbits(128),
    _text,
)
FLOATS: dict[str, tuple[Generator, ...]] = {"s": (_singles,), "d": (_doubles,)}


def _generators(name: str) -> tuple[Generator, ...]:
    """What kind of values mean something to an instruction."""
    if name.startswith("cvt"):
        return (_singles, _doubles, _limits)
    if name[0] == "p" or name[:4] in ("movd", "movn", "mask", "crc3"):
        return INTEGERS
    kind = name[-1] if name[-1] in "sd" and name[-2] in "ps" else ""
    return FLOATS.get(kind, (_singles, _doubles))


def mxcsr_of(rng: random.Random, unmasked: bool = False) -> int:
    """Any rounding, DAZ and FTZ now and then, some sticky flags; exceptions masked unless told."""
    value = MXCSR | rng.randrange(4) << 13
    value |= (rng.random() < 0.2) << 6 | (rng.random() < 0.2) << 15
    value |= rng.getrandbits(6) if rng.random() < 0.3 else 0
    return value & ~(rng.getrandbits(6) << 7) if unmasked else value


def case(line: Line, rng: random.Random, *, unmasked: bool = False) -> Case:
    """The line with values for everything that it may read."""
    choices = _generators(line.name)

    def value() -> int:
        return rng.choice(choices)(rng)

    first = value()
    second = first if rng.random() < 0.1 else value()
    mm = [value().to_bytes(16, "little")[:8] + b"\xff\xff" for _ in range(8)]
    lengths = (0, 3, 8, 16, 20, -5, -16, 2**40, rng.getrandbits(64))
    return Case(
        line.code,
        gpr={
            "rbx": DATA, "rcx": second & 2**64 - 1, "rdi": DATA + 9, "r9": value() & 2**64 - 1,
            "rax": rng.choice(lengths) & 2**64 - 1, "rdx": rng.choice(lengths) & 2**64 - 1,
        },
        rflags=0x202 | rng.getrandbits(12) & 0x8D5,
        xmm={0: value(), 1: first, 10: second, 2: value()},
        mxcsr=mxcsr_of(rng, unmasked),
        x87=X87(sw=rng.randrange(8) << 11, tag=rng.getrandbits(8), st=tuple(mm)),
        memory={DATA: rng.randbytes(16) + second.to_bytes(16, "little") + rng.randbytes(16)},
    )  # fmt: skip
