"""Each system call through to its operation, and the kernel's meaning of an absent one."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import os
import select
from collections.abc import Callable
from typing import Any

import pytest

from anykvm import fs
from anykvm.fs import vfs
from anykvm.fs.ioctl import FIOASYNC, FIOCLEX, FIONBIO, FIONCLEX

Bare = Callable[[fs.FileOperations], int]


def error_of(call: Callable[..., object], *args: Any) -> int | None:
    try:
        call(*args)
    except OSError as error:
        return error.errno
    return None


def file_of(fd: int) -> fs.File:
    file = fs.fget(fd)
    assert file is not None
    fs.fput(file)
    return file


def test_read_write_and_seek_share_one_position(toy: Any, path: str) -> None:
    fd = fs.open(path)
    assert fs.read(fd, 5) == b"hello"
    assert fs.lseek(fd, 2, os.SEEK_CUR) == 7
    assert fs.write(fd, b"WORLD") == 5
    assert bytes(toy.data) == b"hello, WORLD"
    assert fs.read(fd, 5) == b""
    assert error_of(fs.lseek, fd, -1) == errno.EINVAL
    fs.close(fd)


def test_open_mode_is_checked(path: str) -> None:
    reader, writer = fs.open(path, os.O_RDONLY), fs.open(path, os.O_WRONLY)
    assert error_of(fs.write, reader, b"x") == errno.EBADF
    assert error_of(fs.read, writer, 1) == errno.EBADF
    assert error_of(fs.mmap, writer, 4096) == errno.EACCES
    assert error_of(fs.mmap, reader, 4096) == errno.EACCES
    fs.close(reader)
    fs.close(writer)


def test_ioctl_copies_in_and_out_of_user_memory(toy: Any, path: str) -> None:
    fd = fs.open(path)
    value = ctypes.c_uint32(41)
    assert fs.ioctl(fd, toy.ADD_ONE, ctypes.addressof(value)) == 0
    assert value.value == 42
    fs.close(fd)


@pytest.mark.parametrize("address", [0, 1, 0x1000, 1 << 46, (1 << 47) - 2, (1 << 64) - 8])
def test_bad_pointer_is_efault(toy: Any, path: str, address: int) -> None:
    fd = fs.open(path)
    assert error_of(fs.ioctl, fd, toy.ADD_ONE, address) == errno.EFAULT
    fs.close(fd)


def test_read_only_memory_is_efault_on_the_way_out(toy: Any, path: str) -> None:
    fd = fs.open(path)
    page = fs.Mapping(4096, fs.PROT_READ, fs.MAP_PRIVATE | fs.MAP_ANONYMOUS)
    assert error_of(fs.ioctl, fd, toy.ADD_ONE, page.address) == errno.EFAULT
    fs.close(fd)


def test_argument_has_64_bits_and_32_for_compat(toy: Any, path: str) -> None:
    fd = fs.open(path)
    assert fs.ioctl(fd, toy.BIG_ARG, 0x12345678 << 32) == 0x12345678
    assert fs.compat_ioctl(fd, toy.BIG_ARG, 0x12345678 << 32) == 0
    assert error_of(fs.ioctl, fd, 0xDEAD) == errno.ENOTTY
    fs.close(fd)


def test_poll_gives_what_was_asked_for(path: str) -> None:
    fd = fs.open(path)
    assert fs.poll(fd, select.POLLIN | select.POLLOUT) == select.POLLIN
    assert fs.poll(fd, select.POLLOUT) == 0
    fs.close(fd)


def test_fdinfo_has_the_drivers_lines(path: str) -> None:
    fd = fs.open(path)
    fs.read(fd, 3)
    lines = dict(line.split(":\t") for line in fs.fdinfo(fd).splitlines())
    assert lines["pos"] == "3"
    assert lines["flags"] == "02"
    assert lines["toy-bytes"] == "12"
    assert int(lines["ino"]) == os.fstat(fd).st_ino
    fs.close(fd)


def test_fsync_and_flush_reach_the_driver(toy: Any, path: str) -> None:
    fd = fs.open(path)
    fs.fsync(fd)
    fs.close(fd)
    assert toy.log == ["open", "fsync", "flush", "release"]


def test_status_flags(toy: Any, path: str) -> None:
    fd = fs.open(path, os.O_RDWR | os.O_CLOEXEC)
    assert fs.getfl(fd) == os.O_RDWR
    on = ctypes.c_int32(1)
    fs.ioctl(fd, FIONBIO, ctypes.addressof(on))
    assert fs.getfl(fd) & os.O_NONBLOCK
    fs.ioctl(fd, FIOASYNC, ctypes.addressof(on))
    assert toy.log[-1] == "fasync True"
    assert error_of(fs.set_flags, fd, os.O_APPEND) == errno.EINVAL
    fs.close(fd)


def test_close_on_exec_is_the_descriptors(path: str) -> None:
    fd = fs.open(path, os.O_RDWR)
    assert os.get_inheritable(fd)
    fs.ioctl(fd, FIOCLEX)
    assert not os.get_inheritable(fd)
    fs.ioctl(fd, FIONCLEX)
    assert os.get_inheritable(fd)
    fs.close(fd)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        (lambda fd: fs.read(fd, 1), errno.EINVAL),
        (lambda fd: fs.write(fd, b"x"), errno.EINVAL),
        (lambda fd: fs.lseek(fd, 0), errno.ESPIPE),
        (lambda fd: fs.ioctl(fd, 1), errno.ENOTTY),
        (lambda fd: fs.compat_ioctl(fd, 1), errno.ENOTTY),
        (lambda fd: fs.mmap(fd, 4096), errno.ENODEV),
        (lambda fd: fs.mmap(fd, 0), errno.EINVAL),
        (lambda fd: fs.mmap(fd, 4096, offset=1), errno.EINVAL),
        (lambda fd: fs.fsync(fd), errno.EINVAL),
        (lambda fd: vfs.iterate_dir(file_of(fd)), errno.ENOTDIR),
        (lambda fd: vfs.vfs_fallocate(file_of(fd), 0, 0, 1), errno.EOPNOTSUPP),
        (lambda fd: vfs.vfs_fallocate(file_of(fd), 0, -1, 1), errno.EINVAL),
    ],
)
def test_absent_operation(bare: Bare, call: Callable[[int], object], number: int) -> None:
    assert error_of(call, bare(fs.FileOperations())) == number


def test_absent_operations_that_succeed(bare: Bare) -> None:
    fd = bare(fs.FileOperations())
    assert fs.poll(fd, select.POLLIN | select.POLLOUT) == select.POLLIN | select.POLLOUT
    fs.set_flags(fd, os.O_NONBLOCK | os.O_ASYNC | os.O_APPEND)
    assert fs.fdinfo(fd).startswith("pos:\t0\n")


def test_every_member_has_a_stated_meaning_when_absent() -> None:
    assert [f.name for f in dataclasses.fields(fs.FileOperations)] == list(fs.ABSENT)


def test_iter_variants_serve_where_the_plain_ones_are_absent(bare: Bare) -> None:
    taken: list[bytes] = []

    def write_iter(file: fs.File, data: bytes, position: int) -> int:
        taken.append(data)
        return len(data)

    fops = fs.FileOperations(read_iter=lambda f, n, at: b"abc"[at : at + n], write_iter=write_iter)
    fd = bare(fops)
    assert (fs.read(fd, 2), fs.read(fd, 2)) == (b"ab", b"c")
    assert fs.write(fd, b"xyz") == 3
    assert taken == [b"xyz"]


def test_noop_llseek_moves_nothing(bare: Bare) -> None:
    fd = bare(fs.FileOperations(llseek=fs.noop_llseek))
    assert fs.lseek(fd, 100) == 0
