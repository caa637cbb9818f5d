"""The trace points of `fs.trace` as text: a call and what it led to in one line.

    0.412 ms  main  kvm_dev_ioctl(KVM_CREATE_VM) → kvm_create_vm(type=0) → … = 7  (0.2 ms)

Events inside a call have lines of their own; the call's line is then split in two around them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import sizeof
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from anykvm.fs.fdtable import fget
from anykvm.fs.file import File, FileOperations, fput
from anykvm.fs.trace import Event, Sink
from anykvm.uapi.kvm import (
    KVM_EXIT_IO,
    KVM_EXIT_IO_OUT,
    KVM_EXIT_MMIO,
    KVM_RUN,
    kvm_run,
)
from anykvm.uapi.names import CAPABILITIES, EXIT_REASONS, IOCTLS

IOCTL_NAMES = {row.number: row for row in IOCTLS.values()}
DECIMAL_BELOW = 1024
ADDRESSES = ("port", "addr", "address", "gpa", "gva", "rip", "msr", "vector")
NS_PER_MS = 1_000_000


def ioctl_name(number: int) -> str:
    """The ABI's name of an ioctl number, hexadecimal where it has none."""
    row = IOCTL_NAMES.get(number)
    return row.name if row else f"{number:#x}"


def operations_name(operations: FileOperations) -> str:
    """The name that our source gives to a table of file operations."""
    for name, module in list(sys.modules.items()):
        if name.startswith("anykvm."):
            for variable, value in vars(module).items():
                if value is operations:
                    return variable
    return "file_operations"


def _operations_behind(descriptor: Any) -> str:
    """The operations of one of our files by its descriptor; empty for the host's."""
    with suppress(OSError):
        file = fget(descriptor)
        if file is not None:
            try:
                return operations_name(file.f_op)
            finally:
                fput(file)
    return ""


def value_text(value: Any) -> str:
    """A field's or a result's value for people."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value) if abs(value) < DECIMAL_BELOW else f"{value:#x}"
    if isinstance(value, File):
        return value.f_path
    if isinstance(value, bytes):
        return value.hex(" ")
    if isinstance(value, tuple):
        return f"({', '.join(map(value_text, value))})"
    return value if isinstance(value, str) else repr(value)


def _field(name: str, value: Any) -> str:
    return f"{value:#x}" if name in ADDRESSES and isinstance(value, int) else value_text(value)


def _open(event: Event) -> str:
    operations = _operations_behind(event.result) if event.result is not None else ""
    return f"open {event.fields['path']}" + (f" → {operations}" if operations else "")


def _anon_inode_getfd(event: Event) -> str:
    operations = _operations_behind(event.result) if event.result is not None else ""
    return f'anon_inode_getfd("{event.fields["file"]}"{", " if operations else ""}{operations})'


def _ioctl(event: Event) -> str:
    file, number = event.fields["file"], event.fields["cmd"]
    handler = file.f_op.unlocked_ioctl if isinstance(file, File) else None
    function = f"{handler.__name__}(" if handler else f"ioctl(fd {event.fields['fd']}, "
    return f"{function}{ioctl_name(number)}{_ioctl_value(number, event.fields['arg'])})"


def _ioctl_value(number: int, argument: int) -> str:
    """The argument where it is a value; where it is a pointer nothing."""
    row = IOCTL_NAMES.get(number)
    if row is None or row.arg is not None:
        return ""
    if row.name == "KVM_CHECK_EXTENSION":
        return f", {CAPABILITIES.get(argument, argument)}"
    return f", {value_text(argument)}" if argument else ""


def _on_descriptor(event: Event) -> str:
    file = event.fields.get("file")
    what = file.f_path if isinstance(file, File) else f"fd {event.fields['fd']}"
    return f"{event.name}({what})"


LABELS: dict[str, Callable[[Event], str]] = {
    "open": _open,
    "anon_inode_getfd": _anon_inode_getfd,
    "ioctl": _ioctl,
    "compat_ioctl": _ioctl,
    "mmap": _on_descriptor,
    "close": _on_descriptor,
    "dup": _on_descriptor,
}


def label(event: Event) -> str:
    """The call or event itself, without its result."""
    special = LABELS.get(event.name)
    if special is not None:
        return special(event)
    fields = ", ".join(f"{name}={_field(name, value)}" for name, value in event.fields.items())
    return f"{event.name}({fields})" if fields else event.name


def exit_text(run: kvm_run) -> str:
    """Why KVM_RUN returned, with the address where there is one."""
    name = EXIT_REASONS.get(run.exit_reason, f"exit reason {run.exit_reason}")
    if run.exit_reason == KVM_EXIT_IO:
        way = "out" if run.io.direction == KVM_EXIT_IO_OUT else "in"
        return f"{name} {way} {run.io.port:#x} size {run.io.size}"
    if run.exit_reason == KVM_EXIT_MMIO:
        way = "write" if run.mmio.is_write else "read"
        return f"{name} {way} {run.mmio.phys_addr:#x} size {run.mmio.len}"
    return name


def _run_result(event: Event) -> str:
    """The exit of a KVM_RUN on one of our vCPUs, whose descriptor's file is the kvm_run area."""
    is_run = event.fields.get("cmd") == KVM_RUN
    if not is_run or not isinstance(event.fields.get("file"), File):
        return ""
    with suppress(OSError):
        page = os.pread(event.fields["fd"], sizeof(kvm_run), 0)
        if len(page) == sizeof(kvm_run):
            return f" {exit_text(kvm_run.from_buffer_copy(page))}"
    return ""


