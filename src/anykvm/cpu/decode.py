"""From bytes to forms: which handler an instruction needs, and what goes into its record.

iced-x86 decodes; this maps its view of an instruction to `forms.Form` and the record's fields.
Results are cached by the bytes of the instruction, since all but branches and RIP-relative operands
mean the same wherever they stand.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import NamedTuple

from iced_x86 import Code, Instruction, MemorySizeExt, Mnemonic, OpKind, Register

from anykvm.cpu.forms import INTERCEPTED, ROWS, Form
from anykvm.cpu.state import ZERO, Mode, Seg, offset_of


def _names(module: object) -> dict[int, str]:
    return {v: k for k, v in vars(module).items() if isinstance(v, int) and k.isupper()}


MNEMONICS = {v: k.lower() for v, k in _names(Mnemonic).items()}
CODES = _names(Code)
REGISTERS = _names(Register)
GPRS = "RAX RCX RDX RBX RSP RBP RSI RDI R8 R9 R10 R11 R12 R13 R14 R15".split()


def _register_table() -> dict[int, tuple[str, int]]:
    """Register → (operand kind, offset in State, or index of a segment register)."""
    table: dict[int, tuple[str, int]] = {}
    low = "AL CL DL BL SPL BPL SIL DIL".split() + [f"R{n}L" for n in range(8, 16)]
    word = "AX CX DX BX SP BP SI DI".split() + [f"R{n}W" for n in range(8, 16)]
    half = ["E" + n for n in word[:8]] + [f"R{n}D" for n in range(8, 16)]
    for kind, names in (("r8", low), ("r16", word), ("r32", half), ("r64", GPRS)):
        for n, name in enumerate(names):
            table[getattr(Register, name)] = kind, 8 * n
    for n, name in enumerate("AH CH DH BH".split()):
        table[getattr(Register, name)] = "r8", 8 * n + 1
    for n in range(16):
        table[getattr(Register, f"XMM{n}")] = "x", offset_of(f"xmm[{n}]")
    for n in range(8):
        table[getattr(Register, f"MM{n}")] = "d", offset_of(f"st[{n}]")
        table[getattr(Register, f"ST{n}")] = "st", n
    for seg in list(Seg)[:6]:
        table[getattr(Register, seg.name)] = "s", int(seg)
    for n in (0, 2, 3, 4):
        table[getattr(Register, f"CR{n}")] = "cr", offset_of(f"cr{n}")
    return table


TABLE = _register_table()
NUMBER = {r: o // 8 for r, (k, o) in TABLE.items() if k in ("r16", "r32", "r64")}
WIDTH = {r: int(k[1:]) for r, (k, _) in TABLE.items() if k in ("r16", "r32", "r64")}
SEGMENT = {getattr(Register, s.name): int(s) for s in list(Seg)[:6]}

BRANCHES = (OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64)
STRING_SOURCES = (OpKind.MEMORY_SEG_SI, OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_RSI)
STRING_TARGETS = (OpKind.MEMORY_ESDI, OpKind.MEMORY_ESEDI, OpKind.MEMORY_ESRDI)
STRING_16 = (OpKind.MEMORY_SEG_SI, OpKind.MEMORY_ESDI)
STRING_32 = (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_ESEDI)
MASKED_STORES = {
    OpKind.MEMORY_SEG_DI: 16,
    OpKind.MEMORY_SEG_EDI: 32,
    OpKind.MEMORY_SEG_RDI: 64,
}
IMMEDIATES = tuple(v for v, n in _names(OpKind).items() if n.startswith("IMMEDIATE"))

# Instructions whose operand size shows in the name of iced's code alone
SIZED = re.compile(r"(RETN|LEAVE|ENTER|IRET|PUSHA|POPA|PUSHF|POPF|SYSRET|SYSEXIT)([WDQ])")
SIZED_BY_OPERAND = re.compile(r"(?:CALL|JMP)_(?:REL|RM)\w*?(16|32|64)$")
STACK_ROWS = frozenset("push pop pushf popf leave enter pusha popa call ret".split())
ADDRESS_ROWS = frozenset("loop loope loopne xlatb".split())
LEGACY_ROWS = frozenset(
    "syscall sysret iret pushf popf mov_to_cr3 mov_to_seg fxsave fxrstor "
    "xsave xsaveopt xsavec xsaves xrstor xrstors".split()
)
SHIFTS = frozenset("shl shr sar sal rol ror rcl rcr".split())
RENAMED = {
    **{
        f"{n}{letter}": n for n in ("pushf", "popf", "iret", "sysret", "sysexit") for letter in "dq"
    },
    "pushad": "pusha",
    "popad": "popa",
    "wait": "fwait",
    "tzcnt": "bsf",  # what the encoding means on a processor without BMI1
}  # iced has mnemonics for operand sizes; here the size is an attribute
LETTER_BITS = {"W": 16, "D": 32, "Q": 64}

REG_FIELDS = struct.Struct("<HHBBBBii")  # a, b, base, index, scale, seg, disp, imm
THREE_FIELDS = struct.Struct("<HHHBBii")  # a, b, c, scale, seg, disp, imm


class Decoded(NamedTuple):
    """What one instruction becomes."""

    form: Form
    fields: bytes  # 16 bytes: record offsets 8 to 23
    aux: int
    ends: bool
    falls_through: bool  # a branch that may also go on
    counted: bool  # its handler counts instructions: the count belongs into field B
    shadow: bool  # interrupts stay off for one more instruction


class Operands:
    """Collects the record's fields while the operands are looked at."""

    def __init__(self) -> None:
        self.registers: list[int] = []
        self.base = self.index = ZERO
        self.scale = self.seg = self.disp = self.imm = self.aux = 0
        self.specs: list[str] = []
        self.memory = False

    def fields(self) -> bytes:
        a, b, c = (*self.registers, 0, 0, 0)[:3]
        if len(self.registers) > 2 and not self.memory:
            return THREE_FIELDS.pack(a, b, c, self.scale, self.seg, self.disp, self.imm)
        return REG_FIELDS.pack(
            a, b, self.base, self.index, self.scale, self.seg, self.disp, self.imm
        )


