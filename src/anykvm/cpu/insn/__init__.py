"""What instructions mean: one short function each, over the value algebra. Importing this fills `forms.ROWS`."""

from anykvm.cpu.insn import bits, control, integer, shifts, stack, strings, system

__all__ = ["bits", "control", "integer", "shifts", "stack", "strings", "system"]
