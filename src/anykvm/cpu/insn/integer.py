"""Moves, arithmetic and logic on general registers (SDM vol. 1, 7.3.1 to 7.3.5)."""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, compare_exchange, row
from anykvm.cpu.guest import DE, GP
from anykvm.cpu.ir import Value
from anykvm.cpu.state import TSC_RATIO_BITS

CONDITIONS = "o no b ae e ne be a s ns p np l ge le g".split()
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


def read_gpr(i: Insn, number: int, bits: int) -> Value:
    return i.h.field(f"gpr[{number}]").load(f"i{bits}")


def write_gpr(i: Insn, number: int, value: Value) -> None:
    """Writes 8, 16, 32 (zero-extended) or 64 bits of a general register."""
    if value.bits == 32:
        value = value.zext(64)
    i.h.field(f"gpr[{number}]").store(value)


@row("mov")
def mov(i: Insn) -> None:
    dst, src = i.ops
    dst.write(src.read())


@row("movzx")
def movzx(i: Insn) -> None:
    dst, src = i.ops
    dst.write(src.read().zext(dst.bits))


@row("movsx", "movsxd")
def movsx(i: Insn, name: str) -> None:
    dst, src = i.ops
    value = src.read()
    dst.write(value.sext(dst.bits) if dst.bits > value.bits else value)


@row("movbe")
def movbe(i: Insn) -> None:
    dst, src = i.ops
    dst.write(i.h.intrinsic(f"llvm.bswap.i{dst.bits}", f"i{dst.bits}", src.read()))


@row("lea")
def lea(i: Insn) -> None:
    dst, src = i.ops
    assert isinstance(src, Memory)
    dst.write(src.offset.trunc(dst.bits))


@row("add", lock=True)
def add(i: Insn) -> None:
    b = i.ops[1].read()
    a, r = i.ops[0].update(lambda a: a + b)
    i.h.flags.add(a, b, r)


@row("adc", lock=True)
def adc(i: Insn) -> None:
    b = i.ops[1].read()
    carry = i.h.flags.cf().zext(b.bits)
    a, r = i.ops[0].update(lambda a: a + b + carry)
    i.h.flags.add(a, b, r)


@row("sub", lock=True)
def sub(i: Insn) -> None:
    b = i.ops[1].read()
    a, r = i.ops[0].update(lambda a: a - b)
    i.h.flags.sub(a, b, r)


@row("sbb", lock=True)
def sbb(i: Insn) -> None:
    b = i.ops[1].read()
    borrow = i.h.flags.cf().zext(b.bits)
    a, r = i.ops[0].update(lambda a: a - b - borrow)
    i.h.flags.sub(a, b, r)


@row("cmp", writes=())
def cmp(i: Insn) -> None:
    a, b = i.ops[0].read(), i.ops[1].read()
    i.h.flags.sub(a, b, a - b)


@row("and", "or", "xor", lock=True)
def logic(i: Insn, name: str) -> None:
    b = i.ops[1].read()
    _, r = i.ops[0].update(lambda a: a._binary(name, b))
    i.h.flags.logic(r)


@row("test", writes=())
def test(i: Insn) -> None:
    i.h.flags.logic(i.ops[0].read() & i.ops[1].read())


@row("inc", lock=True)
def inc(i: Insn) -> None:
    a, r = i.ops[0].update(lambda a: a + 1)
    i.h.flags.keep_cf(a, 1, r, subtract=False)


@row("dec", lock=True)
def dec(i: Insn) -> None:
    a, r = i.ops[0].update(lambda a: a - 1)
    i.h.flags.keep_cf(a, 1, r, subtract=True)


@row("neg", lock=True)
def neg(i: Insn) -> None:
    a, r = i.ops[0].update(lambda a: -a)
    i.h.flags.sub(i.h.const(0, a.bits), a, r)


@row("not", lock=True)
def not_(i: Insn) -> None:
    i.ops[0].update(lambda a: ~a)


