"""String comparison of SSE4.2: PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM vol. 1, 12.10, vol.
2, 4.1).

The host has the very instructions; LLVM's intrinsics give the result and each flag.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.insn.integer import RAX, RCX, RDX, read_gpr, write_gpr
from anykvm.cpu.insn.sse_shuffle import control
from anykvm.cpu.ir import Value

TYPE = "<16 x i8>"


def _length(i: Insn, number: int, name: str) -> Value:
    """The length in a register; one of 64 bits is saturated to what an `i32` holds, which is more
    than any vector has.
    """
    if not name.endswith("64"):
        return read_gpr(i, number, 32)
    h, whole = i.h, read_gpr(i, number, 64)
    limits = h.const(-(2**31) + 1, 64), h.const(2**31 - 1, 64)
    raised = h.intrinsic("llvm.smax.i64", "i64", whole, limits[0])
    return h.intrinsic("llvm.smin.i64", "i64", raised, limits[1]).trunc(32)


def _arguments(i: Insn, name: str) -> list[Value]:
    h = i.h
    a, b = (op.read(TYPE) for op in i.ops[:2])
    immediate = h.const(control(i), 8)
    if name[4] == "i":
        return [a, b, immediate]
    return [a, _length(i, RAX, name), b, _length(i, RDX, name), immediate]


@row("pcmpestri", "pcmpestri64", "pcmpestrm", "pcmpestrm64", "pcmpistri", "pcmpistrm",
     writes=(), feature="sse4.2", constant=True, unaligned=True)  # fmt: skip
def compare_strings(i: Insn, name: str) -> None:
    """An index in ECX or a mask in XMM0; CF, ZF, SF, OF tell of it and the strings' ends."""
    h, arguments = i.h, _arguments(i, name)
    stem = f"llvm.x86.sse42.pcmp{name[4]}str"

    def flag(letter: str) -> Value:
        return h.intrinsic(f"{stem}i{letter}128", "i32", *arguments).trunc(1)

    cf, zf, sf, of = (flag(letter) for letter in "czso")
    if "stri" in name[5:]:
        write_gpr(i, RCX, h.intrinsic(f"{stem}i128", "i32", *arguments))
    else:
        h.field("xmm[0]").store(h.intrinsic(f"{stem}m128", TYPE, *arguments))
    h.flags.pack(cf, h.false(), h.false(), zf, sf, of)
