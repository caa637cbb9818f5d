"""Serves the calls of the clients: who receives them, who answers, and when it is over.

One thread receives at a time, and carries out what it has received: the kernel would wake all that
wait, for each call. When a call lasts, such as KVM_RUN, another thread takes its place: at once
where the vCPU's last stay in the guest was long, else when the millisecond's watch finds nobody
there. The first thread alone stops and resumes clients, for ptrace is a matter of one thread.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import queue
import select
import signal
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from errno import EINTR, EIO, ENOENT, EPERM

from anykvm import fs
from anykvm.fs.task import as_current, current
from anykvm.fs.vfs import vfs_mmap
from anykvm.fs.vmas import Vma
from anykvm.proxy import abi
from anykvm.proxy.call import ClientCall
from anykvm.proxy.client import Clients, ClientThread, Process
from anykvm.proxy.descriptors import Descriptors
from anykvm.proxy.inject import ERESTARTNOINTR, Calls, Tracer, send_fd
from anykvm.proxy.listener import Listener, Notification, Received
from anykvm.proxy.memory import BACKING_BASE, MAP_FIXED, ClientMemory
from anykvm.proxy.opens import LOOKS, OPENS, Caller, open_node
from anykvm.proxy.procfs import state
from anykvm.proxy.sigaction import restart_calls
from anykvm.uapi.kvm import KVM_CAP_IMMEDIATE_EXIT
from anykvm.uapi.names import IOCTLS

log = logging.getLogger("anykvm.proxy")
KVM_CHECK_EXTENSION = IOCTLS["KVM_CHECK_EXTENSION"].number
SIGNAL_LATENCY = 0.001
STOP_TURNS = 50  # after how many of these we look whether a process is being stopped
STOPPED = "T"
MASK32 = (1 << 32) - 1
MANY_CALLS = 1 << 10
SYS_IOCTL = abi.SYS_IOCTL
NAMES = {ioctl.number: name for name, ioctl in IOCTLS.items()}
# Calls that may be made twice without harm, if a signal hid the first one's result.
REPEATABLE = {number for number, name in NAMES.items() if name.startswith(("KVM_GET", "KVM_SET"))}
REPEATABLE = {number for number in REPEATABLE if "USER_MEMORY" not in NAMES[number]}


class Supervisor:
    """Everything between the listener and the file operations."""

    def __init__(self, listener_fd: int) -> None:
        self.listener = Listener(listener_fd)
        self.descriptors = Descriptors(self.listener)
        self.clients = Clients(self.listener, self._replace, self._fetch, self._met)
        self._calls: defaultdict[int, int] = defaultdict(int)  # by the ioctl's number
        self._known: dict[bytes, ClientCall] = {}
        self._opens: Counter[str] = Counter()
        self._receiving = 0
        self._received = 0
        self._parked = 0
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._over = False
        self._jobs: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(listener_fd, 0)  # POLLHUP when the last client has gone
        self._pidfds: dict[int, Process] = {}
        self._watched: dict[int, Callable[[], None]] = {}

    @property
    def counts(self) -> Counter[str]:
        """How often each ioctl was made, and each node opened."""
        ioctls = {NAMES.get(number, hex(number)): n for number, n in self._calls.items()}
        return Counter(ioctls) + self._opens

    # The first thread.

    def watch(self, fd: int, function: Callable[[], None]) -> None:
        """Call `function` in the first thread whenever `fd` is readable."""
        self._watched[fd] = function
        self._poll.register(fd, select.POLLIN)

    def unwatch(self, fd: int) -> None:
        self._poll.unregister(fd)
        del self._watched[fd]

    def serve(self) -> None:
        """Until the last client has ended."""
        self._spawn(self._receive)
        self._spawn(self._release)
        self._spawn(self._watch_signals)
        while not self._over:
            for fd, events in self._poll.poll():
                self._event(fd, events)
        self.descriptors.close_all()

    def _event(self, fd: int, events: int) -> None:
        if fd == self._wake:
            os.eventfd_read(self._wake)
            while not self._jobs.empty():
                self._work(*self._jobs.get())
        elif fd == self.listener.fd:
            self._over = bool(events & select.POLLHUP)
        elif fd in self._watched:
            self._watched[fd]()
        elif fd in self._pidfds:
            self._poll.unregister(fd)
            self.clients.forget_process(self._pidfds.pop(fd))
            self._known.clear()
            gc.collect()  # VMs refer to their vCPUs and these to them, and both to its memory

    @staticmethod
    def _work(job: Callable[[], None], future: Future[None]) -> None:
        try:
            job()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _met(self, process: Process) -> None:
        """A client called for the first time: hear of its end."""
        self._pidfds[process.pidfd] = process
        self._poll.register(process.pidfd, select.POLLIN)
        os.eventfd_write(self._wake, 1)  # poll(2) anew, with this one

    def _by_first_thread(self, job: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self._jobs.put((job, done))
        os.eventfd_write(self._wake, 1)
        done.result()

    def _replace(self, memory: ClientMemory, areas: list[Vma]) -> None:
        """Have shared memory take the place of private ranges of the calling client."""
        thread = current()
        assert isinstance(thread, ClientThread)
        self._by_first_thread(lambda: self._replace_now(thread, memory, areas))

    def _replace_now(self, thread: ClientThread, memory: ClientMemory, areas: list[Vma]) -> None:
        with self._injecting(thread, memory.backing, alone=True) as (inject, remote_fd):
            for area in areas:
                memory.copy(area)
                flags = fs.MAP_SHARED | MAP_FIXED | fs.MAP_NORESERVE
                length, offset = area.end - area.start, BACKING_BASE + area.start
                inject(abi.SYS_MMAP, area.start, length, area.prot, flags, remote_fd, offset)

    def _fetch(self, thread: ClientThread, fd: int) -> int:
        """Have the calling client send us its descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            self._by_first_thread(lambda: self._fetch_now(thread, theirs.fileno(), fd))
            return socket.recv_fds(ours, 1, 1, socket.MSG_DONTWAIT)[1][0]

    def _fetch_now(self, thread: ClientThread, channel: int, fd: int) -> None:
        with self._injecting(thread, channel, alone=False) as (inject, remote_fd):
            send_fd(inject, thread.mm, remote_fd, fd)

    @contextmanager
    def _injecting(
        self, thread: ClientThread, ours: int, alone: bool
    ) -> Iterator[tuple[Calls, int]]:
        """Calls in a thread that waits for us, and its duplicate there of our descriptor `ours`.
        `alone`: no other thread of its process runs. Afterwards it makes its own call once more.
        """
        caller = Notification(*thread.waiting)
        try:
            remote_fd = self.listener.give(caller.id, ours, cloexec=True)
        except OSError as error:
            if error.errno == ENOENT:  # it left the call, and will make it once more
                raise OSError(EINTR, os.strerror(EINTR)) from error
            raise
        tracer = Tracer(thread.process.pid)
        self.listener.gate.acquire()
        try:
            tracer.stop_caller(thread.tid, lambda: self.listener.answer(caller.id, -ERESTARTNOINTR))
            if alone:
                tracer.stop()
            with tracer.calling(thread.tid, caller.ip) as inject:
                try:
                    yield inject, remote_fd
                finally:
                    inject(abi.SYS_CLOSE, remote_fd)
        finally:
            tracer.resume()
            self.listener.gate.release()

    # The others.

    @staticmethod
    def _spawn(function: Callable[[], None]) -> None:
        threading.Thread(target=function, name=f"proxy{function.__name__}", daemon=True).start()

    def _release(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._over:
            if self.descriptors.wait():
                self._known.clear()
                self.clients.release_unused_memory()

    def _watch_signals(self) -> None:
        """Tell vCPUs of signals for their callers, and of their processes being stopped."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        received = 0
        for turn in itertools.count():
            if self._over:
                return
            time.sleep(SIGNAL_LATENCY)
            if received == self._received:  # whoever was to receive is still busy with that call
                self._have_another_receive()
            received = self._received
            for thread in self.clients.running():
                if turn % STOP_TURNS == 0:
                    thread.stopping = state(thread.process.pid) == STOPPED
                tell = thread.on_signal
                if tell is not None and thread.signal_pending():
                    tell()

    def _receive(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        buffer = bytearray(abi.NOTIF.size)
        while not self._over:
            if self._receiving:
                self._parked += 1
                self._places.get()
                continue
            self._receiving += 1
            received = self.listener.receive(buffer)
            self._receiving -= 1
            self._received += 1
            if received is None:
                return
            self._answer(received)

    def _have_another_receive(self) -> None:
        if self._receiving:
            return
        if self._parked:
            self._parked -= 1
            self._places.put(None)
        else:
            self._spawn(self._receive)

    def _answer(self, received: Received) -> None:
        try:
            call = self._known.get(received[1])
            if call is not None and call.holds():
                self._carry_out(call, received)
            else:
                self._first(Notification(*received))
        except Exception:
            log.exception("a call could not be answered: %s", Notification(*received))
            self.listener.answer(received[0], -EIO)

    def _first(self, notification: Notification) -> None:
        """A call that nothing is known of."""
        nr = notification.nr
        if nr == SYS_IOCTL:
            self._ioctl(notification)
        elif nr in OPENS:
            self._open(notification)
        elif nr == abi.SYS_MMAP:
            self._map(notification)
        elif nr == abi.SYS_RT_SIGACTION:
            self._sigaction(notification)
        else:
            self._look(notification)

    def _ioctl(self, notification: Notification) -> None:
        fd, command, argument = abi.IOCTL_ARGS.unpack(notification.call)
        found = self.clients.find(notification.tid, fd)
        handle = None if found is None else self.descriptors.find(found[1])
        if found is None or handle is None:
            self.listener.let_run(notification.id)
            return
        thread = found[0]
        if command == KVM_CHECK_EXTENSION and argument == KVM_CAP_IMMEDIATE_EXIT:
            thread.process.immediate_exit = True
        call = ClientCall(thread, handle, fd, command, argument)
        if len(self._known) >= MANY_CALLS:
            self._known.clear()
        self._known[notification.call] = call
        self._carry_out(call, (notification.id, notification.call))

    def _carry_out(self, call: ClientCall, received: Received) -> None:
        id, thread = received[0], call.thread
        if thread.on_signal is not None:
            thread.on_signal()  # its KVM_RUN goes on here, but it is out of it
        self._calls[call.command] += 1
        if call.runs is not None:
            if call.runs.long:
                self._have_another_receive()
            call.runs.call(self.listener, thread, id, call.make)
            if thread.gone:
                thread.close()
            return
        thread.calling.acquire()  # `with` takes twice as long
        try:
            thread.installed.clear()
            if thread.kept is None and not thread.fetched:
                thread.waiting = received
                result = call.make()
            else:
                result = self._maybe_again(thread, received, call.make)
            if thread.installed and self._gave(thread, id, result):
                return
            delivered = self.listener.answer(id, result)
            if not delivered and call.command not in REPEATABLE and result != -EINTR:
                thread.kept = received[1], result
        finally:
            thread.calling.release()

    def _gave(self, thread: ClientThread, id: int, result: int) -> bool:
        """Whether the call's result is a new descriptor; the client has it."""
        new = result in thread.installed
        if new:
            self.descriptors.give(id, result)
        return new

    def _maybe_again(
        self, thread: ClientThread, received: Received, call: Callable[[], int]
    ) -> int:
        """A call that the kernel may make once more, after a signal or by our stopping it."""
        kept, thread.kept = thread.kept, None
        if kept is not None and kept[0] == received[1]:
            result = kept[1]
        else:
            if thread.waiting[1] != received[1]:
                thread.forget_fetched()
            thread.waiting = received
            result = call()
        if result != -EINTR:
            thread.forget_fetched()
        return result

    def _open(self, notification: Notification) -> None:
        where, flags_of = OPENS[notification.nr]
        try:
            caller = Caller(notification.tid)
            found = where.node(caller, notification.args)
            if found is None:
                self.listener.let_run(notification.id)
                return
            flags = flags_of(caller, notification.args)
            with as_current(self.clients.thread(notification.tid)):
                handle = self.descriptors.adopt(open_node(found[0], flags))
            self._loaded()
        except OSError as error:
            self.listener.answer(notification.id, -(error.errno or EPERM))
            return
        self._opens[f"open {found[0]}"] += 1
        self.descriptors.answer(notification.id, handle, bool(flags & os.O_CLOEXEC))

    def _loaded(self) -> None:
        """What importing KVM made stays: collecting garbage after each VM need not look at it."""
        if not gc.get_freeze_count():
            gc.freeze()

    def _map(self, notification: Notification) -> None:
        """The file itself is the kernel's to map, if its driver allows this mapping."""
        _, length, prot, flags, fd, offset = notification.args
        found = self.clients.find(notification.tid, fd & MASK32)
        handle = None if found is None else self.descriptors.find(found[1])
        if handle is not None:
            try:
                vfs_mmap(handle.file, fs.VmArea(length, prot, flags, offset))
            except OSError as error:
                self.listener.answer(notification.id, -(error.errno or EPERM))
                return
        self.listener.let_run(notification.id)

    def _sigaction(self, notification: Notification) -> None:
        with suppress(OSError):
            process = self.clients.process_of(notification.tid)
            if process is not None and process.immediate_exit:
                restart_calls(process.memory, notification.args[1])
        self.listener.let_run(notification.id)

    def _look(self, notification: Notification) -> None:
        where, answer = LOOKS[notification.nr]
        with suppress(OSError):
            caller = Caller(notification.tid)
            found = where.node(caller, notification.args)
            if found is not None:
                result = answer(caller, found[1], notification.args)
                self.listener.answer(notification.id, result)
                return
        self.listener.let_run(notification.id)
