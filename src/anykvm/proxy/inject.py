"""System calls carried out in a client's own thread, and its process held still: ptrace(2).

A thread that waits for our answer is stopped in its system call. It then executes others, at the
very instruction that it used itself, and afterwards begins its own call once more.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import ESRCH

from anykvm.fs.mapping import MAP_ANONYMOUS, MAP_PRIVATE, PROT_READ, PROT_WRITE
from anykvm.fs.uaccess import UserMemory
from anykvm.proxy import abi
from anykvm.proxy.procfs import PAGE_SIZE, state, threads

SYSCALL_LENGTH = 2  # bytes of the instruction
RESTARTS = range(516, 511, -1)  # -ERESTARTSYS and its kin, as the kernel has them in rax
STOP_SECONDS = 2.0
MASK64 = (1 << 64) - 1
SYSCALL_STOP = signal.SIGTRAP | 0x80
STOPPED = 0x7F
UNINTERRUPTIBLE = "D"
ERESTARTNOINTR = 513
SCRATCH = MAP_PRIVATE | MAP_ANONYMOUS

late: set[int] = set()
"""Threads that were to stop and then waited for an answer of ours: they will stop behind it."""


class Tracer:
    """Holds the threads of one process. All of it is for one thread of ours: ptrace insists."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._held: dict[int, int] = {}  # by thread: a signal that it was about to take

    def stop(self) -> None:
        """Stop every thread, also those that appear meanwhile."""
        while new := [tid for tid in threads(self._pid) if tid not in self._held]:
            for tid in new:
                # Those that wait for an answer of ours get none now, so they stand still.
                if state(tid) == UNINTERRUPTIBLE or not self._seize(tid):
                    self._held[tid] = -1
                elif (status := wait_stop(tid, STOP_SECONDS, waits=True)) is not None:
                    self._held[tid] = _taking(status)
                else:
                    self._held[tid] = -1
                    late.add(tid)

    def stop_caller(self, tid: int, let_go: Callable[[], object]) -> None:
        """Stop the thread whose call we are in. `let_go` answers it: the call begins again."""
        if not self._seize(tid):
            raise OSError(ESRCH, f"thread {tid} has ended")
        let_go()
        status = wait_stop(tid, STOP_SECONDS)
        self._held[tid] = -1 if status is None else _taking(status)

    def _seize(self, tid: int) -> bool:
        try:
            abi.ptrace(abi.PTRACE_SEIZE, tid, abi.PTRACE_O_TRACESYSGOOD)
            abi.ptrace(abi.PTRACE_INTERRUPT, tid)
        except OSError as error:
            if error.errno == ESRCH:
                return False  # it ended
            raise
        return True

    def resume(self) -> None:
        """Let all go on."""
        for tid, taking in self._held.items():
            if taking >= 0:
                _detach(tid, taking)
        self._held.clear()

    @contextmanager
    def calling(self, tid: int, ip: int) -> Iterator[Calls]:
        """Carry out calls in thread `tid`, which is at its system call that ends at `ip`."""
        saved = abi.user_regs_struct()
        abi.ptrace(abi.PTRACE_GETREGS, tid, ctypes.addressof(saved))
        calls = Calls(tid, ip - SYSCALL_LENGTH, saved)
        try:
            yield calls
        finally:
            _begin_again(saved)
            abi.ptrace(abi.PTRACE_SETREGS, tid, ctypes.addressof(saved))
            for number in calls.deferred:
                abi.tgkill(self._pid, tid, number)


def _taking(status: int) -> int:
    """The signal that a thread was about to take when it stopped, if any."""
    number = os.WSTOPSIG(status) if status >> 16 == 0 else 0
    return 0 if number in (signal.SIGTRAP, SYSCALL_STOP) else number


def _detach(tid: int, number: int) -> None:
    try:
        abi.ptrace(abi.PTRACE_DETACH, tid, number)
    except OSError as error:
        if error.errno != ESRCH:
            raise


