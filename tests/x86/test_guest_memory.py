"""Slots that change under running vCPUs, and slots without memory behind them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Vcpu
from anykvm.uapi import kvm as uapi
from anykvm.uapi import later

from .long_guest import long_guest
from .real_guest import PAGE, RealGuest, Runner, real_guest

LOG, READONLY = uapi.KVM_MEM_LOG_DIRTY_PAGES, uapi.KVM_MEM_READONLY
DATA = 0x8000
COPY = bytes.fromhex("a10080 a30070 ebf8")  # again: mov ax, [8000]; mov [7000], ax; jmp again
LOAD = bytes.fromhex("a10080 a30070 f4")
STORE = bytes.fromhex("b83412 a30080 f4")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


def protect(address: int, prot: int) -> None:
    assert _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), prot) == 0


def map_fixed(address: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    where, size = ctypes.c_void_p(address), ctypes.c_size_t(PAGE)
    assert _libc.mmap(where, size, 3, flags, -1, 0) == address


def unmap(address: int) -> None:
    assert _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(PAGE)) == 0


def reserved() -> int:
    """A page of address space of our own to which nothing else will be mapped in this test."""
    found = int(
        _libc.mmap(None, ctypes.c_size_t(PAGE), 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    )
    return found


def run_errno(vcpu: Vcpu) -> int:
    try:
        vcpu.run()
    except OSError as error:
        return error.errno or 0
    return 0


def memory_fault(vcpu: Vcpu) -> tuple[int, int, int]:
    """KVM_RUN fails with the exit for it: flags, address, size."""
    assert run_errno(vcpu) == errno.EFAULT
    assert vcpu.kvm_run.exit_reason == later.KVM_EXIT_MEMORY_FAULT
    offset = uapi.kvm_run.hw.offset
    fault = later.kvm_run_memory_fault.from_buffer(vcpu.kvm_run, offset)
    return fault.flags, fault.gpa, fault.size


def slot(guest: RealGuest, hva: int, flags: int = 0, size: int = PAGE, number: int = 1) -> None:
    guest.vm.set_user_memory_region(number, DATA, size, hva, flags)


@pytest.mark.parametrize("code", [LOAD, STORE])
def test_a_hole_is_efault_until_it_is_filled(code: bytes) -> None:
    with real_guest() as guest:
        hva = reserved()
        slot(guest, hva)
        vcpu = guest.vcpu(code)
        for _ in range(2):
            assert memory_fault(vcpu) == (0, DATA, PAGE)
        rip = vcpu.get_regs().rip
        assert rip == (0x1000 if code == LOAD else 0x1003)
        map_fixed(hva)
        ctypes.memmove(hva, b"\x78\x56", 2)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert (guest.memory.read(0x7000, 2), ctypes.string_at(hva, 2)) == (
            (b"\x78\x56", b"\x78\x56") if code == LOAD else (b"\0\0", b"\x34\x12")
        )
        unmap(hva)


def test_memory_unmapped_after_the_guest_has_used_it() -> None:
    with real_guest() as guest:
        hva = reserved()
        map_fixed(hva)
        slot(guest, hva)
        vcpu = guest.vcpu(COPY)
        runner = Runner(vcpu, lambda vcpu: False)
        ctypes.memmove(hva, b"\x55\x55", 2)
        wait_for(lambda: guest.word(0x7000) == 0x5555)
        protect(hva, 0)
        runner.join(10)
        with pytest.raises(OSError, match=f"Errno {errno.EFAULT}]"):
            runner.stop()
        vcpu.kvm_run.immediate_exit = 0
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        map_fixed(hva)
        ctypes.memmove(hva, b"\x66\x66", 2)
        again = Runner(vcpu, lambda vcpu: False)
        wait_for(lambda: guest.word(0x7000) == 0x6666)
        again.stop()
        unmap(hva)


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_read_only_host_memory_takes_no_stores() -> None:
    with real_guest() as guest:
        memory = GuestMemory(PAGE)
        slot(guest, memory.userspace_addr)
        protect(memory.userspace_addr, 1)
        vcpu = guest.vcpu(LOAD[:-1] + STORE)
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        assert vcpu.get_regs().rip == 0x1000 + 9
        protect(memory.userspace_addr, 3)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert memory.read(0, 2) == b"\x34\x12"


def test_past_the_end_of_a_file() -> None:
    with real_guest() as guest:
        fd = os.memfd_create("short")
        os.ftruncate(fd, PAGE)
        mapping = fs.Mapping(2 * PAGE, 3, fs.MAP_SHARED, fd)
        slot(guest, mapping.address + PAGE)
        vcpu = guest.vcpu(STORE)
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        os.ftruncate(fd, 2 * PAGE)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert os.pread(fd, 2, PAGE) == b"\x34\x12"
        os.close(fd)


MICROCODE = {
    "lgdt [8000]": "0f011600 80",
    "rep movsb": "be0080 bf0070 b90300 fc f3a4",
    "rep stosw": "bf0080 b90300 fc f3ab",
    "lock inc word [8000]": "f0ff060080",
    "fxsave [8000]": "0fae060080",
    "push word [8000]": "ff360080",
    "jmp [8000]": "ff260080",
    "call far [8000]": "ff1e0080",
    "outsb": "be0080 6e",
    "insb": "bf0080 6c",
}


@pytest.mark.parametrize("name", MICROCODE)
def test_every_way_to_memory_stops_in_front_of_the_instruction(name: str) -> None:
    with real_guest() as guest:
        hva = reserved()
        slot(guest, hva)
        vcpu = guest.vcpu(bytes.fromhex(MICROCODE[name]) + b"\xf4")
        sregs = vcpu.get_sregs()
        sregs.cr4 |= 0x200
        vcpu.set_sregs(sregs)
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        map_fixed(hva)
        ctypes.memmove(hva, b"\x00\x70", 2)
        guest.memory.write(0x7000, b"\xf4")
        guest.memory.write(0, b"\xf4")
        reason = vcpu.run()
        if reason == uapi.KVM_EXIT_IO:
            reason = vcpu.run()
        assert reason in (uapi.KVM_EXIT_HLT, uapi.KVM_EXIT_MMIO)
        unmap(hva)


def test_memory_that_goes_while_userspace_answers() -> None:
    with real_guest() as guest:
        hva = reserved()
        map_fixed(hva)
        slot(guest, hva)
        vcpu = guest.vcpu(bytes.fromhex(MICROCODE["insb"]) + b"\xf4")
        assert vcpu.run() == uapi.KVM_EXIT_IO
        vcpu.io_data()[:] = b"!"
        protect(hva, 0)
        for _ in range(2):
            assert memory_fault(vcpu) == (0, DATA, PAGE)
        protect(hva, 3)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert ctypes.string_at(hva, 1) == b"!"
        unmap(hva)


def test_code_in_a_hole() -> None:
    with real_guest() as guest:
        hva = reserved()
        slot(guest, hva)
        vcpu = guest.vcpu(b"\xe9" + (DATA - 0x1003).to_bytes(2, "little"))
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        assert vcpu.get_regs().rip == DATA
        map_fixed(hva)
        ctypes.memmove(hva, b"\xf4", 1)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        protect(hva, 0)
        vcpu.set_regs(uapi.kvm_regs(rip=DATA, rflags=2))
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        unmap(hva)


def test_page_tables_in_a_hole() -> None:
    with long_guest() as guest:
        hva, far = reserved(), 0x40000000
        guest.vm.set_user_memory_region(1, far, PAGE, hva)
        vcpu = guest.vcpus[0]
        assert guest.start(b"\x90") == uapi.KVM_EXIT_IO
        sregs = vcpu.get_sregs()
        tables, sregs.cr3 = sregs.cr3, far
        vcpu.set_sregs(sregs)
        assert memory_fault(vcpu) == (0, far, PAGE)
        map_fixed(hva)
        ctypes.memmove(hva, guest.memory.read(tables, PAGE), PAGE)
        vcpu.set_regs(uapi.kvm_regs(rip=0x20000, rflags=2, rsp=0x21000))
        assert vcpu.run() == uapi.KVM_EXIT_IO
        unmap(hva)


def test_an_interrupt_whose_vector_is_in_a_hole_is_delivered_later() -> None:
    with real_guest() as guest:
        hva = reserved()
        slot(guest, hva)
        vcpu = guest.vcpu(bytes.fromhex("fb 90 ebfd"))
        guest.memory.write(0x2000, b"\xf4")
        sregs = vcpu.get_sregs()
        sregs.idt.base = DATA
        vcpu.set_sregs(sregs)
        vcpu.interrupt(0x20)
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        assert memory_fault(vcpu) == (0, DATA, PAGE)
        map_fixed(hva)
        ctypes.memmove(hva + 0x80, b"\x00\x20\x00\x00", 4)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert vcpu.get_regs().rip == 0x2001
        unmap(hva)


# Changes under a running vCPU.


def mmio_as(value: bytes):
    """Answers MMIO reads; True."""

    def on_exit(vcpu: Vcpu) -> bool:
        if vcpu.kvm_run.exit_reason != uapi.KVM_EXIT_MMIO:
            return False
        vcpu.mmio_data()[:] = value[: vcpu.kvm_run.mmio.len]
        return True

    return on_exit


def test_nothing_of_a_deleted_slot_is_seen_again() -> None:
    with real_guest() as guest:
        first, second = GuestMemory(PAGE), GuestMemory(PAGE)
        runner = Runner(guest.vcpu(COPY), mmio_as(b"\xff\xff"))
        for n in range(30):
            memory, value = (first, second)[n % 2], 0x1000 + n
            memory.write(0, value.to_bytes(2, "little"))
            slot(guest, memory.userspace_addr)
            wait_for(lambda value=value: guest.word(0x7000) == value)
            guest.vm.remove_memory(1)
            memory.write(0, b"\xad\xde")
            wait_for(lambda: guest.word(0x7000) == 0xFFFF)
            for _ in range(20):
                assert guest.word(0x7000) != 0xDEAD
        runner.stop()


def test_other_slots_come_and_go() -> None:
    """The data's slot stays where it is while its neighbours, its flags and its number change."""
    count = bytes.fromhex("ff060080 ebfa")  # again: inc word [8000]; jmp again
    with real_guest() as guest:
        memory, other = GuestMemory(PAGE), GuestMemory(4 * PAGE)
        slot(guest, memory.userspace_addr)
        runner = Runner(guest.vcpu(count), lambda vcpu: False)
        for n in range(60):
            slot(guest, memory.userspace_addr, LOG * (n & 1))
            for extra in range(2, 6):
                address = 0x100000 * extra + PAGE * (n & 7)
                guest.vm.set_user_memory_region(extra, address, 4 * PAGE, other.userspace_addr)
            before = memory.read(0, 2)
            wait_for(lambda before=before: memory.read(0, 2) != before)
            if n % 3 == 0:
                for extra in range(2, 6):
                    guest.vm.remove_memory(extra)
        runner.stop()