def outcome(event: Event) -> str:
    """Result or error, and duration, of a call that is over."""
    if event.error is not None:
        result = f" = {type(event.error).__name__}: {event.error}"
    else:
        result = f" = {value_text(event.result)}" if event.result is not None else ""
    return f"{result}{_run_result(event)}  ({event.duration / NS_PER_MS:.3f} ms)"


@dataclass
class _Thread(threading.local):
    """The line under construction in one thread: labels by depth, and when it began."""

    chain: list[tuple[int, str]] = field(default_factory=list)
    began: int = 0


def _is_echo(event: Event) -> bool:
    """A driver's table tells the ioctl's name again inside the system call, which says it all."""
    return isinstance(event.fields.get("cmd"), str)


class Narrator:
    """A sink that writes text lines. Times count from the first event, in milliseconds."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._here = _Thread()
        self._origin: int | None = None
        self._kinds = {"enter": self._enter, "event": self._event, "exit": self._exit}

    def __call__(self, event: Event) -> None:
        if self._origin is None:
            self._origin = event.time
        if not _is_echo(event):
            self._kinds[event.kind](event)

    def _enter(self, event: Event) -> None:
        if not self._here.chain:
            self._here.began = event.time
        self._here.chain.append((event.depth, label(event)))

    def _event(self, event: Event) -> None:
        if self._here.chain:
            self._chain(event.thread, " …")
        self._line(event.time, event.thread, event.depth, label(event))

    def _exit(self, event: Event) -> None:
        chain = self._here.chain
        same = [index for index, (depth, _) in enumerate(chain) if depth == event.depth]
        if same:
            # Only now is it known what descriptor came of it.
            chain[same[-1]] = (event.depth, label(event))
        if not chain:
            text = f"… {label(event)}{outcome(event)}"
            self._line(event.time, event.thread, event.depth, text)
        elif chain[0][0] == event.depth:
            self._chain(event.thread, outcome(event))

    def _chain(self, thread: str, end: str) -> None:
        chain = self._here.chain
        text = " → ".join(text for _, text in chain) + end
        self._line(self._here.began, thread, chain[0][0], text)
        chain.clear()

    def _line(self, time: int, thread: str, depth: int, text: str) -> None:
        assert self._origin is not None
        milliseconds = (time - self._origin) / NS_PER_MS
        self._write(f"{milliseconds:12.3f} ms  {thread:<12}  {'  ' * depth}{text}")


def as_json(write: Callable[[str], None]) -> Sink:
    """A sink that writes one JSON object a line."""

    def take(event: Event) -> None:
        record: dict[str, Any] = {
            "time_ns": event.time,
            "thread": event.thread,
            "depth": event.depth,
            "kind": event.kind,
            "name": event.name,
            "label": label(event),
            "fields": _plain(event.fields),
        }
        if event.kind == "exit":
            record |= {
                "duration_ns": event.duration,
                "result": _plain_value(event.result),
                "error": str(event.error) if event.error is not None else None,
                "exit": _run_result(event).strip() or None,
            }
        write(json.dumps(record))

    return take


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain_value(value) for name, value in fields.items()}


def _plain_value(value: Any) -> Any:
    is_plain = isinstance(value, int | str | None) and not isinstance(value, Enum)
    return value if is_plain else value_text(value)
