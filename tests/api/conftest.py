"""A KVM that is none: descriptors that note each ioctl with its argument, and answer as told."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from anykvm import fs
from anykvm.api import Kvm, Vcpu, Vm
from anykvm.uapi import kvm as abi
from anykvm.uapi.names import IOCTLS

Answer = int | OSError | Callable[[int], int]


@dataclass
class FakeKvm:
    """`calls` is (file, ioctl number, argument struct or value); `answers` by ioctl number.

    An answer is a return value, an error, or a function of the argument's address. A struct ioctl
    without one gets its bytes noted and is 0.
    """

    calls: list[tuple[str, int, Any]] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers |= {
            abi.KVM_GET_API_VERSION: 12,
            abi.KVM_GET_VCPU_MMAP_SIZE: 3 * 4096,
            abi.KVM_CREATE_VM: lambda _: self.descriptor("kvm-vm"),
            abi.KVM_CREATE_VCPU: lambda n: self.descriptor(f"kvm-vcpu:{n}", 3 * 4096),
        }

    def fops(self) -> fs.FileOperations:
        return fs.FileOperations(
            unlocked_ioctl=self.ioctl, mmap=lambda file, vma: None, release=self.release
        )

    def descriptor(self, name: str, size: int = 0) -> int:
        return fs.anon_inode_getfd(name, self.fops(), name, size=size)

    def release(self, inode: fs.Inode, file: fs.File) -> None:
        self.released.append(file.private_data or "kvm")

    def ioctl(self, file: fs.File, cmd: int, arg: int) -> int:
        row = next(r for r in IOCTLS.values() if r.number == cmd)
        value = fs.current().mm.read_object(arg, row.arg) if row.arg and arg else arg
        self.calls.append((file.private_data or "kvm", cmd, value))
        answer = self.answers.get(cmd, 0)
        if isinstance(answer, OSError):
            raise answer
        return answer if isinstance(answer, int) else answer(arg)

    def last(self, cmd: int) -> Any:
        """The argument of the last call of `cmd`."""
        return [value for _, number, value in self.calls if number == cmd][-1]

    def fill(self, cmd: int, value: ctypes.Structure) -> None:
        """Let `cmd` copy `value` out."""

        def copy_out(address: int) -> int:
            fs.current().mm.write_object(address, value)
            return 0

        self.answers[cmd] = copy_out

    def fail(self, cmd: int, number: int) -> None:
        """Let `cmd` fail."""
        self.answers[cmd] = OSError(number, os.strerror(number))

    def answer_list(self, cmd: int, count: type[ctypes.Structure], entries: bytes, n: int) -> None:
        """Let `cmd` return `n` entries, or E2BIG and the count it needs where there is no room."""

        def copy_out(address: int) -> int:
            mm = fs.current().mm
            room = int.from_bytes(mm.read(address, 4), "little")
            mm.write(address, n.to_bytes(4, "little"))
            if room < n:
                raise OSError(errno.E2BIG, "too many")
            mm.write(address + ctypes.sizeof(count), entries)
            return 0

        self.answers[cmd] = copy_out


@pytest.fixture
def fake() -> Iterator[FakeKvm]:
    device = FakeKvm()
    misc = fs.MiscDevice(240, "fake-kvm", device.fops())
    fs.misc_register(misc)
    yield device
    fs.misc_deregister(misc)


@pytest.fixture
def kvm(fake: FakeKvm) -> Iterator[Kvm]:
    with Kvm("/dev/fake-kvm") as system:
        yield system


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as machine:
        yield machine


@pytest.fixture
def vcpu(vm: Vm) -> Iterator[Vcpu]:
    with vm.create_vcpu(0) as processor:
        yield processor
