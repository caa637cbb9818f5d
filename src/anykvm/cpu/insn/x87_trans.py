"""x87 transcendental functions (SDM vol. 1, 8.3.7 and 8.3.9), with the host's precision."""

from __future__ import annotations

from anykvm.cpu.insn.x87 import C1, C2, Operation, operations

operations(
    {
        "fsin": Operation("fsin", conditions=C1 | C2),
        "fcos": Operation("fcos", conditions=C1 | C2),
        "fsincos": Operation(
            "fsincos", results=(-1, 0), push=True, conditions=C1 | C2, partial=True
        ),
        "fptan": Operation("fptan", results=(-1, 0), push=True, conditions=C1 | C2, partial=True),
        "fpatan": Operation("fpatan", (0, 1), (1,), pops=1),
        "f2xm1": Operation("f2xm1"),
        "fyl2x": Operation("fyl2x", (0, 1), (1,), pops=1),
        "fyl2xp1": Operation("fyl2xp1", (0, 1), (1,), pops=1),
    }
)
