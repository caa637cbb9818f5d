"""A descriptor with its ioctls, each one row of a class body.

    get_regs = Get(abi.KVM_GET_REGS, abi.kvm_regs)      vcpu.get_regs() -> kvm_regs
    set_regs = Set(abi.KVM_SET_REGS, abi.kvm_regs)      vcpu.set_regs(regs)
    translate = Exchange(abi.KVM_TRANSLATE, ...)        vcpu.translate(t) -> t, filled in
    nmi = Call(abi.KVM_NMI)                             vcpu.nmi() -> int
    set_tsc_khz = Value(abi.KVM_SET_TSC_KHZ)            vcpu.set_tsc_khz(khz) -> int

What has no row goes through `ioctl(number, argument)`.

A row is a descriptor in Python's sense and generic in its struct, so mypy knows each method's type.
All raise OSError with KVM's errno.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from anykvm import fs

S = TypeVar("S", bound=ctypes.Structure)

if TYPE_CHECKING:
    from _ctypes import _SimpleCData

    Argument = int | ctypes.Structure | ctypes.Union | ctypes.Array[Any] | _SimpleCData[Any]


class Descriptor:
    """Owns a descriptor and closes it; a context manager."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @property
    def fd(self) -> int:
        """The descriptor; ValueError after `close`."""
        if self._fd < 0:
            raise ValueError(f"{type(self).__name__} is closed")
        return self._fd

    def fileno(self) -> int:
        return self.fd

    def ioctl(self, cmd: int, arg: Argument = 0) -> int:
        """Any ioctl: `arg` is a value, an address, or a ctypes object that is passed by address."""
        if isinstance(arg, int):
            return fs.ioctl(self.fd, cmd, arg)
        return fs.ioctl(self.fd, cmd, ctypes.addressof(arg))

    def close(self) -> None:
        """Close the descriptor; a second time does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            fs.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._fd < 0 else f"fd {self._fd}"
        return f"<{type(self).__name__} {state}>"


class Row:
    """An ioctl that is a method of a Descriptor; `name` is the method's."""

    def __init__(self, cmd: int) -> None:
        self.cmd = cmd
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name


class StructRow(Row, Generic[S]):
    """An ioctl whose argument is a pointer to a struct."""

    def __init__(self, cmd: int, kind: type[S]) -> None:
        super().__init__(cmd)
        self.kind = kind

    def check(self, value: S) -> None:
        """KVM would read whatever lies there; a wrong struct is a TypeError instead."""
        if not isinstance(value, self.kind):
            expected, got = self.kind.__name__, type(value).__name__
            raise TypeError(f"{self.name} takes a {expected}, not {got}")


class Get(StructRow[S]):
    """Kernel to user: no argument, returns a struct."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[], S]:
        def get() -> S:
            result = self.kind()
            owner.ioctl(self.cmd, result)
            return result

        return get


class Set(StructRow[S]):
    """User to kernel: takes a struct, returns what the ioctl does, mostly 0."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[S], int]:
        def set(value: S) -> int:
            self.check(value)
            return owner.ioctl(self.cmd, value)

        return set


class Exchange(StructRow[S]):
    """Both ways: takes a struct, which is filled in and returned."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[S], S]:
        def exchange(value: S) -> S:
            self.check(value)
            owner.ioctl(self.cmd, value)
            return value

        return exchange


class Call(Row):
    """No argument."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[], int]:
        return lambda: owner.ioctl(self.cmd)


class Value(Row):
    """The argument is the value itself."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[int], int]:
        return lambda value: owner.ioctl(self.cmd, value)


class Quad(Row):
    """The argument is a pointer to a 64-bit value that the kernel reads."""

    def __get__(self, owner: Descriptor, kind: type[Descriptor]) -> Callable[[int], int]:
        return lambda value: owner.ioctl(self.cmd, ctypes.c_uint64(value))
