"""What instructions mean: one short function each, over the value algebra.

Importing this fills `forms.ROWS`.
"""

from anykvm.cpu.insn import (
    bits,
    control,
    fxsave,
    integer,
    mmx,
    shifts,
    sse_convert,
    sse_float,
    sse_int,
    sse_move,
    sse_shuffle,
    sse_string,
    stack,
    strings,
    system,
    x87_arith,
    x87_control,
    x87_move,
    x87_trans,
    xsave,
)

__all__ = [
    "bits",
    "control",
    "fxsave",
    "integer",
    "mmx",
    "shifts",
    "sse_convert",
    "sse_float",
    "sse_int",
    "sse_move",
    "sse_shuffle",
    "sse_string",
    "stack",
    "strings",
    "system",
    "x87_arith",
    "x87_control",
    "x87_move",
    "x87_trans",
    "xsave",
]
