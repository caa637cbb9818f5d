"""How long threads wait for a processor, as the host's scheduler counts it: `sched_info.run_delay`,
the second number of schedstat (Documentation/scheduler/sched-stats.rst).
"""

from __future__ import annotations

import os
import threading
import time

from anykvm.fs.task import current

RESOLUTION_NS = 1_000_000
"""Guests look at their ticks, and a look at schedstat costs as much as a short exit."""


def sched_info_on() -> bool:
    """Whether this host's kernel measures how long threads wait for a processor."""
    return os.path.exists("/proc/thread-self/schedstat")


class RunDelay:
    """How long those that run a vCPU have waited for a processor, in nanoseconds: the thread in
    KVM_RUN and, if another process calls, that one's thread too.
    """

    def __init__(self) -> None:
        self._threads: dict[int, tuple[int, int]] = {}  # schedstat's descriptor, the last delay
        self._next_look = 0  # in monotonic_ns

    def passed(self) -> int:
        """Since the last look, which is a millisecond ago at least: until then nothing has. Nor has
        it for a thread that is here for the first time.
        """
        now = time.monotonic_ns()
        if now < self._next_look:
            return 0
        self._next_look = now + RESOLUTION_NS
        remote = current().remote
        threads = {threading.get_native_id()} | ({remote.tid} if remote is not None else set())
        for gone in self._threads.keys() - threads:
            os.close(self._threads.pop(gone)[0])
        return sum(map(self._passed, threads))

    def _passed(self, thread: int) -> int:
        fd, last = self._threads.get(thread, (-1, 0))
        if fd < 0:
            fd = os.open(f"/proc/{thread}/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            self._threads[thread] = fd, 0  # from here on `close` knows of it
            last = _read(fd)
        now = _read(fd)
        self._threads[thread] = fd, now
        return now - last

    def close(self) -> None:
        for fd, _ in self._threads.values():
            os.close(fd)
        self._threads.clear()


def _read(schedstat: int) -> int:
    return int(os.pread(schedstat, 64, 0).split()[1])
