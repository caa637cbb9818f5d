"""The frame in which Python executes one instruction: operands, memory, the stack, privilege."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING

from iced_x86 import (
    Instruction,
    MemorySizeExt,
    OpKind,
    Register,
)

from anykvm.cpu.decode import (
    CODES,
    IMMEDIATES,
    MNEMONICS,
    NUMBER,
    REGISTERS,
    RENAMED,
    SEGMENT,
    TABLE,
    WIDTH,
)
from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP, SS, UD
from anykvm.cpu.state import Flag, Mode, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

MASK64 = 2**64 - 1


class Assist:
    """One instruction being executed in Python."""

    def __init__(self, cpu: Cpu, i: Instruction) -> None:
        self.cpu, self.i, self.s = cpu, i, cpu.state
        mnemonic = MNEMONICS[i.mnemonic]
        self.name = RENAMED.get(mnemonic, mnemonic)
        self.code = CODES[i.code]
        self.code64 = bool(cpu.state.mode & Mode.CODE64)
        self.holds_interrupts = False  # until the next instruction is done
        self.next_rip: int | None = i.next_ip & (MASK64 if self.code64 else 0xFFFF_FFFF)

    @property
    def operand_size(self) -> int:
        """Bytes, where iced's code shows it by a letter or number at its end."""
        last = self.code.rsplit("_", 1)[-1]
        return {"W": 2, "D": 4, "Q": 8}.get(last[-1:]) or int(last[-2:]) // 8

    def require_cpl0(self) -> None:
        if self.cpu.cpl:
            raise GuestFault(GP, 0)

    def require_protected(self) -> None:
        """Not in real or virtual-8086 mode."""
        if not self.s.cr0 & 1 or self.cpu.rflags & Flag.VM:
            raise GuestFault(UD)

    def reg(self, n: int) -> int:
        """Operand `n`, a general register."""
        kind, offset = TABLE[self.i.op_register(n)]
        return int.from_bytes(
            ctypes.string_at(self.cpu.address + offset, int(kind[1:]) // 8), "little"
        )

    def set_reg(self, n: int, value: int) -> None:
        kind, offset = TABLE[self.i.op_register(n)]
        size = int(kind[1:]) // 8
        if size == 4:
            size, value = 8, value & 0xFFFF_FFFF
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        ctypes.memmove(self.cpu.address + offset, data, size)

    def is_reg(self, n: int) -> bool:
        return bool(self.i.op_kind(n) == OpKind.REGISTER)

    def effective(self) -> int:
        """Offset of the memory operand in its segment."""
        i = self.i
        if i.is_ip_rel_memory_operand:
            return int(i.ip_rel_memory_address)
        base, index = i.memory_base, i.memory_index
        value = i.memory_displacement
        if base != Register.NONE:
            value += self.s.gpr[NUMBER[base]]
        if index != Register.NONE:
            value += self.s.gpr[NUMBER[index]] * i.memory_index_scale
        bits = WIDTH.get(base) or WIDTH.get(index) or 8 * i.memory_displ_size
        if self.code64 and bits != 32:
            return value & MASK64
        return value & ((1 << bits) - 1)

    def linear(self, seg: int, offset: int, size: int, *, write: bool = False) -> int:
        """Linear address, checked against the segment outside 64-bit mode."""
        r = self.s.seg[seg]
        if self.code64:
            address = (offset + (r.base if seg in (Seg.FS, Seg.GS) else 0)) & MASK64
            if (address >> 47) not in (0, (1 << 17) - 1):
                raise GuestFault(SS if seg == Seg.SS else GP, 0)
            return address
        real = not self.s.cr0 & 1
        down = r.attr & 0xC == 4
        top = 0xFFFF_FFFF if r.attr & 1 << 14 else 0xFFFF
        last = offset + size - 1
        inside = r.limit < offset and last <= top if down else last <= r.limit
        kind = r.attr & 10
        right = kind == 2 if write else kind != 8
        if not inside or not (real or (right and not r.attr & 0x10000)):
            raise GuestFault(SS if seg == Seg.SS else GP, 0)
        return (r.base + offset) & 0xFFFF_FFFF

    def address(self, size: int, *, write: bool = False) -> int:
        return self.linear(SEGMENT[self.i.memory_segment], self.effective(), size, write=write)

    def value(self, n: int, size: int | None = None) -> int:
        """Operand `n`: register, memory or immediate."""
        if self.is_reg(n):
            return self.reg(n)
        if self.i.op_kind(n) in IMMEDIATES:
            return int(self.i.immediate(n))
        size = size or MemorySizeExt.size(self.i.memory_size)
        return self.cpu.read_int(self.address(size), size)

    def store(self, n: int, value: int, size: int) -> None:
        """Into operand `n`; `size` bytes if it is in memory."""
        if self.is_reg(n):
            self.set_reg(n, value)
        else:
            data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
            self.cpu.write(self.address(size, write=True), data)

    # The stack, for far transfers
    @property
    def stack_mask(self) -> int:
        if self.code64:
            return MASK64
        return 0xFFFF_FFFF if self.s.seg[Seg.SS].attr & 1 << 14 else 0xFFFF

    def peek(self, offset: int, size: int) -> int:
        at = (self.s.gpr[4] + offset) & self.stack_mask
        return self.cpu.read_int(self.linear(Seg.SS, at, size), size)

    def drop(self, size: int) -> None:
        self.set_sp(self.s.gpr[4] + size)

    def set_sp(self, value: int) -> None:
        mask = self.stack_mask
        keep = self.s.gpr[4] & ~mask if mask == 0xFFFF else 0
        self.s.gpr[4] = (keep | value & mask) & MASK64

    def push(self, value: int, size: int) -> None:
        at = (self.s.gpr[4] - size) & self.stack_mask
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self.cpu.write(self.linear(Seg.SS, at, size, write=True), data)
        self.set_sp(at)


Microcode = Callable[[Assist], None]
ASSISTS: dict[str, Microcode] = {}


def microcode(*names: str) -> Callable[[Microcode], Microcode]:
    """Declares what executes these mnemonics."""

    def declare(function: Microcode) -> Microcode:
        for name in names:
            assert name not in ASSISTS, name
            ASSISTS[name] = function
        return function

    return declare


def register_name(i: Instruction, n: int) -> str:
    return REGISTERS[i.op_register(n)]
