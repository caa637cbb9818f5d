"""FdTable: what is known of a descriptor is never believed after it has become another file's."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from anykvm.proxy import fdtable
from anykvm.proxy.fdtable import FdTable, Key


@pytest.fixture
def table() -> Iterator[FdTable]:
    """Of this thread."""
    found = FdTable(threading.get_native_id())
    yield found
    found.close()


def key(fd: int) -> Key:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_same_file_is_found_again(table: FdTable) -> None:
    fd = os.memfd_create("one")
    assert [table.find(fd) for _ in range(3)] == [key(fd)] * 3
    os.close(fd)


def test_a_closed_descriptor_is_nobodys(table: FdTable) -> None:
    fd = os.memfd_create("one")
    table.find(fd)
    os.close(fd)
    assert table.find(fd) is None
    assert table.find(-1) is None


def test_a_descriptor_that_became_another_file(table: FdTable) -> None:
    fd, other = os.memfd_create("one"), os.memfd_create("other")
    first = table.find(fd)
    os.dup2(other, fd)
    assert table.find(fd) == key(other) != first
    os.close(fd)
    assert os.dup(other) == fd
    assert table.find(fd) == key(other)
    os.close(fd)
    os.close(other)


def test_changed_flags_change_nothing(table: FdTable) -> None:
    fd = os.memfd_create("one")
    before = table.find(fd)
    os.set_inheritable(fd, True)
    os.lseek(fd, 10, os.SEEK_SET)
    assert table.find(fd) == before
    os.close(fd)


def test_files_of_one_number_on_two_file_systems_differ(table: FdTable, tmp_path: Path) -> None:
    fd = os.open("/proc/self/mounts", os.O_RDONLY)
    table.find(fd)
    other = os.open(tmp_path, os.O_RDONLY)
    os.dup2(other, fd)
    assert table.find(fd) == key(other)
    os.close(fd)
    os.close(other)


def test_without_inode_numbers_in_fdinfo(table: FdTable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As before Linux 5.19: nothing is kept, all is found."""
    monkeypatch.setattr(fdtable, "FDINFO_SIZE", 5)
    before = descriptors()
    fd = os.memfd_create("one")
    assert table.find(fd) == key(fd)
    assert descriptors() == before + 1
    os.close(fd)


def test_how_many_are_kept(table: FdTable) -> None:
    fds = [os.memfd_create(str(n)) for n in range(fdtable.MOST + 5)]
    before = descriptors()
    for _ in range(2):
        assert [table.find(fd) for fd in fds] == [key(fd) for fd in fds]
    assert descriptors() == before + fdtable.MOST
    table.close()
    assert descriptors() == before - 1
    for fd in fds:
        os.close(fd)


def test_a_process_that_has_ended() -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        table = FdTable(process.pid)
        assert table.find(1) == (os.stat("/dev/null").st_dev, os.stat("/dev/null").st_ino)
    assert table.find(1) is None
    table.close()