def signed32(value: int) -> int:
    value &= 0xFFFF_FFFF
    return value - (1 << 32) if value >> 31 else value


def fits32(value: int) -> bool:
    value &= 2**64 - 1
    return value < 1 << 31 or value >= 2**64 - (1 << 31)


def _memory(i: Instruction, o: Operands, code64: bool, bits: int) -> None:
    o.memory = True
    shape = ""
    base, index = i.memory_base, i.memory_index
    wide = WIDTH.get(base) or WIDTH.get(index) or 8 * i.memory_displ_size
    o.disp = signed32(i.memory_displacement)
    if i.is_ip_rel_memory_operand:
        address = i.ip_rel_memory_address
        wide = 32 if base == Register.EIP else 64
        if fits32(address) and wide == 64:
            o.disp = signed32(address)
        else:
            shape, o.aux, o.disp = "a", address, 0
    else:
        o.base = NUMBER.get(base, ZERO)
        if index in NUMBER:
            shape = "i"
            o.index = NUMBER[index]
            o.scale = i.memory_index_scale.bit_length() - 1
        elif base == Register.NONE and not fits32(i.memory_displacement):
            shape, o.aux, o.disp = "a", i.memory_displacement, 0
    o.seg = SEGMENT.get(i.memory_segment, 0)
    if not code64:
        shape += "h" if wide == 16 else "l"
    else:
        if i.memory_segment in (Register.FS, Register.GS):
            shape += "s"
        if wide == 32 and (base != Register.NONE or index != Register.NONE):
            shape += "w"
    o.specs.append(f"m{bits}{shape}")


