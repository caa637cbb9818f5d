"""A unit of translation: its instructions are collected, then written as records."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple

from iced_x86 import Decoder, Instruction

from anykvm.cpu.forms import Form
from anykvm.cpu.guest import RECORD
from anykvm.cpu.state import Mode
from anykvm.cpu.templates import Template

if TYPE_CHECKING:
    from anykvm.cpu.translate import Translator

PAGE_MASK = ~4095
UNIT_INSNS = 64
UNIT_BRANCHES = 4
HEAD = struct.Struct("<Q16sQ")
CODE_MODE = int(
    Mode.CODE32 | Mode.CODE64 | Mode.STACK32 | Mode.PROTECTED | Mode.NM | Mode.SSE_UD | Mode.SSE_NM
)
STEP, CODE64 = int(Mode.STEP), int(Mode.CODE64)

# What stands between instructions. A link and a seek count what no branch has counted.
POLL, MISSING = Template(Form("poll")), Template(Form("missing"))
SEEK, LINK = Template(Form("seek")), Template(Form("link"))
SEEK.counted = LINK.counted = True


class Step(NamedTuple):
    """A record to be: its template, RIP, and a branch's target or a RIP-relative address."""

    template: Template
    rip: int
    value: int


class UnitBuilder:
    """Collects from `rip`, whose bytes begin `code` (the rest of its page), then writes."""

    def __init__(
        self, t: Translator, rip: int, mode: int, base: int, host: int, code: bytes
    ) -> None:
        self.t, self.rip, self.mode, self.host, self.code = t, rip, mode, host, code
        self.base = base
        self.mask = 2**64 - 1 if mode & CODE64 else 2**32 - 1
        self.templates = t.decoder(mode & CODE_MODE)
        self.steps: list[Step] = []
        self.heads: list[tuple[int, int]] = []  # RIP and record address
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
        code, steps, blocks = self.code, self.steps, self.t.blocks
        limit = 1 if self.mode & STEP else UNIT_INSNS
        branches, fresh, shadow = 0, True, False
        while self.count < limit and branches <= UNIT_BRANCHES and self.length < len(code):
            at = self.at
            if fresh and self.count and (target := blocks.get((at, self.host, self.mode))):
                steps.append(Step(LINK, at, target))
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

    def write(self) -> None:
        """Makes records of the steps; sets `heads`."""
        self._resolve()
        first = self.t.next_record
        records: list[bytes] = []
        rips: list[int] = []
        branches: list[tuple[int, int]] = []  # index of a branch's record, its target
        uncounted = 0
        for template, rip, value in self.steps:
            uncounted += 1
            if template.branch:
                branches.append((len(records), value & self.mask))
            if template is LINK:
                uncounted -= 1
                records.append(HEAD.pack(LINK.handler, _count_field(uncounted), value))
            else:
                uncounted -= template is SEEK or template is POLL
                records.append(HEAD.pack(*template.place(value, uncounted)))
            rips.append(rip)
            if template.counted:
                uncounted = 0
        self.heads = [(self.steps[n].rip, first + n * RECORD) for n in self._entries]
        self._link(first, records, rips, branches)
        self.t.append(records, rips)

    def _resolve(self) -> None:
        """Handlers of all templates; those that have to be compiled are one batch."""
        wanted = [s.template for s in self.steps] + [POLL, SEEK, LINK, MISSING]
        missing = {t.form: t for t in wanted if not t.handler}
        if missing:
            addresses = self.t.handlers(list(missing))
            known = dict(zip(missing, addresses, strict=True))
            for t in wanted:
                t.handler = t.handler or known[t.form]

    def _link(
        self, first: int, records: list[bytes], rips: list[int], branches: list[tuple[int, int]]
    ) -> None:
        """Gives every branch its target, or a record that finds it."""
        own = dict(self.heads)
        page = (self.rip + self.base) & PAGE_MASK
        for index, target in branches:
            stub = own.get(target) or self.t.blocks.get((target, self.host, self.mode))
            outside = (target + self.base) & PAGE_MASK != page
            if stub is None or outside or self.mode & STEP:
                stub = first + len(records) * RECORD
                branch = first + index * RECORD
                records.append(self._finder(branch, outside=outside))
                rips.append(target)
            handler, fields, _ = HEAD.unpack(records[index])
            records[index] = HEAD.pack(handler, fields, stub)

    def _finder(self, branch: int, *, outside: bool) -> bytes:
        """A record that goes on to its RIP, which is a branch's target."""
        if self.mode & STEP:
            return HEAD.pack(*POLL.place(0, 0))
        if outside:
            return HEAD.pack(*SEEK.place(0, 0))
        return HEAD.pack(MISSING.handler, MISSING.fields, branch)


def _count_field(count: int) -> bytes:
    return b"\0\0" + count.to_bytes(2, "little") + bytes(12)
