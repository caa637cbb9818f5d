"""How a client is started, and the three processes that then are.

    front        the one that the user started: mirrors the client's stops, end and signals
    supervisor   answers the client's calls, in a process group of its own; stays for as long as
                 any process of the client's making does, after the front has gone, too
    client       in the front's process group, with its terminal and standard streams

The supervisor is an ancestor of every client, also of those that daemonise (prctl(2),
PR_SET_CHILD_SUBREAPER): Yama's ptrace_scope 1 lets it reach their memory.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import socket
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import addressof, create_string_buffer
from errno import EACCES, EBUSY, EINVAL, ENOENT, ENOSYS, EPERM
from pathlib import Path
from struct import Struct
from typing import NoReturn

from anykvm.proxy import abi
from anykvm.proxy.bpf import SOCK_FILTER, program
from anykvm.proxy.front import Front, LaunchError, Report
from anykvm.proxy.inject import late, stopped_late
from anykvm.proxy.reach import refusal
from anykvm.proxy.supervisor import Supervisor

SOCK_FPROG = Struct("@HP")
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell has them
READY, FAILED = b"R", b"F"
ERRNO = Struct("=ci")
FORBIDDEN = "this container or sandbox does not allow seccomp filters"
REASONS = {
    EBUSY: "a seccomp listener is there already: anykvm exec, or a container engine's, around this",
    EINVAL: "this kernel has no seccomp user notification (Linux 5.9), or forbids it here (gVisor)",
    ENOSYS: "this kernel has no seccomp",
    EACCES: FORBIDDEN,
    EPERM: FORBIDDEN,
}

Set_up = Callable[[Supervisor], None]


def find_program(name: str) -> str:
    """The file that execvp(3) would take. LaunchError."""
    found = shutil.which(name)
    if found is not None:
        return found
    path = Path(name)
    if "/" in name and path.exists():
        why = "is a directory" if path.is_dir() else "is not executable"
        raise LaunchError(f"{name} {why}", NOT_EXECUTABLE)
    raise LaunchError(f"{name}: no such program", NOT_FOUND)


def node_is_usable(path: str = "/dev/kvm") -> bool:
    """Whether a look at the host's own node finds what a client needs to see."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) and os.access(path, os.R_OK | os.W_OK)


def run(
    command: Sequence[str], set_up: Set_up, last_words: Set_up, looks: bool | None = None
) -> int:
    """Run a command as a client: its exit status; the end by a signal is ours, too. LaunchError.

    `set_up` and `last_words` run in the supervisor: before the first call, and when the command
    has ended. `looks` None: the client's looks at /dev/kvm are answered if the node is no use.
    """
    path = find_program(command[0])
    code = program(not node_is_usable() if looks is None else looks)
    report, report_end = os.pipe()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    front = Front(report, before)
    supervisor = os.fork()
    if supervisor == 0:
        os.close(report)
        _supervise(path, command, code, Report(report_end), before, set_up, last_words)
    os.close(report_end)
    return front.wait()


def _supervise(
    path: str,
    command: Sequence[str],
    code: bytes,
    report: Report,
    mask: set[int],
    set_up: Set_up,
    last_words: Set_up,
) -> NoReturn:
    status = 1
    try:
        abi.prctl(abi.PR_SET_CHILD_SUBREAPER, 1)
        inherited = _inheritable()
        pid, listener = _start(path, command, code, mask, report)
        os.setpgid(0, 0)
        report.started(pid)
        for fd in inherited:
            os.close(fd)
        _serve(listener, pid, report, set_up, last_words)
        status = 0
    except LaunchError as error:
        report.refused(error.status, str(error))
    finally:
        os._exit(status)


def _inheritable() -> list[int]:
    """What the client is to have, and who waits for its end must not find held by us."""
    fds = (int(name) for name in os.listdir("/proc/self/fd"))
    return [fd for fd in fds if fd > 2 and _is_inheritable(fd)]


