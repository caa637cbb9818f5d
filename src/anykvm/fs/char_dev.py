"""Character devices (`fs/char_dev.c`, `drivers/char/misc.c`) and their nodes in /dev.

Drivers register a range of minors under a major number, or one minor of major 10 (misc). Opening a
node looks the number up, asks for the module `char-major-MAJOR-MINOR` where nobody has it, and
replaces the file's operations by the driver's.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from dataclasses import dataclass

from anykvm.fs.file import FMODE_LSEEK, File, FileOperations, Inode, fops_get, fops_put
from anykvm.fs.module import request_module
from anykvm.fs.trace import call

MISC_MAJOR = 10
KVM_MINOR = 232
MISC_DYNAMIC_MINOR = 255
_DYNAMIC_MAJORS = range(254, 233, -1)
_DYNAMIC_MINORS = range(511, 256, -1)


@dataclass(frozen=True)
class CharDevice:
    """A registered range: `count` minors of `major` from `baseminor` on."""

    major: int
    baseminor: int
    count: int
    name: str
    fops: FileOperations

    def has(self, major: int, minor: int) -> bool:
        return major == self.major and 0 <= minor - self.baseminor < self.count

    def overlaps(self, other: CharDevice) -> bool:
        mine = range(self.baseminor, self.baseminor + self.count)
        end = other.baseminor + other.count
        return self.major == other.major and other.baseminor < mine.stop and mine.start < end


@dataclass(frozen=True)
class MiscDevice:
    """`struct miscdevice`: one minor of major 10, with a node /dev/`name`."""

    minor: int
    name: str
    fops: FileOperations


def _chrdev_open(inode: Inode, file: File) -> None:
    """The operations of every character device's inode: find the driver's, open through them."""
    major, minor = os.major(inode.i_rdev), os.minor(inode.i_rdev)
    device = lookup(major, minor)
    if device is None and request_module(f"char-major-{major}-{minor}"):
        device = lookup(major, minor)
    if device is None or not fops_get(device.fops):
        number = errno.ENODEV if major == MISC_MAJOR else errno.ENXIO
        raise OSError(number, os.strerror(number), file.f_path)
    file.f_op = device.fops
    if device.fops.llseek is not None:
        file.f_mode |= FMODE_LSEEK
    try:
        if device.fops.open is not None:
            with call(f"{device.name}.open", path=file.f_path):
                device.fops.open(inode, file)
    except BaseException:
        fops_put(device.fops)
        raise


def_chr_fops = FileOperations(open=_chrdev_open)

_devices: list[CharDevice] = []
_nodes: dict[str, Inode] = {}
_lock = threading.Lock()


def lookup(major: int, minor: int) -> CharDevice | None:
    """The driver of a device number."""
    with _lock:
        return next((d for d in _devices if d.has(major, minor)), None)


def registered() -> tuple[CharDevice, ...]:
    """All drivers, in the order they registered (/proc/devices)."""
    with _lock:
        return tuple(_devices)


def register_chrdev(
    major: int, name: str, fops: FileOperations, baseminor: int = 0, count: int = 256
) -> int:
    """Register a driver and return its major; `major` 0 asks for a free one. EBUSY."""
    with _lock:
        chosen = major or _free_major()
        device = CharDevice(chosen, baseminor, count, name, fops)
        if any(device.overlaps(other) for other in _devices):
            raise OSError(errno.EBUSY, f"character device {chosen}:{baseminor} is taken", name)
        _devices.append(device)
    return chosen


def _free_major() -> int:
    used = {d.major for d in _devices}
    free = next((m for m in _DYNAMIC_MAJORS if m not in used), None)
    if free is None:
        raise OSError(errno.EBUSY, "no free major number")
    return free


def unregister_chrdev(major: int, name: str) -> None:
    """Take a driver's ranges out; its open files stay. ENODEV where there is none."""
    with _lock:
        mine = [d for d in _devices if d.major == major and d.name == name]
        if not mine:
            raise OSError(errno.ENODEV, f"no character device {name} with major {major}")
        for device in mine:
            _devices.remove(device)


def misc_register(misc: MiscDevice) -> int:
    """Register under major 10, make the node /dev/NAME, return the minor. EBUSY."""
    minor = misc.minor if misc.minor != MISC_DYNAMIC_MINOR else _free_minor()
    register_chrdev(MISC_MAJOR, misc.name, misc.fops, minor, 1)
    mknod(f"/dev/{misc.name}", MISC_MAJOR, minor)
    return minor


def _free_minor() -> int:
    free = next((m for m in _DYNAMIC_MINORS if lookup(MISC_MAJOR, m) is None), None)
    if free is None:
        raise OSError(errno.EBUSY, "no free misc minor number")
    return free


def misc_deregister(misc: MiscDevice) -> None:
    """Undo `misc_register`. The node of /dev/kvm stays, as it is there before any module is."""
    unregister_chrdev(MISC_MAJOR, misc.name)
    if misc.minor != KVM_MINOR:
        unlink(f"/dev/{misc.name}")


def mknod(path: str, major: int, minor: int, mode: int = 0o666) -> Inode:
    """Make a node at `path`; one that is there already is kept where it is the same device."""
    rdev = os.makedev(major, minor)
    with _lock:
        inode = _nodes.setdefault(path, Inode(stat.S_IFCHR | mode, def_chr_fops, rdev))
    if inode.i_rdev != rdev:
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    return inode


def unlink(path: str) -> None:
    """Take a node away; ENOENT."""
    with _lock:
        if _nodes.pop(path, None) is None:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def namei(path: str) -> Inode | None:
    """The inode of one of our nodes; None for any other path."""
    with _lock:
        return _nodes.get(os.path.abspath(path))


# There before its module, which the first open loads (`devname:kvm`).
mknod("/dev/kvm", MISC_MAJOR, KVM_MINOR)