def _operand(i: Instruction, n: int, o: Operands, code64: bool, name: str) -> None:
    kind = i.op_kind(n)
    if kind == OpKind.REGISTER:
        spec, offset = TABLE[i.op_register(n)]
        if spec == "st":
            spec = f"st{offset}"
        else:
            o.registers.append(offset)
        o.specs.append(spec)
    elif kind == OpKind.MEMORY:
        bits = 8 * MemorySizeExt.size(i.memory_size)
        _memory(i, o, code64, bits)
    elif kind in IMMEDIATES:
        value = i.immediate(n)
        if kind == OpKind.IMMEDIATE64 and not fits32(value):
            o.aux = value
            o.specs.append("j")
        elif ROWS[name].constant:
            o.specs.append(f"i{value & 0xFF}")
        elif n == 1 and name in SHIFTS and value == 1:
            o.specs.append("k")
        else:
            o.imm = signed32(value)
            o.specs.append("i")
    elif kind in MASKED_STORES:
        _masked_store(i, o, code64, MASKED_STORES[kind])
    elif kind not in BRANCHES:
        raise KeyError(kind)


def _masked_store(i: Instruction, o: Operands, code64: bool, bits: int) -> None:
    """The implied operand of MASKMOVDQU and MASKMOVQ."""
    o.memory = True
    o.base, o.seg = GPRS.index("RDI"), SEGMENT[i.memory_segment]
    shape = {16: "h", 32: "w" if code64 else "l", 64: ""}[bits]
    if code64 and o.seg in (Seg.FS, Seg.GS):
        shape += "s"
    o.specs.append(f"m{8 * MemorySizeExt.size(i.memory_size)}{shape}")


def _has_mmx_operand(i: Instruction) -> bool:
    return any(
        i.op_kind(n) == OpKind.REGISTER and TABLE.get(i.op_register(n), ("",))[0] == "d"
        for n in range(i.op_count)
    )


def _string(i: Instruction, name: str, code64: bool) -> tuple[str, Operands, list[str]] | None:
    kinds = [i.op_kind(n) for n in range(i.op_count)]
    if not any(k in STRING_SOURCES + STRING_TARGETS for k in kinds):
        return None
    o = Operands()
    bits = 8 * MemorySizeExt.size(i.memory_size)
    attrs = [f"o{bits}"]
    if any(k in STRING_16 for k in kinds):
        attrs.append("a16")
    elif any(k in STRING_32 for k in kinds):
        attrs.append("a32")
    if i.has_repne_prefix:
        attrs.append("repne")
    elif i.has_rep_prefix:
        attrs.append("rep")
    o.seg = SEGMENT.get(i.memory_segment, int(Seg.DS))
    if not code64:
        attrs.append("legacy")
    elif any(k in STRING_SOURCES for k in kinds) and o.seg in (Seg.FS, Seg.GS):
        attrs.append("seg")
    return name[:4], o, attrs


def _sizes(i: Instruction, name: str, mode: int) -> list[str]:
    """Operand, stack and address size, where no operand tells them."""
    attrs = []
    code64 = bool(mode & Mode.CODE64)
    code = CODES[i.code]
    if name in ("push", "pop"):
        size = 8 * abs(i.stack_pointer_increment)
    elif m := SIZED.match(code):
        size = LETTER_BITS[m[2]]
    elif m := SIZED_BY_OPERAND.match(code):
        size = int(m[1])
    else:
        size = 64
    if size != 64 or name in ("iret", "sysret"):
        attrs.append(f"o{size}")
    if name in STACK_ROWS and not code64:
        attrs.append("s32" if mode & Mode.STACK32 else "s16")
    if name in ADDRESS_ROWS and (bits := _loop_bits(i, code)) != 64:
        attrs.append(f"a{bits}")
    if name in LEGACY_ROWS and not code64:
        attrs.append("legacy")
    return attrs


def _loop_bits(i: Instruction, code: str) -> int:
    """Address size of LOOP and XLAT."""
    if i.mnemonic == Mnemonic.XLATB:
        return WIDTH[i.memory_base]
    return {"_RCX": 64, "ECX": 32}.get(code[-4:], {"ECX": 32}.get(code[-3:], 16))


