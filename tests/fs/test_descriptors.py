"""Real descriptors: names, duplicates, reference counts, memory, many threads."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest

from anykvm import fs

Raises = Callable[[int], AbstractContextManager[None]]
Bare = Callable[[fs.FileOperations], int]


def count_of(fd: int) -> int:
    file = fs.fget(fd)
    assert file is not None
    fs.fput(file)
    return file.f_count


def child(toy: Any, fd: int, size: int = 0) -> int:
    return fs.ioctl(fd, toy.SPAWN, size)


def test_names_in_proc(toy: Any, path: str) -> None:
    fd = fs.open(path)
    spawned = child(toy, fd)
    assert os.readlink(f"/proc/self/fd/{fd}") == "/memfd:toy (deleted)"
    assert os.readlink(f"/proc/self/fd/{spawned}") == "/memfd:toy-child (deleted)"
    fs.close(fd)
    fs.close(spawned)


def test_last_close_releases_and_a_second_is_ebadf(toy: Any, path: str, raises: Raises) -> None:
    fd = fs.open(path)
    again = fs.dup(fd)
    assert count_of(fd) == 2
    fs.close(fd)
    assert "release" not in toy.log
    with raises(errno.EBADF):
        fs.close(fd)
    assert fs.ioctl(again, toy.BIG_ARG, 7 << 32) == 7
    fs.close(again)
    assert toy.log == ["open", "flush", "flush", "release"]


def test_every_call_on_a_closed_descriptor_is_ebadf(toy: Any, path: str, raises: Raises) -> None:
    fd = fs.open(path)
    fs.close(fd)
    calls: list[Callable[[], object]] = [
        lambda: fs.ioctl(fd, toy.BIG_ARG),
        lambda: fs.read(fd, 1),
        lambda: fs.mmap(fd, 4096),
        lambda: fs.dup(fd),
        lambda: fs.fdinfo(fd),
        lambda: fs.poll(fd, 1),
    ]
    for call in calls:
        with raises(errno.EBADF):
            call()


def test_a_dup_behind_our_back_takes_over(toy: Any, path: str) -> None:
    fd = fs.open(path)
    stray = os.dup(fd)
    fs.close(fd)
    assert "release" not in toy.log
    assert fs.ioctl(stray, toy.BIG_ARG, 9 << 32) == 9
    fs.close(stray)
    assert toy.log.count("release") == 1
    assert toy.module.refcount == 0


def test_closing_a_stray_dup_first_gives_up_nothing(toy: Any, path: str) -> None:
    fd = fs.open(path)
    stray = os.dup(fd)
    fs.close(stray)
    assert toy.log == ["open"]
    assert count_of(fd) == 1
    fs.close(fd)


def test_a_close_behind_our_back_is_noticed_at_the_next(toy: Any, path: str) -> None:
    fd = fs.open(path)
    second = fs.dup(fd)
    os.close(fd)
    fs.close(second)
    assert toy.log.count("release") == 1


def test_a_descriptor_passed_over_a_socket_resolves(toy: Any, path: str) -> None:
    fd = fs.open(path)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [fd])
        _, (passed,), _, _ = socket.recv_fds(theirs, 1, 1)
    assert fs.ioctl(passed, toy.BIG_ARG, 3 << 32) == 3
    fs.close(fd)
    fs.close(passed)
    assert toy.log.count("release") == 1


def test_module_is_in_use_while_a_file_is_open(toy: Any, path: str, raises: Raises) -> None:
    fd = fs.open(path)
    spawned = child(toy, fd)
    assert toy.module.refcount == 2
    with raises(errno.EBUSY):
        toy.module.delete()
    fs.close(fd)
    fs.close(spawned)
    toy.module.delete()
    with raises(errno.ENODEV):
        fs.open(path)
    with raises(errno.ENOENT):
        fs.anon_inode_getfd("late", toy.child_fops(), None)


def test_failing_open_leaves_nothing(bare: Bare, raises: Raises) -> None:
    module = fs.Module("grumpy")

    def refuse(inode: fs.Inode, file: fs.File) -> None:
        raise OSError(errno.EPERM, "go away")

    with raises(errno.EPERM):
        bare(fs.FileOperations(owner=module, open=refuse))
    assert module.refcount == 0


def test_failing_release_still_lets_the_module_go(toy: Any) -> None:
    module = fs.Module("clumsy")

    def fail(inode: fs.Inode, file: fs.File) -> None:
        raise RuntimeError("release failed")

    fd = fs.anon_inode_getfd("clumsy", fs.FileOperations(owner=module, release=fail), None)
    with pytest.raises(RuntimeError, match="release failed"):
        fs.close(fd)
    assert module.refcount == 0


def test_memory_is_one_however_often_it_is_mapped(toy: Any, path: str) -> None:
    fd = fs.open(path)
    spawned = child(toy, fd, 3 * 4096)
    file = fs.fget(spawned)
    assert file is not None
    assert file.f_mapping is not None
    stray = os.dup(spawned)
    first, second = fs.mmap(spawned, 3 * 4096), fs.mmap(stray, 4096, offset=8192)
    file.f_mapping.buffer[8192] = 0x5A
    assert (first.buffer[8192], second.buffer[0]) == (0x5A, 0x5A)
    fs.UserMemory().write(second.address + 1, b"\xa5")
    assert file.f_mapping.buffer[8193] == 0xA5
    fs.fput(file)
    assert toy.log[1:] == ["mmap 0x3000 at page 0", "mmap 0x1000 at page 2"]
    for descriptor in (fd, spawned, stray):
        fs.close(descriptor)


def test_memory_outlives_its_descriptor(toy: Any, path: str, raises: Raises) -> None:
    fd = fs.open(path)
    spawned = child(toy, fd, 4096)
    mapping = fs.mmap(spawned, 4096)
    word = mapping.view(fs.libc.iovec, 16)
    fs.close(spawned)
    fs.close(fd)
    address = mapping.address
    fs.munmap(mapping)
    with pytest.raises(ValueError, match="unmapped"):
        mapping.view(fs.libc.iovec)
    word.iov_len = 77
    assert fs.UserMemory().read(address + 24, 8) == (77).to_bytes(8, "little")
    del word
    with raises(errno.EFAULT):
        fs.UserMemory().read(address, 1)


def test_size_is_sealed(toy: Any, path: str) -> None:
    fd = fs.open(path)
    spawned = child(toy, fd, 4096)
    for call in (lambda: os.ftruncate(spawned, 0), lambda: os.write(fd, b"x")):
        with pytest.raises(PermissionError):
            call()
    fs.close(spawned)
    fs.close(fd)


def test_a_memfd_made_before_its_file(toy: Any) -> None:
    memfd = fs.Memfd("early", 4096)
    assert memfd.mapping is not None
    memfd.mapping.buffer[0] = 9
    fd = fs.anon_inode_getfd("early", toy.child_fops(), None, memfd=memfd)
    assert fs.mmap(fd, 4096).buffer[0] == 9
    fs.close(fd)


def test_release_waits_for_the_ioctl_under_way(toy: Any) -> None:
    inside, leave = threading.Event(), threading.Event()
    order: list[str] = []

    def slow(file: fs.File, cmd: int, arg: int) -> int:
        inside.set()
        assert leave.wait(10)
        order.append("ioctl")
        return arg

    fops = fs.FileOperations(
        unlocked_ioctl=slow, release=lambda inode, file: order.append("release")
    )
    fd = fs.anon_inode_getfd("slow", fops, None)
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(fs.ioctl(fd, 1, 5)))
    thread.start()
    assert inside.wait(10)
    fs.close(fd)
    assert order == []
    leave.set()
    thread.join(10)
    assert (order, results) == (["ioctl", "release"], [5])


def test_many_threads_on_the_same_and_on_other_files(toy: Any, path: str) -> None:
    shared = fs.open(path)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for turn in range(100):
                assert fs.ioctl(shared, toy.BIG_ARG, turn << 32) == turn
                own = fs.dup(shared) if turn % 2 else fs.open(path)
                assert fs.ioctl(own, toy.BIG_ARG, turn << 32) == turn
                fs.close(own)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert count_of(shared) == 1
    fs.close(shared)
    assert toy.module.refcount == 0
    assert toy.log.count("open") == toy.log.count("release") == 201


def test_exit_files_closes_all_of_ours() -> None:
    program = """
from anykvm import fs
gone = []
fops = fs.FileOperations(release=lambda inode, file: gone.append(file.private_data))
first = fs.anon_inode_getfd("a", fops, "a")
second = fs.dup(fs.anon_inode_getfd("b", fops, "b"))
fs.exit_files()
print(sorted(gone), fs.FILES.files())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "['a', 'b'] []\n"


def test_more_puts_than_gets_is_a_bug_that_shows(toy: Any) -> None:
    with pytest.raises(RuntimeError, match="more uses given back"):
        toy.module.put()
