"""Which trace points to show: patterns for the names that a call or an event goes by."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

from anykvm.cli.narrate import ioctl_name
from anykvm.fs.file import File
from anykvm.fs.trace import Event, Sink


class Verdict(Enum):
    """SHOW and HIDE hold for all that a call leads to; NEUTRAL shows nothing of the call itself."""

    SHOW = "show"
    HIDE = "hide"
    NEUTRAL = "neutral"


@dataclass(frozen=True)
class Filter:
    """Patterns of what to show, and of what to leave out. Without the first, everything is shown.

    A pattern (`KVM_SET_*`, `kvm-vcpu*`, `ioctl`, `kvm_pio`) is compared with the event's own name,
    the ioctl's, and the kind of descriptor; case does not matter.
    """

    wanted: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()

    @classmethod
    def parse(cls, patterns: Iterable[str]) -> Filter:
        """From words, `!` before what to leave out, commas between several in one."""
        words = [word for text in patterns for word in text.lower().split(",") if word]
        unwanted = tuple(word[1:] for word in words if word.startswith("!"))
        return cls(tuple(word for word in words if not word.startswith("!")), unwanted)

    def verdict(self, event: Event, around: Verdict) -> Verdict:
        """What becomes of an event inside a call with the verdict `around`."""
        names = event_names(event)
        if around is Verdict.HIDE or _any_match(names, self.unwanted):
            return Verdict.HIDE
        shown = around is Verdict.SHOW or not self.wanted or _any_match(names, self.wanted)
        return Verdict.SHOW if shown else Verdict.NEUTRAL


def event_names(event: Event) -> list[str]:
    """What a pattern may call an event, in lower case."""
    names = [event.name]
    number = event.fields.get("cmd")
    if number is not None:
        names.append(ioctl_name(number) if isinstance(number, int) else str(number))
    file = event.fields.get("file")
    if file is not None:
        path = file.f_path if isinstance(file, File) else str(file)
        names.append(path.removeprefix("/dev/").removeprefix("anon_inode:"))
    return [name.lower() for name in names]


def _any_match(names: list[str], patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


class _Calls(threading.local):
    """The verdicts on the calls that this thread is in."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []


def filtered(sink: Sink, which: Filter) -> Sink:
    """A sink that passes on what the filter shows."""
    calls = _Calls()

    def take(event: Event) -> None:
        if event.kind == "exit":
            # A call that was under way when the tracing began was not entered here.
            verdict = calls.verdicts.pop() if calls.verdicts else Verdict.NEUTRAL
        else:
            around = calls.verdicts[-1] if calls.verdicts else Verdict.NEUTRAL
            verdict = which.verdict(event, around)
            if event.kind == "enter":
                calls.verdicts.append(verdict)
        if verdict is Verdict.SHOW:
            sink(event)

    return take
