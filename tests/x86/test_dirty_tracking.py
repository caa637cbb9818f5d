"""No write is lost: the dirty log and the dirty ring under running vCPUs, as a migration uses them.

A mirror of the guest's memory is kept by copying only pages that were reported; in the end it must
be equal (the idea of the kernel's dirty_log_test).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.uapi import kvm as uapi

from .long_guest import CODE, LongGuest
from .real_guest import PAGE, Runner

LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES
AT, PAGES = 0x40000000, 512
RING = 4096  # bytes: 256 entries, of which 64 are kept back
ENTRIES, LIMIT = 256, 192
BOTH = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET
# again: inc dword [rbx]; add rbx, rcx; and rbx, rdx; or rbx, rsi; jmp again
WALK = bytes.fromhex("ff03 4801cb 4821d3 4809f3 ebf3")


@contextmanager
def guest(vcpus: int = 1, ring: int = 0, manual: int = 0) -> Iterator[LongGuest]:
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        if ring:
            vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING_ACQ_REL, ring)
        if manual:
            vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, manual)
        made = LongGuest(kvm, vm, vcpus)
        try:
            yield made
        finally:
            for vcpu in made.vcpus:
                vcpu.close()


def logged(vm: Vm, flags: int = LOG) -> GuestMemory:
    """Slot 1: memory at AT that logs."""
    memory = GuestMemory(PAGES * PAGE, AT)
    vm.add_memory(1, memory, flags)
    return memory


def dirty(vm: Vm, slot: int = 1, size: int = PAGES * PAGE) -> set[int]:
    bits = int.from_bytes(vm.get_dirty_log(slot, size), "little")
    return {n for n in range(size // PAGE) if bits >> n & 1}


class Ring:
    """A vCPU's ring, as userspace sees it."""

    def __init__(self, vcpu: Vcpu) -> None:
        self.mapping = fs.mmap(vcpu.fd, RING, offset=uapi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE)
        self.entries = self.mapping.view(uapi.kvm_dirty_gfn * ENTRIES)
        self.next = 0

    def collect(self) -> list[tuple[int, int]]:
        """(slot, page) of what is there, which is marked as seen."""
        found = []
        while (entry := self.entries[self.next % ENTRIES]).flags == uapi.KVM_DIRTY_GFN_F_DIRTY:
            found.append((entry.slot, entry.offset))
            entry.flags |= uapi.KVM_DIRTY_GFN_F_RESET
            self.next += 1
        return found


Harvest = Callable[[], set[int]]


def log_harvest(vm: Vm) -> Harvest:
    return lambda: dirty(vm)


def manual_harvest(vm: Vm) -> Harvest:
    def harvest() -> set[int]:
        raw = vm.get_dirty_log(1, PAGES * PAGE)
        bitmap = (ctypes.c_ubyte * len(raw)).from_buffer_copy(raw)
        request = uapi.kvm_clear_dirty_log(slot=1, num_pages=PAGES, first_page=0)
        request.dirty_bitmap = ctypes.addressof(bitmap)
        vm.clear_dirty_log(request)
        bits = int.from_bytes(raw, "little")
        return {n for n in range(PAGES) if bits >> n & 1}

    return harvest


def ring_harvest(vm: Vm, vcpus: list[Vcpu]) -> Harvest:
    rings = [Ring(vcpu) for vcpu in vcpus]

    def harvest() -> set[int]:
        found = [gfn for ring in rings for gfn in ring.collect()]
        assert vm.ioctl(uapi.KVM_RESET_DIRTY_RINGS) == len(found)
        return {page for slot, page in found if slot == 1}

    return harvest


def wait_at_full_ring(vcpu: Vcpu) -> bool:
    time.sleep(0.0005)
    return vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_DIRTY_RING_FULL


@pytest.mark.parametrize("kind", ["log", "manual", "initially set", "ring"])
def test_a_mirror_of_what_was_reported_is_exact(kind: str) -> None:
    manual = {"manual": uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, "initially set": BOTH}
    ring = RING if kind == "ring" else 0
    with guest(2, ring, manual.get(kind, 0)) as g:
        memory = logged(g.vm)
        harvest = (
            ring_harvest(g.vm, g.vcpus)
            if ring
            else manual_harvest(g.vm)
            if kind in manual
            else log_harvest(g.vm)
        )
        mirror, rounds = bytearray(PAGES * PAGE), 0
        runners = [start_walk(g, n) for n in range(2)]
        end = time.monotonic() + 1
        while time.monotonic() < end or rounds < 10:
            copy(memory, harvest(), mirror)
            rounds += 1
        for runner in runners:
            runner.stop()
        copy(memory, harvest(), mirror)
        assert mirror == memory.read(AT, PAGES * PAGE)
        assert sum(map(bool, struct.unpack(f"<{PAGES * PAGE // 4}I", mirror))) > PAGES
        assert harvest() == set()


