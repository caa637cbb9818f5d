"""KVM_RUN that ends before the guest wants it to: EINTR out of nothing, and runs cut short."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from types import FrameType

from anykvm.fs.intercept import IoctlCall, Proceed
from anykvm.fs.mapping import PAGE_SIZE, PROT_READ, PROT_WRITE, Mapping
from anykvm.uapi import kvm as abi

_MAP_SHARED = 1


def spurious_interrupt(call: IoctlCall, proceed: Proceed) -> int:
    """EINTR with KVM_EXIT_INTR, as after a signal; the guest does not run."""
    run = _kvm_run(call)
    run.exit_reason = abi.KVM_EXIT_INTR
    raise OSError(errno.EINTR, os.strerror(errno.EINTR))


def _kvm_run(call: IoctlCall) -> abi.kvm_run:
    if call.file is not None:
        run: abi.kvm_run = call.file.private_data.run
        return run
    return Mapping(PAGE_SIZE, PROT_READ | PROT_WRITE, _MAP_SHARED, call.fd).view(abi.kvm_run)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler: that it exists makes the signal interrupt."""


class ShortRuns:
    """Signals each thread that has been in KVM_RUN for `seconds`, until it is out.

    The signal is SIGRTMAX - 2, for which a handler that does nothing is set meanwhile.
    """

    SIGNAL = signal.SIGRTMAX - 2

    def __init__(self, seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("short runs can only be set up in the main thread, as signals can")
        self.seconds = seconds
        self._running: dict[int, float] = {}  # since when, by thread
        self._changed = threading.Condition()
        self._ended = False
        self._before = signal.signal(self.SIGNAL, _nothing)
        self._thread = threading.Thread(target=self._watch, name="short-runs", daemon=True)
        self._thread.start()

    def __call__(self, call: IoctlCall, proceed: Proceed) -> int:
        if call.cmd != abi.KVM_RUN:
            return proceed()
        thread = threading.get_ident()
        with self._changed:
            self._running[thread] = time.monotonic() + self.seconds
            self._changed.notify()
        try:
            return proceed()
        finally:
            with self._changed:
                del self._running[thread]

    def _watch(self) -> None:
        with self._changed:
            while not self._ended:
                now = time.monotonic()
                for thread, due in self._running.items():
                    if due <= now:
                        signal.pthread_kill(thread, self.SIGNAL)
                        self._running[thread] = now + self.seconds
                next_due = min(self._running.values(), default=None)
                self._changed.wait(None if next_due is None else max(next_due - now, 0))

    def close(self) -> None:
        """No signal is sent any more; the handler from before is back."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        signal.signal(self.SIGNAL, self._before)
