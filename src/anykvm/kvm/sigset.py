"""Signals that end KVM_RUN: `kvm_sigset_activate`, `signal_pending(current)` and
KVM_SET_SIGNAL_MASK.

In the kernel a signal for the thread in KVM_RUN makes it return EINTR, and its handler runs on the
way out. Here the thread in KVM_RUN blocks every signal at entry, so that one that arrives for it
stays pending instead of running a handler that native guest code would not notice; looks at its
pending set whenever it is back in Python (a tick takes it there every few milliseconds, see
cpu/ticker.py); answers EINTR when one is pending that the mask lets through; and restores
the mask at exit, at which the handler runs. So handlers, dispositions, SA_RESTART and signals that
the mask leaves pending behave as with Linux's KVM. A blocked vCPU (HLT) polls a signalfd of its own
and wakes at once.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable
from errno import EINVAL

from anykvm.fs.task import RemoteThread, current
from anykvm.kvm.errors import fail

REMOTE_POLL_MS = 50  # how often a vCPU in HLT looks for signals that nobody told it of
SIGSET_SIZE = 8  # the kernel's sigset_t; libc's is longer

# Raised by a fault of the running thread itself: blocking them would turn a handler into a kill.
_SYNCHRONOUS = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGTRAP,
    signal.SIGABRT,
    signal.SIGSYS,
)

# PyDLL: these calls never block, and giving up the GIL for them costs more than they do.
_libc = ctypes.PyDLL(None, use_errno=True)
_SIG_SETMASK = int(signal.SIG_SETMASK)


class _Sigset(ctypes.Structure):
    _fields_ = [("bits", ctypes.c_uint64), ("rest", ctypes.c_uint64 * 15)]
    bits: int


def _bit(number: int) -> int:
    return 1 << number - 1


_UNBLOCKABLE = sum(_bit(n) for n in (*_SYNCHRONOUS, signal.SIGKILL, signal.SIGSTOP))
_ALL = (1 << 64) - 1 & ~_UNBLOCKABLE


class Sigset(ABC):
    """The signal side of one vCPU. `activate` ... `deactivate` enclose KVM_RUN."""

    def __init__(self) -> None:
        self._mask: int | None = None  # KVM_SET_SIGNAL_MASK's; None: the caller's own
        self._wakefd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wakefd, select.POLLIN)

    @abstractmethod
    def activate(self) -> None:
        """KVM_RUN begins, in this thread."""

    @abstractmethod
    def deactivate(self) -> None:
        """KVM_RUN ends."""

    @abstractmethod
    def signal_pending(self) -> bool:
        """Whether a signal waits for the calling thread that may interrupt it."""

    @abstractmethod
    def wait(self, timeout_ms: int | None = None) -> None:
        """Block until `wake`, an interrupting signal, or the time-out; returns at once if any has
        happened.
        """

    def wake(self) -> None:
        """End a `wait`, now or the next one; from any thread."""
        os.eventfd_write(self._wakefd, 1)

    def close(self) -> None:
        os.close(self._wakefd)

    def set_mask(self, sigset: bytes | None) -> None:
        """KVM_SET_SIGNAL_MASK: what is blocked during KVM_RUN, None for the thread's own mask."""
        if sigset is not None and len(sigset) != SIGSET_SIZE:
            raise fail(EINVAL, f"a sigset is {SIGSET_SIZE} bytes, got {len(sigset)}")
        self._mask = None if sigset is None else int.from_bytes(sigset, "little")


class KvmSigset(Sigset):
    """A vCPU whose KVM_RUN is called in this process."""

    def __init__(self) -> None:
        super().__init__()
        self._blocked = _Sigset(_ALL)
        self._saved = _Sigset()
        self._pending = _Sigset()
        self._signalfd = -1

    def activate(self) -> None:
        _libc.pthread_sigmask(_SIG_SETMASK, ctypes.byref(self._blocked), ctypes.byref(self._saved))

    def deactivate(self) -> None:
        _libc.pthread_sigmask(_SIG_SETMASK, ctypes.byref(self._saved), None)

    def _interrupting(self) -> int:
        """The set of signals that end KVM_RUN."""
        mask = self._saved.bits if self._mask is None else self._mask
        return _ALL & ~mask

    def signal_pending(self) -> bool:
        _libc.sigpending(ctypes.byref(self._pending))
        return bool(self._pending.bits & self._interrupting())

    def wait(self, timeout_ms: int | None = None) -> None:
        waited_for = _Sigset(self._interrupting())
        fd: int = _libc.signalfd(self._signalfd, ctypes.byref(waited_for), os.O_CLOEXEC)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "signalfd")
        if self._signalfd < 0:
            self._signalfd = fd
            self._poll.register(fd, select.POLLIN)
        for ready, _ in self._poll.poll(timeout_ms):
            if ready == self._wakefd:
                os.eventfd_read(self._wakefd)

    def close(self) -> None:
        super().close()
        if self._signalfd >= 0:
            os.close(self._signalfd)


class RemoteSigset(Sigset):
    """A vCPU whose KVM_RUN is called by other processes' threads, which wait elsewhere.

    Who serves them calls `wake_up` for their signals, soon if not at once; besides, they are looked
    for whenever the vCPU is back in Python.
    """

    def __init__(self, wake_up: Callable[[], None]) -> None:
        super().__init__()
        self._wake_up = wake_up
        self._caller: RemoteThread | None = None

    def activate(self) -> None:
        self._caller = current().remote
        assert self._caller is not None, "the vCPU was made on behalf of another process"
        self._caller.signal_mask = self._mask
        self._caller.on_signal = self._wake_up

    def deactivate(self) -> None:
        assert self._caller is not None
        self._caller.on_signal = None

    def signal_pending(self) -> bool:
        return self._caller is not None and self._caller.signal_pending()

    def wait(self, timeout_ms: int | None = None) -> None:
        step = REMOTE_POLL_MS if timeout_ms is None else min(timeout_ms, REMOTE_POLL_MS)
        passed = 0
        while not self.signal_pending() and (timeout_ms is None or passed < timeout_ms):
            if self._poll.poll(step):
                os.eventfd_read(self._wakefd)
                return
            passed += step


def new_sigset(wake_up: Callable[[], None]) -> Sigset:
    """For a vCPU that `current` makes; `wake_up` brings a running vCPU back to Python."""
    return KvmSigset() if current().remote is None else RemoteSigset(wake_up)
