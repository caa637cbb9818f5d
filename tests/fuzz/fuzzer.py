"""Hostile callers: threads that call any ioctl with anything, while descriptors close under them.

`run` makes some number of calls and returns what went wrong: an exception that is no OSError, an
errno that the ioctl's row does not state, descriptors or threads left over. Crashes and hangs are
for whoever runs this in a child (hostile.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import random
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from anykvm import fs
from anykvm.cpu.engine import process_runtime
from anykvm.kvm.ioctl import IoctlRow
from anykvm.kvm.tables import absent, tables, unknown
from anykvm.uapi import kvm as abi
from anykvm.uapi.names import ioctl_name

from .arena import Arena
from .guest import GuestPages
from .machines import RunPages, machine
from .values import argument, integer, random_number

_libc = ctypes.CDLL(None)
KINDS = ("system", "VM", "vCPU")
THREADS = 3
MIN_VMS, MAX_VMS, MAX_DESCRIPTORS = 2, 4, 40
MACHINE_ERRORS = (
    errno.EBADF,
    errno.ENOTTY,
    errno.EINVAL,
    errno.EEXIST,
)  # others close it meanwhile
PATIENCE = 0.004  # seconds in a call before it gets a signal
SIGNAL = signal.SIGRTMAX - 3
MADE = {abi.KVM_CREATE_VM: "VM", abi.KVM_CREATE_VCPU: "vCPU"}


def _rows(kind: str) -> dict[int, IoctlRow[Any]]:
    return {row.number: row for table in tables(kind) for row in table}


ROWS: dict[str, dict[int, IoctlRow[Any]]] = {}
ABSENT: dict[tuple[str, int], int] = {}


def read_tables() -> None:
    """Once the driver is loaded."""
    for kind in KINDS:
        ROWS[kind] = _rows(kind)
    for kind, row in absent():
        if row.name in abi.IOCTLS:  # others have no number on x86
            ABSENT[kind, abi.IOCTLS[row.name].number] = row.errno


@dataclass(eq=False)
class Open:
    """A descriptor in the pool. `closed` is set before it is closed."""

    fd: int
    kind: str
    closed: bool = False
    run: RunPages | None = None  # of a vCPU, if it is mapped


@dataclass
class Findings:
    """What one run saw. `wrong` describes each thing that should not be."""

    calls: int = 0
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Pool:
    """The descriptors that all threads share."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: list[Open] = []

    def add(self, fd: int, kind: str) -> None:
        opened = Open(fd, kind)
        if kind == "vCPU":
            with contextlib.suppress(OSError):  # closed already by another thread
                opened.run = RunPages(fd)
        with self._lock:
            self._open.append(opened)

    def pick(self, r: random.Random) -> Open | None:
        """Any one, though most are to be VMs and vCPUs."""
        with self._lock:
            kind = r.choice(("VM", "vCPU", "vCPU", None))
            wanted = [each for each in self._open if kind in (None, each.kind)] or self._open
            return r.choice(wanted) if wanted else None

    def count(self, kind: str | None = None) -> int:
        with self._lock:
            return sum(kind in (None, each.kind) for each in self._open)

    def take(self, r: random.Random | None = None) -> Open | None:
        """Remove one, to be closed."""
        with self._lock:
            if not self._open:
                return None
            found = self._open.pop(r.randrange(len(self._open)) if r else -1)
            found.closed = True
            return found


