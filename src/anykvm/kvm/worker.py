"""The VM's own thread: high-resolution timers (as kernel/time/hrtimer.c) and eventfds that it
listens to.

One thread a VM, started at the first timer or eventfd and ended with the VM. It sleeps in epoll on
a timerfd armed for the earliest deadline, the listened-to eventfds and one eventfd that wakes it
for changes.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from itertools import count

_libc = ctypes.CDLL(None, use_errno=True)
_CLOCK_MONOTONIC = 1
_TFD_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_TFD_TIMER_ABSTIME = 1
_PR_SET_NAME = 15
_FOREVER_NS = 1 << 62
_MIN_ROOM = 64


class _Itimerspec(ctypes.Structure):
    _fields_ = [(name, ctypes.c_long) for name in ("i_sec", "i_nsec", "v_sec", "v_nsec")]


def _timerfd_create() -> int:
    fd: int = _libc.timerfd_create(_CLOCK_MONOTONIC, _TFD_NONBLOCK_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create")
    return fd


class Hrtimer:
    """struct hrtimer: one deadline on CLOCK_MONOTONIC and a function that the VM's thread calls
    when it has passed.
    """

    __slots__ = ("_worker", "expires", "function")

    def __init__(self, worker: Worker, function: Callable[[], None]) -> None:
        self._worker = worker
        self.function = function
        self.expires: int | None = None

    def start(self, expires_ns: int) -> None:
        """Call the function at `expires_ns`, in place of any earlier deadline."""
        self._worker.enqueue(self, expires_ns)

    def cancel(self) -> None:
        """Forget the deadline; the function may be running at this moment."""
        self.expires = None


def _ignored() -> None:
    """Stands for a descriptor that nobody listens to any more."""


class Worker:
    """The thread, its heap of deadlines and the descriptors that it polls."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._heap: list[tuple[int, int, Hrtimer]] = []
        self._room = _MIN_ROOM  # entries until those that are no timer's deadline any more go
        self._sequence = count()
        self._armed: int | None = None
        self._dispatching = threading.RLock()  # held around a listener's function
        self._listeners: dict[int, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._epoll = select.epoll()
        self._timerfd = _timerfd_create()
        self._wakefd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._timerfd, select.EPOLLIN)
        self._epoll.register(self._wakefd, select.EPOLLIN)

    @staticmethod
    def now() -> int:
        """CLOCK_MONOTONIC in nanoseconds, the clock of all deadlines here."""
        return time.monotonic_ns()

    def hrtimer(self, function: Callable[[], None]) -> Hrtimer:
        return Hrtimer(self, function)

    def enqueue(self, timer: Hrtimer, expires: int) -> None:
        with self._lock:
            timer.expires = expires  # not before: `_due` may be about to reset it
            if len(self._heap) >= self._room:
                self._compact()
            heapq.heappush(self._heap, (expires, next(self._sequence), timer))
            self._ensure_started()
            if self._armed is None or expires < self._armed:
                self._arm(expires)

    def listen(self, fd: int, function: Callable[[], None]) -> None:
        """Call `function` on the VM's thread whenever `fd` becomes readable."""
        with self._lock:
            self._listeners[fd] = function
            self._epoll.register(fd, select.EPOLLIN)
            self._ensure_started()

    def ignore(self, fd: int) -> None:
        """Stop listening; on return the function neither runs nor will."""
        with self._dispatching, self._lock:
            if self._listeners.pop(fd, None) is not None:
                self._epoll.unregister(fd)

    def stop(self) -> None:
        """End the thread and close what it held. Not for the thread itself to call."""
        with self._lock:
            self._stopping = True
        if self._thread is not None:
            os.eventfd_write(self._wakefd, 1)
            self._thread.join()
        self._epoll.close()
        os.close(self._timerfd)
        os.close(self._wakefd)

    def _ensure_started(self) -> None:
        if self._thread is None and not self._stopping:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _compact(self) -> None:
        """Forget deadlines that were cancelled or moved: a guest can move a far one for ever."""
        current = {entry[2]: entry for entry in self._heap if entry[2].expires == entry[0]}
        self._heap = list(current.values())
        heapq.heapify(self._heap)
        self._room = max(_MIN_ROOM, 2 * len(self._heap))

    def _arm(self, expires: int) -> None:
        self._armed = expires
        moment = min(max(expires, 1), _FOREVER_NS)  # zero would disarm
        spec = _Itimerspec(0, 0, moment // 1_000_000_000, moment % 1_000_000_000)
        if _libc.timerfd_settime(self._timerfd, _TFD_TIMER_ABSTIME, ctypes.byref(spec), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def _due(self) -> list[Hrtimer]:
        """Take what has expired off the heap, and arm for what comes next."""
        due = []
        with self._lock:
            now = self.now()
            while self._heap:
                expires, _, timer = self._heap[0]
                current = timer.expires == expires  # else cancelled or started anew
                if current and expires > now:
                    break
                heapq.heappop(self._heap)
                if current:
                    timer.expires = None
                    due.append(timer)
            self._armed = None
            if self._heap:
                self._arm(self._heap[0][0])
        return due

    def _poll(self) -> None:
        for fd, _ in self._epoll.poll():
            if fd in (self._timerfd, self._wakefd):
                with contextlib.suppress(BlockingIOError):  # armed anew since it expired
                    os.read(fd, 8)
            else:
                with self._dispatching:
                    self._listeners.get(fd, _ignored)()

    def _run(self) -> None:
        # Signals are the process's threads' own; and the name is not to be inherited from a vCPU.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        _libc.prctl(_PR_SET_NAME, self._name.encode(), 0, 0, 0)
        while not self._stopping:
            self._poll()
            for timer in self._due():
                timer.function()
