"""Hiding what a KVM has: capabilities with the ioctls that they announce, and CPUID bits."""

from __future__ import annotations

import ctypes
import errno
import os

from anykvm.fs.intercept import IoctlCall, Proceed
from anykvm.fs.task import current
from anykvm.kvm.tables import rows
from anykvm.uapi import kvm as abi
from anykvm.x86.cpu_models import hidden_features
from anykvm.x86.cpuid import FEATURES, Reg

CpuidBit = tuple[int, Reg, int]  # leaf (its subleaf 0), register, bit
XSAVE_LEAF = 0xD


def _refused(number: int, what: str) -> OSError:
    return OSError(number, f"{os.strerror(number)}: {what} is hidden")


class HiddenCapability:
    """KVM_CHECK_EXTENSION says 0, KVM_ENABLE_CAP EINVAL, and the ioctls that came with the
    capability are as unknown as to a KVM from before it (ENOTTY).
    """

    def __init__(self, cap: int) -> None:
        self.cap = cap
        self.ioctls = {row.number for _, row in rows() if row.capability == cap}

    def __call__(self, call: IoctlCall, proceed: Proceed) -> int:
        if call.cmd == abi.KVM_CHECK_EXTENSION and call.arg == self.cap:
            return 0
        if call.cmd in self.ioctls:
            raise _refused(errno.ENOTTY, "its capability")
        if call.cmd == abi.KVM_ENABLE_CAP:
            wanted = current().mm.read_object(call.arg, abi.kvm_enable_cap)
            if wanted.cap == self.cap:
                raise _refused(errno.EINVAL, "the capability")
        return proceed()


def cpuid_bit(name: str) -> CpuidBit:
    """A feature's leaf, register and bit by its name in /proc/cpuinfo; ValueError."""
    for feature in FEATURES:
        if feature.name == name:
            return feature.function, feature.reg, feature.bit
    known = ", ".join(feature.name for feature in FEATURES)
    raise ValueError(f"there is no CPUID feature {name!r}; known are {known}")


class HiddenCpuid:
    """KVM_GET_SUPPORTED_CPUID does not offer some bits. Without XSAVE, leaf 0DH is empty."""

    def __init__(self, *bits: CpuidBit) -> None:
        self.bits: dict[int, list[CpuidBit]] = {}
        for bit in bits:
            self.bits.setdefault(bit[0], []).append(bit)
        self.no_xsave = cpuid_bit("xsave") in bits

    def __call__(self, call: IoctlCall, proceed: Proceed) -> int:
        result = proceed()
        if call.cmd == abi.KVM_GET_SUPPORTED_CPUID:
            self._clear(call.arg)
        return result

    def _clear(self, address: int) -> None:
        mm = current().mm
        count = mm.read_object(address, abi.kvm_cpuid2).nent
        array = (abi.kvm_cpuid_entry2 * count)()
        start = address + ctypes.sizeof(abi.kvm_cpuid2)
        mm.read_into(start, array)
        for entry in array:
            if entry.function == XSAVE_LEAF and self.no_xsave:
                entry.eax = entry.ebx = entry.ecx = entry.edx = 0
            elif entry.index == 0:
                self._clear_bits(entry)
        mm.write_object(start, array)

    def _clear_bits(self, entry: abi.kvm_cpuid_entry2) -> None:
        for _, reg, bit in self.bits.get(entry.function, ()):
            register = reg.name.lower()
            setattr(entry, register, getattr(entry, register) & ~(1 << bit))


def lesser_processor(model: str) -> HiddenCpuid:
    """What a model of x86/cpu_models.py lacks, hidden; ValueError."""
    return HiddenCpuid(*map(cpuid_bit, hidden_features(model)))
