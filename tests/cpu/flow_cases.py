"""Cases for what is more than a computation: strings, the stack, control flow, and instructions
that fault half way.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

from .assembler import assemble, assemble_many
from .integer_cases import ALL, CONDITIONS, corner
from .layout import GPRS, RFLAGS, SCRATCH, SCRATCH_SIZE, STACK, Case

Named = tuple[str, Case]
END = SCRATCH + SCRATCH_SIZE  # the first byte that is not mapped
DF = 1 << 10
MASK64 = 2**64 - 1
NON_CANONICAL = 0x1234_5678_0000_0000
SAFE_FLAGS = ALL | DF | 1 << 21  # what POPF may get here: no TF, no AC


def random_gprs(rng: random.Random, **given: int) -> dict[str, int]:
    return {n: corner(rng, 64) for n in GPRS if n != "rsp"} | given


# Strings

STRINGS = [
    (f"{prefix} {name}{letter}".strip(), 1 << n)
    for names, prefixes in (("movs stos lods", ("", "rep")), ("scas cmps", ("", "repe", "repne")))
    for name in names.split()
    for prefix in prefixes
    for n, letter in enumerate("bwdq")
]


class Span(NamedTuple):
    """Memory of few different values, so that comparisons go on for a while."""

    start: int
    data: bytes


def _span(rng: random.Random, start: int, size: int) -> Span:
    usual = rng.choice((0, 0xFF, 0x41))
    data = bytearray(usual.to_bytes() * size)
    for _ in range(rng.choice((0, 1, 4))):
        data[rng.randrange(size)] = rng.randrange(256)
    return Span(start, bytes(data))


def _string_case(code: bytes, size: int, rng: random.Random, *, short: bool) -> Case:
    """Source and destination near each other, overlapping, across pages, off the end of memory."""
    span = _span(rng, SCRATCH + 0x0E00, 0x600)
    middle = SCRATCH + 0x1000 + rng.randrange(-24, 24)
    rsi = middle + rng.choice((0, 1, size, 8, 64, -size, -64, 200))
    rdi = middle
    if rng.random() < 0.1:
        rdi = END - rng.randrange(1, 40)
    elif rng.random() < 0.1:
        rsi = END - rng.randrange(1, 40)
    count = rng.choice((0, 1, 2, 3, 7, 16, 33, 60))
    high = rng.getrandbits(32) << 32 if short else 0
    usual = int.from_bytes(span.data[:8], "little")
    rax = usual if rng.random() < 0.6 else rng.getrandbits(64)
    flags = RFLAGS | rng.getrandbits(12) & ALL | rng.choice((0, DF))
    memory = {span.start: span.data, END - 64: rng.randbytes(64)}
    gpr = random_gprs(rng, rsi=rsi | high, rdi=rdi | high, rcx=count | high, rax=rax)
    return Case(code, gpr, flags, memory=memory)


def strings(each: int, seed: int = 0) -> Iterator[Named]:
    codes = assemble_many([text for text, _ in STRINGS])
    for (text, size), code in zip(STRINGS, codes, strict=True):
        for short in (False, True):
            rng = random.Random(f"{text} {short} {seed}")
            prefix = b"\x67" if short else b""
            for _ in range(each):
                yield (
                    f"{text} a{32 if short else 64}",
                    _string_case(prefix + code, size, rng, short=short),
                )


# The stack

STACK_TEXTS = (
    "push rcx", "push r9", "push rsp", "push cx", "push 5", "push -5", "push 0x12345678",
    "push qword ptr [rsi]", "push word ptr [rsi]",
    "push qword ptr [rsp+16]", "push qword ptr [rsp-8]", "pop rcx", "pop r9", "pop rsp", "pop cx",
    "pop sp", "push sp", "pop qword ptr [rsi]", "pop word ptr [rsi]", "pop qword ptr [rsp]",
    "pop qword ptr [rsp+8]", "pop word ptr [rsp+rdi]", "pushfq", "pushf", "push rax; popfq",
    "push rax; popf", "enter 32, 0", "enter 0, 1", "enter 8, 2", "enter 0x100, 5", "enter 0, 31",
    "enter 16, 33", "leave", "mov rsp, rsi; pop rax; push rbx",
    "xchg rsp, rsi", "add rsp, -16", "push rax; pop rbx; push rcx; pop rdx", "lea rsp, [rsp+8]",
)  # fmt: skip

STACK_BYTES = {
    "push -3 as a word": "666afd",
    "push a word": "66683412",
    "pushfw": "669c",
    "leavew": "66c9",
    "enterw": "66c8100002",
}


def _popped_flags(rng: random.Random) -> int:
    return rng.getrandbits(22) & SAFE_FLAGS | RFLAGS


def stack(each: int, seed: int = 0) -> Iterator[Named]:
    codes = list(zip(STACK_TEXTS, assemble_many(STACK_TEXTS), strict=True))
    codes += [(name, bytes.fromhex(text)) for name, text in STACK_BYTES.items()]
    for text, code in codes:
        rng = random.Random(f"{text} {seed}")
        for _ in range(each):
            rsp = STACK + rng.choice((0, 1, 7, -8, 0x800 - 4))
            gpr = random_gprs(rng, rsp=rsp, rbp=STACK - 0x80, rsi=SCRATCH + 0x400, rdi=16)
            if "popf" in text:
                gpr["rax"] = _popped_flags(rng)
            memory = {STACK - 0x300: rng.randbytes(0x600), SCRATCH + 0x400: rng.randbytes(16)}
            if rng.random() < 0.15:
                gpr["rsp"] = rng.choice((END + 4, END, END - 4, SCRATCH, SCRATCH + 4, SCRATCH - 8))
            if rng.random() < 0.1:
                gpr["rsp"] = gpr["rbp"] = NON_CANONICAL
            yield text, Case(code, gpr, RFLAGS | rng.getrandbits(12) & ALL, memory=memory)


# Control flow

FLOW_TEXTS = (
    *(f"j{c} 1f; mov ecx, 0x1234; 1: nop" for c in CONDITIONS),
    *(f"cmp rax, rbx; j{c} 1f; mov ecx, 0x1234; 1: nop" for c in CONDITIONS),
    *(f"{name} 1f; mov edx, 0x1234; 1: nop" for name in ("jrcxz", "jecxz", "loop", "loope")),
    "and rcx, 63; inc rcx; 1: add rax, rcx; loop 1b",
    "mov ecx, 20; 1: add rax, rbx; dec rdx; loope 1b",
    "mov ecx, 20; 1: add rax, rbx; cmp rdx, rax; loopne 1b",
    "call 2f; jmp 3f; 2: inc rax; ret; 3: nop",
    "call 2f; jmp 3f; 2: inc rax; ret 24; 3: nop",
    "lea rdx, [rip+4]; jmp rdx; ud2; nop; inc rax",
    "lea rdx, [rip+2]; push rdx; ret; nop; inc rax",
    "lea rdx, [rip+8]; mov [rsi], rdx; jmp qword ptr [rsi]; inc rax; nop",
    "lea rdx, [rip+3]; call rdx; jmp 1f; inc rax; ret; 1: nop",
    "jmp rax", "call rax", "push rax; ret", "jmp qword ptr [rax]", "call qword ptr [rax]",
    "int3", "ud2", "hlt", "cli", "sti", "in al, dx", "out dx, eax",
    "mov rax, cr0", "mov cr3, rax", "lgdt [rsi]", "invlpg [rsi]", "wbinvd", "rdmsr", "wrmsr",
    "mov dr7, rax", "clts", "lmsw ax", "swapgs", "sysretq", "lock nop; nop",
    "mov rcx, 3; 1: push rcx; dec rcx; jnz 1b; pop rax; pop rbx; pop rdx",
)  # fmt: skip
FLOW_BYTES = {
    "ret with 66": "66c3",
    "jmp rel8 with 66": "66eb00",
    "jrcxz with 66": "66e300",
    "lock add r, r": "f001d8",
    "lock mov m, r": "f0891e",
    "lock cmp m, r": "f0391e",
    "mov cs, ax": "8ec8",
    "lea with a register": "8dc0",
    "push cs in 64-bit mode": "0e",
    "daa in 64-bit mode": "27",
    "les in 64-bit mode": "c400",
    "into in 64-bit mode": "ce",
    "pusha in 64-bit mode": "60",
    "arithmetic 82 in 64-bit mode": "8200 00",
    "15 bytes of prefixes and opcode": "66" * 14 + "90",
    "16 bytes": "66" * 15 + "90",
    "ud0": "0fff00",
    "ud1": "0fb900",
    "salc": "d6",
    "sal by 1 (/6)": "d0f1",
    "test /1": "f6c905",
    "bswap cx": "660fc9",
    "nop with a REX.B is xchg r8, rax": "4990",
    "pause": "f390",
    "rep nop operations": "f3f30f1f00",
    "rex ignored before a prefix": "4866 01d8",
    "movsxd r32": "63c1",
    "movsxd r16": "6663c1",
    "movzx 16 to 16": "660fb7c1",
    "repne before an add": "f201d8",
    "cs before a load": "2e8b06",
    "xchg eax, eax": "87c0",
    "mov with immediate and modrm.reg 1": "c7c800000000",
}


def _flow_case(code: bytes, rng: random.Random) -> Case:
    gpr = random_gprs(rng, rsi=SCRATCH + 0x400, rdi=16)
    kind = rng.randrange(4)
    # Nothing in the kernel's half: what is mapped there is the host's affair.
    gpr["rax"] = (corner(rng, 63) & (1 << 63) - 1, NON_CANONICAL, END + 8, rng.getrandbits(47))[
        kind
    ]
    if rng.random() < 0.3:
        gpr["rbx"], gpr["rcx"] = gpr["rax"], rng.choice((0, 1, 1 << 32))
    memory = {STACK - 0x80: rng.randbytes(0x100), SCRATCH + 0x400: rng.randbytes(32)}
    return Case(code, gpr, RFLAGS | rng.getrandbits(12) & ALL, memory=memory)


def flow(each: int, seed: int = 0) -> Iterator[Named]:
    codes = list(zip(FLOW_TEXTS, assemble_many(FLOW_TEXTS), strict=True))
    codes += [(name, bytes.fromhex(text)) for name, text in FLOW_BYTES.items()]
    for text, code in codes:
        rng = random.Random(f"{text} {seed}")
        for _ in range(each):
            case = _flow_case(code, rng)
            if text == "call rax" and case.gpr["rax"] + (1 << 47) & MASK64 >= 1 << 48:
                continue  # the host stores the return address before it looks at the target
            yield text, case


# Faults: nothing may have changed

FAULT_TEXTS = (
    "mov rax, {m}", "mov {m}, rax", "add {m}, rax", "add rax, {m}", "lock add {m}, rax",
    "adc {m}, rax", "xchg {m}, rax", "xadd {m}, rax", "lock xadd {m}, rax", "cmpxchg {m}, rbx",
    "cmpxchg8b {m}", "lock cmpxchg8b {m}", "inc {m}", "neg {m}", "not {m}", "shl {m}, cl",
    "rcl {m}, 3", "shld {m}, rax, 5", "bts {m}, 3", "bt {m}, rcx", "lock btc {m}, 9", "mul {m}",
    "idiv {m}", "imul rax, {m}", "imul rax, {m}, 5", "cmovne rax, {m}", "setc byte ptr [{a}]",
    "movbe rax, {m}", "bsf rax, {m}", "popcnt rax, {m}", "push {m}", "pop {m}", "call {m}",
    "jmp {m}", "cmp {m}, 5", "test {m}, rax", "movzx eax, byte ptr [{a}]", "xlatb",
)  # fmt: skip
FAULT_BASES = ("rsi", "rbp", "rsi+rdi*8", "rsp+0x400")


def faults(each: int, seed: int = 0) -> Iterator[Named]:
    """Memory operands that are not there, cross into nothing, or are not canonical."""
    for text in FAULT_TEXTS:
        for base in FAULT_BASES:
            full = text.format(m=f"qword ptr [{base}]", a=base)
            rng = random.Random(f"{full} {seed}")
            code = assemble(full)
            for _ in range(each):
                where = rng.choice((END, END - 1, END - 4, SCRATCH - 4, SCRATCH - 8, NON_CANONICAL))
                gpr = random_gprs(rng, rsi=where, rbp=where, rdi=0, rbx=where)
                gpr["rsp"] = where - 0x400 if "rsp" in base else STACK
                flags = RFLAGS | rng.getrandbits(12) & ALL
                memory = {END - 16: rng.randbytes(16), SCRATCH: rng.randbytes(16)}
                yield full, Case(code, gpr, flags, memory=memory)


FAMILIES = {"strings": strings, "stack": stack, "flow": flow, "faults": faults}
