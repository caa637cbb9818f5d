"""What conformance tests are written with: descriptors of one backend, and the guest's memory.

Everything goes through `anykvm.fs`, which calls this package's KVM for its own descriptors and the
system for those of the host.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

from anykvm import fs
from anykvm.fs.backend import hardware_virtualization
from anykvm.uapi import kvm as uapi
from anykvm.uapi.names import capability_name, exit_name, ioctl_name

PROVIDED = ("machine", "kvm", "vm", "irqchip_vm", "vcpu")  # what a test may name
BAD = 0x10  # an address where nothing is
Argument = int | ctypes.Structure | ctypes.Array[Any] | Any
CODE_AT = 0x1000
NO_GUEST = (uapi.KVM_EXIT_INTERNAL_ERROR, uapi.KVM_EXIT_FAIL_ENTRY)


PROVOKED: set[tuple[str, str, int]] = set()  # kind of descriptor, ioctl, errno: seen on soft


class NotAvailable(Exception):
    """The host's KVM cannot do what the test is about; never raised on soft."""


def _kind(fd: int) -> str | None:
    """The kind of one of our descriptors; None for the system's."""
    file = fs.fget(fd)
    if file is None:
        return None
    from anykvm.kvm.tables import FOPS

    try:
        return next((kind for kind, fops in FOPS.items() if file.f_op is fops), None)
    finally:
        fs.fput(file)


def _check_stated(fd: int, cmd: int, number: int) -> None:
    """An errno that one of our ioctls gives must be in its row."""
    kind = _kind(fd)
    if kind is None:
        return
    from anykvm.kvm.tables import tables, unknown

    row = next((t.rows[cmd] for t in tables(kind) if cmd in t.rows), None)
    absent = next((a for t in tables(kind) if (a := t.find_absent(cmd))), None)
    if number == errno.EIO and kind != "system":
        return  # any ioctl, from another process than the VM's
    if row is not None:
        PROVOKED.add((kind, row.name, number))
        allowed = {code for code, _ in row.all_errors()}
    else:
        allowed = {absent.errno if absent else unknown(kind)}
    assert number in allowed, (
        f"{ioctl_name(cmd)} ({kind}) gave {errno.errorcode[number]}, which its row does not have:"
        f" say when in errors={{{errno.errorcode[number]}: ...}}"
    )


def ioctl(fd: int, cmd: int, arg: Argument = 0) -> int:
    """ioctl(2); `arg` is a value or an object of ctypes, whose address is passed."""
    address = arg if isinstance(arg, int) else ctypes.addressof(arg)
    try:
        return fs.ioctl(fd, cmd, address)
    except OSError as error:
        _check_stated(fd, cmd, error.errno or 0)
        raise


def errno_of(fd: int, cmd: int, arg: Argument = 0) -> int:
    """The errno that an ioctl fails with, 0 where it does not."""
    try:
        ioctl(fd, cmd, arg)
    except OSError as error:
        return error.errno or 0
    return 0


def fails(expected: int, fd: int, cmd: int, arg: Argument = 0) -> None:
    """The ioctl must fail with this errno."""
    got = errno_of(fd, cmd, arg)
    names = errno.errorcode | {0: "success"}
    assert got == expected, f"{ioctl_name(cmd)}: {names[got]}, expected {names[expected]}"


def get(fd: int, cmd: int, kind: type[Any]) -> Any:
    """The struct that an ioctl fills in."""
    value = kind()
    ioctl(fd, cmd, value)
    return value


def flexible(header: ctypes.Structure, entries: Any) -> ctypes.Array[ctypes.c_ubyte]:
    """A header and its flexible array in one piece of memory."""
    raw = bytes(header) + b"".join(bytes(entry) for entry in entries)
    return (ctypes.c_ubyte * len(raw)).from_buffer_copy(raw)


def entries(raw: ctypes.Array[ctypes.c_ubyte], header: type[Any], kind: type[Any], n: int) -> Any:
    """The first `n` entries behind a header."""
    return (kind * n).from_buffer_copy(raw, ctypes.sizeof(header))


