"""The registry of character devices, loading by alias, and the choice of a backend."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from anykvm import fs
from anykvm.fs import backend, char_dev, module

Raises = Callable[[int], AbstractContextManager[None]]


def error_of_open(path: str) -> int | None:
    try:
        fs.open(path)
    except OSError as error:
        return error.errno
    return None


def test_dev_kvm_is_a_node_10_232_before_any_module() -> None:
    inode = char_dev.namei("/dev/../dev/kvm")
    assert inode is not None
    assert stat.S_ISCHR(inode.i_mode)
    assert inode.is_chrdev()
    assert (os.major(inode.i_rdev), os.minor(inode.i_rdev)) == (10, 232)


def test_numbers_are_exclusive(raises: Raises) -> None:
    major = fs.register_chrdev(0, "first", fs.FileOperations(), 0, 16)
    assert 234 <= major <= 254
    with raises(errno.EBUSY):
        fs.register_chrdev(major, "second", fs.FileOperations(), 8, 16)
    assert fs.register_chrdev(major, "third", fs.FileOperations(), 16, 16) == major
    names = [d.name for d in char_dev.registered() if d.major == major]
    assert names == ["first", "third"]
    fs.unregister_chrdev(major, "first")
    fs.unregister_chrdev(major, "third")
    with raises(errno.ENODEV):
        fs.unregister_chrdev(major, "first")


def test_open_by_major_and_minor_through_a_node() -> None:
    opened: list[int] = []

    def open_(inode: fs.Inode, file: fs.File) -> None:
        opened.append(os.minor(inode.i_rdev))

    major = fs.register_chrdev(0, "multi", fs.FileOperations(open=open_), 0, 4)
    fs.mknod("/dev/multi3", major, 3)
    fs.mknod("/dev/multi4", major, 4)
    fs.close(fs.open("/dev/multi3"))
    assert opened == [3]
    assert error_of_open("/dev/multi4") == errno.ENXIO
    fs.unregister_chrdev(major, "multi")
    assert error_of_open("/dev/multi3") == errno.ENXIO
    fs.unlink("/dev/multi3")
    fs.unlink("/dev/multi4")
    with pytest.raises(FileNotFoundError):
        fs.unlink("/dev/multi4")
    assert error_of_open("/dev/multi3") == errno.ENOENT


def test_a_node_is_one_device() -> None:
    with pytest.raises(FileExistsError):
        fs.mknod("/dev/kvm", 10, 231)


def test_first_open_loads_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lazy_driver.py").write_text(
        "from anykvm import fs\n"
        "fops = fs.FileOperations(unlocked_ioctl=lambda file, cmd, arg: 1234)\n"
        "MISC = fs.MiscDevice(200, 'lazy', fops)\n"
        "fs.misc_register(MISC)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(module.MODULE_ALIASES, "char-major-10-200", "lazy_driver")
    fs.mknod("/dev/lazy", 10, 200)
    assert "lazy_driver" not in sys.modules
    fd = fs.open("/dev/lazy")
    assert fs.ioctl(fd, 0) == 1234
    fs.close(fd)
    fs.misc_deregister(sys.modules["lazy_driver"].MISC)
    monkeypatch.delitem(sys.modules, "lazy_driver")


def test_misc_device_without_driver_is_enodev() -> None:
    fs.mknod("/dev/nobody", 10, 201)
    assert error_of_open("/dev/nobody") == errno.ENODEV
    fs.unlink("/dev/nobody")
    assert not fs.request_module("char-major-10-201")


def test_the_systems_files_open_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "file"
    fd = fs.open(str(path), os.O_CREAT | os.O_RDWR, 0o600)
    assert fs.write(fd, b"abc") == 3
    fs.close(fd)
    assert path.read_bytes() == b"abc"
    assert path.stat().st_mode & 0o777 == 0o600


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    return path


def test_hardware_virtualization_from_cpuinfo(tmp_path: Path) -> None:
    assert fs.hardware_virtualization(cpuinfo(tmp_path, "vmx")) == "vmx"
    assert fs.hardware_virtualization(cpuinfo(tmp_path, "svm")) == "svm"
    assert fs.hardware_virtualization(cpuinfo(tmp_path, "vmxnet")) is None
    assert fs.hardware_virtualization(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("wanted", "environment", "expected"),
    [
        ("soft", "host", "soft"),
        ("host", "soft", "host"),
        (None, "soft", "soft"),
        (None, "host", "host"),
        ("auto", "host", "host"),
    ],
)
def test_argument_then_environment(
    monkeypatch: pytest.MonkeyPatch, wanted: str | None, environment: str, expected: str
) -> None:
    monkeypatch.setenv(backend.VARIABLE, environment)
    assert fs.choose(wanted).backend == expected


@pytest.mark.parametrize(
    ("extension", "device", "expected", "reason"),
    [
        (None, "/dev/null", "soft", "neither vmx nor svm"),
        ("svm", "/dev/null", "host", "has svm"),
        ("vmx", "/nonexistent", "soft", "No such file"),
    ],
)
def test_auto_asks_the_host(
    monkeypatch: pytest.MonkeyPatch, extension: str | None, device: str, expected: str, reason: str
) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    monkeypatch.setattr(backend, "hardware_virtualization", lambda: extension)
    monkeypatch.setattr(backend, "HOST_KVM", device)
    choice = fs.choose()
    assert choice.backend == expected
    assert reason in choice.reason


def test_unknown_backend_says_what_was_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected soft, host or auto"):
        fs.choose("hard")
    monkeypatch.setenv(backend.VARIABLE, "kvm")
    with pytest.raises(ValueError, match=backend.VARIABLE):
        fs.choose()
