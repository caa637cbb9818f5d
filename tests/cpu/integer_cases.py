"""Cases for the integer instruction set: every mnemonic with the operand shapes that it takes,
corner and random values.

A `Line` is one instruction text with what the manual leaves undefined about it. The texts are
generated from tables in the manual's operand notation; a seed makes the values, so a failing
case can be made again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .assembler import assemble_many
from .layout import GPRS, RFLAGS, SCRATCH, STATUS, Case, Result

CONDITIONS = "o no b ae e ne be a s ns p np l ge le g".split()
SIZES = (8, 16, 32, 64)
NAMES: dict[int, list[str]] = {
    64: GPRS,
    32: ["e" + n[1:] for n in GPRS[:8]] + [n + "d" for n in GPRS[8:]],
    16: [n[1:] for n in GPRS[:8]] + [n + "w" for n in GPRS[8:]],
    8: "al cl dl bl spl bpl sil dil".split() + [n + "b" for n in GPRS[8:]],
}
KEYWORD = {
    8: "byte", 16: "word", 32: "dword", 64: "qword", 128: "xmmword",
}  # fmt: skip
DATA = SCRATCH + 0x800  # 256 bytes around here are the memory operand's
WINDOW = 256
ALL = sum(1 << bit for bit in STATUS.values())


def bits(*names: str) -> int:
    return sum(1 << STATUS[n] for n in names)


AF, CF, OF = bits("af"), bits("cf"), bits("of")


@dataclass(frozen=True)
class Line:
    """An instruction under test. `undefined` tells the undefined flags, if need be from a count."""

    text: str
    name: str
    size: int  # of the operands, bits
    undefined: Callable[[Line, int], int] | int = 0
    count: int | None = None  # an immediate count
    counts: bool = False  # CL is a count
    wide: bool = False  # rdx:rax is a dividend


def register(number: int, size: int) -> str:
    return NAMES[size][number]


# Memory operands: the base is DATA or close to the end of a page
MEMORY = ("[rsi]", "[rsi+rdi*4+0x10]", "[r13+r14-0x20]", "[rsi+rdi*8-0x80]", "[esi+edi*2+4]")


def operands(size: int, shape: str, variant: int = 0) -> str:
    """Operands for a shape such as `r,m` or `m,i`; `variant` picks registers and addresses."""
    pairs = ((1, 2), (3, 9), (8, 0), (11, 15), (5, 7))
    names = [register(n, size) for n in (*pairs[variant % 5], 10)]
    registers = iter(["ah", "dh"] if size == 8 and variant == 4 else names)
    immediate = {8: "0x5a", 16: "-0x1234", 32: "0x12345678", 64: "-0x12345678"}[size]
    texts = {"m": f"{KEYWORD[size]} ptr {MEMORY[variant % 5]}", "i": immediate, "b": "-5", "1": "1"}
    return ", ".join(next(registers) if s == "r" else texts[s] for s in shape.split(","))


def lines_of(
    names: str, shapes: str, sizes: Sequence[int] = SIZES, *, lock: bool = False, variants: int = 5,
    undefined: Callable[[Line, int], int] | int = 0, wide: bool = False,
) -> Iterator[Line]:  # fmt: skip
    for name in names.split():
        for size in sizes:
            for shape in shapes.split():
                seen = set()
                for variant in range(variants):
                    text = f"{name} {operands(size, shape, variant)}"
                    texts = [text, f"lock {text}"] if lock and shape[0] == "m" else [text]
                    for t in texts:
                        if t not in seen:
                            seen.add(t)
                            yield Line(t, name, size, undefined, wide=wide)


# Flags that the manual leaves undefined (SDM vol. 2, each instruction's "Flags Affected")
MULTIPLY = bits("sf", "zf", "af", "pf")
BIT_TEST = bits("of", "sf", "af", "pf")
BIT_SCAN = BIT_TEST | CF


def shift_undefined(line: Line, count: int) -> int:
    masked = count & (63 if line.size == 64 else 31)
    if not masked:
        return 0
    undefined = 0 if line.name[0] == "r" else AF
    if masked > 1:
        undefined |= OF
    if line.name in ("shl", "shr", "sal") and masked >= line.size:
        undefined |= CF
    return undefined


def double_undefined(line: Line, count: int) -> int:
    masked = count & (63 if line.size == 64 else 31)
    return AF | OF if masked > 1 else AF if masked else 0


def arithmetic() -> Iterator[Line]:
    shapes = "r,r r,m m,r r,i m,i r,b m,b"
    yield from lines_of("add adc sub sbb", shapes, lock=True)
    yield from lines_of("and or xor", shapes, lock=True, undefined=AF)
    yield from lines_of("cmp", shapes)
    yield from lines_of("test", "r,r m,r r,i m,i", undefined=AF)
    yield from lines_of("mov", shapes)
    yield from lines_of("inc dec neg not", "r m", lock=True)
    yield from lines_of("xadd", "r,r m,r", lock=True)
    yield from lines_of("cmpxchg", "r,r m,r", lock=True)
    yield from lines_of("xchg", "r,r m,r r,m", lock=True)
    yield from lines_of("mul", "r m", undefined=MULTIPLY)
    yield from lines_of("imul", "r m", undefined=MULTIPLY)
    yield from lines_of("imul", "r,r r,m r,r,i r,m,i r,r,b", (16, 32, 64), undefined=MULTIPLY)
    yield from lines_of("div idiv", "r m", undefined=ALL, wide=True)
    yield from lines_of("bswap", "r", (32, 64))
    yield from lines_of("movbe", "r,m m,r", (16, 32, 64))
    yield Line("mov rcx, 0x123456789abcdef0", "mov", 64)
    yield Line("mov r9, -1", "mov", 64)
    yield Line("movabs rax, [0x20000808]", "mov", 64)
    yield Line("movabs [0x20000808], eax", "mov", 32)
    for name in ("cmpxchg8b qword", "cmpxchg16b xmmword"):
        for prefix in ("", "lock "):
            yield Line(f"{prefix}{name} ptr [rsi]", name.split()[0], 64)


def extensions() -> Iterator[Line]:
    for to, sources in ((16, (8,)), (32, (8, 16)), (64, (8, 16))):
        for source in sources:
            for name in ("movzx", "movsx"):
                for text in (register(1, source), f"{KEYWORD[source]} ptr [rsi]"):
                    yield Line(f"{name} {register(9, to)}, {text}", name, to)
    for text in ("ecx", "dword ptr [rsi]"):
        yield Line(f"movsxd r8, {text}", "movsxd", 64)
    yield Line("movzx edx, ah", "movzx", 32)
    for name in "cbw cwde cdqe cwd cdq cqo".split():
        yield Line(name, name, 32)
    for size in (16, 32, 64):
        for address in ("[rax+rcx*8-5]", "[rsp+rbx]", "[eax+ecx+0x7fffffff]", "[r12+0x7fffffff]"):
            yield Line(f"lea {register(13, size)}, {address}", "lea", size)
    yield Line("xlatb", "xlatb", 8)


def conditionals() -> Iterator[Line]:
    for c in CONDITIONS:
        for target in ("al", "r10b", "ch", "byte ptr [rsi]"):
            yield Line(f"set{c} {target}", f"set{c}", 8)
        for size in (16, 32, 64):
            for source in (register(2, size), f"{KEYWORD[size]} ptr [rsi+rdi*4]"):
                yield Line(f"cmov{c} {register(9, size)}, {source}", f"cmov{c}", size)
    for name in "clc stc cmc lahf sahf cld std".split():
        yield Line(name, name, 8)
    for name in "lfence sfence mfence pause nop endbr64".split():
        yield Line(name, name, 8)
    for text in ("rdsspd eax", "rdsspq rax"):  # no shadow stacks, so nothing happens
        yield Line(text, text.split()[0], 64)
    for name in "prefetcht0 prefetcht1 prefetcht2 prefetchnta".split():
        yield Line(f"{name} [rax]", name, 8)
    yield Line("nop dword ptr [rax+rax]", "nop", 32)


def shifts() -> Iterator[Line]:
    for name in "shl shr sar rol ror rcl rcr".split():
        for size in SIZES:
            for target in (register(0, size), register(12, size), operands(size, "m", 1)):
                yield Line(f"{name} {target}, 1", name, size, shift_undefined, 1)
                yield Line(f"{name} {target}, cl", name, size, shift_undefined, counts=True)
                for count in (0, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 255):
                    yield Line(f"{name} {target}, {count}", name, size, shift_undefined, count)
    for name in ("shld", "shrd"):
        for size in (16, 32, 64):
            for target in (register(0, size), operands(size, "m", 1)):
                both = f"{name} {target}, {register(2, size)}"
                if size != 16:
                    yield Line(f"{both}, cl", name, size, double_undefined, counts=True)
                for count in (0, 1, 2, 15, 16, 31, 63):
                    if size != 16 or count <= 16:
                        yield Line(f"{both}, {count}", name, size, double_undefined, count)


def bit_instructions() -> Iterator[Line]:
    sizes = (16, 32, 64)
    yield from lines_of("bt", "r,r m,r r,b m,b", sizes, undefined=BIT_TEST)
    yield from lines_of("bts btr btc", "r,r m,r r,b m,b", sizes, lock=True, undefined=BIT_TEST)
    yield from lines_of("bsf bsr", "r,r r,m", sizes, undefined=BIT_SCAN)
    yield from lines_of("lzcnt", "r,r r,m", sizes, undefined=BIT_TEST)
    yield from lines_of("popcnt", "r,r r,m", sizes)
    for size in SIZES:
        for source in (register(2, size), operands(size, "m", 0)):
            yield Line(f"crc32 {'rax' if size == 64 else 'eax'}, {source}", "crc32", size)
    yield Line("crc32 r9, bl", "crc32", 8)


FAMILIES: dict[str, Callable[[], Iterator[Line]]] = {
    "arithmetic": arithmetic,
    "extensions": extensions,
    "conditionals": conditionals,
    "shifts": shifts,
    "bits": bit_instructions,
}


# Values


def corner(rng: random.Random, size: int) -> int:
    """A value of `size` bits, likely at some edge; the bits above are random."""
    top = 1 << (size - 1)
    values = (0, 1, 2, 0xF, 0x10, 0x7F, 0x80, 0xFF, top - 1, top, top + 1, 2 * top - 1, 2 * top - 2)
    value = rng.choice(values) if rng.random() < 0.6 else rng.getrandbits(size)
    if rng.random() < 0.1:
        value = 1 << rng.randrange(size)
    return value & (2 * top - 1) | (rng.getrandbits(64) >> size << size if size < 64 else 0)


def case_of(line: Line, code: bytes, rng: random.Random, count: int | None) -> Case:
    """A state for a line: operands at corners, addresses inside the window."""
    gpr = {name: corner(rng, line.size) for name in GPRS if name != "rsp"}
    base = DATA if rng.random() < 0.7 else SCRATCH + 0x1000 - rng.randrange(1, 10)
    scratch = rng.randrange(0, 8)
    text = line.text
    if "[" in text and line.name != "lea":
        if "rsi" in text or "esi" in text:
            gpr["rsi"], gpr["rdi"] = base, scratch
            if "16b" in text:
                gpr["rsi"] = DATA + rng.choice((0, 16, 32, 64, 8))
        elif "r13" in text:
            gpr["r13"], gpr["r14"] = base - scratch, scratch + 32
    if line.name[:2] == "bt" and "[" in text and line.name in ("bt", "bts", "btr", "btc"):
        limit = min(WINDOW * 2, 1 << line.size - 1)
        for register_ in ("rcx", "rdx", "rbx", "r8", "r11", "rbp"):
            gpr[register_] = rng.randrange(-limit, limit) & (1 << line.size) - 1
    if line.name == "xlatb":
        gpr["rbx"] = DATA - 0x80
    if count is not None:
        gpr["rcx"] = gpr["rcx"] & ~0xFF | count
    if line.wide:
        _make_quotient_fit(line, gpr, rng)
    flags = RFLAGS | rng.choice((0, ALL, rng.getrandbits(12) & ALL))
    start = base & ~0xF
    memory = bytearray(rng.randbytes(WINDOW))
    for at in range(0, WINDOW, 8):
        if rng.random() < 0.5:
            memory[at : at + 8] = corner(rng, line.size).to_bytes(8, "little")
    if "cmpxchg" in text and rng.random() < 0.5:
        _make_equal(line, gpr, memory, gpr.get("rsi", 0) - (start - 64))
    return Case(code, gpr, flags, memory={start - 64: bytes(memory)})


def _make_quotient_fit(line: Line, gpr: dict[str, int], rng: random.Random) -> None:
    """Half of the dividends are small enough not to overflow."""
    if rng.random() < 0.5:
        if line.size == 8:
            gpr["rax"] &= ~0xFF00
        else:
            gpr["rdx"] = rng.choice((0, 0, 1, 3, 2**64 - 1))


def _make_equal(line: Line, gpr: dict[str, int], memory: bytearray, at: int) -> None:
    """The comparison of CMPXCHG succeeds."""
    if "8b" in line.text or "16b" in line.text:
        half = 4 if "8b" in line.text else 8
        gpr["rax"] = int.from_bytes(memory[at : at + half], "little")
        gpr["rdx"] = int.from_bytes(memory[at + half : at + 2 * half], "little")
    elif "[rsi]" in line.text:
        gpr["rax"] = int.from_bytes(memory[at : at + 8], "little")
    else:
        gpr["rax"] = gpr["rcx"]


def counts_of(line: Line, each: int) -> Iterator[int | None]:
    if line.counts:
        whole = each > 3 or line.text.split()[1][0] in "ae"  # AL, AX, EAX, not RAX nor memory
        yield from range(0, 256, 1 if whole else 5)
    else:
        yield from [None] * each


def cases(lines: Sequence[Line], each: int, seed: int = 0) -> list[tuple[Line, Case]]:
    """`each` cases for a line; for a shift by CL one for every count."""
    codes = assemble_many([line.text for line in lines])
    made = []
    for line, code in zip(lines, codes, strict=True):
        rng = random.Random(f"{line.text} {seed}")
        made += [(line, case_of(line, code, rng, n)) for n in counts_of(line, each)]
    return made


def undefined_flags(line: Line, case: Case, result: Result) -> int:
    """RFLAGS bits not to be compared."""
    if result.vector is not None:
        return ALL if line.wide else 0
    if not callable(line.undefined):
        return line.undefined
    count = line.count if line.count is not None else case.gpr["rcx"] & 0xFF
    return line.undefined(line, count)


def all_cases(each: int, seed: int = 0) -> Iterator[tuple[Line, Case]]:
    for family in FAMILIES.values():
        yield from cases(list(family()), each, seed)