def stopped_late(tid: int, status: int) -> None:
    """A stop that nobody waits for any more: let the thread go on."""
    late.discard(tid)
    _detach(tid, _taking(status))


def _begin_again(regs: abi.user_regs_struct) -> None:
    """Make an interrupted call the next thing that the thread does."""
    in_call = regs.orig_rax != MASK64
    if in_call and MASK64 + 1 - regs.rax in RESTARTS:
        regs.rax, regs.rip = regs.orig_rax, regs.rip - SYSCALL_LENGTH
    regs.orig_rax = MASK64


class Calls:
    """System calls in a stopped thread."""

    def __init__(self, tid: int, instruction: int, regs: abi.user_regs_struct) -> None:
        self._tid = tid
        self._instruction = instruction
        self._regs = regs
        self.deferred: list[int] = []

    def __call__(self, number: int, *args: int) -> int:
        """The call's result; OSError."""
        regs = abi.user_regs_struct.from_buffer_copy(self._regs)
        regs.rip, regs.rax, regs.orig_rax = self._instruction, number, MASK64
        padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
        regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9 = padded
        abi.ptrace(abi.PTRACE_SETREGS, self._tid, ctypes.addressof(regs))
        for _ in ("entry", "exit"):
            self._to_next_stop()
        abi.ptrace(abi.PTRACE_GETREGS, self._tid, ctypes.addressof(regs))
        if regs.rax > MASK64 - 4095:
            error = MASK64 + 1 - regs.rax
            raise OSError(error, f"injected call {number}: {os.strerror(error)}")
        return regs.rax

    def _to_next_stop(self) -> None:
        while True:
            abi.ptrace(abi.PTRACE_SYSCALL, self._tid)
            status = wait_stop(self._tid, STOP_SECONDS)
            if status is None:
                raise OSError(ESRCH, f"thread {self._tid} ended or did not stop")
            if os.WSTOPSIG(status) == SYSCALL_STOP:
                return
            if status >> 16 == 0:  # about to take a signal, which has to wait
                self.deferred.append(os.WSTOPSIG(status))


def send_fd(inject: Calls, memory: UserMemory, channel: int, fd: int) -> None:
    """Have a client send its descriptor `fd` over its socket `channel` (unix(7)). EBADF."""
    page = inject(abi.SYS_MMAP, 0, PAGE_SIZE, PROT_READ | PROT_WRITE, SCRATCH, MASK64, 0)
    try:
        iov, control = page + abi.MSGHDR.size, page + abi.MSGHDR.size + abi.IOVEC.size
        length = abi.CMSG_FD.size
        message = abi.MSGHDR.pack(0, 0, iov, 1, control, length, 0) + abi.IOVEC.pack(page, 1)
        message += abi.CMSG_FD.pack(length - 4, socket.SOL_SOCKET, socket.SCM_RIGHTS, fd)
        memory.write(page, message)
        inject(abi.SYS_SENDMSG, channel, page, socket.MSG_DONTWAIT)
    finally:
        inject(abi.SYS_MUNMAP, page, PAGE_SIZE)


def wait_stop(tid: int, seconds: float, waits: bool = False) -> int | None:
    """The status of a stop; None if it ended, or did not stop in time. With `waits` a thread that
    has come to wait for an answer of ours is not waited for.
    """
    deadline = time.monotonic() + seconds
    pause = 20e-6
    while True:
        try:
            pid, status = os.waitpid(tid, abi.WALL | os.WNOHANG)
        except ChildProcessError:
            return None
        if pid:
            return status if status & 0xFF == STOPPED else None
        late_already = waits and pause >= 1e-3 and state(tid) == UNINTERRUPTIBLE
        if late_already or time.monotonic() > deadline:
            return None
        time.sleep(pause)
        pause = min(2 * pause, 1e-3)
