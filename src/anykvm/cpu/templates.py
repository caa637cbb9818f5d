"""Templates: what an instruction becomes wherever it stands, found by its bytes.

The same instruction is met many times, so what `decode` finds out about it is kept: by its bytes,
or, for what depends on where it stands, by its code (branches) or by its bytes without the
displacement (RIP-relative operands). A template also remembers its handler's number.
"""

from __future__ import annotations

import struct

from iced_x86 import Code, Decoder, DecoderError, Instruction, OpKind

from anykvm.cpu.decode import FormDecoder, fits32, signed32
from anykvm.cpu.forms import Form

NEAR_BRANCHES = frozenset((OpKind.NEAR_BRANCH16, OpKind.NEAR_BRANCH32, OpKind.NEAR_BRANCH64))
INVALID = Code.INVALID
MAX_LENGTH = 15
DISP = struct.Struct("<i")
# Offsets within the 16 bytes of fields (a record's bytes 8 to 23)
FIELD_B, FIELD_DISP = 2, 8


class Template:
    """A form with its fields; `back` is the variant for a branch to where it stands or before."""

    __slots__ = (
        "aux",
        "back",
        "branch",
        "conditional",
        "counted",
        "ends",
        "fields",
        "form",
        "number",
        "relative",
        "shadow",
    )

    def __init__(self, form: Form, fields: bytes = bytes(16), aux: int = 0) -> None:
        self.form, self.fields, self.aux = form, fields, aux
        self.number = -1  # of the handler, once asked for
        self.back = self
        self.branch = self.conditional = self.counted = self.ends = self.shadow = False
        self.relative = ""  # where a RIP-relative address goes: "disp" or "aux"

    def place(self, value: int, count: int) -> tuple[bytes, int]:
        """Fields and aux for a RIP-relative address and a count of instructions."""
        fields, aux = self.fields, self.aux
        if self.counted:
            fields = fields[:FIELD_B] + count.to_bytes(2, "little") + fields[FIELD_B + 2 :]
        if self.relative == "disp":
            disp = DISP.pack(signed32(value))
            fields = fields[:FIELD_DISP] + disp + fields[FIELD_DISP + 4 :]
        elif self.relative:
            aux = value
        return fields, aux


class TemplateDecoder:
    """Decodes instructions of one mode to templates."""

    def __init__(self, forms: FormDecoder) -> None:
        self.forms, self.bits = forms, forms.bits
        self._by_bytes: dict[bytes, Template] = {}
        self._by_code: dict[int, Template] = {}
        self._by_rest: dict[tuple[bytes, bool], Template] = {}
        self._invalid = Template(Form("ud2"))
        self._too_long = Template(Form("too_long"))
        self._invalid.ends = self._too_long.ends = True

    def decode(
        self, decoder: Decoder, i: Instruction, code: bytes, at: int
    ) -> tuple[Template, int] | None:
        """The instruction that `decoder` stands at, `at` bytes into `code`, and a branch target or
        RIP-relative address; None if it is longer than `code`. Decodes into `i`.
        """
        decoder.decode_out(i)
        if i.code == INVALID:
            if decoder.last_error == DecoderError.NO_MORE_BYTES and len(code) - at < MAX_LENGTH:
                return None
            return (self._invalid if i.len < MAX_LENGTH else self._too_long), 0
        raw = code[at : at + i.len]
        known = self._by_bytes.get(raw)
        if known is not None:
            return known, 0
        if i.op0_kind in NEAR_BRANCHES:
            return self._branch(i)
        if i.is_ip_rel_memory_operand:
            return self._relative(decoder, i, raw)
        made = self._by_bytes[raw] = self._describe(i, raw)
        return made, 0

    def _describe(self, i: Instruction, raw: bytes) -> Template:
        d = self.forms.describe(i, raw)
        t = Template(d.form, d.fields, d.aux)
        t.ends, t.counted, t.shadow, t.conditional = d.ends, d.counted, d.shadow, d.falls_through
        return t

    def _branch(self, i: Instruction) -> tuple[Template, int]:
        target = i.near_branch_target
        t = self._by_code.get(i.code)
        if t is None:
            t = self._by_code[i.code] = self._describe(i, b"")
            t.branch = True
            t.back = Template(t.form._replace(attrs=(*t.form.attrs, "back")), t.fields)
            t.back.branch, t.back.counted = True, t.counted
            t.back.ends, t.back.conditional = t.ends, t.conditional
        if self.bits != 64:
            target &= 0xFFFF if "o16" in t.form.attrs or self.bits == 16 else 0xFFFF_FFFF
        return t.back if target <= i.ip else t, target

    def _relative(self, decoder: Decoder, i: Instruction, raw: bytes) -> tuple[Template, int]:
        address = i.ip_rel_memory_address
        offsets = decoder.get_constant_offsets(i)
        start, end = offsets.displacement_offset, offsets.displacement_offset + 4
        key = raw[:start] + raw[end:], fits32(address)
        t = self._by_rest.get(key)
        if t is None:
            t = self._by_rest[key] = self._describe(i, raw)
            is_absolute = any(o[0] == "m" and "a" in o for o in t.form.operands)
            t.relative = "aux" if is_absolute else "disp"
        return t, address
