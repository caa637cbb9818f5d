"""A unit of translation: instructions are collected and become records without addresses."""

from __future__ import annotations

import struct
from array import array
from typing import TYPE_CHECKING, NamedTuple

from iced_x86 import Decoder, Instruction

from anykvm.cpu.forms import Form
from anykvm.cpu.state import Mode
from anykvm.cpu.templates import Template
from anykvm.cpu.unit_cache import UnitImage

if TYPE_CHECKING:
    from anykvm.cpu.translate import Translator

UNIT_INSNS = 64
UNIT_BRANCHES = 4
HEAD = struct.Struct("<Q16sQ")
CODE_MODE = int(
    Mode.CODE32
    | Mode.CODE64
    | Mode.STACK32
    | Mode.PROTECTED
    | Mode.NM
    | Mode.SSE_UD
    | Mode.SSE_NM
    | Mode.GUEST
)
STEP, CODE64 = int(Mode.STEP), int(Mode.CODE64)

# What stands between instructions. A link and a seek count what no branch has counted.
POLL, SEEK, LINK = Template(Form("poll")), Template(Form("seek")), Template(Form("link"))
SEEK.counted = LINK.counted = LINK.branch = True
NO_INSTRUCTION = (POLL, SEEK, LINK)


class Step(NamedTuple):
    """A record to be: its template, RIP, and a branch's target or a RIP-relative address."""

    template: Template
    rip: int
    value: int


class UnitBuilder:
    """Collects from `rip`, whose bytes begin `code` (the rest of its page)."""

    def __init__(self, t: Translator, rip: int, mode: int, host: int, code: bytes) -> None:
        self.t, self.rip, self.mode, self.host, self.code = t, rip, mode, host, code
        self.mask = 2**64 - 1 if mode & CODE64 else 2**32 - 1
        self.templates = t.decoder(mode & CODE_MODE)
        self.steps: list[Step] = []
        self.length = 0  # bytes
        self.count = 0  # instructions
        self._entries: list[int] = []  # which steps are heads

    @property
    def at(self) -> int:
        return (self.rip + self.length) & self.mask

    def collect(self) -> bool:
        """Until something ends the unit. False if not even one instruction lies in the page."""
        decoder = Decoder(self.templates.bits, self.code, ip=self.rip)
        i = Instruction()
        code, steps, blocks = self.code, self.steps, self.t.blocks.records
        limit = 1 if self.mode & STEP else UNIT_INSNS
        branches, fresh, shadow = 0, True, False
        while self.count < limit and branches <= UNIT_BRANCHES and self.length < len(code):
            at = self.at
            if fresh and self.count and (at, self.host, self.mode) in blocks:
                steps.append(Step(LINK, at, at))
                return True
            found = self.templates.decode(decoder, i, code, self.length)
            if found is None:
                break
            template, value = found
            if fresh:
                self._entries.append(len(steps))
                fresh = False
            steps.append(Step(template, at, value))
            self.length += i.len
            self.count += 1
            if template.ends:
                break
            if shadow:
                steps.append(Step(POLL, self.at, 0))
            shadow = template.shadow
            if template.conditional:
                branches += 1
                fresh = True
        self._end()
        return self.count > 0

    def collect_one(self, code: bytes) -> None:
        """Only one instruction, from bytes of two pages."""
        self.steps.clear()
        i = Instruction()
        found = self.templates.decode(Decoder(self.templates.bits, code, ip=self.rip), i, code, 0)
        assert found is not None
        self._entries.append(0)
        self.steps.append(Step(found[0], self.rip, found[1]))
        self.length, self.count = max(i.len, 1), 1
        self._end()

    def _end(self) -> None:
        """On to the next instruction by a look-up (a poll when stepping)."""
        self.steps.append(Step(POLL if self.mode & STEP else SEEK, self.at, 0))

    def image(self) -> UnitImage:
        """The unit as records without addresses."""
        number = self.t.handlers.number
        handlers: list[int] = []
        records: list[bytes] = []
        branches: list[tuple[int, int]] = []
        leaving: list[tuple[int, int]] = []
        uncounted = 0
        for template, _, value in self.steps:
            uncounted += template not in NO_INSTRUCTION
            if template.number < 0:
                template.number = number(template.form)
            if template.branch:
                branches.append((len(records), value & self.mask))
            if template.ends and not template.counted:
                leaving.append((len(records), uncounted))
            handlers.append(template.number)
            records.append(HEAD.pack(0, *template.place(value, uncounted)))
            if template.counted:
                uncounted = 0
        return UnitImage(
            self.code[: self.length],
            self.count,
            tuple(handlers),
            b"".join(records),
            array("Q", [s.rip for s in self.steps]).tobytes(),
            tuple(branches),
            tuple((self.steps[n].rip, n) for n in self._entries),
            tuple(leaving),
        )