@row("xchg", writes=(0, 1))
def xchg(i: Insn) -> None:
    """With a memory operand always locked."""
    a, b = (i.ops[0], i.ops[1]) if i.ops[0].is_memory else (i.ops[1], i.ops[0])
    new = b.read()
    if isinstance(a, Memory):
        a.lock = True
    old, _ = a.update(lambda _: new)
    b.write(old)


@row("xadd", writes=(0, 1), lock=True)
def xadd(i: Insn) -> None:
    b = i.ops[1].read()
    a, r = i.ops[0].update(lambda a: a + b)
    i.ops[1].write(a)
    if not i.ops[0].is_memory:
        i.ops[0].write(r)  # the same register twice holds the sum
    i.h.flags.add(a, b, r)


@row("cmpxchg", lock=True)
def cmpxchg(i: Insn) -> None:
    """Memory is written in either case, so a read-only page faults; a register only where they are
    equal.
    """
    expected = read_gpr(i, RAX, i.bits)
    dst, new = i.ops[0], i.ops[1].read()
    if dst.is_memory:
        a, _ = dst.update(lambda a: a.eq(expected).select(new, a))
        equal = a.eq(expected)
    else:
        a = dst.read()
        equal = a.eq(expected)
        with i.h.If(equal):
            dst.write(new)
    with i.h.If(equal ^ 1):
        write_gpr(i, RAX, a)
    i.h.flags.sub(expected, a, expected - a)


@row("cmpxchg8b", "cmpxchg16b", lock=True)
def cmpxchg_pair(i: Insn, name: str) -> None:
    op = i.ops[0]
    assert isinstance(op, Memory)
    half = op.bits // 2
    if name == "cmpxchg16b":
        op.require_aligned(16)

    def pair(low: int, high: int) -> Value:
        return read_gpr(i, low, half).zext(op.bits) | (
            read_gpr(i, high, half).zext(op.bits) << half
        )

    expected, new = pair(RAX, RDX), pair(RBX, RCX)
    place = op.place()
    old = place.load(f"i{op.bits}")
    if "lock" in i.attrs:
        old, _ = compare_exchange(i.h, place.ptr, expected, new)
        with i.h.If(place.slow):
            place.store(old.eq(expected).select(new, old))
    else:
        place.store(old.eq(expected).select(new, old))
    equal = old.eq(expected)
    with i.h.If(equal ^ 1):
        write_gpr(i, RAX, old.trunc(half))
        write_gpr(i, RDX, (old >> half).trunc(half))
    i.h.flags.set_zf(equal)


def _write_product(i: Insn, product: Value, n: int) -> None:
    if n == 8:
        write_gpr(i, RAX, product)
    else:
        write_gpr(i, RAX, product.trunc(n))
        write_gpr(i, RDX, (product >> n).trunc(n))


@row("mul", writes=())
def mul(i: Insn) -> None:
    n = i.bits
    product = read_gpr(i, RAX, n).zext(2 * n) * i.ops[0].read().zext(2 * n)
    _write_product(i, product, n)
    over = (product >> n).ne(0)
    i.h.flags.result(product.trunc(n), over, over)


@row("imul", writes=())
def imul(i: Insn) -> None:
    n = i.bits
    if len(i.ops) == 1:
        a, b = read_gpr(i, RAX, n), i.ops[0].read()
    else:
        a, b = (op.read() for op in i.ops[-2:])
    product = a.sext(2 * n) * b.sext(2 * n)
    low = product.trunc(n)
    if len(i.ops) == 1:
        _write_product(i, product, n)
    else:
        i.ops[0].write(low)
    over = low.sext(2 * n).ne(product)
    i.h.flags.result(low, over, over)


def _dividend(i: Insn, n: int) -> Value:
    if n == 8:
        return read_gpr(i, RAX, 16)
    return read_gpr(i, RAX, n).zext(2 * n) | (read_gpr(i, RDX, n).zext(2 * n) << n)


def _write_quotient(i: Insn, quotient: Value, remainder: Value) -> None:
    write_gpr(i, RAX, quotient)
    if quotient.bits == 8:
        i.h.cpu.offset(1).store(remainder)  # AH
    else:
        write_gpr(i, RDX, remainder)


