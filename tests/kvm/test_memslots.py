"""Memory slots: what is refused, what a call amounts to, look-up, and the dirty log."""

from __future__ import annotations

import ctypes
import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.x86.machine import machine

from anykvm.api import GuestMemory
from anykvm.kvm.memslots import (
    KVM_USER_MEM_SLOTS,
    KvmMemslots,
    KvmMrChange,
    check_memory_region,
)
from anykvm.uapi import kvm as uapi

PAGE, HVA = 4096, 0x7F0000000000
LOG = uapi.KVM_MEM_LOG_DIRTY_PAGES


def region(slot=0, gpa=0, size=PAGE, hva=HVA, flags=0):
    return uapi.kvm_userspace_memory_region(
        slot=slot, flags=flags, guest_phys_addr=gpa, memory_size=size, userspace_addr=hva
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"flags": 4},
        {"size": 100},
        {"gpa": 0x123},
        {"hva": HVA + 1},
        {"hva": 1 << 47},
        {"slot": 1 << 16},
        {"slot": 32764},
        {"gpa": (1 << 64) - PAGE, "size": 2 * PAGE},
        {"size": 1 << 43, "hva": 0},
    ],
)
def test_bad_regions_are_einval(wrong):
    with pytest.raises(OSError, match="KVM_SET_USER_MEMORY_REGION") as raised:
        check_memory_region(region(**wrong))
    assert raised.value.errno == errno.EINVAL


def apply(slots: KvmMemslots, **kwargs: int) -> KvmMrChange:
    change, old, new = slots.plan(region(**kwargs))
    slots.install(old, new)
    return change


def test_create_move_change_flags_delete():
    slots = KvmMemslots()
    assert apply(slots, size=2 * PAGE) is KvmMrChange.CREATE
    assert apply(slots, size=2 * PAGE) is KvmMrChange.NONE
    assert apply(slots, size=2 * PAGE, flags=LOG) is KvmMrChange.FLAGS_ONLY
    assert apply(slots, size=2 * PAGE, flags=LOG, gpa=0x10000) is KvmMrChange.MOVE
    assert slots.gpa_to_memslot(0) is None
    assert apply(slots, size=0) is KvmMrChange.DELETE
    assert len(slots) == 0


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ({"slot": 1, "gpa": PAGE}, errno.EEXIST),
        ({"slot": 0, "size": PAGE}, errno.EINVAL),
        ({"slot": 0, "size": 2 * PAGE, "hva": HVA + PAGE}, errno.EINVAL),
        ({"slot": 0, "size": 2 * PAGE, "flags": uapi.KVM_MEM_READONLY}, errno.EINVAL),
        ({"slot": 5, "size": 0}, errno.EINVAL),
    ],
)
def test_refusals(second, expected):
    slots = KvmMemslots()
    apply(slots, size=2 * PAGE)
    with pytest.raises(OSError, match=f"Errno {expected}]"):
        slots.plan(region(**second))


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=8))
def test_look_up_agrees_with_a_search(ranges):
    slots = KvmMemslots()
    held: dict[int, int] = {}
    for n, (page, length) in enumerate(ranges):
        if held.keys().isdisjoint(range(page, page + length)):
            apply(slots, slot=n, gpa=page * PAGE, size=length * PAGE)
            held |= dict.fromkeys(range(page, page + length), n)
    for page in range(36):
        found = slots.gpa_to_memslot(page * PAGE + 7)
        assert (found.id if found else None) == held.get(page)


def test_the_engine_sees_every_change():
    with machine() as m:
        memory = GuestMemory(2 * PAGE)
        hva = memory.userspace_addr
        m.vm.set_user_memory_region(0, 0, 2 * PAGE, hva)
        assert m.engine.slots == {0: (2 * PAGE, hva, False, False)}
        m.vm.set_user_memory_region(0, 0x8000, 2 * PAGE, hva, LOG)
        assert m.engine.slots == {0x8000: (2 * PAGE, hva, False, True)}
        m.vm.set_user_memory_region(0, 0, 0, 0)
        assert m.engine.slots == {}


