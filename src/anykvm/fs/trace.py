"""Trace points: the way of each call, for whoever attaches a sink.

    trace("kvm_pio", port=0x3F8, size=1)             one event
    with call("kvm_create_vm", type=0) as c:         enter and exit, nested calls one deeper
        c.result = ...
    @traced                                          the same around a function

Without a sink a trace point costs the call that finds that out. Fields are the raw values; sinks
format them.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, NamedTuple, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
Kind = Literal["event", "enter", "exit"]


class Event(NamedTuple):
    """`time` is time.monotonic_ns(). An exit has `duration` (ns) and `result` or `error`."""

    time: int
    thread: str
    depth: int
    kind: Kind
    name: str
    fields: dict[str, Any]
    duration: int = 0
    result: Any = None
    error: BaseException | None = None


Sink = Callable[[Event], None]
_sinks: list[Sink] = []
enabled: Callable[[], int] = _sinks.__len__
"""How many listen: guard what is costly to compute for a field. (Nothing is cheaper to call.)"""


class _Depth(threading.local):
    value = 0


_depth = _Depth()


def attach(sink: Sink) -> None:
    """Send every event to `sink`, which is called in the thread that traces."""
    _sinks.append(sink)


def detach(sink: Sink) -> None:
    """Stop sending to `sink`; ValueError where it is not attached."""
    _sinks.remove(sink)


@contextmanager
def attached(sink: Sink) -> Iterator[Sink]:
    """Attach `sink` for the time of a `with`."""
    attach(sink)
    try:
        yield sink
    finally:
        detach(sink)


def _emit(event: Event) -> None:
    for sink in tuple(_sinks):
        sink(event)


def _now(kind: Kind, name: str, fields: dict[str, Any]) -> Event:
    thread = threading.current_thread().name
    return Event(time.monotonic_ns(), thread, _depth.value, kind, name, fields)


def trace(name: str, /, **fields: Any) -> None:
    """One event, at the depth of the calls around it."""
    if _sinks:
        _emit(_now("event", name, fields))


class _Call:
    """A call under way; set `result` before leaving to have it in the exit event."""

    __slots__ = ("fields", "name", "result", "started")

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields
        self.result: Any = None
        self.started = 0

    def __enter__(self) -> _Call:
        event = _now("enter", self.name, self.fields)
        self.started = event.time
        _emit(event)
        _depth.value += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _depth.value -= 1
        event = _now("exit", self.name, self.fields)
        duration = event.time - self.started
        _emit(event._replace(duration=duration, result=self.result, error=error))


class _Untraced(_Call):
    """What `call` gives when nobody listens."""

    def __init__(self) -> None:
        super().__init__("", {})

    def __enter__(self) -> _Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.result = None


_untraced = _Untraced()


def call(name: str, /, **fields: Any) -> _Call:
    """A context manager that traces entering and leaving `name`."""
    return _Call(name, fields) if _sinks else _untraced


def traced(function: Callable[P, R]) -> Callable[P, R]:
    """Trace a function's calls under its own name, with its result."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _sinks:
            return function(*args, **kwargs)
        with _Call(function.__name__, {}) as this:
            this.result = result = function(*args, **kwargs)
            return result

    return wrapper
