"""Memory of the guest: slots, the dirty log, coalesced writes (api.rst 4.8, 4.35, 4.116, 4.117)."""

from __future__ import annotations

import ctypes
from errno import EEXIST, EFAULT, EINVAL, ENOENT

import pytest

from anykvm import fs
from anykvm.uapi import kvm as uapi

from .framework import conforms
from .machine import BAD, Guest, Machine, errno_of, fails, ioctl, set_memory

PAGE = 4096
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
READONLY = uapi.KVM_MEM_READONLY
SET = uapi.KVM_SET_USER_MEMORY_REGION


def region(
    slot: int, gpa: int, size: int, address: int, flags: int = 0
) -> uapi.kvm_userspace_memory_region:
    return uapi.kvm_userspace_memory_region(slot, flags, gpa, size, address)


# Slots.


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_slots_that_cannot_be(machine: Machine, vm: int) -> None:
    memory = machine.memory(4 * PAGE).address
    slots = ioctl(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS)
    for wrong in (
        region(0, 0, PAGE, memory, flags=1 << 20),
        region(0, 1, PAGE, memory),
        region(0, 0, PAGE + 1, memory),
        region(0, 0, PAGE, memory + 1),
        region(0, -PAGE & (1 << 64) - 1, 2 * PAGE, memory),
        region(slots, 0, PAGE, memory),
        region(99 << 16, 0, PAGE, memory),
        region(0, 0, PAGE, 1 << 63),
    ):
        fails(EINVAL, vm, SET, wrong)
    fails(EFAULT, vm, SET, BAD)


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_deleting_a_slot_that_is_not_there(vm: int) -> None:
    fails(EINVAL, vm, SET, region(3, 0, 0, 0))


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_slots_do_not_overlap(machine: Machine, vm: int) -> None:
    memory = machine.memory(4 * PAGE).address
    set_memory(vm, 0, 0x10000, 2 * PAGE, memory)
    for start in (0xF000, 0x10000, 0x11000):
        fails(EEXIST, vm, SET, region(1, start, 2 * PAGE, memory))
    set_memory(vm, 1, 0x12000, PAGE, memory)
    set_memory(vm, 2, 0xF000, PAGE, memory)
    fails(EEXIST, vm, SET, region(1, 0x10000, PAGE, memory))


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_what_can_change_in_a_slot(machine: Machine, vm: int) -> None:
    memory = machine.memory(4 * PAGE).address
    set_memory(vm, 0, 0, 2 * PAGE, memory)
    set_memory(vm, 0, 0, 2 * PAGE, memory)
    set_memory(vm, 0, 0, 2 * PAGE, memory, LOG)
    set_memory(vm, 0, 0x8000, 2 * PAGE, memory)
    fails(EINVAL, vm, SET, region(0, 0x8000, PAGE, memory))
    fails(EINVAL, vm, SET, region(0, 0x8000, 2 * PAGE, memory + PAGE))
    fails(EINVAL, vm, SET, region(0, 0x8000, 2 * PAGE, memory, READONLY))
    set_memory(vm, 0, 0, 0, 0)
    set_memory(vm, 0, 0x8000, PAGE, memory, READONLY)


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_there_are_as_many_slots_as_the_capability_says(machine: Machine, vm: int) -> None:
    memory = machine.memory(PAGE).address
    most = ioctl(vm, uapi.KVM_CHECK_EXTENSION, uapi.KVM_CAP_NR_MEMSLOTS)
    for slot in [*range(509), most - 1]:
        set_memory(vm, slot, slot * PAGE, PAGE, memory)
    for slot in range(0, 509, 3):
        set_memory(vm, slot, 0, 0, 0)
    fails(EEXIST, vm, SET, region(0, PAGE, PAGE, memory))


def store(address: int) -> bytes:
    """mov byte [address], 0x5a; hlt"""
    return b"\xc6\x06" + address.to_bytes(2, "little") + b"\x5a\xf4"


