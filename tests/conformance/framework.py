"""What a conformance test says about itself, and how it is run on either backend.

A test is a plain function under `@conforms`, written against descriptors. It gets what it names
from a `Machine` (`kvm`, `vm`, `vcpu`, ...); that and the function are all that a run needs, so the
same call serves in this process and in a child.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from .machine import PROVIDED, Machine

F = TypeVar("F", bound=Callable[..., None])


@dataclass(frozen=True)
class Difference:
    """A place where anykvm is not as Linux is: what each gives (`errnos`: an errno, 0 for none),
    and why.
    """

    linux: object
    anykvm: object
    why: str
    errnos: bool = False
    ioctls: tuple[str, ...] = ()
    test: str = ""


@dataclass
class Statement:
    """What a test states: the ioctls that it is about, differences, excuses of a host."""

    ioctls: tuple[str, ...] = ()
    difference: Difference | None = None
    host_excuse: str | None = None
    name: str = ""


@dataclass
class Registry:
    """Statements of the tests that have been imported, by test."""

    by_test: dict[str, Statement] = field(default_factory=dict)

    def differences(self) -> list[Difference]:
        found = (s.difference for s in self.by_test.values())
        return sorted((d for d in found if d), key=lambda d: (d.ioctls, d.test))


REGISTRY = Registry()


def statement(function: Callable[..., object]) -> Statement | None:
    """The statement of a test function, None where it is no conformance test."""
    return getattr(function, "__conformance__", None)


def conforms(*ioctls: str) -> Callable[[F], F]:
    """Enter a test of these ioctls. Where a name has rows for several kinds of descriptor, it is
    written `system:KVM_GET_MSRS`, `VM:...`, `vCPU:...`. Outermost decorator.
    """

    def enter(function: F) -> F:
        made = statement(function) or Statement()
        made.ioctls = ioctls
        made.name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        if made.difference is not None:
            made.difference = replace(made.difference, ioctls=ioctls, test=made.name)
        function.__conformance__ = made  # type: ignore[attr-defined]
        REGISTRY.by_test[made.name] = made
        return function

    return enter


def differs(*, linux: object, anykvm: object, why: str, errnos: bool = False) -> Callable[[F], F]:
    """The test's argument `expected` is `linux` on the host, `anykvm` on soft. Goes to the docs."""

    def state(function: F) -> F:
        made = statement(function) or Statement()
        made.difference = Difference(linux, anykvm, why, errnos)
        function.__conformance__ = made  # type: ignore[attr-defined]
        return function

    return state


def host_may_differ(why: str) -> Callable[[F], F]:
    """A failure on the host is stated: its kernel is newer, or its KVM is not Linux's own."""

    def state(function: F) -> F:
        made = statement(function) or Statement()
        made.host_excuse = why
        function.__conformance__ = made  # type: ignore[attr-defined]
        return function

    return state


def execute(function: Callable[..., None], parameters: Mapping[str, Any], backend: str) -> None:
    """Run a test on `backend`; what it opened is closed afterwards, whatever came."""
    made = statement(function)
    assert made is not None
    with Machine(backend) as machine:
        arguments = dict(parameters)
        if made.difference is not None:
            sides = {"soft": made.difference.anykvm, "host": made.difference.linux}
            arguments["expected"] = sides[backend]
        wanted = inspect.signature(function).parameters
        arguments |= {name: getattr(machine, name) for name in wanted if name in PROVIDED}
        function(**arguments)