def dirty_log(m, slot, pages):
    bitmap = (ctypes.c_uint64 * ((pages + 63) // 64))()
    log = uapi.kvm_dirty_log(slot=slot, dirty_bitmap=ctypes.addressof(bitmap))
    m.vm.ioctl(uapi.KVM_GET_DIRTY_LOG, log)
    return list(bitmap)


def clear_log(m, slot, first, pages, bits):
    bitmap = (ctypes.c_uint64 * len(bits))(*bits)
    log = uapi.kvm_clear_dirty_log(slot=slot, num_pages=pages, first_page=first)
    log.dirty_bitmap = ctypes.addressof(bitmap)
    m.vm.clear_dirty_log(log)


def test_the_dirty_log_reports_and_forgets():
    with machine() as m:
        memory = GuestMemory(70 * PAGE)
        m.vm.add_memory(0, memory, LOG)
        m.engine.dirty[0] = bytes([0b101] + [0] * 7 + [1])
        assert dirty_log(m, 0, 70) == [0b101, 1]
        assert dirty_log(m, 0, 70) == [0, 0]


def test_manual_protection_forgets_only_what_is_cleared():
    both = uapi.KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | uapi.KVM_DIRTY_LOG_INITIALLY_SET
    with machine() as m:
        m.vm.enable_cap(uapi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, both)
        m.vm.add_memory(0, GuestMemory(70 * PAGE), LOG)
        everything = [(1 << 64) - 1, 0b111111]
        assert dirty_log(m, 0, 70) == everything
        clear_log(m, 0, 64, 6, [0b11])
        assert dirty_log(m, 0, 70) == [everything[0], 0b111100]
        with pytest.raises(OSError, match="begin a word") as raised:
            clear_log(m, 0, 1, 64, [0])
        assert raised.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("slot", "expected"), [(0, errno.ENOENT), (1 << 16, errno.ENOENT), (2 << 16, errno.EINVAL)]
)
def test_slots_without_a_log(slot, expected):
    with machine() as m:
        m.ram()
        with pytest.raises(OSError, match=f"Errno {expected}]"):
            dirty_log(m, slot, 16)


def test_slots_of_two_address_spaces_do_not_meet():
    with machine() as m:
        memory = GuestMemory(2 * PAGE)
        for space in (0, 1):
            m.vm.set_user_memory_region(space << 16 | 3, 0, 2 * PAGE, memory.userspace_addr)
        with pytest.raises(OSError, match=f"Errno {errno.EEXIST}]"):
            m.vm.set_user_memory_region(1 << 16, PAGE, PAGE, memory.userspace_addr)
        with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
            m.vm.set_user_memory_region(2 << 16, 0, PAGE, memory.userspace_addr)


def test_guest_addresses_end_where_the_processor_ends():
    with machine() as m:
        hva = GuestMemory(2 * PAGE)
        with pytest.raises(OSError, match="46 bits"):
            m.vm.set_user_memory_region(1, (1 << 46) - PAGE, 2 * PAGE, hva.userspace_addr)
        m.vm.set_user_memory_region(0, (1 << 46) - PAGE, PAGE, hva.userspace_addr)
        assert list(m.engine.slots) == [(1 << 46) - PAGE]


def test_every_slot_that_the_capability_promises_at_once():
    slots, step = KvmMemslots(), 2 * PAGE
    for n in range(KVM_USER_MEM_SLOTS):
        apply(slots, slot=n, gpa=n * step)
    with pytest.raises(OSError, match=f"Errno {errno.EEXIST}]"):
        slots.plan(region(slot=5, gpa=7 * step))
    for n in range(0, KVM_USER_MEM_SLOTS, 1000):
        found = slots.gpa_to_memslot(n * step + PAGE - 1)
        assert found is not None
        assert found.id == n
        assert slots.gpa_to_memslot(n * step + PAGE) is None
