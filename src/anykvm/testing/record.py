"""The record of every ioctl of KVM that was made: what, on which descriptor, with which result."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass

from anykvm.fs.intercept import IoctlCall, Proceed
from anykvm.uapi.names import ioctl_name


@dataclass(frozen=True, slots=True)
class Call:
    """One ioctl. `file` is what its descriptor stood for: "/dev/kvm", "anon_inode:kvm-vm", …

    Exactly one of `result` and `error` (an errno) is set. `seconds` is how long it took, which for
    a call that an interceptor answered includes what that did.
    """

    name: str
    file: str
    arg: int
    result: int | None
    error: int | None
    seconds: float
    thread: str


def file_name(call: IoctlCall) -> str:
    """What a descriptor stands for."""
    if call.file is not None:
        return call.file.f_path
    return os.readlink(f"/proc/self/fd/{call.fd}")


def record(calls: list[Call], call: IoctlCall, proceed: Proceed) -> int:
    """Make a call and append it to `calls`."""
    name, file = ioctl_name(call.cmd), file_name(call)
    thread, started = threading.current_thread().name, time.perf_counter()
    result, error = None, None
    try:
        result = proceed()
        return result
    except OSError as problem:
        error = problem.errno
        raise
    finally:
        seconds = time.perf_counter() - started
        calls.append(Call(name, file, call.arg, result, error, seconds, thread))