def start_walk(g: LongGuest, n: int) -> Runner:
    """vCPU `n` counts in words all over the memory, in an order of its own."""
    at = CODE + 0x1000 * n
    g.memory.write(at, WALK)
    regs = g.vcpus[n].get_regs()
    regs.rip, regs.rflags = at, 2
    regs.rbx = regs.rsi = AT
    regs.rcx, regs.rdx = (0x3004, 0x18FFC)[n], AT | (PAGES * PAGE - 4)
    g.vcpus[n].set_regs(regs)
    return Runner(g.vcpus[n], wait_at_full_ring)


def copy(memory: GuestMemory, pages: set[int], mirror: bytearray) -> None:
    for page in pages:
        mirror[page * PAGE : (page + 1) * PAGE] = memory.read(AT + page * PAGE, PAGE)


# What counts as a write.

STORES = {
    "mov [rbx], al": ("8803", {0}),
    "xchg [rbx], rax": ("488703", {0}),
    "lock xadd [rbx], eax": ("f00fc103", {0}),
    "lock cmpxchg16b [rbx], which fails": ("f0480fc70b", {0}),
    "mov [rbx+0xffc], rax: two pages": ("488983fc0f0000", {0, 1}),
    "lock inc qword [rbx+0xffc]": ("f048ff83fc0f0000", {0, 1}),
    "rep stosb over three pages": ("4889df fc b901200000 f3aa", {0, 1, 2}),
    "rep movsb": ("4889df 4889de 4881c700400000 fc b901100000 f3a4", {4, 5}),
    "fxsave [rbx]": ("0fae03", {0}),
    "movaps [rbx], xmm0": ("0f2903", {0}),
    "fstp qword [rbx]": ("d9e8 dd1b", {0}),
    "push": ("4889dc 4881c400100000 50", {0}),
    "sgdt [rbx]": ("0f0103", {0}),
    "stmxcsr [rbx]": ("0fae1b", {0}),
    "bts [rbx], rax": ("480fab03", {0}),
    "mov al, [rbx]": ("8a03", set()),
    "cmp [rbx], eax": ("3903", set()),
}


@pytest.mark.parametrize("name", STORES)
def test_every_kind_of_store_is_logged(name: str) -> None:
    code, pages = STORES[name]
    with guest() as g:
        logged(g.vm)
        sregs = g.vcpus[0].get_sregs()
        sregs.cr4 |= 0x200
        g.vcpus[0].set_sregs(sregs)
        dirty(g.vm)
        for _ in range(2):
            g.execute(bytes.fromhex(code), rbx=AT)
            assert dirty(g.vm) == pages
        assert dirty(g.vm) == set()


