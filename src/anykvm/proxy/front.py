"""The process that the user started: to whoever waits for it, it behaves as the client does.

The client is in the same process group, so what the terminal sends reaches it by itself. Signals
that somebody sends to us alone are passed on. When the client stops, so do we; when it is killed,
we die of the same signal.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
from contextlib import suppress
from struct import Struct

from anykvm.proxy import abi

MESSAGE = Struct("=cii")
STARTED, STOPPED, ENDED, REFUSED = b"+", b"T", b"X", b"!"
SIGINFO_SIZE = 128
SIGINFO_HEAD = Struct("=Iii")  # struct signalfd_siginfo: signo, errno, code
SI_KERNEL = 0x80
NEVER_PASSED_ON = {signal.SIGCHLD, signal.SIGKILL, signal.SIGSTOP, signal.SIGTTIN, signal.SIGTTOU}
SUPERVISOR_DIED = "the supervisor has died; the program's KVM calls fail from now on"

_libc = ctypes.CDLL(None, use_errno=True)


class Report:
    """The supervisor's end of the pipe to the front. A front that has gone misses nothing."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def _send(self, kind: bytes, value: int, text: bytes = b"") -> None:
        with suppress(OSError):
            os.write(self.fd, MESSAGE.pack(kind, value, len(text)) + text)

    def started(self, pid: int) -> None:
        self._send(STARTED, pid)

    def stopped(self) -> None:
        self._send(STOPPED, 0)

    def ended(self, status: int) -> None:
        """The client's status, as of wait(2)."""
        self._send(ENDED, status)

    def refused(self, status: int, text: str) -> None:
        """There is no client."""
        self._send(REFUSED, status, text.encode())


class LaunchError(Exception):
    """The client could not be started; `status` is the exit status for that."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Front:
    """Made before the supervisor is, with all signals blocked; `mask` was blocked before."""

    def __init__(self, report: int, mask: set[int]) -> None:
        self._report = report
        self._mask = mask
        self._client = 0
        self._early: list[int] = []  # signals from before there was a client
        abi.prctl(abi.PR_SET_CHILD_SUBREAPER, 1)  # if the supervisor dies, the client is ours
        every = ctypes.create_string_buffer(b"\xff" * 128, 128)
        self._signals: int = _libc.signalfd(-1, every, os.O_CLOEXEC)
        if self._signals < 0:
            raise OSError(ctypes.get_errno(), "signalfd")

    def wait(self) -> int:
        """The client's exit status, or no return. LaunchError."""
        poll = select.poll()
        poll.register(self._signals, select.POLLIN)
        poll.register(self._report, select.POLLIN)
        while True:
            for fd, _ in poll.poll():
                if fd == self._signals:
                    self._pass_on()
                elif (status := self._hear()) is not None:
                    os.close(self._signals)
                    return self._end_as(status)

    def _hear(self) -> int | None:
        raw = os.read(self._report, MESSAGE.size)
        if not raw:
            return self._supervisor_died()
        kind, value, length = MESSAGE.unpack(raw)
        text = os.read(self._report, length) if length else b""
        if kind == REFUSED:
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
            raise LaunchError(text.decode(), value)
        if kind == STARTED:
            self._client = value
            for number in self._early:
                self._kill(number)
        elif kind == STOPPED:
            os.kill(os.getpid(), signal.SIGSTOP)
            self._kill(signal.SIGCONT)
        return value if kind == ENDED else None

    def _pass_on(self) -> None:
        number, _, code = SIGINFO_HEAD.unpack_from(os.read(self._signals, SIGINFO_SIZE))
        # What the terminal sends, the client gets as well.
        if number not in NEVER_PASSED_ON and code != SI_KERNEL:
            self._kill(number)

    def _kill(self, number: int) -> None:
        if not self._client:
            self._early.append(number)
        else:
            with suppress(ProcessLookupError):
                os.kill(self._client, number)

    def _supervisor_died(self) -> int:
        print(f"anykvm: {SUPERVISOR_DIED}", file=sys.stderr)
        while True:
            try:
                pid, status = os.waitpid(-1, 0)
            except ChildProcessError:
                return 1 << 8
            if pid == self._client:
                return status

    def _end_as(self, status: int) -> int:
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)
        if os.WIFEXITED(status):
            return os.WEXITSTATUS(status)
        number = os.WTERMSIG(status)
        # The client has left a core, if one was wanted.
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
        with suppress(OSError):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        return 128 + number