def test_a_slot_moves_and_takes_its_code_with_it() -> None:
    with real_guest() as guest:
        memory = GuestMemory(PAGE)
        memory.write(0, b"\xf4")
        vcpu = guest.vcpu(b"\xf4")
        for address in (DATA, DATA + PAGE, DATA):
            guest.vm.set_user_memory_region(1, address, PAGE, memory.userspace_addr)
            vcpu.set_regs(uapi.kvm_regs(rip=address, rflags=2))
            assert vcpu.run() == uapi.KVM_EXIT_HLT
        guest.vm.set_user_memory_region(1, DATA + PAGE, PAGE, memory.userspace_addr)
        vcpu.set_regs(uapi.kvm_regs(rip=DATA, rflags=2))
        assert vcpu.run() == uapi.KVM_EXIT_INTERNAL_ERROR


def test_stores_to_a_read_only_slot_exit() -> None:
    with real_guest() as guest:
        memory = GuestMemory(PAGE)
        slot(guest, memory.userspace_addr, READONLY)
        vcpu = guest.vcpu(LOAD[:-1] + STORE)
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        mmio = vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (DATA, 2, 1)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert memory.read(0, 2) == b"\0\0"


def test_page_tables_in_a_read_only_slot_keep_their_bits() -> None:
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        tables = vcpu.get_sregs().cr3
        rom = GuestMemory(PAGE, 0x40000000)
        rom.write(rom.addr, guest.memory.read(tables, PAGE))
        before = int.from_bytes(rom.read(rom.addr, 8), "little") & ~0x20
        rom.write(rom.addr, before.to_bytes(8, "little"))
        guest.vm.add_memory(1, rom, READONLY)
        sregs = vcpu.get_sregs()
        sregs.cr3 = rom.addr
        vcpu.set_sregs(sregs)
        assert guest.start(b"\x90") == uapi.KVM_EXIT_IO
        assert int.from_bytes(rom.read(rom.addr, 8), "little") == before