def test_accessed_and_dirty_bits_are_writes_too() -> None:
    with guest() as g:
        tables = GuestMemory(0x10000, AT)
        source = g.vcpus[0].get_sregs()
        for page in range(16):
            tables.write(AT + page * PAGE, g.memory.read(page * PAGE, PAGE))
        g.vm.add_memory(1, tables, LOG)
        level, at = 0, source.cr3
        pages = []
        while level < 3:  # the tables above the code, whose entries' accessed bits are cleared
            pages.append(at // PAGE)
            entry = int.from_bytes(tables.read(AT + at, 8), "little")
            tables.write(
                AT + at, ((entry & ~0x60) + (0 if entry & 0x80 else AT)).to_bytes(8, "little")
            )
            if entry & 0x80:
                break
            level, at = level + 1, entry & 0xFFFFF000
        source.cr3 += AT
        g.vcpus[0].set_sregs(source)
        dirty(g.vm, size=0x10000)
        g.execute(b"\x90")
        assert dirty(g.vm, size=0x10000) == set(pages)


def test_kvms_own_writes_are_logged() -> None:
    with guest() as g:
        logged(g.vm)
        dirty(g.vm)
        g.vcpus[0].set_msrs({0x4B564D01: AT + 3 * PAGE | 1})  # the clock's page
        g.execute(b"\x90")
        assert dirty(g.vm) == {3}


def test_the_log_survives_a_move_and_begins_anew_with_the_flag() -> None:
    with guest() as g:
        memory = logged(g.vm)
        g.execute(bytes.fromhex("8803"), rbx=AT)
        hva = memory.userspace_addr
        g.vm.set_user_memory_region(1, 2 * AT, PAGES * PAGE, hva, LOG)
        assert dirty(g.vm) == {0}
        g.vm.set_user_memory_region(1, AT, PAGES * PAGE, hva, LOG)
        g.execute(bytes.fromhex("8803"), rbx=AT)
        g.vm.set_user_memory_region(1, AT, PAGES * PAGE, hva, 0)
        with pytest.raises(OSError, match=f"Errno {errno.ENOENT}]"):
            dirty(g.vm)
        g.vm.set_user_memory_region(1, AT, PAGES * PAGE, hva, LOG)
        assert dirty(g.vm) == set()
        g.execute(bytes.fromhex("8803"), rbx=AT)
        assert dirty(g.vm) == {0}


# The ring.


def test_the_ring_tells_slot_and_page_once_until_reset() -> None:
    with guest(ring=RING) as g:
        logged(g.vm)
        ring = Ring(g.vcpus[0])
        store = bytes.fromhex("8803 88831050 0000".replace(" ", ""))
        for _ in range(3):
            g.execute(store, rbx=AT)
        assert ring.collect() == [(1, 0), (1, 5)]
        g.execute(store, rbx=AT)
        assert ring.collect() == []
        assert g.vm.reset_dirty_rings() == 2
        assert g.vm.reset_dirty_rings() == 0
        g.execute(store, rbx=AT)
        assert ring.collect() == [(1, 0), (1, 5)]


def test_a_full_ring_stops_the_vcpu_before_the_next_page() -> None:
    touch = bytes.fromhex("8803 4881c300100000 ffc9 75f3")  # ecx pages from rbx on
    with guest(ring=RING) as g:
        memory = logged(g.vm)
        vcpu, ring = g.vcpus[0], Ring(g.vcpus[0])
        assert g.start(touch, rbx=AT, rcx=300, rax=7) == uapi.KVM_EXIT_DIRTY_RING_FULL
        assert vcpu.run() == uapi.KVM_EXIT_DIRTY_RING_FULL
        assert vcpu.get_regs().rbx == AT + LIMIT * PAGE
        assert memory.read(AT + LIMIT * PAGE, 1) == b"\0"
        assert ring.collect() == [(1, page) for page in range(LIMIT)]
        assert vcpu.run() == uapi.KVM_EXIT_DIRTY_RING_FULL
        assert g.vm.reset_dirty_rings() == LIMIT
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert ring.collect() == [(1, page) for page in range(LIMIT, 300)]
        assert g.vm.reset_dirty_rings() == 300 - LIMIT


def test_kvms_own_writes_and_microcode_are_in_the_ring() -> None:
    with guest(ring=RING) as g:
        logged(g.vm)
        ring = Ring(g.vcpus[0])
        g.vcpus[0].set_msrs({0x4B564D01: AT + 3 * PAGE | 1})
        g.execute(bytes.fromhex("0f0103"), rbx=AT + PAGE)
        assert sorted(ring.collect()) == [(1, 1), (1, 3)]


def test_what_a_ring_forbids_and_how_it_is_made() -> None:
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        most = vm.check_extension(uapi.KVM_CAP_DIRTY_LOG_RING)
        assert most == 65536 * ctypes.sizeof(uapi.kvm_dirty_gfn)
        wrong = {0: errno.EINVAL, 4097: errno.EINVAL, 2048: errno.EINVAL, 2 * most: errno.E2BIG}
        for size, number in wrong.items():
            with pytest.raises(OSError, match=f"Errno {number}]"):
                vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, size)
        with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
            vm.reset_dirty_rings()
        vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, RING)
        with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
            vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, RING)
        logged(vm)
        with pytest.raises(OSError, match=f"Errno {errno.ENXIO}]"):
            dirty(vm)
        with vm.create_vcpu() as vcpu:
            offset = uapi.KVM_DIRTY_LOG_PAGE_OFFSET * PAGE
            for prot, flags in ((1, mmap.MAP_PRIVATE), (5, mmap.MAP_SHARED)):
                with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
                    fs.mmap(vcpu.fd, RING, prot, flags, offset)
        with vm.create_vcpu(1), pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
            vm.enable_cap(uapi.KVM_CAP_DIRTY_LOG_RING, RING)


def test_entries_that_userspace_invents_do_no_harm() -> None:
    with guest(ring=RING) as g:
        logged(g.vm)
        ring = Ring(g.vcpus[0])
        for n, (slot, page) in enumerate(((1, 1 << 40), (7, 0), (9 << 16, 0))):
            ring.entries[n] = uapi.kvm_dirty_gfn(3, slot, page)
        assert g.vm.reset_dirty_rings() == 3