class Caller:
    """One hostile thread."""

    def __init__(self, seed: str, pool: Pool, guest: GuestPages, findings: Findings) -> None:
        self.r = random.Random(seed)
        self.arena = Arena(self.r, guest)
        self.pool, self.findings = pool, findings
        self.since = 0.0  # when the call under way began
        self.outcomes: Counter[tuple[str, str]] = Counter()

    def call_once(self) -> None:
        kind = self.r.random()
        if kind < 0.008:
            self._close()
        elif kind < 0.03:
            self._other_call()
        elif kind < 0.06:
            self.arena.guest.damage(self.r)
        elif kind < 0.09:
            self._scribble()
        elif kind < 0.12:
            self._run_a_vcpu()
        elif self.pool.count("VM") < MIN_VMS:
            self._expect("machine", MACHINE_ERRORS, self._machine)
        else:
            self._ioctl()

    def _machine(self) -> None:
        fd = fs.open("/dev/kvm", backend="soft")
        try:
            for made, kind in machine(fd, self.r, self.arena.guest):
                self.pool.add(made, kind)
        finally:
            self.pool.add(fd, "system")

    def _scribble(self) -> None:
        found = self.pool.pick(self.r)
        if found is not None and found.run is not None:
            found.run.scribble(self.r)

    def _run_a_vcpu(self) -> None:
        found = self.pool.pick(self.r)
        if found is not None and found.kind == "vCPU":
            self._make(found, abi.KVM_RUN, 0, ROWS["vCPU"][abi.KVM_RUN])

    def _close(self) -> None:
        found = self.pool.take(self.r)
        if found is not None:
            found.run = None
            self._expect("close", (), lambda: fs.close(found.fd))

    def _other_call(self) -> None:
        """What else one does to a descriptor."""
        found = self.pool.pick(self.r)
        if found is None or self.pool.count("system") < 1:
            fd = fs.open("/dev/kvm", backend="soft")
            self.pool.add(fd, "system")
            return
        fd = found.fd
        if self.r.random() < 0.2 and self.pool.count() < MAX_DESCRIPTORS:
            self._expect("dup", (errno.EBADF, errno.ENOENT), lambda: self._dup(fd))
            return
        calls: tuple[Callable[[], object], ...] = (
            lambda: fs.mmap(fd, self.r.choice((4096, 3 * 4096, 64 * 4096, 0, 100))).unmap(),
            lambda: fs.read(fd, 4),  # by now it may be an eventfd of KVM's own, whose read wants 8
            lambda: fs.write(fd, b"x"),
            lambda: fs.lseek(fd, integer(self.r, 63)),
            lambda: fs.poll(fd, 0xFFFF),
            lambda: fs.fdinfo(fd),
            lambda: fs.getfl(fd),
            lambda: self._compat_ioctl(fd),
        )
        allowed = (errno.EBADF, errno.EINVAL, errno.ENODEV, errno.ESPIPE, errno.ENOTTY)
        more = (errno.EPERM, errno.EACCES, errno.EFAULT, errno.ENXIO, errno.EIO, errno.E2BIG)
        gone = errno.ENOENT  # of /proc, for a descriptor closed meanwhile
        self._expect("other", (*allowed, *more, gone, errno.ENOSYS), self.r.choice(calls))

    def _compat_ioctl(self, fd: int) -> None:
        number = random_number(self.r)
        result = fs.compat_ioctl(fd, number, integer(self.r, 32))
        if number in (*MADE, abi.KVM_GET_STATS_FD):
            fs.close(result)

    def _dup(self, fd: int) -> None:
        """Of whatever has that number by now."""
        new = fs.dup(fd)
        name = os.readlink(f"/proc/self/fd/{new}").removeprefix("/memfd:").split(" ")[0]
        kind = {"kvm": "system", "kvm-vm": "VM"}.get(name)
        kind = "vCPU" if name.startswith("kvm-vcpu:") else kind
        if kind is None:
            os.close(new)
        else:
            self.pool.add(new, kind)

    def _expect(self, what: str, allowed: tuple[int, ...], function: Callable[[], object]) -> None:
        try:
            function()
        except OSError as error:
            if error.errno not in allowed:
                self._wrong(f"{what}: {error!r}")
        except Exception:
            self._wrong(f"{what}: {traceback.format_exc()}")
        self.outcomes[what, ""] += 1

    def _wrong(self, text: str) -> None:
        self.findings.wrong.append(text)

    def _number(self, kind: str) -> int:
        choice = self.r.random()
        if choice < 0.9:
            return self.r.choice(tuple(ROWS[kind]))
        if choice < 0.96:
            return self.r.choice(tuple(ROWS[self.r.choice(KINDS)]))
        if choice < 0.98:
            return self.r.choice(tuple(abi.IOCTLS.values())).number
        return random_number(self.r)

    def _ioctl(self) -> None:
        found = self.pool.pick(self.r)
        if found is None:
            self._other_call()
            return
        number = self._number(found.kind)
        full = self.pool.count("VM") >= MAX_VMS or self.pool.count() >= MAX_DESCRIPTORS
        if number in MADE and full:
            return
        row = ROWS[found.kind].get(number)
        arg = argument(self.arena, row) if row is not None else self.arena.pointer(64)
        self._make(found, number, arg, row)

    def _make(self, found: Open, number: int, arg: int, row: IoctlRow[Any] | None) -> None:
        outcome = "0"
        self.since = time.monotonic()
        try:
            result = fs.ioctl(found.fd, number, arg)
            if number in MADE and row is not None:
                self.pool.add(result, MADE[number])
            elif row is not None and row.name == "KVM_GET_STATS_FD":
                self._statistics(result)
        except OSError as error:
            outcome = errno.errorcode.get(error.errno or 0, str(error.errno))
            if not found.closed and error.errno not in self._allowed(found.kind, number, row):
                self._wrong(f"{found.kind} {ioctl_name(number)}({arg:#x}): {error!r}")
        except Exception:
            outcome = "exception"
            text = traceback.format_exc()
            self._wrong(f"{found.kind} {ioctl_name(number)}({arg:#x}):\n{text}")
        finally:
            self.since = 0.0
        self.outcomes[ioctl_name(number) if row else "unknown", outcome] += 1

    def _statistics(self, fd: int) -> None:
        """A descriptor that outlives its VM; here only for a moment."""
        for function in (lambda: os.read(fd, self.r.choice((1, 8, 24, 4096))), self._close):
            function()
        os.close(fd)

    @staticmethod
    def _allowed(kind: str, number: int, row: IoctlRow[Any] | None) -> set[int]:
        if row is None:
            return {ABSENT.get((kind, number), unknown(kind)), unknown(kind)}
        return {number for number, _ in row.all_errors()}