def load(address: int) -> bytes:
    """mov al, [address]; hlt"""
    return b"\xa0" + address.to_bytes(2, "little") + b"\xf4"


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
def test_what_no_slot_covers_is_mmio(machine: Machine) -> None:
    guest = machine.guest(store(0xC000), ram=0x8000)
    guest.run_until(uapi.KVM_EXIT_MMIO)
    mmio = guest.kvm_run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (0xC000, 1, 1, 0x5A)
    guest.run_until(uapi.KVM_EXIT_HLT)


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
def test_a_read_of_mmio_takes_what_the_vmm_says(machine: Machine) -> None:
    guest = machine.guest(load(0xC000), ram=0x8000)
    guest.run_until(uapi.KVM_EXIT_MMIO)
    mmio = guest.kvm_run.mmio
    assert (mmio.phys_addr, mmio.len, mmio.is_write) == (0xC000, 1, 0)
    mmio.data[0] = 0x77
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFF == 0x77


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
def test_a_read_only_slot_is_read_and_its_writes_exit(machine: Machine) -> None:
    machine.require(uapi.KVM_CAP_READONLY_MEM)
    guest = machine.guest(load(0xC000)[:-1] + store(0xC000), ram=0x8000)
    rom = machine.memory(PAGE)
    rom.buffer[0] = 0x33
    set_memory(guest.vm, 1, 0xC000, PAGE, rom.address, READONLY)
    guest.run_until(uapi.KVM_EXIT_MMIO)
    assert (guest.kvm_run.mmio.phys_addr, guest.kvm_run.mmio.is_write) == (0xC000, 1)
    assert guest.regs().rax & 0xFF == 0x33
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert rom.buffer[0] == 0x33


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
def test_a_slot_that_was_moved_or_deleted_is_no_longer_there(machine: Machine) -> None:
    guest = machine.guest(load(0xC000), ram=0x8000)
    memory = machine.memory(PAGE)
    memory.buffer[0] = 0x44
    set_memory(guest.vm, 1, 0xC000, PAGE, memory.address)
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFF == 0x44
    set_memory(guest.vm, 1, 0xD000, PAGE, memory.address)
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_MMIO)
    guest.run_until(uapi.KVM_EXIT_HLT)
    set_memory(guest.vm, 1, 0xC000, PAGE, memory.address)
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_HLT)
    set_memory(guest.vm, 1, 0, 0, 0)
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_MMIO)


@conforms("KVM_SET_USER_MEMORY_REGION", "KVM_RUN")
def test_two_slots_may_have_the_same_memory(machine: Machine) -> None:
    guest = machine.guest(store(0xC000)[:-1] + load(0xD000), ram=0x8000)
    memory = machine.memory(PAGE)
    for slot, gpa in ((1, 0xC000), (2, 0xD000)):
        set_memory(guest.vm, slot, gpa, PAGE, memory.address)
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert guest.regs().rax & 0xFF == 0x5A


# The dirty log.


def dirty_log(
    slot: int, words: int = 1
) -> tuple[uapi.kvm_dirty_log, ctypes.Array[ctypes.c_uint64]]:
    bitmap = (ctypes.c_uint64 * words)()
    log = uapi.kvm_dirty_log(slot=slot)
    log.dirty_bitmap = ctypes.addressof(bitmap)
    return log, bitmap


def clear_log(
    slot: int, first: int, pages: int, bits: int
) -> tuple[uapi.kvm_clear_dirty_log, ctypes.c_uint64]:
    bitmap = ctypes.c_uint64(bits)
    log = uapi.kvm_clear_dirty_log(slot=slot, first_page=first, num_pages=pages)
    log.dirty_bitmap = ctypes.addressof(bitmap)
    return log, bitmap


def dirty_pages(vm: int, slot: int) -> int:
    log, bitmap = dirty_log(slot)
    ioctl(vm, uapi.KVM_GET_DIRTY_LOG, log)
    return bitmap[0]


def logging_guest(machine: Machine, *pages: int) -> Guest:
    """It stores into these pages of slot 1, which lies at 0x8000, and halts."""
    code = b"".join(store(0x8000 + page * PAGE)[:-1] for page in pages)
    guest = machine.guest(code + b"\xf4", ram=0x8000)
    memory = machine.memory(8 * PAGE)
    set_memory(guest.vm, 1, 0x8000, 8 * PAGE, memory.address, LOG)
    return guest


