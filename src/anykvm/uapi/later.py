"""What came to the ABI after the header that kvm.py is generated from, by hand: the second form of
KVM_SET_USER_MEMORY_REGION and the exit for memory faults (Linux 6.8).
"""

from __future__ import annotations

import ctypes
from ctypes import Structure
from ctypes import c_uint32 as u32
from ctypes import c_uint64 as u64

from anykvm.uapi.ioctl import Ioctl
from anykvm.uapi.kvm import KVMIO

KVM_CAP_USER_MEMORY2 = 231
KVM_CAP_MEMORY_FAULT_INFO = 232
KVM_EXIT_MEMORY_FAULT = 39
KVM_MEM_GUEST_MEMFD = 1 << 2
KVM_MEMORY_EXIT_FLAG_PRIVATE = 1 << 3


class kvm_userspace_memory_region2(Structure):
    """`guest_memfd` and its offset count only with KVM_MEM_GUEST_MEMFD."""

    _fields_ = [
        ("slot", u32),
        ("flags", u32),
        ("guest_phys_addr", u64),
        ("memory_size", u64),
        ("userspace_addr", u64),
        ("guest_memfd_offset", u64),
        ("guest_memfd", u32),
        ("pad1", u32),
        ("pad2", u64 * 14),
    ]
    slot: int
    flags: int
    guest_phys_addr: int
    memory_size: int
    userspace_addr: int
    guest_memfd_offset: int
    guest_memfd: int


class kvm_run_memory_fault(Structure):
    """`kvm_run.memory_fault`, where the other exits' structs are."""

    _fields_ = [("flags", u64), ("gpa", u64), ("size", u64)]
    flags: int
    gpa: int
    size: int


assert ctypes.sizeof(kvm_userspace_memory_region2) == 160
KVM_SET_USER_MEMORY_REGION2 = 1 << 30 | 160 << 16 | KVMIO << 8 | 0x49  # _IOW

IOCTLS: dict[str, Ioctl] = {
    "KVM_SET_USER_MEMORY_REGION2": Ioctl(
        "KVM_SET_USER_MEMORY_REGION2", KVM_SET_USER_MEMORY_REGION2, kvm_userspace_memory_region2
    )
}
EXIT_REASONS: dict[int, str] = {KVM_EXIT_MEMORY_FAULT: "KVM_EXIT_MEMORY_FAULT"}
CAPABILITIES: dict[int, str] = {
    KVM_CAP_USER_MEMORY2: "KVM_CAP_USER_MEMORY2",
    KVM_CAP_MEMORY_FAULT_INFO: "KVM_CAP_MEMORY_FAULT_INFO",
}
