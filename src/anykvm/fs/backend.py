"""Which /dev/kvm an open gets: this package's or the host's.

`auto` takes the host's only where the processor has hardware virtualization and the device opens: a
host whose KVM emulates, or whose device is there without the rights to it, is no use.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

Backend = Literal["soft", "host"]
VARIABLE = "ANYKVM_BACKEND"
HOST_KVM = "/dev/kvm"
_HARDWARE = ("vmx", "svm")


class Choice(NamedTuple):
    """The backend taken and the reason in words."""

    backend: Backend
    reason: str


def choose(wanted: str | None = None) -> Choice:
    """Decide between `soft` and `host`.

    `wanted` is "soft", "host", "auto" or None. The first two are taken as they are; otherwise the
    environment's ANYKVM_BACKEND decides, and without it what the host offers. ValueError.
    """
    asked = _checked(wanted or "auto", "backend")
    if asked != "auto":
        return _EXPLICIT[asked](f"backend={asked!r} was asked for")
    environment = _checked(os.environ.get(VARIABLE) or "auto", VARIABLE)
    if environment != "auto":
        return _EXPLICIT[environment](f"{VARIABLE}={environment}")
    return _by_host()


_EXPLICIT: dict[str, Callable[[str], Choice]] = {
    "soft": lambda reason: Choice("soft", reason),
    "host": lambda reason: Choice("host", reason),
}


def _checked(name: str, what: str) -> str:
    if name not in ("soft", "host", "auto"):
        raise ValueError(f"{what} is {name!r}: expected soft, host or auto")
    return name


def _by_host() -> Choice:
    extension = hardware_virtualization()
    if extension is None:
        return Choice("soft", "the processor reports neither vmx nor svm")
    try:
        os.close(os.open(HOST_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return Choice("soft", f"{HOST_KVM} does not open: {error.strerror}")
    return Choice("host", f"the processor has {extension} and {HOST_KVM} opens")


def hardware_virtualization(cpuinfo: Path = Path("/proc/cpuinfo")) -> str | None:
    """`vmx` or `svm` where the processor reports it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return None
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return next((name for name in _HARDWARE if name in flags), None)