def _divide(i: Insn, dividend: Value, divisor: Value) -> tuple[Value, Value]:
    """Unsigned, of a width that has no machine instruction behind it where it is 128."""
    wide = divisor.zext(dividend.bits)
    if dividend.bits < 128:
        return dividend.udiv(wide), dividend.urem(wide)
    h, low = i.h, dividend.trunc(64)
    quotient, remainder = h.local("i64"), h.local("i64")
    high = (dividend >> 64).trunc(64)
    with h.If(high.eq(0)):
        quotient.set(low.udiv(divisor))
        remainder.set(low.urem(divisor))
    with h.Else():
        quotient.set(h.entry("udiv128").call("i64", h.cpu, high, low, divisor))
        remainder.set(h.get("scratch[0]"))
    return quotient.get(), remainder.get()


@row("div", writes=())
def div(i: Insn) -> None:
    n = i.bits
    divisor = i.ops[0].read()
    dividend = _dividend(i, n)
    # The quotient fits exactly if the high half is below the divisor; that also tells a divisor of
    # zero.
    i.h.raise_if((dividend >> n).trunc(n).uge(divisor), DE)
    quotient, remainder = _divide(i, dividend, divisor)
    _write_quotient(i, quotient.trunc(n), remainder.trunc(n))


@row("idiv", writes=())
def idiv(i: Insn) -> None:
    n, h = i.bits, i.h
    divisor = i.ops[0].read()
    dividend = _dividend(i, n)
    minus, other = dividend.slt(0), divisor.slt(0)
    magnitude = minus.select(-dividend, dividend)
    by = other.select(-divisor, divisor)
    h.raise_if((magnitude >> n).trunc(n).uge(by), DE)
    quotient, remainder = (v.trunc(n) for v in _divide(i, magnitude, by))
    negative = minus ^ other
    limit = negative.select(h.const(1 << (n - 1), n), h.const((1 << (n - 1)) - 1, n))
    h.raise_if(quotient.ugt(limit), DE)
    _write_quotient(i, negative.select(-quotient, quotient), minus.select(-remainder, remainder))


