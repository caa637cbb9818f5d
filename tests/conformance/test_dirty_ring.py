"""The dirty ring, and KVM_SET_USER_MEMORY_REGION2 (api.rst 8.29, 4.140)."""

from __future__ import annotations

import ctypes
from errno import E2BIG, EEXIST, EFAULT, EINVAL, ENXIO
from typing import Any

from anykvm import fs
from anykvm.uapi import kvm as uapi
from anykvm.uapi import later

from .framework import conforms, host_may_differ
from .machine import BAD, Guest, Machine, enable_cap, fails, ioctl, set_memory

PAGE = 4096
RING = 65536
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
OFFSET = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE
SET2 = later.KVM_SET_USER_MEMORY_REGION2


def ring_guest(machine: Machine) -> tuple[Guest, Any]:
    """Stores into pages 2 and 5 of slot 1, which lies at 0x8000; and the vCPU's ring."""
    machine.require(uapi.KVM_CAP_DIRTY_LOG_RING)
    machine.enable_cap(machine.vm, uapi.KVM_CAP_DIRTY_LOG_RING, RING)
    guest = machine.guest(bytes.fromhex("a200a0 a200d0 a200a0 f4"), ram=0x8000)
    memory = machine.memory(8 * PAGE)
    set_memory(guest.vm, 1, 0x8000, 8 * PAGE, memory.address, LOG)
    mapping = fs.mmap(guest.vcpu, RING, offset=OFFSET)
    return guest, mapping.view(uapi.kvm_dirty_gfn * (RING // 16))


def told(ring: Any) -> list[tuple[int, int]]:
    """(slot, page) of the entries that are DIRTY, each once; they are marked as seen."""
    found = []
    for entry in ring:
        if entry.flags == uapi.KVM_DIRTY_GFN_F_DIRTY:
            found.append((entry.slot, entry.offset))
            entry.flags |= uapi.KVM_DIRTY_GFN_F_RESET
    return list(dict.fromkeys(found))


@conforms("KVM_RESET_DIRTY_RINGS", "VM:KVM_ENABLE_CAP", "KVM_RUN")
def test_the_ring_tells_each_page_until_it_is_reset(machine: Machine) -> None:
    guest, ring = ring_guest(machine)
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert told(ring) == [(1, 2), (1, 5)]
    assert ioctl(guest.vm, uapi.KVM_RESET_DIRTY_RINGS) >= 2
    assert ioctl(guest.vm, uapi.KVM_RESET_DIRTY_RINGS) == 0
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert told(ring) == [(1, 2), (1, 5)]


@conforms("KVM_RESET_DIRTY_RINGS", "KVM_GET_DIRTY_LOG", "KVM_CLEAR_DIRTY_LOG")
def test_there_is_either_a_ring_or_a_log(machine: Machine, vm: int) -> None:
    fails(EINVAL, vm, uapi.KVM_RESET_DIRTY_RINGS)
    guest, _ = ring_guest(machine)
    bitmap = ctypes.c_uint64()
    log = uapi.kvm_dirty_log(slot=1)
    log.dirty_bitmap = ctypes.addressof(bitmap)
    fails(ENXIO, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    clear = uapi.kvm_clear_dirty_log(slot=1, num_pages=8)
    clear.dirty_bitmap = ctypes.addressof(bitmap)
    fails(ENXIO, guest.vm, uapi.KVM_CLEAR_DIRTY_LOG, clear)


@conforms("VM:KVM_ENABLE_CAP")
def test_the_size_of_a_ring(machine: Machine, vm: int) -> None:
    most = machine.require(uapi.KVM_CAP_DIRTY_LOG_RING)
    for size, expected in ((0, EINVAL), (RING + 1, EINVAL), (64, EINVAL), (2 * most, E2BIG)):
        fails(expected, vm, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, size))
    machine.enable_cap(vm, uapi.KVM_CAP_DIRTY_LOG_RING, RING)
    fails(EINVAL, vm, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, RING))
    late = machine.create_vm()
    machine.create_vcpu(late)
    fails(EINVAL, late, uapi.KVM_ENABLE_CAP, enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, RING))


def region2(
    slot: int, gpa: int, size: int, address: int, flags: int = 0
) -> later.kvm_userspace_memory_region2:
    return later.kvm_userspace_memory_region2(slot, flags, gpa, size, address)


@conforms("KVM_SET_USER_MEMORY_REGION2", "KVM_RUN")
def test_the_second_form_makes_the_same_slots(machine: Machine) -> None:
    machine.require(later.KVM_CAP_USER_MEMORY2)
    guest = machine.guest(bytes.fromhex("a000c0 f4"), ram=0x8000)
    memory = machine.memory(PAGE)
    memory.buffer[0] = 0x44
    ioctl(guest.vm, SET2, region2(1, 0xC000, PAGE, memory.address))
    fails(EEXIST, guest.vm, SET2, region2(2, 0xC000, PAGE, memory.address))
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFF == 0x44
    set_memory(guest.vm, 1, 0, 0, 0)
    fails(EINVAL, guest.vm, SET2, region2(1, 0, 0, 0))


@conforms("KVM_SET_USER_MEMORY_REGION2")
def test_private_memory_is_for_other_types_of_vm(machine: Machine, vm: int) -> None:
    machine.require(later.KVM_CAP_USER_MEMORY2)
    memory = machine.memory(PAGE).address
    fails(EINVAL, vm, SET2, region2(0, 0, PAGE, memory, later.KVM_MEM_GUEST_MEMFD))
    fails(EFAULT, vm, SET2, BAD)


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
@host_may_differ("a KVM that emulates real mode takes a hole for MMIO")
def test_a_slot_without_memory_is_efault_and_then_works(machine: Machine) -> None:
    guest = machine.guest(bytes.fromhex("a000c0 f4"), ram=0x8000)
    hole = fs.Mapping(PAGE, 0, fs.MAP_PRIVATE | fs.MAP_ANONYMOUS)
    set_memory(guest.vm, 1, 0xC000, PAGE, hole.address)
    fails(EFAULT, guest.vcpu, uapi.KVM_RUN)
    if machine.backend == "soft":
        assert guest.kvm_run.exit_reason == later.KVM_EXIT_MEMORY_FAULT
    protect = ctypes.CDLL(None).mprotect
    assert protect(ctypes.c_void_p(hole.address), ctypes.c_size_t(PAGE), 3) == 0
    hole.buffer[0] = 0x55
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFF == 0x55