def _serve(caller: Caller, calls: int, beat: Callable[[], None]) -> None:
    try:
        for _ in range(calls):
            caller.call_once()
            beat()
    except Exception:
        caller.findings.wrong.append(f"the fuzzer itself: {traceback.format_exc()}")


def _kick(callers: dict[int, Caller]) -> None:
    """Signal the threads that have been in a call for long: a guest may run forever."""
    now = time.monotonic()
    for thread, caller in callers.items():
        since = caller.since
        if since and now - since > PATIENCE:
            signal.pthread_kill(thread, SIGNAL)


def _nothing(number: int, frame: object) -> None:
    """That there is a handler makes the signal interrupt."""


def run(calls: int, seed: str, beat: Callable[[], None] = lambda: None) -> Findings:
    """Make about `calls` calls from THREADS threads, close everything, and tell what was seen."""
    findings, pool, guest = Findings(), Pool(), GuestPages()
    signal.signal(SIGNAL, _nothing)
    pool.add(fs.open("/dev/kvm", backend="soft"), "system")
    read_tables()
    callers = [Caller(f"{seed}-{n}", pool, guest, findings) for n in range(THREADS)]
    threads = {
        threading.Thread(target=_serve, args=(caller, calls // THREADS, beat), daemon=True): caller
        for caller in callers
    }
    for thread in threads:
        thread.start()
    running = dict(threads)
    while running:
        _kick({t.ident: c for t, c in running.items() if t.ident is not None and t.is_alive()})
        time.sleep(PATIENCE / 2)
        running = {t: c for t, c in running.items() if t.is_alive()}
    while (left := pool.take()) is not None:
        fs.close(left.fd)
    guest.close()
    for caller in callers:
        findings.outcomes += caller.outcomes
        caller.arena.close()
    findings.calls = sum(findings.outcomes.values())
    return findings


def resources() -> tuple[int, list[str], int]:
    """Descriptors, threads and resident KiB of this process."""
    process_runtime().units.forget()  # translations that are kept are no leak
    gc.collect()
    _libc.malloc_trim(0)  # what the allocator keeps for later is no leak
    descriptors = len(os.listdir("/proc/self/fd"))
    names = sorted(thread.name for thread in threading.enumerate())
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * 4
    return descriptors, names, resident
