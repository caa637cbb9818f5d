"""/dev/kvm itself (api.rst: system ioctls)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Self

from anykvm import fs
from anykvm.api.descriptor import Call, Value
from anykvm.api.device import Attributes
from anykvm.api.flexible import CPUID2, MSR_LIST, read_msrs
from anykvm.api.vm import Vm
from anykvm.uapi import kvm as abi


class Kvm(Attributes):
    """The KVM subsystem, this package's or the host's.

    `backend` is "soft", "host" or "auto"; None and "auto" leave it to ANYKVM_BACKEND and to what
    the host has (`fs.choose`).
    """

    def __init__(self, path: str = "/dev/kvm", *, backend: str | None = None) -> None:
        super().__init__(fs.open(path, os.O_RDWR | os.O_CLOEXEC, backend=backend))

    @classmethod
    def from_fd(cls, fd: int) -> Self:
        """Take over a descriptor that is open already."""
        self = cls.__new__(cls)
        super().__init__(self, fd)
        return self

    api_version = Call(abi.KVM_GET_API_VERSION)
    vcpu_mmap_size = Call(abi.KVM_GET_VCPU_MMAP_SIZE)
    check_extension = Value(abi.KVM_CHECK_EXTENSION)

    def create_vm(self, type: int = 0) -> Vm:
        """KVM_CREATE_VM."""
        return Vm(self.ioctl(abi.KVM_CREATE_VM, type), self.vcpu_mmap_size())

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_SUPPORTED_CPUID: what the processor and KVM can offer a guest."""
        return CPUID2.query(self, abi.KVM_GET_SUPPORTED_CPUID)

    def emulated_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_EMULATED_CPUID: what KVM offers by emulation only."""
        return CPUID2.query(self, abi.KVM_GET_EMULATED_CPUID)

    def msr_index_list(self) -> list[int]:
        """KVM_GET_MSR_INDEX_LIST: the MSRs to save and restore."""
        return MSR_LIST.query(self, abi.KVM_GET_MSR_INDEX_LIST)

    def msr_feature_index_list(self) -> list[int]:
        """KVM_GET_MSR_FEATURE_INDEX_LIST: the MSRs that describe features."""
        return MSR_LIST.query(self, abi.KVM_GET_MSR_FEATURE_INDEX_LIST)

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Feature MSRs by index, up to the first that KVM does not know."""
        return read_msrs(self, indices)

    def mce_cap_supported(self) -> int:
        """KVM_X86_GET_MCE_CAP_SUPPORTED: the value for KVM_X86_SETUP_MCE."""
        capability = ctypes.c_uint64()
        self.ioctl(abi.KVM_X86_GET_MCE_CAP_SUPPORTED, capability)
        return capability.value
