"""The VM's thread: deadlines in order, cancelled and moved ones, descriptors."""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections.abc import Iterator

import pytest

from anykvm.kvm.worker import Worker

MS = 1_000_000


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker("test")
    yield made
    made.stop()


def test_timers_expire_in_order_and_not_early(worker):
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def note(n: int) -> None:
        seen.append((n, worker.now()))
        if len(seen) == 3:
            done.set()

    start = worker.now()
    for n in (30, 10, 20):
        worker.hrtimer(lambda n=n: note(n)).start(start + n * MS)
    assert done.wait(5)
    assert [n for n, _ in seen] == [10, 20, 30]
    assert all(at >= start + n * MS for n, at in seen)


def test_a_cancelled_timer_stays_silent_and_a_moved_one_fires_once(worker):
    fired: list[str] = []
    cancelled, moved = (worker.hrtimer(lambda n=n: fired.append(n)) for n in ("bad", "good"))
    cancelled.start(worker.now() + 10 * MS)
    cancelled.cancel()
    moved.start(worker.now() + 10 * MS)
    moved.start(worker.now() + 30 * MS)
    time.sleep(0.02)
    assert fired == []
    time.sleep(0.05)
    assert fired == ["good"]


def test_a_deadline_in_the_past_and_one_centuries_away(worker):
    past = threading.Event()
    worker.hrtimer(lambda: None).start(1 << 70)
    worker.hrtimer(past.set).start(-5)
    assert past.wait(5)


def test_a_timer_started_anew_while_it_expires_is_not_lost(worker, monkeypatch):
    fired = threading.Semaphore(0)
    timer = worker.hrtimer(fired.release)
    other = threading.Thread(target=lambda: timer.start(worker.now() + 20 * MS))
    heappop = heapq.heappop

    def meanwhile(heap: list[object]) -> object:
        if other.ident is None:
            other.start()
            other.join(0.05)
        return heappop(heap)

    monkeypatch.setattr(heapq, "heappop", meanwhile)
    timer.start(worker.now())
    assert fired.acquire(timeout=5)
    assert fired.acquire(timeout=5)
    other.join(5)


def test_deadlines_that_were_moved_take_no_memory(worker):
    """As those of a guest that sets its timer far ahead, again and again."""
    fired: list[int] = []
    done = threading.Event()
    for n in range(100):
        worker.hrtimer(lambda n=n: fired.append(n)).start(worker.now() + (200 + n % 7) * MS)
    timer = worker.hrtimer(done.set)
    for n in range(20_000):
        timer.start(worker.now() + (1000 + n % 3) * 1000 * MS)
    assert len(worker._heap) <= 300
    timer.start(worker.now() + 220 * MS)
    assert done.wait(10)
    assert sorted(fired) == list(range(100))


def test_descriptors_are_listened_to_until_ignored(worker):
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    heard: list[int] = []
    try:
        worker.listen(fd, lambda: heard.append(os.eventfd_read(fd)))
        os.eventfd_write(fd, 4)
        deadline = time.monotonic() + 5
        while not heard and time.monotonic() < deadline:
            time.sleep(0.001)
        assert heard == [4]
        worker.ignore(fd)
        os.eventfd_write(fd, 1)
        time.sleep(0.02)
        assert heard == [4]
    finally:
        os.close(fd)


def test_stopping_ends_the_thread_and_closes_its_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    worker = Worker("test-stop")
    worker.hrtimer(lambda: None).start(worker.now() + 10_000 * MS)
    assert "test-stop" in [t.name for t in threading.enumerate()]
    worker.stop()
    assert "test-stop" not in [t.name for t in threading.enumerate()]
    assert len(os.listdir("/proc/self/fd")) == before
