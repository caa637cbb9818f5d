"""The clients: their processes, and their threads as the tasks on whose behalf calls run."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from errno import ENOSYS, EPERM

from anykvm.fs.task import Cred, RemoteThread, Task
from anykvm.proxy import abi
from anykvm.proxy.fdtable import FdTable, Key
from anykvm.proxy.listener import Listener, Received
from anykvm.proxy.memory import ClientMemory
from anykvm.proxy.procfs import state, status

MANY = 64
STATUS_SIZE = 1 << 13
SIGNAL_ROWS = (0, 25, 50)  # SigPnd, ShdPnd, SigBlk: lines of 25 bytes one after the other
NOTHING = 0, bytes(abi.NOTIF_CALL.size)


class Process:
    """A client: a thread group with its memory. Closed when it has ended."""

    def __init__(self, pid: int, memory: ClientMemory) -> None:
        self.pid = pid
        self.memory = memory
        self.immediate_exit = False  # it has asked whether it can end KVM_RUN so
        self.pidfd = os.pidfd_open(pid)

    def close(self) -> None:
        os.close(self.pidfd)


class ClientThread(Task, RemoteThread):
    """A thread of a client, `current` while its calls are carried out."""

    def __init__(
        self, tid: int, process: Process, cred: Cred, listener: Listener, fetch: Fetch
    ) -> None:
        super().__init__(process.pid, cred)
        self.mm = process.memory
        self.tid = tid
        self.process = process
        self.waiting: Received = NOTHING  # what it calls now, KVM_RUN apart
        self.running = 0  # its KVM_RUN that is being carried out, though it may have left it
        self.on_signal: Callable[[], None] | None = None
        self.signal_mask: int | None = None
        self.stopping = False  # its process is to stop, for which all threads have to return
        self.installed: list[int] = []
        self.calling = threading.Lock()  # an earlier call may be going on, though it left that
        self.kept: tuple[bytes, int] | None = None
        self._listener = listener
        self._fetch = fetch
        self.fetched: dict[int, int] = {}  # by descriptor: our duplicate, during a call
        self.files = FdTable(tid)
        self._status = -1
        self._closing = threading.Lock()  # our descriptors are not read from meanwhile
        self.gone = False  # it has ended; what is being carried out for it closes it

    @property
    def remote(self) -> RemoteThread:
        return self

    def dup_fd(self, fd: int) -> int:
        try:
            return abi.pidfd_getfd(self.process.pidfd, fd)
        except OSError as error:
            if error.errno not in (EPERM, ENOSYS):
                raise
        # Docker's default profile forbids that call. The client has to send the descriptor, and
        # then to call once more: one at a time.
        if fd not in self.fetched:
            self.fetched[fd] = self._fetch(self, fd)
        return os.dup(self.fetched[fd])

    def forget_fetched(self) -> None:
        """The call that needed them is over."""
        while self.fetched:
            os.close(self.fetched.popitem()[1])

    def fd_installed(self, fd: int) -> None:
        self.installed.append(fd)

    def signal_pending(self) -> bool:
        if self.stopping or not self._listener.alive(self.running):
            return True
        own, process, blocked = self._signals()
        mask = blocked if self.signal_mask is None else self.signal_mask
        return bool((own | process) & ~mask)

    def _signals(self) -> tuple[int, ...]:
        """What is pending for this thread, pending for any of its process, blocked by this one."""
        with self._closing:
            if self.gone:
                return 1, 0, 0
            try:
                if self._status < 0:
                    self._status = os.open(f"/proc/{self.tid}/status", os.O_RDONLY | os.O_CLOEXEC)
                text = abi.pread(self._status, STATUS_SIZE)
            except (ProcessLookupError, FileNotFoundError):
                return 1, 0, 0
        at = text.index(b"SigPnd:")
        return tuple(int(text[at + row + 8 : at + row + 24], 16) for row in SIGNAL_ROWS)

    def end(self) -> None:
        """It has ended: now, or when its KVM_RUN has seen that, it is closed."""
        self.gone = True
        tell = self.on_signal
        if tell is None:
            self.close()
        else:
            tell()

    def close(self) -> None:
        with self._closing:
            self.gone = True
            self.forget_fetched()
            status, self._status = self._status, -1
        self.files.close()
        if status >= 0:
            os.close(status)


Fetch = Callable[[ClientThread, int], int]


class Clients:
    """Every thread that has called so far, by its number."""

    def __init__(
        self,
        listener: Listener,
        replace: Callable[..., None],
        fetch: Fetch,
        met: Callable[[Process], None],
    ) -> None:
        self._listener = listener
        self._fetch = fetch
        self._replace = replace
        self._met = met
        self._lock = threading.Lock()
        self._threads: dict[int, ClientThread] = {}
        self._look_at = MANY
        self._processes: dict[int, Process] = {}

    def thread(self, tid: int) -> ClientThread:
        """OSError where it has ended meanwhile."""
        found = self._threads.get(tid)
        if found is None:
            with self._lock:
                found = self._threads.get(tid) or self._new(tid)
        return found

    def running(self) -> list[ClientThread]:
        """Those whose KVM_RUN is being carried out."""
        return [t for t in list(self._threads.values()) if t.on_signal is not None]

    def find(self, tid: int, fd: int) -> tuple[ClientThread, Key] | None:
        """A thread and the file behind its descriptor; None where there is none, or where the
        thread has ended.
        """
        thread = self._threads.get(tid)
        if thread is not None:
            key = thread.files.find(fd)
            if key is not None and not thread.gone:
                return thread, key
            self.forget(tid)  # its number may be another thread's by now
        with suppress(OSError):
            thread = self.thread(tid)
            key = thread.files.find(fd)
            return None if key is None else (thread, key)
        return None

    def _new(self, tid: int) -> ClientThread:
        facts = status(tid)
        process = self._process(int(facts["Tgid"]))
        uid, euid = map(int, facts["Uid"].split()[:2])
        gid, egid = map(int, facts["Gid"].split()[:2])
        thread = ClientThread(tid, process, Cred(uid, gid, euid, egid), self._listener, self._fetch)
        if len(self._threads) >= self._look_at:
            self._forget_ended()
        self._threads[tid] = thread
        return thread

    def _forget_ended(self) -> None:
        """Threads end without a word; their entries are looked through when there are many."""
        for thread in list(self._threads.values()):
            if not state(thread.tid) and thread.on_signal is None:
                del self._threads[thread.tid]
                thread.close()
        self._look_at = max(MANY, 2 * len(self._threads))

    def _process(self, pid: int) -> Process:
        process = self._processes.get(pid)
        if process is None:
            process = Process(pid, ClientMemory(pid, self._replace))
            self._processes[pid] = process
            self._met(process)
        return process

    def process_of(self, tid: int) -> Process | None:
        """A thread's process, if that has called before. OSError where it has ended."""
        return self._processes.get(int(status(tid)["Tgid"]))

    def forget(self, tid: int) -> None:
        """A thread that has ended."""
        with self._lock:
            thread = self._threads.pop(tid, None)
        if thread is not None:
            thread.end()

    def forget_process(self, process: Process) -> None:
        """A process that has ended, with all its threads."""
        with self._lock:
            gone = [t.tid for t in self._threads.values() if t.process is process]
            self._processes.pop(process.pid, None)
        for tid in gone:
            self.forget(tid)
        process.close()

    def release_unused_memory(self) -> None:
        """After a VM has gone: what its client has unmapped."""
        for process in list(self._processes.values()):
            with suppress(OSError):
                process.memory.release_unused()
