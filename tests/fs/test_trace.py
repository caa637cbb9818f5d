"""Trace points: depth, results, errors, and nothing where nobody listens."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from anykvm import fs
from anykvm.fs import trace as tracing

Raises = Callable[[int], AbstractContextManager[None]]


def test_the_way_of_a_call(toy: Any, path: str) -> None:
    events: list[tracing.Event] = []
    with tracing.attached(events.append):
        fd = fs.open(path)
        child = fs.ioctl(fd, toy.SPAWN, 0)
    fs.close(child)
    fs.close(fd)
    assert [(e.depth, e.kind, e.name) for e in events] == [
        (0, "enter", "open"),
        (1, "enter", "toy.open"),
        (1, "exit", "toy.open"),
        (0, "exit", "open"),
        (0, "enter", "ioctl"),
        (1, "enter", "anon_inode_getfd"),
        (1, "exit", "anon_inode_getfd"),
        (0, "exit", "ioctl"),
    ]
    assert events[0].fields == {"path": path, "backend": "soft"}
    assert events[4].fields["cmd"] == toy.SPAWN
    assert events[6].fields == {"file": "toy-child"}
    assert [e.result for e in events if e.kind == "exit"] == [None, fd, child, child]
    assert events[7].duration >= events[6].duration > 0
    assert {e.thread for e in events} == {"MainThread"}
    assert [e.time for e in events] == sorted(e.time for e in events)


def test_an_error_is_in_the_exit(path: str, raises: Raises) -> None:
    events: list[tracing.Event] = []
    fd = fs.open(path)
    with tracing.attached(events.append), raises(errno.ENOTTY):
        fs.ioctl(fd, 0xDEAD)
    fs.close(fd)
    error = events[-1].error
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOTTY


def test_several_sinks_and_none() -> None:
    first: list[tracing.Event] = []
    second: list[tracing.Event] = []
    assert not tracing.enabled()
    with tracing.attached(first.append):
        tracing.trace("a", n=1)
        with tracing.attached(second.append):
            tracing.trace("b")
    tracing.trace("c")
    assert [e.name for e in first] == ["a", "b"]
    assert [e.name for e in second] == ["b"]
    with pytest.raises(ValueError, match="not in list"):
        tracing.detach(first.append)


@tracing.traced
def double(number: int) -> int:
    tracing.trace("inside")
    return number * 2


def test_traced_function() -> None:
    events: list[tracing.Event] = []
    assert double(1) == 2
    with tracing.attached(events.append):
        assert double(21) == 42
    assert [(e.name, e.depth) for e in events] == [("double", 0), ("inside", 1), ("double", 0)]
    assert events[-1].result == 42
