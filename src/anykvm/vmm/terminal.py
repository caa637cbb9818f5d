"""The user's terminal as the guest's console: raw mode, an escape key, and always a way back.

`Escape` is a pure state machine over what is typed; `raw_mode` changes the terminal and restores it
however the run ends (termios(3)); `Keyboard` is the thread that reads.
"""

from __future__ import annotations

import atexit
import errno
import os
import select
import signal
import termios
import threading
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Self

CTRL_A = b"\x01"
CTRL_D = b"\x04"
READ_SIZE = 4096
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

HELP = (
    "\r\n"
    "Ctrl-A X       leave: stop the guest at once\r\n"
    "Ctrl-A Ctrl-A  send Ctrl-A to the guest (Ctrl-A A too)\r\n"
    "Ctrl-A H       show this\r\n"
)


class Action(Enum):
    """What an escape sequence asks for, other than to send something."""

    LEAVE = "leave"
    HELP = "help"


SEQUENCES: dict[bytes, bytes | Action] = {
    b"x": Action.LEAVE,
    b"X": Action.LEAVE,
    b"h": Action.HELP,
    b"H": Action.HELP,
    b"?": Action.HELP,
    b"a": CTRL_A,
    b"A": CTRL_A,
    CTRL_A: CTRL_A,
}
"""What follows Ctrl-A, and what that means. Anything else shows the help."""


class Escape:
    """Splits what is typed into bytes for the guest and actions, whatever pieces it comes in."""

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, typed: bytes) -> Iterator[bytes | Action]:
        """What to do, in order."""
        while typed:
            if self._escaped:
                self._escaped = False
                yield SEQUENCES.get(typed[:1], Action.HELP)
                typed = typed[1:]
                continue
            plain, found, typed = typed.partition(CTRL_A)
            self._escaped = bool(found)
            if plain:
                yield plain


def is_terminal(descriptor: int) -> bool:
    """Whether a descriptor is open on a terminal."""
    try:
        return os.isatty(descriptor)
    except OSError:
        return False


def size_of(descriptor: int) -> tuple[int, int]:
    """The terminal's rows and columns, zeros where it is none or does not know."""
    try:
        size = os.get_terminal_size(descriptor)
    except OSError:
        return 0, 0
    return size.lines, size.columns


class _Raw:
    """A terminal's saved settings; both ways are idempotent and safe in a signal handler."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._saved: list[Any] = termios.tcgetattr(descriptor)

    def enter(self) -> None:
        tty.setraw(self._descriptor, termios.TCSANOW)

    def restore(self) -> None:
        try:
            termios.tcsetattr(self._descriptor, termios.TCSANOW, self._saved)
        except termios.error as error:
            # A terminal that was hung up has no settings left to restore.
            if error.args[0] != errno.EIO:
                raise

    def stop(self, signum: int, frame: FrameType | None) -> None:
        """SIGTSTP: give the terminal back while stopped, take it again when continued."""
        self.restore()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.enter()


class EndedBySignal(SystemExit):
    """Unwinds the stack like sys.exit with 128 + signal, a shell's status for it."""

    def __init__(self, signum: int) -> None:
        self.status = 128 + signum
        super().__init__(self.status)
        self.name = signal.Signals(signum).name


def _end(signum: int, frame: FrameType | None) -> None:
    raise EndedBySignal(signum)


@contextmanager
def ending_signals() -> Iterator[None]:
    """Turn SIGTERM, SIGHUP and SIGQUIT into EndedBySignal, so that the stack unwinds.

    Signals that are ignored stay so. In another thread than the main one nothing changes.
    """
    saved: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for signum in ENDING_SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                saved[signum] = signal.signal(signum, _end)
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


@contextmanager
def raw_mode(descriptor: int) -> Iterator[bool]:
    """Raw mode for the time of a `with`; yields whether `descriptor` is a terminal at all.

    Restored at the end of the block, on an ending signal, while stopped by SIGTSTP, and at exit.
    """
    if not is_terminal(descriptor):
        yield False
        return
    raw = _Raw(descriptor)
    is_main = threading.current_thread() is threading.main_thread()
    atexit.register(raw.restore)
    suspend = signal.signal(signal.SIGTSTP, raw.stop) if is_main else None
    try:
        with ending_signals():
            raw.enter()
            yield True
    finally:
        raw.restore()
        if is_main:
            signal.signal(signal.SIGTSTP, suspend)
        atexit.unregister(raw.restore)


def write_all(descriptor: int, data: bytes) -> None:
    """Write every byte, also to a descriptor that does not block."""
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


class Keyboard:
    """A thread that reads a descriptor and hands the guest what is typed.

    send: takes bytes for the guest. leave: called when the user asks to leave. show: takes text for
    the user. Escape sequences count on a terminal only; from a pipe every byte is sent, and its end
    as Ctrl-D, which is how a terminal tells it.
    """

    def __init__(
        self,
        descriptor: int,
        send: Callable[[bytes], None],
        leave: Callable[[], None],
        show: Callable[[str], None],
    ) -> None:
        self._descriptor = descriptor
        self._send = send
        self._actions: dict[Action, Callable[[], None]] = {
            Action.LEAVE: leave,
            Action.HELP: lambda: show(HELP),
        }
        self._escape = Escape() if is_terminal(descriptor) else None
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._read, name="keyboard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._stop_write)
        self._thread.join()
        os.close(self._stop_read)

    def _read(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are main's
        # poll, since a regular file and /dev/null are always ready and epoll takes neither.
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while True:
            ready = {descriptor for descriptor, _ in poll.poll()}
            if self._stop_read in ready:
                return
            typed = self._typed()
            if not typed:
                self._send(CTRL_D)
                return
            self._dispatch(typed)

    def _typed(self) -> bytes:
        try:
            return os.read(self._descriptor, READ_SIZE)
        except OSError as error:
            # EIO: the terminal is gone; EBADF: there never was a standard input.
            if error.errno in (errno.EIO, errno.EBADF):
                return b""
            raise

    def _dispatch(self, typed: bytes) -> None:
        if self._escape is None:
            self._send(typed)
            return
        for item in self._escape.feed(typed):
            if isinstance(item, Action):
                self._actions[item]()
            else:
                self._send(item)
