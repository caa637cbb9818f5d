"""Rules: which calls of an ioctl are concerned, and what happens to them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from difflib import get_close_matches

from anykvm.fs.intercept import IoctlCall, Proceed
from anykvm.uapi.names import CAPABILITIES, IOCTLS

Act = Callable[[IoctlCall, Proceed], int]


def _known(kind: str, name: str, names: Collection[str]) -> str:
    if name not in names:
        near = ", ".join(get_close_matches(name, names, 3, 0.5))
        hint = f"; is it one of {near}?" if near else ""
        raise ValueError(f"there is no {kind} {name!r}{hint}")
    return name


def ioctl_number(name: str) -> int:
    """An ioctl's number by its name in linux/kvm.h; ValueError."""
    return IOCTLS[_known("ioctl", name, IOCTLS)].number


def capability_number(name: str | int) -> int:
    """A capability's number by its name, with or without KVM_CAP_; ValueError."""
    if isinstance(name, int):
        return name
    numbers = {text: number for number, text in CAPABILITIES.items()}
    full = name if name.startswith("KVM_CAP_") else f"KVM_CAP_{name}"
    return numbers[_known("capability", full, numbers)]


@dataclass
class Rule:
    """What happens to certain calls of the ioctl `cmd`.

    Calls are counted from 1 where the rule was made. Without `call` and `every` each is concerned;
    `call` names one or several by number, `every` each nth. After `times` of them the rule rests.
    """

    cmd: int
    act: Act
    call: int | Collection[int] | None = None
    every: int | None = None
    times: int | None = None
    seen: int = 0
    applied: int = 0
    _counting: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.call is not None and self.every is not None:
            raise ValueError("give call= or every=, not both")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every={self.every}: expected 1 or more")

    def _concerned(self) -> bool:
        if self.every is not None:
            return self.seen % self.every == 0
        if self.call is None:
            return True
        return self.seen in ((self.call,) if isinstance(self.call, int) else self.call)

    def __call__(self, call: IoctlCall, proceed: Proceed) -> int:
        if call.cmd != self.cmd:
            return proceed()
        with self._counting:
            self.seen += 1
            rests = self.times is not None and self.applied >= self.times
            if rests or not self._concerned():
                apply = False
            else:
                self.applied += 1
                apply = True
        return self.act(call, proceed) if apply else proceed()
