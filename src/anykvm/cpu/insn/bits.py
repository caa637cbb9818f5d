"""Bit tests, scans and counts (SDM vol. 1, 7.3.7 and 7.3.16)."""

from __future__ import annotations

from anykvm.cpu.forms import Insn, Memory, row
from anykvm.cpu.ir import Value


@row("bt", writes=())
def bt(i: Insn) -> None:
    _bit_test(i, None)


@row("bts", "btr", "btc", lock=True)
def bit_change(i: Insn, name: str) -> None:
    _bit_test(i, name)


def _bit_test(i: Insn, name: str | None) -> None:
    """A register as bit offset reaches beyond a memory operand: it is a signed index into a bit
    string.
    """
    h, n = i.h, i.bits
    dst, src = i.ops
    index = src.read()
    if isinstance(dst, Memory) and src.spec != "i":
        words = index.sext(64).sar(n.bit_length() - 1)
        offset = dst.offset + words * (n // 8)
        if set(dst.shape) & {"l", "w"}:
            offset = offset & 0xFFFF_FFFF
        elif "h" in dst.shape:
            offset = offset & 0xFFFF
        dst.__dict__["offset"] = offset
    bit = index & (n - 1)
    mask = h.const(1, n) << bit

    def change(a: Value) -> Value:
        return {"bts": lambda: a | mask, "btr": lambda: a & ~mask, "btc": lambda: a ^ mask}[
            str(name)
        ]()

    old = dst.read() if name is None else dst.update(change)[0]
    h.flags.set_cf((old >> bit).trunc(1))


@row("bsf", "bsr")
def bit_scan(i: Insn, name: str) -> None:
    """A source of zero leaves the destination as it was (as processors do)."""
    h, n = i.h, i.bits
    value = i.ops[1].read()
    fn = "cttz" if name == "bsf" else "ctlz"
    found = h.intrinsic(f"llvm.{fn}.i{n}", f"i{n}", value, h.false())
    if name == "bsr":
        found = found ^ (n - 1)
    with h.If(value.ne(0)):
        i.ops[0].write(found)
    h.flags.set_zf(value.eq(0))


@row("lzcnt", feature="abm")
def lzcnt(i: Insn) -> None:
    _count_zeros(i, "ctlz")


def _count_zeros(i: Insn, fn: str) -> None:
    h, n = i.h, i.bits
    value = i.ops[1].read()
    found = h.intrinsic(f"llvm.{fn}.i{n}", f"i{n}", value, h.false())
    i.ops[0].write(found)
    h.flags.result(found, value.eq(0), h.false())


@row("popcnt", feature="popcnt")
def popcnt(i: Insn) -> None:
    h, n = i.h, i.bits
    value = i.ops[1].read()
    i.ops[0].write(h.intrinsic(f"llvm.ctpop.i{n}", f"i{n}", value))
    no = h.false()
    h.flags.pack(no, no, no, value.eq(0), no, no)
