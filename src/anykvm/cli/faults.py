"""Options by which `anykvm exec` makes a KVM that lacks or refuses something: the rules of
anykvm.testing, for programs that know nothing of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anykvm.cli.errors import CommandError

if TYPE_CHECKING:
    from anykvm.testing import Faults

WHICH = ("call", "every", "times")
SYNTAX = "expected IOCTL:ERRNO, and after it :call=N, :every=N or :times=N"


@dataclass(frozen=True)
class Lacks:
    """What the options say."""

    cpu_model: str
    capabilities: Sequence[str]
    cpuid: Sequence[str]
    failures: Sequence[str]

    def __bool__(self) -> bool:
        return self.cpu_model != "max" or any((self.capabilities, self.cpuid, self.failures))

    def faults(self) -> Faults:
        """The rules, not in force yet. CommandError for a name that does not exist."""
        from anykvm.testing import Faults

        faults = Faults(recording=False)
        options: tuple[tuple[str, Sequence[str], Callable[[str], object]], ...] = (
            ("--cpu-model", (self.cpu_model,), faults.cpu_model),
            ("--hide-cap", self.capabilities, faults.hide_capability),
            ("--hide-cpuid", self.cpuid, faults.hide_cpuid),
            ("--fail", self.failures, lambda text: _fail(faults, text)),
        )
        for option, values, add in options:
            for value in values:
                try:
                    add(value)
                except ValueError as error:
                    raise CommandError(f"{option} {value}: {error}") from error
        return faults


def _fail(faults: Faults, text: str) -> None:
    """A rule from `IOCTL:ERRNO[:call=N]`; EINTR of KVM_RUN is as after a signal. ValueError."""
    ioctl, _, rest = text.partition(":")
    name, *conditions = rest.split(":")
    number = getattr(errno, name, None)
    if not name.startswith("E") or not isinstance(number, int):
        raise ValueError(f"there is no errno {name!r}; {SYNTAX}")
    which = dict(map(_condition, conditions))
    if (ioctl, number) == ("KVM_RUN", errno.EINTR):
        faults.interrupt(**which)
    else:
        faults.fail(ioctl, number, **which)


def _condition(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in WHICH or not number.isdecimal():
        raise ValueError(f"{text!r} is no condition; {SYNTAX}")
    return name, int(number)
