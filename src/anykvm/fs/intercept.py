"""Interceptors: code between an ioctl's caller and the file, for whoever tests a program.

    def slow(call: IoctlCall, proceed: Callable[[], int]) -> int:
        time.sleep(0.1)
        return proceed()

    with intercepted(slow): ...

An interceptor may let the call proceed, answer in its place, or raise OSError. It stands before our
own files and the system's alike, and before calls that are made for another process. The last one
entered is asked first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from anykvm.fs.file import File


@dataclass(frozen=True, slots=True)
class IoctlCall:
    """An ioctl about to be made. `file` is None for a descriptor of the system's own."""

    fd: int
    file: File | None
    cmd: int
    arg: int


Proceed = Callable[[], int]
Interceptor = Callable[[IoctlCall, Proceed], int]
_interceptors: list[Interceptor] = []
intercepting: Callable[[], int] = _interceptors.__len__
"""How many interceptors are in place."""


@contextmanager
def intercepted(interceptor: Interceptor) -> Iterator[None]:
    """Put an interceptor in place for the time of a `with`, in all threads."""
    _interceptors.append(interceptor)
    try:
        yield
    finally:
        _interceptors.remove(interceptor)


def through(call: IoctlCall, proceed: Proceed) -> int:
    """Make a call through the interceptors that are in place."""
    return through_all(tuple(_interceptors), call, proceed)


def through_all(interceptors: Iterable[Interceptor], call: IoctlCall, proceed: Proceed) -> int:
    """Make a call through these: the last one is asked first."""
    for interceptor in interceptors:
        proceed = partial(interceptor, call, proceed)
    return proceed()
