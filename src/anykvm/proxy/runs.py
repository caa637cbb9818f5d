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
from anykvm.fs.task import Task
from anykvm.proxy.client import ClientThread
from anykvm.proxy.listener import Listener
from anykvm.uapi.kvm import KVM_EXIT_INTR, kvm_run


def _offset(name: str) -> int:
    offset: int = getattr(kvm_run, name).offset
    return offset


LONG = 0.0002
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
        run: Callable[[Task, int, int, int], int],
        *arguments: *tuple[int, int, int],
    ) -> None:
        """Answer a KVM_RUN; `run` carries it out on behalf of `thread` with the ioctl's arguments,
        and returns its result or a negative errno.
        """
        if self._active is not None and self._was_interrupted(listener):
            listener.answer(id, -EINTR)
            return
        with self._lock:
            if self._unanswered:
                self._unanswered = False
                listener.answer(id, -EINTR)
            elif self._undelivered is None:
                self._begin(thread, id)
                began = monotonic()
                result = run(thread, *arguments)
                self.long = monotonic() - began > LONG
                self._end(listener, id, result)
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

    def _begin(self, thread: ClientThread, id: int) -> None:
        self._active, self._active_id, thread.running = thread, id, id
        thread.stopping = False
        if not self._run.immediate_exit:
            # What a client reads that a signal takes out of the call.
            self._run.exit_reason = KVM_EXIT_INTR

    def _end(self, listener: Listener, id: int, result: int) -> None:
        self._answered = id  # it may have left already when we are back
        delivered = listener.answer(id, result)
        noticed = self._active is None
        self._active = None
        if not delivered:
            self._unanswered = not noticed
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
