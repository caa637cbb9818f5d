"""Descriptors of the system's: every call goes to the real one."""

from __future__ import annotations

import ctypes
import errno
import os
import select
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from anykvm import fs

Raises = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        fs.close(fd)


def test_fionread_on_a_pipe(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    fs.write(writer, b"12345")
    waiting = ctypes.c_int()
    assert fs.ioctl(reader, termios.FIONREAD, ctypes.addressof(waiting)) == 0
    assert waiting.value == 5
    assert fs.read(reader, 3) == b"123"


def test_errors_are_the_kernels(pipe: tuple[int, int], raises: Raises) -> None:
    reader, _ = pipe
    for call, number in (
        (lambda: fs.ioctl(reader, 0xAE80), errno.ENOTTY),
        (lambda: fs.ioctl(reader, termios.FIONREAD, 8), errno.EFAULT),
        (lambda: fs.lseek(reader, 0), errno.ESPIPE),
        (lambda: fs.fsync(reader), errno.EINVAL),
        (lambda: fs.mmap(reader, 4096, fs.PROT_READ), errno.ENODEV),
        (lambda: fs.compat_ioctl(reader, termios.FIONREAD, 8), errno.ENOSYS),
    ):
        with raises(number):
            call()


def test_poll_waits(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    assert fs.poll(reader, select.POLLIN) == 0
    fs.write(writer, b"x")
    assert fs.poll(reader, select.POLLIN, timeout=5) == select.POLLIN


def test_flags_dup_and_fdinfo(pipe: tuple[int, int]) -> None:
    reader, _ = pipe
    fs.set_flags(reader, os.O_NONBLOCK)
    assert fs.getfl(reader) & os.O_NONBLOCK
    with pytest.raises(BlockingIOError):
        fs.read(reader, 1)
    again = fs.dup(reader)
    assert fs.fdinfo(again).startswith("pos:\t0\n")
    assert not os.get_inheritable(again)
    fs.close(again)


def test_mmap_of_a_file() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"\0" * 4096)
        file.flush()
        mapping = fs.mmap(file.fileno(), 4096)
        mapping.buffer[7] = 0x41
        assert os.pread(file.fileno(), 1, 7) == b"A"
        assert fs.lseek(file.fileno(), 0, os.SEEK_END) == 4096
