"""A character device with every operation: `toy` is the driver, `path` its node."""

from __future__ import annotations

import ctypes
import errno
import os
import select
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from io import StringIO
from typing import ClassVar

import pytest

from anykvm import fs


@dataclass
class Toy:
    """The driver's state, shared by its files; `log` is what was called."""

    ADD_ONE: ClassVar[int] = 0x1001
    BIG_ARG: ClassVar[int] = 0x1002
    SPAWN: ClassVar[int] = 0x1003

    module: fs.Module = field(default_factory=lambda: fs.Module("toy"))
    log: list[str] = field(default_factory=list)
    data: bytearray = field(default_factory=lambda: bytearray(b"hello, world"))

    def note(self, what: str) -> None:
        self.log.append(what)

    def open(self, inode: fs.Inode, file: fs.File) -> None:
        self.note("open")
        file.private_data = self

    def release(self, inode: fs.Inode, file: fs.File) -> None:
        self.note("release")

    def flush(self, file: fs.File) -> None:
        self.note("flush")

    def read(self, file: fs.File, count: int, position: int) -> bytes:
        return bytes(self.data[position : position + count])

    def write(self, file: fs.File, data: bytes, position: int) -> int:
        self.data[position : position + len(data)] = data
        return len(data)

    def llseek(self, file: fs.File, offset: int, whence: int) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: file.f_pos, os.SEEK_END: len(self.data)}[whence]
        if base + offset < 0:
            raise OSError(errno.EINVAL, "before the start")
        file.f_pos = base + offset
        return file.f_pos

    def poll(self, file: fs.File) -> int:
        return select.POLLIN

    def ioctl(self, file: fs.File, cmd: int, arg: int) -> int:
        if cmd == self.ADD_ONE:
            value = fs.current().mm.read_object(arg, ctypes.c_uint32)
            value.value += 1
            fs.current().mm.write_object(arg, value)
            return 0
        if cmd == self.BIG_ARG:
            return arg >> 32
        if cmd == self.SPAWN:
            return fs.anon_inode_getfd("toy-child", self.child_fops(), self, size=arg)
        raise OSError(errno.ENOTTY, "no such ioctl")

    def mmap(self, file: fs.File, vma: fs.VmArea) -> None:
        self.note(f"mmap {vma.length:#x} at page {vma.vm_pgoff}")

    def fsync(self, file: fs.File, start: int, end: int, datasync: bool) -> None:
        self.note("fsync")

    def fasync(self, fd: int, file: fs.File, on: bool) -> None:
        self.note(f"fasync {on}")

    def check_flags(self, flags: int) -> None:
        if flags & os.O_APPEND:
            raise OSError(errno.EINVAL, "no appending")

    def show_fdinfo(self, text: StringIO, file: fs.File) -> None:
        text.write(f"toy-bytes:\t{len(self.data)}\n")

    def fops(self) -> fs.FileOperations:
        return fs.FileOperations(
            owner=self.module,
            llseek=self.llseek,
            read=self.read,
            write=self.write,
            poll=self.poll,
            unlocked_ioctl=self.ioctl,
            compat_ioctl=fs.compat_ptr_ioctl,
            mmap=self.mmap,
            open=self.open,
            flush=self.flush,
            release=self.release,
            fsync=self.fsync,
            fasync=self.fasync,
            check_flags=self.check_flags,
            show_fdinfo=self.show_fdinfo,
        )

    def child_fops(self) -> fs.FileOperations:
        return replace(self.fops(), flush=None, open=None)


@contextmanager
def registered(fops: fs.FileOperations, name: str = "toy") -> Iterator[str]:
    """The path of a misc device with these operations, for the time of a `with`."""
    misc = fs.MiscDevice(fs.MISC_DYNAMIC_MINOR, name, fops)
    minor = fs.misc_register(misc)
    try:
        yield f"/dev/{name}"
    finally:
        fs.misc_deregister(replace(misc, minor=minor))


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def path(toy: Toy) -> Iterator[str]:
    with registered(toy.fops()) as node:
        yield node


@pytest.fixture
def bare() -> Iterator[Callable[[fs.FileOperations], int]]:
    """Open a device with just these operations."""
    with ExitStack() as stack:

        def opened(fops: fs.FileOperations) -> int:
            fd = fs.open(stack.enter_context(registered(fops, "bare")))
            stack.callback(fs.close, fd)
            return fd

        yield opened


@pytest.fixture
def raises() -> Callable[[int], AbstractContextManager[None]]:
    """`with raises(errno.EBADF):` an OSError with just this errno."""

    @contextmanager
    def raised(number: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != number:
                raise
        else:
            pytest.fail(f"no error, expected {errno.errorcode[number]}")

    return raised


@pytest.fixture(autouse=True)
def no_file_left_behind() -> Iterator[None]:
    before = fs.FILES.files()
    yield
    assert fs.FILES.files() == before
