"""What is MMX's alone (SDM vol. 1, chapter 9); its arithmetic is in sse_int.py, for registers of
either length.

An MMX register is the significand of a physical x87 register. The state that an MMX instruction
leaves to the x87 is the business of `forms.build`.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, row


@row("emms", writes=(), feature="mmx")
def emms(i: Insn) -> None:
    """Every x87 register is empty again; processors clear TOP too."""
    h = i.h
    h.set("fpu_sw", h.get("fpu_sw") & ~0x3800)
    h.set("fpu_top", 0)
    h.set("fpu_tag", 0xFFFF)