# mov with a control or segment register is an instruction of its own here
def _mov_kind(i: Instruction, name: str) -> str:
    if name != "mov":
        return name
    kinds = [
        TABLE.get(i.op_register(n), ("?", 0))[0] if i.op_kind(n) == OpKind.REGISTER else "m"
        for n in range(2)
    ]
    if kinds[0] == "cr":
        return "mov_to_cr3" if i.op_register(0) == Register.CR3 else "mov_to_cr"
    if kinds[0] == "s":
        return "mov_to_seg"
    if kinds[1] == "cr":
        return "mov_from_cr"
    if kinds[1] == "s":
        return "mov_from_seg"
    return "mov_other" if "?" in kinds else name


ASSIST = Form("assist")
COUNTED = frozenset("jmp call ret iret syscall sysret popf mov_to_cr3 invlpg int".split())


X87_ESCAPE = range(0xD8, 0xE0)
LEGACY_PREFIXES = frozenset(bytes.fromhex("26 2e 36 3e 64 65 66 67 f0 f2 f3"))


def _with_x87_opcode(fields: bytes, raw: bytes) -> bytes:
    """FOP, the last instruction's opcode (SDM vol. 1, 8.1.9), goes where an immediate would."""
    n = 0
    while raw[n] not in X87_ESCAPE:
        if raw[n] not in LEGACY_PREFIXES and raw[n] & 0xF0 != 0x40:
            return fields  # FXSAVE and FXRSTOR
        n += 1
    opcode = (raw[n] & 7) << 8 | raw[n + 1]
    return fields[:12] + opcode.to_bytes(4, "little")


class FormDecoder:
    """Decodes for one mode (code size and what instructions are enabled)."""

    def __init__(self, mode: int, special: Callable[[str, int, bool], str | None]) -> None:
        self.mode = mode
        self.code64 = bool(mode & Mode.CODE64)
        self.bits = 64 if self.code64 else 32 if mode & Mode.CODE32 else 16
        self._special = special

    def describe(self, i: Instruction, raw: bytes) -> Decoded:
        """What instruction `i` with bytes `raw` becomes."""
        name = MNEMONICS[i.mnemonic]
        name = _mov_kind(i, RENAMED.get(name, name))
        shadow = name == "sti" or (
            name in ("mov_to_seg", "pop") and i.op_register(0) == Register.SS
        )
        made = self._form(i, name)
        if made is None:
            return Decoded(ASSIST, bytes(16), 0, True, False, False, shadow)
        form, o = made
        row = ROWS[form.name]
        branch = i.op_count > 0 and i.op_kind(0) in BRANCHES
        conditional = branch and form.name not in ("jmp", "call")
        counted = conditional or form.name in COUNTED
        fields = o.fields()
        if row.feature == "x87":
            fields = _with_x87_opcode(fields, raw)
        return Decoded(form, fields, o.aux, row.ends, conditional, counted, shadow)

    def _form(self, i: Instruction, name: str) -> tuple[Form, Operands] | None:
        """Form and fields, or None where the instruction has no handler."""
        string = _string(i, name, self.code64)
        if string:
            name, o, attrs = string
            return (Form(name, (), tuple(attrs)), o) if name in ROWS else None
        changed = self._special(name, self.mode, _has_mmx_operand(i))
        if changed:
            return Form(changed), Operands()
        if name == "pop" and i.op_register(0) in SEGMENT:
            return None
        if name not in ROWS or i.is_jmp_far_indirect or i.is_call_far_indirect:
            return None
        o = Operands()
        attrs = _sizes(i, name, self.mode)
        if name == "enter":
            o.imm, o.aux = signed32(i.immediate(0)), i.immediate(1)
        else:
            try:
                for n in range(i.op_count):
                    _operand(i, n, o, self.code64, name)
            except KeyError:
                return None
        if name == "mov_from_cr":
            o.specs.pop()
        if name == "mov_to_cr3":
            o.specs.pop(0)
            o.registers.pop(0)
        if name == "mov_to_seg" and i.op_register(0) == Register.SS:
            attrs.append("ss")
        if i.has_lock_prefix:
            if not o.memory or not (ROWS[name].lockable or name == "xchg"):
                return Form("ud2"), Operands()
            attrs.append("lock")
        if self.mode & Mode.GUEST and name in INTERCEPTED:
            attrs.append("guest")
        return Form(name, tuple(o.specs), tuple(attrs)), o
