"""The thread for all that is not the guest's doing: console input and device timers.

Input waits here until the console's device has room. Whoever sends more than a little is made to
wait, so a pipe is slowed down to what the guest reads and nothing is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from anykvm.vmm.device_table import Timed

NS_PER_SECOND = 1_000_000_000
MAX_PENDING = 4096


class ConsoleDevice(Protocol):
    """The device that takes console input."""

    def receive(self, data: bytes) -> int:
        """Take what fits; returns how many bytes did."""


class EventLoop:
    """Waits for input and deadlines; touches devices only with `devices_lock` held.

    Locks are taken in the order devices, then `_changed`: devices call `wake` with theirs held.
    """

    def __init__(self, devices_lock: threading.Lock, clock: Callable[[], int]) -> None:
        self._devices_lock = devices_lock
        self._clock = clock
        self._timed: Sequence[Timed] = ()
        self._console: ConsoleDevice | None = None
        self._changed = threading.Condition()
        self._awake = False
        self._stopping = False
        self._pending = bytearray()

    def connect(self, timed: Sequence[Timed], console: ConsoleDevice | None) -> None:
        """What to serve; before each `run`."""
        self._timed, self._console = timed, console
        self._stopping = False

    @property
    def pending(self) -> bytes:
        """Input that the console has not taken yet."""
        with self._changed:
            return bytes(self._pending)

    def wake(self) -> None:
        """A deadline moved, or the console has room. From any thread."""
        with self._changed:
            self._awake = True
            self._changed.notify_all()

    def send(self, data: bytes) -> None:
        """Input for the console. Waits while much is pending; after `stop` it is dropped."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._pending) < MAX_PENDING or self._stopping)
            self._pending += data
            self._awake = True
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            with self._devices_lock:
                self._feed()
                timeout = self._tick()
            with self._changed:
                self._changed.wait_for(lambda: self._awake or self._stopping, timeout)
                self._awake = False

    def _feed(self) -> None:
        with self._changed:
            data = bytes(self._pending)
        if data and self._console is not None:
            taken = self._console.receive(data)
            with self._changed:
                del self._pending[:taken]
                self._changed.notify_all()

    def _tick(self) -> float | None:
        """Serve what is due; returns the seconds until the next deadline."""
        now = self._clock()
        for device in self._timed:
            deadline = device.next_deadline()
            if deadline is not None and deadline <= now:
                device.tick()
        left = [device.next_deadline() for device in self._timed]
        due = [deadline for deadline in left if deadline is not None]
        return max(min(due) - self._clock(), 0) / NS_PER_SECOND if due else None
