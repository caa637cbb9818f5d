"""Row tests: one line of text a case, in rows/*.txt.

    instructions | what is set before | what must be afterwards

Numbers are hexadecimal. A register may be named in any width: `eax=5` before sets RAX to 5,
afterwards it looks at EAX alone. `cf` and the other status flags are 0 before unless given and
not looked at afterwards unless given (so undefined ones are left out). `[s+10]=0123` is bytes in
memory, `s` the scratch memory (real mode: where DS points). `es.base=`, `ss.limit=`, `ds.attr=`
change a segment before. `#GP(0)` afterwards expects an exception. `db 0f 0b` gives bytes instead
of text. Lines such as `mode 32 user` set the mode for what follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from anykvm.cpu.state import Seg, State

from .assembler import assemble
from .harness import REAL_DATA, machine
from .integer_cases import NAMES
from .layout import GPRS, SCRATCH, STATUS, Case, Result

VECTORS = {
    "DE": 0, "DB": 1, "BP": 3, "OF": 4, "BR": 5, "UD": 6, "NM": 7, "DF": 8, "TS": 10, "NP": 11,
    "SS": 12, "GP": 13, "PF": 14, "AC": 17,
}  # fmt: skip
FLAGS = {**STATUS, "df": 10, "if": 9, "iopl": 12, "nt": 14}
WIDTHS = {name: (n, width) for width, names in NAMES.items() for n, name in enumerate(names)}
EXCEPTION = re.compile(r"#([A-Z]{2})(?:\(([0-9a-f]+)\))?$")
HIGH = {"ah": 0, "ch": 1, "dh": 2, "bh": 3}


@dataclass
class RowCase:
    """A line, parsed."""

    where: str
    mode: int | str
    user: bool
    text: str
    before: str
    after: str
    segments: dict[str, int] = field(default_factory=dict)

    def code(self) -> bytes:
        if self.text.startswith("db "):
            return bytes.fromhex(self.text[3:])
        return assemble(self.text, 32 if self.mode == "compat" else int(self.mode))

    def address(self, text: str) -> int:
        start = REAL_DATA if self.mode == 16 else SCRATCH
        return start + int(text[1:] or "0", 16)

    def case(self) -> Case:
        gpr, memory, rflags = {}, {}, 0x202
        for name, value in _assignments(self.before):
            if name[0] == "[":
                memory[self.address(name[1:-1])] = bytes.fromhex(value)
            elif "." in name:
                self.segments[name] = int(value, 16)
            elif name in FLAGS:
                rflags |= int(value, 16) << FLAGS[name]
            else:
                gpr[GPRS[WIDTHS[name][0]]] = int(value, 16)
        for name, value in _assignments(self.after):
            if name[0] == "[":
                memory.setdefault(self.address(name[1:-1]), bytes(len(value) // 2))
        return Case(self.code(), gpr, rflags, memory=memory)

    def set_segments(self, state: State) -> None:
        for name, value in self.segments.items():
            register, member = name.split(".")
            setattr(state.seg[Seg[register.upper()]], member, value)


def _assignments(text: str) -> Iterator[tuple[str, str]]:
    for word in text.split():
        if word[0] != "#":
            name, value = word.split("=")
            yield name, value


def _rows() -> Iterator[RowCase]:
    for path in sorted((Path(__file__).parent / "rows").glob("*.txt")):
        mode: int | str = 64
        user = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            line = line.partition("//")[0].strip()
            if line.startswith("mode "):
                words = line.split()
                mode, user = int(words[1]) if words[1].isdigit() else words[1], "user" in words
            elif line:
                text, before, after = (part.strip() for part in line.split("|"))
                yield RowCase(f"{path.stem}:{number} {text}", mode, user, text, before, after)


def _found(row: RowCase, result: Result, name: str, expected: str) -> object:
    """What the result holds for `name`, in the form that `expected` has."""
    if name[0] == "[":
        return result.memory[row.address(name[1:-1])][: len(expected) // 2].hex()
    if name in FLAGS:
        width = 3 if name == "iopl" else 1
        return f"{result.rflags >> FLAGS[name] & width:x}"
    if name == "rip":
        return f"{result.rip:x}"
    if name in HIGH:
        return f"{result.gpr[GPRS[HIGH[name]]] >> 8 & 0xFF:x}"
    number, width = WIDTHS[name]
    return f"{result.gpr[GPRS[number]] & (1 << width) - 1:x}"


@pytest.mark.parametrize("row", list(_rows()), ids=lambda row: row.where)
def test_row(row: RowCase) -> None:
    case = row.case()
    result = machine().execute(case, row.mode, user=row.user, setup=row.set_segments)
    wanted = next((m for w in row.after.split() if (m := EXCEPTION.match(w))), None)
    vector = VECTORS[wanted[1]] if wanted else None
    error = int(wanted[2], 16) if wanted and wanted[2] else None
    assert (result.vector, result.error) == (vector, error)
    wrong = [
        f"{name}: expected {value}, got {found}"
        for name, value in _assignments(row.after)
        if (found := _found(row, result, name, value)) != value.lower()
    ]
    assert not wrong
