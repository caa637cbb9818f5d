"""Arguments for ioctls: structs filled with what tends to matter, by type and by field name."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

from anykvm.kvm.ioctl import In, InTail, IoctlRow
from anykvm.uapi import kvm as abi

from .arena import Arena
from .guest import GUEST_PAGES, PAGE

INTERESTING = (
    *range(10), 15, 16, 17, 23, 24, 31, 32, 63, 64, 79, 80, 127, 128, 254, 255, 256, 509, 4095,
    PAGE, PAGE + 1, 2 * PAGE, 0x7FFF, 0x8000, 0xFFFF, 1 << 16, 1 << 20, 1 << 30, (1 << 31) - 1,
    1 << 31, (1 << 32) - 1, 1 << 32, 1 << 46, 1 << 47, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1,
    0xFEE00000, 0xFEC00000, 0xC0000080, 0x174, 0x10, 0x1B, 0x6E0, 0x80000031, 0x20, 0x660, 0xD01,
)  # fmt: skip
KNOWN_MSRS = (
    *(0x10, 0x1B, 0x3B, 0x174, 0x175, 0x277, 0x2FF, 0x400, 0x6E0, 0x4B564D01, 0xC0000080),
    *(0xC0010114, 0xC0010117),
)


def integer(r: random.Random, bits: int) -> int:
    """Mostly small or at some limit, sometimes any."""
    kind = r.random()
    if kind < 0.35:
        return r.randrange(8)
    if kind < 0.8:
        return r.choice(INTERESTING) & (1 << bits) - 1
    return r.getrandbits(bits)


def _pointer_field(a: Arena) -> int:
    return a.guest_address() if a.r.random() < 0.5 else a.pointer(64)


def _descriptor_field(a: Arena) -> int:
    return a.r.choice((*a.eventfds, -1, 0, 999, 1 << 30, (1 << 31) - 1)) & 0xFFFFFFFF


# Fields whose meaning is known from their name.
BY_NAME: dict[str, Callable[[Arena], int]] = {
    "userspace_addr": lambda a: a.guest_address(),
    "memory_size": lambda a: a.r.choice((0, PAGE, 2, 16 * PAGE, GUEST_PAGES * PAGE, 1 << 40)),
    "guest_phys_addr": lambda a: a.r.choice((0, PAGE, 16 * PAGE, 0x1001, 1 << 32, 1 << 63)),
    "slot": lambda a: a.r.choice((*range(6), 508, 509, 32764, 1 << 16, 1 << 31)),
    "dirty_bitmap": _pointer_field,
    "bitmap": _pointer_field,
    "addr": _pointer_field,
    "fd": _descriptor_field,
    "resamplefd": _descriptor_field,
    "index": lambda a: a.r.choice((*KNOWN_MSRS, integer(a.r, 32))),
    "function": lambda a: a.r.choice((0, 1, 4, 7, 0xB, 0xD, 0x40000001, 0x80000001, 0x80000008)),
}
MAX_ENTRIES = 12


def fill(a: Arena, target: Any) -> None:
    """Fill a ctypes object field by field."""
    if a.r.random() < 0.05:
        noise = a.r.randbytes(ctypes.sizeof(target))
        ctypes.memmove(ctypes.addressof(target), noise, len(noise))
        return
    for name, kind, *bits in type(target)._fields_:
        if issubclass(kind, (ctypes.Structure, ctypes.Union)):
            fill(a, getattr(target, name))
        elif issubclass(kind, ctypes.Array):
            _fill_array(a, getattr(target, name))
        elif a.r.random() < 0.7:
            width = bits[0] if bits else 8 * ctypes.sizeof(kind)
            known = BY_NAME.get(name)
            value = known(a) if known else integer(a.r, width)
            setattr(target, name, value & (1 << width) - 1)


def _fill_array(a: Arena, array: Any) -> None:
    if not len(array):
        return
    if issubclass(array._type_, (ctypes.Structure, ctypes.Union, ctypes.Array)):
        nested = _fill_array if issubclass(array._type_, ctypes.Array) else fill
        for entry in list(array)[:MAX_ENTRIES]:
            nested(a, entry)
        return
    for _ in range(min(len(array), a.r.randrange(4))):
        i = a.r.randrange(len(array))
        array[i] = integer(a.r, 8 * ctypes.sizeof(array._type_)) & 0x7F


def struct_argument(a: Arena, kind: type[Any]) -> bytes:
    value = kind()
    if hasattr(kind, "_fields_"):
        fill(a, value)
    else:
        value.value = integer(a.r, 8 * ctypes.sizeof(kind))
    return bytes(value)


def flexible_argument(a: Arena, arg: InTail[Any, Any]) -> bytes:
    """A header that mostly tells the truth about the entries behind it."""
    count = a.r.randrange(MAX_ENTRIES)
    header = arg.header()
    fill(a, header)
    told = count if a.r.random() < 0.9 else integer(a.r, 32)
    setattr(header, arg.count, told)
    return bytes(header) + b"".join(struct_argument(a, arg.entry) for _ in range(count))


def argument(a: Arena, row: IoctlRow[Any]) -> int:
    """The third argument of an ioctl that has a row."""
    arg = row.arg
    if isinstance(arg, InTail):
        data = flexible_argument(a, arg)
    elif isinstance(arg, In):
        data = struct_argument(a, arg.kind)
    elif row.number >> 16 & 0x3FFF:  # a pointer that the row reads in a way of its own
        data = a.r.randbytes(64)
    else:
        return value_argument(a, row.name)
    address = a.pointer(len(data))
    a.fill(address, data)
    return address


CAPABILITIES = tuple(abi.CAPABILITIES)


def value_argument(a: Arena, name: str) -> int:
    """An argument that is no pointer."""
    if name == "KVM_RUN":
        return 0 if a.r.random() < 0.98 else integer(a.r, 64)
    if name == "KVM_CHECK_EXTENSION":
        return a.r.choice((*CAPABILITIES, 9999))
    if name == "KVM_CREATE_VCPU":
        return a.r.choice((0, 1, 2, 3, 254, 255, integer(a.r, 32)))
    return integer(a.r, 64)


def random_number(r: random.Random) -> int:
    """The number of an ioctl that may exist or not."""
    return (
        r.getrandbits(2) << 30
        | r.choice((0, 4, 8, 64, 0x400, 0x3FFF)) << 16
        | 0xAE00
        | r.getrandbits(8)
    )
