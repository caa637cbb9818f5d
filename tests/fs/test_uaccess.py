"""User memory, our own and another process's."""

from __future__ import annotations

import ctypes
import errno
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from anykvm import fs
from anykvm.fs import libc, vm_copy

Raises = Callable[[int], AbstractContextManager[None]]

ANONYMOUS = fs.MAP_PRIVATE | fs.MAP_ANONYMOUS


@pytest.fixture(autouse=True, params=["process_vm", "files"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere, and as where process_vm_readv is forbidden."""
    if request.param == "files":
        monkeypatch.setattr(vm_copy, "read", vm_copy.read_by_file)
        monkeypatch.setattr(vm_copy, "write", vm_copy.write_by_file)


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


def test_memory_that_may_not_be_written(raises: Raises) -> None:
    page = fs.Mapping(4096, fs.PROT_READ, ANONYMOUS)
    assert fs.UserMemory().read(page.address, 8) == bytes(8)
    with raises(errno.EFAULT):
        fs.UserMemory().write(page.address, b"x")


def test_more_than_a_chunk() -> None:
    size = 2 * vm_copy.CHUNK + 5
    pages = fs.Mapping(size, fs.PROT_READ | fs.PROT_WRITE, ANONYMOUS)
    data = bytes(range(251)) * (size // 251 + 1)
    fs.UserMemory().write(pages.address, data[:size])
    assert fs.UserMemory().read(pages.address, size) == data[:size]


def test_each_thread_copies_by_itself() -> None:
    wrong = []

    def copy(number: int) -> None:
        page = fs.Mapping(4096, fs.PROT_READ | fs.PROT_WRITE, ANONYMOUS)
        for n in range(200):
            value = bytes((number, n)) * 512
            fs.UserMemory().write(page.address, value)
            if fs.UserMemory().read(page.address, 1024) != value:
                wrong.append((number, n))

    threads = [threading.Thread(target=copy, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_addresses_outside_of_user_space() -> None:
    assert not fs.access_ok(1 << 63, 1)
    assert not fs.access_ok((1 << 47) - 4096, 1)
    assert fs.access_ok((1 << 47) - 4097, 1)
    for address in (-1, 1 << 47, 1 << 63, (1 << 64) - 1, 1 << 80):
        assert fault(address, 1) == errno.EFAULT


@contextmanager
def child(program: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A process that prints addresses and then waits for its standard input to end."""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=-1, stdout=-1, text=True
    ) as process:
        assert process.stdout is not None
        yield process, [int(word) for word in process.stdout.readline().split()]


def test_another_process_and_current() -> None:
    program = (
        "import ctypes, sys\n"
        "text = ctypes.create_string_buffer(b'theirs', 16)\n"
        "print(ctypes.addressof(text), flush=True)\n"
        "sys.stdin.read()\n"
        "print(text.value.decode())\n"
    )
    with child(program) as (process, [address]):
        with fs.as_current(fs.Task(process.pid)) as task:
            assert task.mm.pid == process.pid
            assert fs.copy_from_user(address, 6) == b"theirs"
            fs.copy_to_user(address, b"ours!\0")
        output, _ = process.communicate("", timeout=30)
    assert output == "ours!\n"


def test_another_processs_bad_addresses(raises: Raises) -> None:
    program = (
        "import sys; from anykvm import fs\n"
        "kind = fs.MAP_PRIVATE | fs.MAP_ANONYMOUS\n"
        "pages = fs.Mapping(8192, fs.PROT_READ | fs.PROT_WRITE, kind)\n"
        "fixed = fs.Mapping(4096, fs.PROT_READ, kind)\n"
        "fs.libc.munmap(pages.address + 4096, 4096)\n"
        "print(pages.address, fixed.address, flush=True); sys.stdin.read()\n"
    )
    with child(program) as (process, [page, fixed]):
        memory = fs.UserMemory(process.pid)
        memory.write(page + 4090, b"sixsix")
        assert memory.read(page + 4090, 6) == b"sixsix"
        for address in (page + 4091, page + 4096, 8):
            with raises(errno.EFAULT):
                memory.read(address, 6)
            with raises(errno.EFAULT):
                memory.write(address, b"sixsix")
        assert memory.read(fixed, 4) == bytes(4)
        with raises(errno.EFAULT):
            memory.write(fixed, b"x")
        process.communicate("", timeout=30)
    with raises(errno.ESRCH):
        memory.read(page, 1)
    with raises(errno.ESRCH):
        memory.write(page, b"x")


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