@row("cbw", "cwde", "cdqe")
def extend_rax(i: Insn, name: str) -> None:
    n = {"cbw": 16, "cwde": 32, "cdqe": 64}[name]
    write_gpr(i, RAX, read_gpr(i, RAX, n // 2).sext(n))


@row("cwd", "cdq", "cqo")
def extend_into_rdx(i: Insn, name: str) -> None:
    n = {"cwd": 16, "cdq": 32, "cqo": 64}[name]
    write_gpr(i, RDX, read_gpr(i, RAX, n).sar(n - 1))


@row("bswap")
def bswap(i: Insn) -> None:
    """Of a 16-bit register it is undefined; processors clear it."""
    n = i.bits
    value = i.ops[0].read()
    swapped = i.h.const(0, 16) if n == 16 else i.h.intrinsic(f"llvm.bswap.i{n}", f"i{n}", value)
    i.ops[0].write(swapped)


@row(*(f"set{c}" for c in CONDITIONS))
def setcc(i: Insn, name: str) -> None:
    i.ops[0].write(i.h.flags.condition(CONDITIONS.index(name[3:])).zext(8))


@row(*(f"cmov{c}" for c in CONDITIONS))
def cmovcc(i: Insn, name: str) -> None:
    """The source is read, and faults, whatever the condition; a 32-bit destination is always
    zero-extended.
    """
    dst, src = i.ops
    value = src.read()
    dst.write(i.h.flags.condition(CONDITIONS.index(name[4:])).select(value, dst.read()))


@row("clc", "stc", "cmc")
def carry(i: Insn, name: str) -> None:
    flags = i.h.flags
    flags.set_cf(flags.cf() ^ 1 if name == "cmc" else i.h.const(int(name == "stc"), 1))


@row("lahf")
def lahf(i: Insn) -> None:
    i.h.cpu.offset(1).store((i.h.flags.read() & 0xD5 | 2).trunc(8))


@row("sahf")
def sahf(i: Insn) -> None:
    f = i.h.flags
    ah = i.h.cpu.offset(1).load("i8").zext(64)
    f.pack(ah.bit(0), ah.bit(2), ah.bit(4), ah.bit(6), ah.bit(7), f.of())


@row("nop", "pause", "prefetcht0", "prefetcht1", "prefetcht2", "prefetchnta", "prefetchw",
     "prefetch", "endbr64",
    "rdsspd",
    "rdsspq", "endbr32", "reservednop", writes=())  # fmt: skip
def nop(i: Insn, name: str) -> None:
    """Nothing; no operand is accessed. RDSSP is one of them where there is no CET."""


@row("xlatb", writes=())
def xlatb(i: Insn) -> None:
    op = i.ops[0]
    assert isinstance(op, Memory)
    h = i.h
    mask = (1 << i.address_size) - 1
    ea = (h.get("gpr[3]") + read_gpr(i, RAX, 8).zext(64)) & mask
    write_gpr(i, RAX, h.load(op.linear(ea, 1, write=False), 8))


def _bcd_adjust(i: Insn, *, subtract: bool) -> None:
    """DAA and DAS (SDM vol. 2)."""
    h, f = i.h, i.h.flags
    al = read_gpr(i, RAX, 8)
    low = (al & 15).ugt(9) | f.af()
    high = al.ugt(0x99) | f.cf()
    by = low.select(h.const(6, 8), h.const(0, 8)) + high.select(h.const(0x60, 8), h.const(0, 8))
    result = al - by if subtract else al + by
    borrow = low & al.ult(6) if subtract else h.false()
    write_gpr(i, RAX, result)
    f.logic(result)
    f.pack(high | borrow, f.pf(), low, f.zf(), f.sf(), h.false())


@row("daa", "das")
def decimal_adjust(i: Insn, name: str) -> None:
    _bcd_adjust(i, subtract=name == "das")


@row("aaa", "aas")
def ascii_adjust(i: Insn, name: str) -> None:
    h, f = i.h, i.h.flags
    ax = read_gpr(i, RAX, 16)
    adjust = (ax & 15).ugt(9) | f.af()
    by = h.const(0x106, 16)
    changed = ax - by if name == "aas" else ax + by
    result = adjust.select(changed, ax) & 0xFF0F
    write_gpr(i, RAX, result)
    f.logic(result.trunc(8))
    f.pack(adjust, f.pf(), adjust, f.zf(), f.sf(), h.false())


@row("aam")
def aam(i: Insn) -> None:
    base = i.h.immediate(8)
    i.h.raise_if(base.eq(0), DE)
    al = read_gpr(i, RAX, 8)
    low = al.urem(base)
    write_gpr(i, RAX, (al.udiv(base).zext(16) << 8) | low.zext(16))
    i.h.flags.logic(low)


@row("aad")
def aad(i: Insn) -> None:
    ax = read_gpr(i, RAX, 16)
    low = (ax.trunc(8) + (ax >> 8).trunc(8) * i.h.immediate(8)).trunc(8)
    write_gpr(i, RAX, low.zext(16))
    i.h.flags.logic(low)


@row("rdtsc", "rdtscp")
def rdtsc(i: Insn, name: str) -> None:
    h = i.h
    h.raise_if((h.get("cr4").bit(2)) & h.cpl().ne(0), GP, 0)
    # In order with the loads before it, as on a processor that does not speculate.
    h.line('call void asm sideeffect "lfence", "~{memory}"()')
    cycles = h.intrinsic("llvm.readcyclecounter", "i64").zext(128)
    scaled = (cycles * h.get("tsc_ratio").zext(128)) >> TSC_RATIO_BITS
    tsc = scaled.trunc(64) + h.get("tsc_offset")
    write_gpr(i, RAX, tsc.trunc(32))
    write_gpr(i, RDX, (tsc >> 32).trunc(32))
    if name == "rdtscp":
        write_gpr(i, RCX, h.get("tsc_aux").trunc(32))


@row("lfence", "sfence", writes=())
def light_fence(i: Insn, name: str) -> None:
    i.h.line("fence acq_rel")


@row("mfence", writes=())
def mfence(i: Insn) -> None:
    i.h.line("fence seq_cst")