@conforms("KVM_GET_DIRTY_LOG", "KVM_SET_USER_MEMORY_REGION")
def test_the_log_has_the_pages_written_since_it_was_read(machine: Machine) -> None:
    guest = logging_guest(machine, 1, 3, 6)
    assert dirty_pages(guest.vm, 1) == 0
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert dirty_pages(guest.vm, 1) == 0b1001010
    assert dirty_pages(guest.vm, 1) == 0
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert dirty_pages(guest.vm, 1) == 0b1001010


@conforms("KVM_GET_DIRTY_LOG")
def test_a_log_that_is_not_kept(machine: Machine) -> None:
    guest = logging_guest(machine, 1)
    log, _bitmap = dirty_log(0)
    fails(ENOENT, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    log.slot = 7
    fails(ENOENT, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    log.slot = 0x7FFF
    fails(EINVAL, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    log.slot = 99 << 16
    fails(EINVAL, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    log.slot, log.dirty_bitmap = 1, BAD
    guest.run_until(uapi.KVM_EXIT_HLT)
    fails(EFAULT, guest.vm, uapi.KVM_GET_DIRTY_LOG, log)
    fails(EFAULT, guest.vm, uapi.KVM_GET_DIRTY_LOG, BAD)


@conforms("KVM_CLEAR_DIRTY_LOG", "KVM_GET_DIRTY_LOG", "VM:KVM_ENABLE_CAP")
@pytest.mark.parametrize("flags", [1, 3])
def test_a_manual_log_is_cleared_on_its_own(machine: Machine, vm: int, flags: int) -> None:
    machine.enable_cap(vm, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags)
    guest = logging_guest(machine, 1, 3)
    everything = 0xFF if flags & uapi.KVM_DIRTY_LOG_INITIALLY_SET else 0
    assert dirty_pages(vm, 1) == everything
    log, _bitmap = clear_log(1, 0, 8, everything)
    ioctl(vm, uapi.KVM_CLEAR_DIRTY_LOG, log)
    assert dirty_pages(vm, 1) == 0
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert dirty_pages(vm, 1) == dirty_pages(vm, 1) == 0b1010
    log, _bitmap = clear_log(1, 0, 8, 0b0010)
    ioctl(vm, uapi.KVM_CLEAR_DIRTY_LOG, log)
    assert dirty_pages(vm, 1) == 0b1000
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_HLT)
    assert dirty_pages(vm, 1) == 0b1010


@conforms("KVM_CLEAR_DIRTY_LOG")
@pytest.mark.parametrize(
    ("slot", "first", "pages", "expected"),
    [
        (0, 0, 8, ENOENT),
        (9, 0, 8, ENOENT),
        (0x7FFF, 0, 8, EINVAL),
        (1, 1, 7, EINVAL),
        (1, 0, 7, EINVAL),
        (1, 0, 9, EINVAL),
        (1, 64, 8, EINVAL),
        (1, 0, 8, 0),
    ],
)
def test_clearing_takes_whole_words(
    machine: Machine, vm: int, slot: int, first: int, pages: int, expected: int
) -> None:
    machine.enable_cap(vm, uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 1)
    logging_guest(machine, 1)
    log, _bitmap = clear_log(slot, first, pages, 0)
    assert errno_of(vm, uapi.KVM_CLEAR_DIRTY_LOG, log) == expected
    fails(EFAULT, vm, uapi.KVM_CLEAR_DIRTY_LOG, BAD)


# Coalesced writes.


def ring_of(machine: Machine, guest: Guest) -> list[tuple[int, int, bytes, int]]:
    """The writes in the ring (address, length, data, port?), which then is empty."""
    page = machine.require(uapi.KVM_CAP_COALESCED_MMIO)
    base = guest.area.address + page * PAGE
    ring = uapi.kvm_coalesced_mmio_ring.from_address(base)
    slots = (uapi.kvm_coalesced_mmio * 170).from_address(base + ctypes.sizeof(ring))
    found = []
    while ring.first != ring.last:
        entry = slots[ring.first]
        found.append((entry.phys_addr, entry.len, bytes(entry.data[: entry.len]), entry.pio))
        ring.first = (ring.first + 1) % 170
    return found


def zone(address: int, size: int, pio: int = 0) -> uapi.kvm_coalesced_mmio_zone:
    made = uapi.kvm_coalesced_mmio_zone(addr=address, size=size)
    made.pio = pio
    return made


@conforms("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
def test_writes_to_a_zone_are_collected(machine: Machine) -> None:
    guest = machine.guest(store(0xC000)[:-1] + store(0xC004)[:-1] + store(0xC010), ram=0x8000)
    where = zone(0xC000, 8)
    ioctl(guest.vm, uapi.KVM_REGISTER_COALESCED_MMIO, where)
    guest.run_until(uapi.KVM_EXIT_MMIO)
    assert guest.kvm_run.mmio.phys_addr == 0xC010
    assert ring_of(machine, guest) == [(0xC000, 1, b"\x5a", 0), (0xC004, 1, b"\x5a", 0)]
    guest.run_until(uapi.KVM_EXIT_HLT)
    ioctl(guest.vm, uapi.KVM_UNREGISTER_COALESCED_MMIO, where)
    guest.reset()
    guest.run_until(uapi.KVM_EXIT_MMIO)
    assert guest.kvm_run.mmio.phys_addr == 0xC000


@conforms("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
def test_writes_to_ports_are_collected(machine: Machine) -> None:
    machine.require(uapi.KVM_CAP_COALESCED_PIO)
    guest = machine.guest(bytes.fromhex("b041e610b042e610e620f4"))
    ioctl(guest.vm, uapi.KVM_REGISTER_COALESCED_MMIO, zone(0x10, 1, 1))
    guest.run_until(uapi.KVM_EXIT_IO)
    assert guest.kvm_run.io.port == 0x20
    assert ring_of(machine, guest) == [(0x10, 1, b"A", 1), (0x10, 1, b"B", 1)]


@conforms("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
def test_a_full_ring_lets_the_write_exit(machine: Machine) -> None:
    # mov cx, 400; again: mov [0xc000], cl; loop again; hlt
    guest = machine.guest(bytes.fromhex("b99001880e00c0e2faf4"), ram=0x8000)
    ioctl(guest.vm, uapi.KVM_REGISTER_COALESCED_MMIO, zone(0xC000, 8))
    collected, exits = 0, 0
    while guest.run_until(uapi.KVM_EXIT_MMIO, uapi.KVM_EXIT_HLT) == uapi.KVM_EXIT_MMIO:
        exits += 1
        collected += len(ring_of(machine, guest))
    collected += len(ring_of(machine, guest))
    assert collected + exits == 400
    assert exits >= 2


@conforms("KVM_REGISTER_COALESCED_MMIO", "KVM_UNREGISTER_COALESCED_MMIO")
@pytest.mark.parametrize(
    "cmd", [uapi.KVM_REGISTER_COALESCED_MMIO, uapi.KVM_UNREGISTER_COALESCED_MMIO]
)
def test_bad_zones(vm: int, cmd: int) -> None:
    fails(EINVAL, vm, cmd, zone(0, 8, 2))
    fails(EFAULT, vm, cmd, BAD)
    assert ioctl(vm, uapi.KVM_UNREGISTER_COALESCED_MMIO, zone(0x5000, 8)) == 0


@conforms("KVM_SET_USER_MEMORY_REGION")
def test_the_slots_own_nothing_of_the_callers(machine: Machine, vm: int) -> None:
    memory = fs.Mapping(PAGE, fs.PROT_READ | fs.PROT_WRITE, fs.MAP_PRIVATE | fs.MAP_ANONYMOUS)
    set_memory(vm, 0, 0, PAGE, memory.address)
    memory.unmap()
    set_memory(vm, 0, 0, 0, 0)
