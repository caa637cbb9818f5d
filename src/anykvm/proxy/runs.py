"""KVM_RUN for a client: between its thread, which a signal may take out of the call at any moment,
and the vCPU, which goes on until it notices.

From Linux 5.19 on a call stays until it is answered, and we look for signals ourselves. Before, its
wait is interrupted: the client sees EINTR, or, where the handler has SA_RESTART, nothing: the
kernel makes the call once more. Hence the rules. A KVM_RUN while the one before was never answered
gets EINTR at once, or a kick would be lost. An exit that could not be delivered is kept for the
next call. (One that is answered in the very moment that the signal comes is lost; the kernel tells
nobody.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from errno import EINTR
from time import monotonic

from anykvm.fs.mapping import Mapping
from anykvm.proxy.client import ClientThread
from anykvm.proxy.listener import Listener
from anykvm.uapi.kvm import KVM_EXIT_INTR, kvm_run


def _offset(name: str) -> int:
    offset: int = getattr(kvm_run, name).offset
    return offset


LONG = 0.0002
IMMEDIATE_EXIT = _offset("immediate_exit")
EXIT = slice(_offset("exit_reason"), _offset("ready_for_interrupt_injection"))
DETAILS = slice(_offset("hw"), _offset("kvm_valid_regs"))


class Runs:
    """The calls of one vCPU. `_lock` is held from entering the guest to the answer."""

    def __init__(self, memory: Mapping) -> None:
        self._bytes = memory.buffer
        self._run = memory.view(kvm_run)
        self._lock = threading.Lock()
        self._active: ClientThread | None = None
        self._active_id = 0
        self._answered = 0  # which call is being answered, or was the last
        self.long = False  # the last stay in the guest took longer than a thread takes to wake
        self._unanswered = False
        self._undelivered: tuple[bytes, bytes] | None = None

    def call(
        self,
        listener: Listener,
        thread: ClientThread,
        id: int,
        run: Callable[[], int],
    ) -> None:
        """Answer a KVM_RUN of `thread`; `run` carries it out, and returns its result or a negative
        errno.
        """
        if self._active is not None and self._was_interrupted(listener):
            listener.answer(id, -EINTR)
            return
        self._lock.acquire()  # `with` takes twice as long
        try:
            if self._unanswered or self._undelivered is not None:
                self._make_up(listener, id)
                return
            self._active, self._active_id, thread.running = thread, id, id
            thread.stopping = False
            if not self._bytes[IMMEDIATE_EXIT]:
                # What a client reads that a signal takes out of the call.
                self._run.exit_reason = KVM_EXIT_INTR
            began = monotonic()
            result = run()
            self.long = monotonic() - began > LONG
            self._answered = id  # it may have left already when we are back
            if listener.answer(id, result):
                self._active = None
            else:
                self._keep(result)
        finally:
            self._lock.release()

    def _make_up(self, listener: Listener, id: int) -> None:
        """For the call before, which was never answered."""
        if self._unanswered:
            self._unanswered = False
            listener.answer(id, -EINTR)
        else:
            self._deliver(listener, id)

    def _was_interrupted(self, listener: Listener) -> bool:
        """Whether the call that is under way will never get its answer. It has one now."""
        active, id = self._active, self._active_id
        if active is None or listener.alive(id) or self._answered == id:
            return False
        self._active = None
        if active.on_signal is not None:
            active.on_signal()
        return True

    def _keep(self, result: int) -> None:
        """What a call has come to whose caller is gone."""
        self._unanswered = self._active is not None  # else somebody has noticed
        self._active = None
        if result == 0:
            self._undelivered = bytes(self._bytes[EXIT]), bytes(self._bytes[DETAILS])
            self._run.exit_reason = KVM_EXIT_INTR

    def _deliver(self, listener: Listener, id: int) -> None:
        """An earlier call's exit, as this one's."""
        assert self._undelivered is not None
        for part, saved in zip((EXIT, DETAILS), self._undelivered, strict=True):
            self._bytes[part] = list(saved)
        if listener.answer(id, 0):
            self._undelivered = None
        else:
            self._run.exit_reason = KVM_EXIT_INTR
            self._unanswered = True