def _is_inheritable(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False  # the listing's own


def _start(
    path: str, command: Sequence[str], code: bytes, mask: set[int], report: Report
) -> tuple[int, int]:
    """The client's pid and its listener. LaunchError."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            _become_client(theirs, path, command, code, mask)
        theirs.close()
        message, fds, _, _ = socket.recv_fds(ours, ERRNO.size, 1)
        if fds:
            _refuse_unreachable(pid)
            ours.send(READY)
            # Nothing is said after a successful exec, which closes the other end.
            return pid, fds[0]
    os.waitpid(pid, 0)
    number = ERRNO.unpack(message)[1] if len(message) == ERRNO.size else EINVAL
    reason = REASONS.get(number, os.strerror(number))
    raise LaunchError(f"cannot watch the program's calls: {reason}; see anykvm doctor", 120)


def filter_refusal() -> str:
    """Why no filter can be put in force here, found out by a child; empty if one can."""
    pid = os.fork()
    if pid == 0:
        status = 0
        try:
            install(program(looks=False))
        except OSError as error:
            status = error.errno or EINVAL
        finally:
            os._exit(status)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return REASONS.get(number, os.strerror(number)) if number else ""


def _refuse_unreachable(pid: int) -> None:
    """LaunchError if the waiting client could not be served."""
    refused = refusal(pid)
    if refused:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise LaunchError(f"cannot serve the program's calls: {refused}; see anykvm doctor", 120)


def _become_client(
    channel: socket.socket, path: str, command: Sequence[str], code: bytes, mask: set[int]
) -> NoReturn:
    """In the new process: filter, hand over the listener, exec. Opens nothing after the filter."""
    try:
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        try:
            listener = install(code)
        except OSError as error:
            channel.send(ERRNO.pack(FAILED, error.errno or EINVAL))
            os._exit(NOT_EXECUTABLE)
        socket.send_fds(channel, [READY], [listener])
        os.close(listener)
        channel.recv(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execv(path, list(command))
    except OSError as error:
        os.write(2, f"anykvm: {command[0]}: {error.strerror}\n".encode())
        os._exit(NOT_FOUND if error.errno == ENOENT else NOT_EXECUTABLE)
    finally:
        os._exit(NOT_EXECUTABLE)


def install(code: bytes) -> int:
    """Put the filter in force for this process and all that come of it: the listener."""
    abi.prctl(abi.PR_SET_NO_NEW_PRIVS, 1)
    buffer = create_string_buffer(code, len(code))
    fprog = SOCK_FPROG.pack(len(code) // SOCK_FILTER.size, addressof(buffer))
    flags = abi.SECCOMP_FILTER_FLAG_NEW_LISTENER
    killable = flags | abi.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
    try:
        return abi.seccomp(abi.SECCOMP_SET_MODE_FILTER, killable, fprog)
    except OSError as error:
        if error.errno != EINVAL:
            raise
    # Before Linux 5.19 signals take a client out of its calls, see proxy/runs.py.
    return abi.seccomp(abi.SECCOMP_SET_MODE_FILTER, flags, fprog)


def _serve(listener: int, client: int, report: Report, set_up: Set_up, last_words: Set_up) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a VM takes a dozen
    supervisor = Supervisor(listener)
    set_up(supervisor)
    children = _Children(client, report, lambda: last_words(supervisor))
    supervisor.watch(children.wakeup, children.reap)
    supervisor.watch(report.fd, lambda: _front_gone(supervisor, children, report))
    supervisor.serve()
    children.wait()


def _front_gone(supervisor: Supervisor, children: _Children, report: Report) -> None:
    """If the front was killed, what it stands for goes with it."""
    supervisor.unwatch(report.fd)
    children.kill_client()


class _Children:
    """The client, and orphans of its making, which come to us."""

    def __init__(self, client: int, report: Report, last_words: Callable[[], None]) -> None:
        self._client: int | None = client
        self._report = report
        self._last_words = last_words
        self._detach(0, 1)
        self.wakeup, wakeup_end = os.pipe()
        os.set_blocking(self.wakeup, False)
        os.set_blocking(wakeup_end, False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup_end, warn_on_full_buffer=False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        os.write(wakeup_end, b"\0")  # it may have ended before

    @staticmethod
    def _detach(*fds: int) -> None:
        """Let go of standard streams, so that a pipe's other end sees the client's close."""
        null = os.open(os.devnull, os.O_RDWR)
        for fd in fds:
            os.dup2(null, fd)
        os.close(null)

    def reap(self) -> None:
        with suppress(BlockingIOError):
            os.read(self.wakeup, 4096)
        with suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED | abi.WALL)
                if pid == 0:
                    return
                self._child(pid, status)

    def wait(self) -> None:
        """Nobody is under the filter any more, but the client may not be waitable yet."""
        while self._client is not None:
            self._child(*os.waitpid(-1, abi.WALL))

    def _child(self, pid: int, status: int) -> None:
        """A traced thread that has ended is waited for, too, or its process would stay."""
        if pid in late and os.WIFSTOPPED(status):
            stopped_late(pid, status)
        elif pid == self._client:
            self._changed(status)

    def _changed(self, status: int) -> None:
        if os.WIFSTOPPED(status):
            self._report.stopped()
            return
        self._client = None
        self._last_words()
        self._detach(2)
        self._report.ended(status)

    def kill_client(self) -> None:
        if self._client is not None:
            os.kill(self._client, signal.SIGKILL)
