"""ioctl numbers: how direction, size, type and number share one word (`asm-generic/ioctl.h`)."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _ctypes import _SimpleCData

    ArgType = type[ctypes.Structure] | type[_SimpleCData[int]]

_IOC_NONE = 0
_IOC_WRITE = 1
_IOC_READ = 2

_DIRECTIONS = {0: "_IO", _IOC_WRITE: "_IOW", _IOC_READ: "_IOR", _IOC_WRITE | _IOC_READ: "_IOWR"}


def _IOC(direction: int, type: int, nr: int, size: int) -> int:
    return direction << 30 | size << 16 | type << 8 | nr


def _IOC_DIR(number: int) -> int:
    return number >> 30 & 3


def _IOC_SIZE(number: int) -> int:
    return number >> 16 & 0x3FFF


def _IOC_TYPE(number: int) -> int:
    return number >> 8 & 0xFF


def _IOC_NR(number: int) -> int:
    return number & 0xFF


class Ioctl(NamedTuple):
    """One ioctl of the ABI.

    `arg` is the type that the encoded size belongs to, None for `_IO` numbers, whose argument is
    the value itself. The encoded direction is what the header says, which for a few old ioctls
    (KVM_SET_IRQCHIP, KVM_SET_PIT) is not the way the data moves.
    """

    name: str
    number: int
    arg: ArgType | None

    @property
    def nr(self) -> int:
        """The low byte: the ioctl's number within its type."""
        return _IOC_NR(self.number)

    @property
    def size(self) -> int:
        """Bytes of the argument as encoded; a flexible array counts as empty."""
        return _IOC_SIZE(self.number)

    @property
    def direction(self) -> str:
        """`_IO`, `_IOW` (user to kernel), `_IOR` (kernel to user) or `_IOWR`."""
        return _DIRECTIONS[_IOC_DIR(self.number)]
