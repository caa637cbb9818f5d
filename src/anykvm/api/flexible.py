"""Structs that end in an array of any length: cpuid, msrs, routing, and KVM's E2BIG protocol."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

from anykvm.api.descriptor import Descriptor
from anykvm.uapi import kvm as abi

E = TypeVar("E")
_FIRST_GUESS = 64
_MOST = 1 << 16


class Flexible(Generic[E]):
    """`header` with its field `count`, followed by elements of type `element`."""

    def __init__(self, header: type[ctypes.Structure], count: str, element: type[Any]) -> None:
        self.header = header
        self.count = count
        self.element = element

    def empty(self, length: int) -> ctypes.Array[ctypes.c_ubyte]:
        """A zeroed struct with room for `length` elements, and its count set to that."""
        size = ctypes.sizeof(self.header) + length * ctypes.sizeof(self.element)
        raw = (ctypes.c_ubyte * size)()
        setattr(self.header.from_buffer(raw), self.count, length)
        return raw

    def pack(self, elements: Sequence[E]) -> ctypes.Array[ctypes.c_ubyte]:
        """The struct with these elements."""
        raw = self.empty(len(elements))
        array = (self.element * len(elements)).from_buffer(raw, ctypes.sizeof(self.header))
        for index, element in enumerate(elements):
            array[index] = element
        return raw

    def length(self, raw: ctypes.Array[ctypes.c_ubyte]) -> int:
        """The count that the struct says it has."""
        length: int = getattr(self.header.from_buffer(raw), self.count)
        return length

    def unpack(self, raw: ctypes.Array[ctypes.c_ubyte]) -> list[E]:
        """The elements, as many as the struct says."""
        kind = self.element * self.length(raw)
        return list(kind.from_buffer(raw, ctypes.sizeof(self.header)))

    def query(self, owner: Descriptor, cmd: int) -> list[E]:
        """Ask with more room until it is enough.

        KVM says E2BIG to too small a count, and for some ioctls leaves the count it needs.
        """
        room = _FIRST_GUESS
        while True:
            raw = self.empty(room)
            try:
                owner.ioctl(cmd, raw)
            except OSError as error:
                if error.errno != errno.E2BIG or room >= _MOST:
                    raise
                needed = self.length(raw)
                room = needed if needed > room else room * 2
            else:
                return self.unpack(raw)


CPUID2: Flexible[abi.kvm_cpuid_entry2] = Flexible(abi.kvm_cpuid2, "nent", abi.kvm_cpuid_entry2)
MSRS: Flexible[abi.kvm_msr_entry] = Flexible(abi.kvm_msrs, "nmsrs", abi.kvm_msr_entry)
MSR_LIST: Flexible[int] = Flexible(abi.kvm_msr_list, "nmsrs", ctypes.c_uint32)
IRQ_ROUTING: Flexible[abi.kvm_irq_routing_entry] = Flexible(
    abi.kvm_irq_routing, "nr", abi.kvm_irq_routing_entry
)
SIGNAL_MASK: Flexible[int] = Flexible(abi.kvm_signal_mask, "len", ctypes.c_uint8)


def read_msrs(owner: Descriptor, indices: Sequence[int]) -> dict[int, int]:
    """KVM_GET_MSRS: values by index, up to the first that KVM does not know."""
    raw = MSRS.pack([abi.kvm_msr_entry(index=index) for index in indices])
    done = owner.ioctl(abi.KVM_GET_MSRS, raw)
    return {entry.index: entry.data for entry in MSRS.unpack(raw)[:done]}


def enable_cap(cap: int, args: Sequence[int], flags: int) -> abi.kvm_enable_cap:
    """The argument of KVM_ENABLE_CAP."""
    request = abi.kvm_enable_cap(cap=cap, flags=flags)
    for index, value in enumerate(args):
        request.args[index] = value
    return request
