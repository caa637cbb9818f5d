"""User memory, our own and another process's."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

from anykvm import fs
from anykvm.fs import libc

Raises = Callable[[int], AbstractContextManager[None]]

ANONYMOUS = fs.MAP_PRIVATE | fs.MAP_ANONYMOUS


def fault(address: int, length: int) -> int | None:
    try:
        fs.UserMemory().read(address, length)
    except OSError as error:
        return error.errno
    return None


def test_round_trip() -> None:
    page = fs.Mapping(4096, fs.PROT_READ | fs.PROT_WRITE, ANONYMOUS)
    memory = fs.UserMemory()
    memory.write(page.address + 10, b"some bytes")
    assert memory.read(page.address + 10, 10) == b"some bytes"
    memory.write_object(page.address, libc.iovec(1, 2))
    assert memory.read_object(page.address, libc.iovec).iov_len == 2


def test_nothing_is_copied_for_length_zero() -> None:
    memory = fs.UserMemory()
    assert memory.read(0, 0) == b""
    memory.write(0, b"")


def test_a_range_that_runs_into_a_hole_is_efault(raises: Raises) -> None:
    pages = fs.Mapping(8192, fs.PROT_READ | fs.PROT_WRITE, ANONYMOUS)
    second = pages.address + 4096
    libc.munmap(second, 4096)
    assert fs.UserMemory().read(second - 8, 8) == bytes(8)
    assert fault(second - 8, 9) == errno.EFAULT
    with raises(errno.EFAULT):
        fs.UserMemory().write(second - 8, bytes(9))


def test_addresses_outside_of_user_space() -> None:
    assert not fs.access_ok(1 << 63, 1)
    assert not fs.access_ok((1 << 47) - 4096, 1)
    assert fs.access_ok((1 << 47) - 4097, 1)
    for address in (-1, 1 << 47, 1 << 63, (1 << 64) - 1, 1 << 80):
        assert fault(address, 1) == errno.EFAULT


def test_another_process_and_current() -> None:
    program = (
        "import ctypes, sys\n"
        "text = ctypes.create_string_buffer(b'theirs', 16)\n"
        "print(ctypes.addressof(text), flush=True)\n"
        "sys.stdin.read()\n"
        "print(text.value.decode())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdout is not None
        address = int(process.stdout.readline())
        with fs.as_current(fs.Task(process.pid)) as task:
            assert task.mm.pid == process.pid
            assert fs.copy_from_user(address, 6) == b"theirs"
            fs.copy_to_user(address, b"ours!\0")
        output, _ = process.communicate("", timeout=30)
    assert output == "ours!\n"


def test_current_is_each_threads_own() -> None:
    seen: list[int] = []
    with fs.as_current(fs.Task(1)):
        thread = threading.Thread(target=lambda: seen.append(fs.current().mm.pid))
        thread.start()
        thread.join(10)
        assert fs.current().mm.pid == 1
    assert seen == [fs.current().mm.pid]


def test_values_of_ctypes_types() -> None:
    value = ctypes.c_uint64(0x1122334455667788)
    memory = fs.UserMemory()
    half = memory.read_object(ctypes.addressof(value), ctypes.c_uint32)
    assert half.value == 0x55667788