class Machine:
    """The descriptors of a test, made when first asked for and closed in the end."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._close = ExitStack()
        self._open: list[int] = []

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()
        while self._open:
            self.close(self._open[-1])

    def keep(self, fd: int) -> int:
        """Close this descriptor with the others, unless `close` has."""
        self._open.append(fd)
        return fd

    def close(self, fd: int) -> None:
        """close(2), now."""
        self._open.remove(fd)
        fs.close(fd)

    def open(self) -> int:
        return self.keep(fs.open("/dev/kvm", backend=self.backend))

    @property
    def machine(self) -> Machine:
        return self

    @cached_property
    def kvm(self) -> int:
        """/dev/kvm."""
        return self.open()

    def create_vm(self) -> int:
        return self.keep(ioctl(self.kvm, uapi.KVM_CREATE_VM, 0))

    @cached_property
    def vm(self) -> int:
        """A VM without anything."""
        return self.create_vm()

    @cached_property
    def irqchip_vm(self) -> int:
        """A VM with the in-kernel interrupt controllers, before any vCPU."""
        vm = self.create_vm()
        self.require(uapi.KVM_CAP_IRQCHIP)
        ioctl(vm, uapi.KVM_CREATE_IRQCHIP)
        return vm

    def create_vcpu(self, vm: int, vcpu_id: int = 0) -> int:
        return self.keep(ioctl(vm, uapi.KVM_CREATE_VCPU, vcpu_id))

    @cached_property
    def vcpu(self) -> int:
        """vCPU 0 of `vm`, at power-on."""
        return self.create_vcpu(self.vm)

    def require(self, cap: int, value: int = 1) -> int:
        """The value of a capability that the test needs at least `value` of."""
        found = ioctl(self.kvm, uapi.KVM_CHECK_EXTENSION, cap)
        if found < value and self.backend == "host":
            raise NotAvailable(f"{capability_name(cap)} is {found}")
        assert found >= value, f"{capability_name(cap)} is {found}"
        return found

    def enable_cap(self, fd: int, cap: int, *args: int, flags: int = 0) -> int:
        return ioctl(fd, uapi.KVM_ENABLE_CAP, enable_cap(cap, *args, flags=flags))

    def memory(self, size: int) -> fs.Mapping:
        """Anonymous memory of the caller."""
        made = fs.Mapping(size, fs.PROT_READ | fs.PROT_WRITE, fs.MAP_SHARED | fs.MAP_ANONYMOUS)
        self._close.callback(made.unmap)
        return made

    def kvm_run(self, vcpu: int) -> uapi.kvm_run:
        """The vCPU's shared page."""
        return self.map(vcpu).view(uapi.kvm_run)

    def map(self, vcpu: int) -> fs.Mapping:
        """The whole area that a vCPU's descriptor maps."""
        size = ioctl(self.kvm, uapi.KVM_GET_VCPU_MMAP_SIZE)
        made = fs.mmap(vcpu, size)
        self._close.callback(fs.munmap, made)
        return made

    def guest(
        self, code: bytes, *, vm: int | None = None, vcpu_id: int = 0, ram: int = 0x10000
    ) -> Guest:
        """A vCPU in real mode at `code`, with RAM from 0 on in slot 0, and the stack at its end."""
        return Guest(self, self.vm if vm is None else vm, vcpu_id, code, ram)

    @contextmanager
    def open_files(self) -> Iterator[None]:
        """No descriptor is left over at the end."""
        before = set(os.listdir("/proc/self/fd"))
        yield
        assert set(os.listdir("/proc/self/fd")) == before


def enable_cap(cap: int, *args: int, flags: int = 0) -> uapi.kvm_enable_cap:
    """The argument of KVM_ENABLE_CAP."""
    made = uapi.kvm_enable_cap(cap=cap, flags=flags)
    made.args[: len(args)] = args
    return made


def set_memory(vm: int, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
    """KVM_SET_USER_MEMORY_REGION."""
    region = uapi.kvm_userspace_memory_region(slot, flags, gpa, size, address)
    ioctl(vm, uapi.KVM_SET_USER_MEMORY_REGION, region)


class Guest:
    """A vCPU with code to run."""

    def __init__(self, machine: Machine, vm: int, vcpu_id: int, code: bytes, ram: int) -> None:
        self.machine, self.vm = machine, vm
        self.vcpu = machine.create_vcpu(vm, vcpu_id)
        self.area = machine.map(self.vcpu)
        self.kvm_run = self.area.view(uapi.kvm_run)
        self.ram = machine.memory(ram)
        set_memory(vm, 0, 0, ram, self.ram.address)
        self.write(CODE_AT, code)
        self.reset()

    def reset(self, rip: int = CODE_AT, **registers: int) -> None:
        """Real mode, flat from 0, at `rip`."""
        sregs = get(self.vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            segment.base = segment.selector = 0
        ioctl(self.vcpu, uapi.KVM_SET_SREGS, sregs)
        self.set_regs(rip=rip, rsp=self.ram.length - 0x10, rflags=2, **registers)

    def set_regs(self, **registers: int) -> None:
        regs = self.regs()
        for name, value in registers.items():
            setattr(regs, name, value)
        ioctl(self.vcpu, uapi.KVM_SET_REGS, regs)

    def regs(self) -> uapi.kvm_regs:
        return get(self.vcpu, uapi.KVM_GET_REGS, uapi.kvm_regs)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(self.ram.address + address, data, len(data))

    def read(self, address: int, length: int) -> bytes:
        return ctypes.string_at(self.ram.address + address, length)

    def word(self, address: int) -> int:
        return struct.unpack("<I", self.read(address, 4))[0]

    def run(self) -> int:
        """KVM_RUN; the exit's reason. A host's KVM that cannot run guests is not available."""
        ioctl(self.vcpu, uapi.KVM_RUN)
        reason = self.kvm_run.exit_reason
        if reason in NO_GUEST and self.machine.backend == "host" and not hardware_virtualization():
            raise NotAvailable(f"{exit_name(reason)}: it has no hardware virtualization")
        return reason

    def run_until(self, *reasons: int) -> int:
        """KVM_RUN, which must end with one of these reasons."""
        reason = self.run()
        wanted = " or ".join(map(exit_name, reasons))
        assert reason in reasons, f"{exit_name(reason)} at {self.regs().rip:#x}, not {wanted}"
        return reason

    def io(self) -> bytes:
        """The data of a KVM_EXIT_IO."""
        io = self.kvm_run.io
        start = self.area.address + io.data_offset
        return ctypes.string_at(start, io.size * io.count)

    def answer(self, data: bytes) -> None:
        """The data for a KVM_EXIT_IO that reads."""
        ctypes.memmove(self.area.address + self.kvm_run.io.data_offset, data, len(data))
