"""Escape sequences in any pieces; a real pseudo-terminal made raw and restored, however it ends."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import textwrap
import threading
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anykvm.vmm.terminal import (
    HELP,
    Action,
    Escape,
    Keyboard,
    is_terminal,
    raw_mode,
    size_of,
    write_all,
)


def fed(*pieces: bytes) -> tuple[bytes, list[Action]]:
    escape = Escape()
    items = [item for piece in pieces for item in escape.feed(piece)]
    sent = b"".join(item for item in items if isinstance(item, bytes))
    return sent, [item for item in items if isinstance(item, Action)]


@pytest.mark.parametrize(
    ("typed", "sent", "actions"),
    [
        (b"ls -l\r", b"ls -l\r", []),
        (b"\x03\x04\x1a\x1c", b"\x03\x04\x1a\x1c", []),
        (b"\x01x", b"", [Action.LEAVE]),
        (b"ab\x01Xcd", b"abcd", [Action.LEAVE]),
        (b"\x01\x01", b"\x01", []),
        (b"\x01a\x01A", b"\x01\x01", []),
        (b"\x01h\x01H\x01?", b"", [Action.HELP] * 3),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01\x01\x01x", b"\x01", [Action.LEAVE]),
        (b"\x01qz", b"z", [Action.HELP]),
        (b"\x01", b"", []),
    ],
)
def test_sequences(typed, sent, actions):
    assert fed(typed) == (sent, actions)


@given(st.binary(max_size=30).map(lambda b: b.replace(b"q", b"\x01")), st.integers(0, 30))
def test_pieces_make_no_difference(typed, cut):
    assert fed(typed[:cut], typed[cut:]) == fed(typed)


@given(st.binary(max_size=40))
def test_doubling_ctrl_a_sends_anything(data):
    assert fed(data.replace(b"\x01", b"\x01\x01")) == (data, [])


def test_order_is_kept():
    assert list(Escape().feed(b"a\x01hb")) == [b"a", Action.HELP, b"b"]


@pytest.fixture
def terminal():
    ours, theirs = pty.openpty()
    yield ours, theirs
    os.close(ours)
    os.close(theirs)


def is_raw(descriptor: int) -> bool:
    return not termios.tcgetattr(descriptor)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


def test_raw_and_back(terminal):
    _, descriptor = terminal
    before = termios.tcgetattr(descriptor)
    with raw_mode(descriptor) as is_tty:
        assert is_tty
        assert is_raw(descriptor)
    assert termios.tcgetattr(descriptor) == before


def test_back_after_an_exception(terminal):
    _, descriptor = terminal
    before = termios.tcgetattr(descriptor)
    with pytest.raises(KeyboardInterrupt), raw_mode(descriptor):
        raise KeyboardInterrupt
    assert termios.tcgetattr(descriptor) == before


def test_signal_handlers_are_put_back(terminal):
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP)
    before = [signal.getsignal(number) for number in numbers]
    with raw_mode(terminal[1]):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_pipe_is_left_alone():
    read, write = os.pipe()
    with raw_mode(read) as is_tty:
        assert not is_tty
    assert not is_terminal(read)
    assert size_of(read) == (0, 0)
    os.close(read)
    os.close(write)
    assert not is_terminal(read)


def test_size(terminal):
    termios.tcsetwinsize(terminal[1], (31, 97))
    assert size_of(terminal[1]) == (31, 97)


CHILD = textwrap.dedent("""
    import os, signal, sys, time
    from anykvm.vmm.terminal import raw_mode
    with raw_mode(0):
        os.write(1, b"raw")
        {body}
""")


def child(body: str, terminal: tuple[int, int]) -> subprocess.Popen[bytes]:
    """A process with the terminal as its input, already raw."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(body=body)],
        stdin=terminal[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.read(3) == b"raw"
    assert is_raw(terminal[1])
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited ten seconds in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_back_after_a_signal(terminal, number):
    before = termios.tcgetattr(terminal[1])
    process = child("time.sleep(60)", terminal)
    process.send_signal(number)
    assert process.wait(10) == 128 + number
    assert termios.tcgetattr(terminal[1]) == before


@pytest.mark.parametrize(
    ("body", "status"), [("sys.exit(5)", 5), ("raise ValueError", 1), ("1 / 0", 1)]
)
def test_back_after_an_exit(terminal, body, status):
    before = termios.tcgetattr(terminal[1])
    process = child(f"os.read(0, 1); {body}", terminal)
    os.write(terminal[0], b"x")
    assert process.wait(10) == status
    assert termios.tcgetattr(terminal[1]) == before


def test_given_back_while_stopped(terminal):
    before = termios.tcgetattr(terminal[1])
    process = child("time.sleep(60)", terminal)
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert termios.tcgetattr(terminal[1]) == before
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: is_raw(terminal[1]))
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert termios.tcgetattr(terminal[1]) == before


class Guest:
    """What a keyboard does to a guest."""

    def __init__(self) -> None:
        self.sent = b""
        self.shown = ""
        self.left = threading.Event()

    def keyboard(self, descriptor: int) -> Keyboard:
        return Keyboard(descriptor, self._send, self.left.set, self._show)

    def _send(self, data: bytes) -> None:
        self.sent += data

    def _show(self, text: str) -> None:
        self.shown += text


def test_typing_on_a_terminal(terminal):
    ours, theirs = terminal
    guest = Guest()
    with raw_mode(theirs), guest.keyboard(theirs):
        os.write(ours, b"ls\r\x01h\x01\x01\x01x")
        assert guest.left.wait(10)
    assert guest.sent == b"ls\r\x01"
    assert guest.shown == HELP


def test_a_pipe_has_no_escapes_and_ends_with_ctrl_d():
    read, write = os.pipe()
    guest = Guest()
    with guest.keyboard(read):
        os.write(write, b"a\x01x")
        os.close(write)
        wait_until(lambda: guest.sent.endswith(b"\x04"))
    os.close(read)
    assert guest.sent == b"a\x01x\x04"
    assert not guest.left.is_set()


def test_a_file_and_dev_null(tmp_path):
    (tmp_path / "typed").write_bytes(b"exit 3\n" * 999)
    for path, expected in ((tmp_path / "typed", b"exit 3\n" * 999), ("/dev/null", b"")):
        guest = Guest()
        with open(path, "rb") as file, guest.keyboard(file.fileno()):
            wait_until(lambda guest=guest: guest.sent.endswith(b"\x04"))
        assert guest.sent == expected + b"\x04"


def test_leaving_does_not_wait_for_a_key():
    read, write = os.pipe()
    before = set(os.listdir("/proc/self/fd"))
    with Guest().keyboard(read):
        pass
    assert set(os.listdir("/proc/self/fd")) == before
    os.close(read)
    os.close(write)


def test_a_closed_input_counts_as_its_end():
    guest = Guest()
    with guest.keyboard(999):
        wait_until(lambda: guest.sent == b"\x04")


def test_everything_is_written_to_a_pipe_that_does_not_block():
    read, write = os.pipe()
    os.set_blocking(write, False)
    data = os.urandom(300_000)
    writing = threading.Thread(target=write_all, args=(write, data))
    writing.start()
    received = b""
    while len(received) < len(data):
        received += os.read(read, 65536)
    writing.join(10)
    os.close(read)
    os.close(write)
    assert received == data
