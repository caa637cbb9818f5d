"""Whether a program can be served: what a supervisor does with clients, tried on one process.

A container, a sandbox or a setting of the kernel may forbid each by itself; then no call of the
client could be answered, so it is found out before the client runs.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ENOENT, ESRCH
from typing import NamedTuple

from anykvm.fs.uaccess import UserMemory
from anykvm.proxy import abi
from anykvm.proxy.inject import STOP_SECONDS, wait_stop

_word = ctypes.c_uint64(0x616E796B766D)


class Trial(NamedTuple):
    """`does` raises OSError where it is not allowed to a child that has not called exec."""

    name: str
    does: Callable[[int], None]
    advice: str


def _proc(pid: int) -> None:
    if os.readlink("/proc/self") != str(os.getpid()):
        raise OSError(ENOENT, "it is another PID namespace's")
    os.listdir(f"/proc/{pid}/fd")
    for name in ("maps", "mem", "pagemap", "status"):
        os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC))


def _memory(pid: int) -> None:
    UserMemory(pid).read(ctypes.addressof(_word), ctypes.sizeof(_word))


def _ptrace(pid: int) -> None:
    abi.ptrace(abi.PTRACE_SEIZE, pid, abi.PTRACE_O_TRACESYSGOOD)
    abi.ptrace(abi.PTRACE_INTERRUPT, pid)
    if wait_stop(pid, STOP_SECONDS) is None:
        raise OSError(ESRCH, "the process did not stop")
    abi.ptrace(abi.PTRACE_DETACH, pid)


TRIALS = (
    Trial(
        "/proc",
        _proc,
        "mount the /proc of this PID namespace, without hidepid (unshare has --mount-proc)",
    ),
    Trial(
        "access to its memory",
        _memory,
        "set kernel.yama.ptrace_scope to 1, or allow it in the container: CAP_SYS_PTRACE",
    ),
    Trial("ptrace", _ptrace, "allow it in the container: CAP_SYS_PTRACE, or its seccomp profile"),
)


def refusal(pid: int) -> str:
    """What is refused with the child `pid`, and what to do; empty if nothing is."""
    for trial in TRIALS:
        try:
            trial.does(pid)
        except OSError as error:
            return f"{trial.name} is refused: {error.strerror}. To mend it: {trial.advice}"
    return ""


@contextmanager
def some_child() -> Iterator[int]:
    """A child that does nothing, to try things on."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
