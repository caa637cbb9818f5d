"""The guest-physical map against a plain search; entries are filled in when first used."""

from __future__ import annotations

import ctypes
import mmap

from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.cpu.engine import Engine
from anykvm.cpu.memory import CODE, GIB_PAGES, LOG, PAGE, RAM, READONLY, PhysicalMap

from .harness import machine

HVA = 0x7000_0000_0000
PLACES = [0, 1, 2, 5, GIB_PAGES - 2, GIB_PAGES - 1, GIB_PAGES, 3 * GIB_PAGES, (1 << 34) - 4]


def native_host(memory: PhysicalMap, gpa: int) -> int | None:
    """What native code finds."""
    cpu = machine().cpu
    before, cpu.state.physmap = cpu.state.physmap, memory.address
    entry = machine().engine.runtime.call["page_entry"](cpu.address, gpa)
    cpu.state.physmap = before
    if not entry:
        return None
    return ctypes.c_uint64.from_address(entry).value


operations = st.lists(
    st.tuples(st.sampled_from(PLACES), st.integers(1, 3), st.booleans(), st.booleans()),
    max_size=12,
)


@settings(max_examples=40)
@given(operations)
def test_look_up_agrees_with_a_search(steps: list[tuple[int, int, bool, bool]]) -> None:
    memory, expected = PhysicalMap(), {}
    for n, (page, length, readonly, remove) in enumerate(steps):
        taken = [p for p in range(page, page + length) if p in expected]
        if remove:
            for slot in memory.inside(page * PAGE, length * PAGE):
                for p in range(slot.gpa // PAGE, (slot.gpa + slot.size) // PAGE):
                    del expected[p]
            memory.unmap(page * PAGE, length * PAGE)
        elif not taken:
            hva = HVA + n * 0x10000
            memory.map(page * PAGE, length * PAGE, hva, readonly=readonly)
            flags = RAM | READONLY * readonly
            expected |= {page + i: hva + i * PAGE | flags for i in range(length)}
        for place in PLACES:
            for p in range(place, place + 3):
                assert native_host(memory, p * PAGE + 5) == expected.get(p)
                found = memory.host(p * PAGE)
                assert found == (expected[p] & ~0xFFF if p in expected else None)


def test_a_slot_of_many_gigabytes_costs_what_is_used_of_it() -> None:
    memory = PhysicalMap()
    memory.map(0, 256 << 30, HVA, log_dirty=False)
    assert native_host(memory, 200 << 30) == HVA + (200 << 30) | RAM
    memory.unmap(0, 256 << 30)
    assert native_host(memory, 200 << 30) is None


def test_code_is_marked_wherever_the_page_is_seen() -> None:
    memory = PhysicalMap()
    memory.map(0, 2 * PAGE, HVA)
    memory.map(0x10000, PAGE, HVA + PAGE, log_dirty=True)
    assert native_host(memory, PAGE) == HVA + PAGE | RAM
    memory.set_code(HVA + PAGE, 0x1234)
    assert native_host(memory, PAGE) == HVA + PAGE | RAM | CODE
    assert native_host(memory, 0x10000) == HVA + PAGE | RAM | LOG | CODE
    memory.set_code(HVA + PAGE, 0)
    assert native_host(memory, 0x10000) == HVA + PAGE | RAM | LOG


def test_a_page_table_entry_that_is_code_too() -> None:
    """The walk sets its accessed bit, and what was translated from it is translated again."""
    engine = Engine()
    backing = mmap.mmap(-1, 1 << 20)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(backing))
    engine.map_memory(0, 1 << 20, hva)
    cpu = engine.create_cpu(0)
    with engine.translator.lock:
        engine._mark(hva + 0x3000)
        engine.translator.pages[hva + 0x3000].mark(0, 8, bytes(8))
        unit = type("U", (), {"start": 0, "end": 8, "heads": ()})()
        engine.translator.pages[hva + 0x3000].units.append(unit)
    for at, entry in ((0x2000, 0x3003), (0x3000, 0x0083)):
        backing[at : at + 8] = entry.to_bytes(8, "little")
    s = cpu.state
    s.cr0, s.cr3, s.cr4, s.efer = 0x80000011, 0x2000, 0x20, 0x500
    s.pdpte[0] = 0
    cpu.mode_changed()
    backing[0x2000:0x2008] = (0x3003).to_bytes(8, "little")
    backing[0x3000:0x3008] = (0x4003).to_bytes(8, "little")
    backing[0x4000:0x4008] = (0x0083).to_bytes(8, "little")
    assert cpu.read(0x5000, 4) == bytes(4)
    assert backing[0x3000] == 0x23
    assert (s.table_write, s.table_write_gpa) == (1, 0x3000)
    assert cpu._requested_exit() is None
    assert s.table_write == 0
    assert engine.translator.pages[hva + 0x3000].units == []
