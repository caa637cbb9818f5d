"""ioctl(2) on files of ours (`fs/ioctl.c`): the numbers every file knows, then the driver's."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import partial

from anykvm.fs import libc
from anykvm.fs.file import File
from anykvm.fs.intercept import IoctlCall, intercepting, through
from anykvm.fs.task import current
from anykvm.fs.trace import call, enabled
from anykvm.fs.vfs import absent, setfl

FIONCLEX = 0x5450
FIOCLEX = 0x5451
FIONBIO = 0x5421
FIOASYNC = 0x5452


def _toggle(fd: int, file: File, arg: int, flag: int) -> int:
    on = current().mm.read_object(arg, ctypes.c_int32).value
    setfl(fd, file, file.f_flags | flag if on else file.f_flags & ~flag)
    return 0


def _set_inheritable(fd: int, inheritable: bool) -> int:
    os.set_inheritable(fd, inheritable)
    return 0


_VFS_IOCTLS: dict[int, Callable[[int, File, int], int]] = {
    FIOCLEX: lambda fd, file, arg: _set_inheritable(fd, False),
    FIONCLEX: lambda fd, file, arg: _set_inheritable(fd, True),
    FIONBIO: lambda fd, file, arg: _toggle(fd, file, arg, os.O_NONBLOCK),
    FIOASYNC: lambda fd, file, arg: _toggle(fd, file, arg, os.O_ASYNC),
}


def do_ioctl(fd: int, file: File | None, cmd: int, arg: int) -> int:
    """The ioctl of a descriptor, traced and intercepted; without `file` it is the system's."""
    if not enabled() and not intercepting():
        return libc.ioctl(fd, cmd, arg) if file is None else vfs_ioctl(fd, file, cmd, arg)
    with call("ioctl", fd=fd, file=file, cmd=cmd, arg=arg) as this:
        last = partial(libc.ioctl, fd) if file is None else partial(vfs_ioctl, fd, file)
        this.result = result = through(IoctlCall(fd, file, cmd, arg), partial(last, cmd, arg))
        return result


def vfs_ioctl(fd: int, file: File, cmd: int, arg: int) -> int:
    """The ioctl of a 64-bit caller; ENOTTY where nobody knows the number."""
    if cmd in _VFS_IOCTLS:
        return _VFS_IOCTLS[cmd](fd, file, arg)
    driver = file.f_op.unlocked_ioctl
    if driver is None:
        raise absent("unlocked_ioctl", file)
    return driver(file, cmd, arg)


def vfs_compat_ioctl(fd: int, file: File, cmd: int, arg: int) -> int:
    """The ioctl of a 32-bit caller; ENOTTY where the driver has no `compat_ioctl`."""
    common = _VFS_IOCTLS.get(cmd)
    if common is not None:
        return common(fd, file, compat_ptr(arg))
    if file.f_op.compat_ioctl is None:
        raise absent("compat_ioctl", file)
    return file.f_op.compat_ioctl(file, cmd, arg & 0xFFFFFFFF)


def compat_ptr(arg: int) -> int:
    """A 32-bit process's pointer as an address."""
    return arg & 0xFFFFFFFF


def compat_ptr_ioctl(file: File, cmd: int, arg: int) -> int:
    """A `compat_ioctl` for drivers whose structs are the same for both."""
    if file.f_op.unlocked_ioctl is None:
        raise absent("compat_ioctl", file)
    return file.f_op.unlocked_ioctl(file, cmd, compat_ptr(arg))
