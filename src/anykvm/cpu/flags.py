"""The six status flags, kept as the result that they come from.

An operation stores two words: `lf_res`, its result sign-extended to 64 bits, and `lf_aux`, what the
result does not tell:

    bit 63     CF                      bit 3       AF
    bit 62     CF xor OF               bit 0       SF differs from the sign of lf_res
    bits 15:8  what to xor into the low byte of lf_res before its parity is taken

so that no flag needs to know which operation set it, and a flag that nobody reads is never
computed. The carry out of each bit of an addition gives CF, OF and AF at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu.ir import Value
from anykvm.cpu.state import STATUS_FLAGS, Flag, State

if TYPE_CHECKING:
    from anykvm.cpu.guest import Guest

CARRIES = 3 << 62
AF_BIT = 1 << 3


class LazyFlags:
    """The status flags of the vCPU that a function under construction works on."""

    def __init__(self, g: Guest) -> None:
        self.g = g

    # What operations store
    def _store(self, result: Value, aux: Value | int) -> None:
        g = self.g
        g.set("lf_res", result.sext(64))
        g.set("lf_aux", aux)

    def logic(self, result: Value) -> None:
        """CF and OF cleared (AF, undefined in the manual, too)."""
        self._store(result, 0)

    @staticmethod
    def _aux(carries: Value) -> Value:
        n = carries.bits
        wide = carries.zext(64)
        return ((wide << (64 - n)) & CARRIES) | (wide & AF_BIT)

    def add(self, a: Value, b: Value, result: Value) -> None:
        """`a + b (+ carry) = result`."""
        self._store(result, self._aux((a & b) | ((a | b) & ~result)))

    def sub(self, a: Value, b: Value, result: Value) -> None:
        """`a - b (- borrow) = result`."""
        self._store(result, self._aux((~a & b) | ((~a | b) & result)))

    def keep_cf(self, a: Value, b: int, result: Value, *, subtract: bool) -> None:
        """INC and DEC: as `add` or `sub`, CF as before."""
        b_ = self.g.const(b, a.bits)
        carries = (~a & b_) | ((~a | b_) & result) if subtract else (a & b_) | ((a | b_) & ~result)
        aux = self._aux(carries)
        of = (aux >> 63) ^ ((aux >> 62) & 1)
        cf = self.g.get("lf_aux") >> 63
        self._store(result, (cf << 63) | ((cf ^ of) << 62) | (aux & AF_BIT))

    def result(self, result: Value, cf: Value, of: Value) -> None:
        """SF, ZF, PF of `result`; CF and OF as given (i1); AF cleared (undefined)."""
        c, o = cf.zext(64), of.zext(64)
        self._store(result, (c << 63) | ((c ^ o) << 62))

    def carry_overflow(self, cf: Value, of: Value) -> None:
        """Only CF and OF change."""
        g = self.g
        c, o = cf.zext(64), of.zext(64)
        kept = g.get("lf_aux") & ~CARRIES
        g.set("lf_aux", kept | (c << 63) | ((c ^ o) << 62))

    def set_cf(self, cf: Value) -> None:
        """Only CF changes."""
        self.carry_overflow(cf, self.of())

    def set_zf(self, zf: Value) -> None:
        """Only ZF changes."""
        self.pack(self.cf(), self.pf(), self.af(), zf, self.sf(), self.of())

    def pack(self, cf: Value, pf: Value, af: Value, zf: Value, sf: Value, of: Value) -> None:
        """All six, each an i1."""
        g = self.g
        res = (~zf).zext(64)
        c, o = cf.zext(64), of.zext(64)
        parity = (res ^ (~pf).zext(64)) << 8
        g.set("lf_res", res)
        g.set(
            "lf_aux",
            (c << 63) | ((c ^ o) << 62) | (af.zext(64) << 3) | sf.zext(64) | parity,
        )

    # What readers compute; each an i1
    def cf(self) -> Value:
        return self.g.get("lf_aux").slt(0)

    def of(self) -> Value:
        aux = self.g.get("lf_aux")
        return (aux ^ (aux << 1)).slt(0)

    def zf(self) -> Value:
        return self.g.get("lf_res").eq(0)

    def sf(self) -> Value:
        return (self.g.get("lf_res") ^ (self.g.get("lf_aux") << 63)).slt(0)

    def af(self) -> Value:
        return self.g.get("lf_aux").bit(3)

    def pf(self) -> Value:
        byte = (self.g.get("lf_res") ^ (self.g.get("lf_aux") >> 8)).trunc(8)
        return self.g.intrinsic("llvm.ctpop.i8", "i8", byte).trunc(1) ^ 1

    def condition(self, code: int) -> Value:
        """Condition `code` of Jcc, SETcc, CMOVcc (SDM vol. 1, appendix B)."""
        sources = (
            self.of,
            self.cf,
            self.zf,
            lambda: self.cf() | self.zf(),
            self.sf,
            self.pf,
            lambda: self.sf() ^ self.of(),
            lambda: (self.sf() ^ self.of()) | self.zf(),
        )
        value = sources[code >> 1]()
        return value ^ 1 if code & 1 else value

    # RFLAGS as a whole
    def read(self) -> Value:
        """RFLAGS, 64 bits."""
        value = self.g.get("flags")
        rows = (
            (self.cf(), 0),
            (self.pf(), 2),
            (self.af(), 4),
            (self.zf(), 6),
            (self.sf(), 7),
            (self.of(), 11),
        )
        for flag, bit in rows:
            value = value | (flag.zext(64) << bit)
        return value

    def write_status(self, value: Value) -> None:
        """The status flags from a 64-bit RFLAGS image."""
        self.pack(*(value.bit(n) for n in (0, 2, 4, 6, 7, 11)))


def read_rflags(state: State) -> int:
    """RFLAGS of a vCPU that is not running."""
    res, aux = state.lf_res, state.lf_aux
    cf, po = aux >> 63, (aux >> 62) & 1
    value = state.flags | 2
    value |= cf * Flag.CF | (cf ^ po) * Flag.OF | ((aux >> 3) & 1) * Flag.AF
    value |= (res == 0) * Flag.ZF | ((res >> 63) ^ (aux & 1)) * Flag.SF
    value |= (((res ^ (aux >> 8)) & 0xFF).bit_count() % 2 == 0) * Flag.PF
    return int(value)


def write_rflags(state: State, value: int) -> None:
    """Sets RFLAGS of a vCPU that is not running. The reserved bits are the caller's to check."""
    state.flags = value & ~STATUS_FLAGS | 2
    cf, of = bool(value & Flag.CF), bool(value & Flag.OF)
    res = 0 if value & Flag.ZF else 1
    parity = res ^ (0 if value & Flag.PF else 1)
    state.lf_res = res
    state.lf_aux = (
        cf << 63
        | (cf ^ of) << 62
        | bool(value & Flag.AF) << 3
        | bool(value & Flag.SF)
        | parity << 8
    )
