"""Guest memory by guest-physical address."""

from __future__ import annotations

import pytest

from anykvm import fs
from anykvm.api import GuestMemory
from anykvm.uapi import kvm as abi


def test_read_and_write() -> None:
    memory = GuestMemory(0x2000, addr=0x1000)
    memory.write(0x2FFE, b"ab")
    assert memory.read(0x2FFD, 3) == b"\0ab"
    assert fs.UserMemory().read(memory.userspace_addr + 0x1FFE, 2) == b"ab"
    memory.slice(0x1000, 4)[:] = b"wxyz"
    assert memory.read(0x1000, 4) == b"wxyz"


def test_edges() -> None:
    memory = GuestMemory(0x1000, addr=0x1000)
    assert (0x1000 in memory, 0x1FFF in memory, 0x2000 in memory) == (True, True, False)
    assert len(memory) == 0x1000
    assert memory.read(0x2000, 0) == b""
    for addr, length in ((0xFFF, 1), (0x2000, 1), (0x1FFF, 2), (0x1000, -1)):
        with pytest.raises(IndexError, match="outside of <GuestMemory 0x1000"):
            memory.read(addr, length)
    with pytest.raises(IndexError):
        memory.write(0x1FFF, b"ab")
    assert memory.read(0x1FFF, 1) == b"\0"


@pytest.mark.parametrize(("size", "addr"), [(0, 0), (-4096, 0), (100, 0), (4096, 8)])
def test_whole_pages_only(size: int, addr: int) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        GuestMemory(size, addr)


def test_view() -> None:
    memory = GuestMemory(0x1000, addr=0x8000)
    entry = memory.view(abi.kvm_dirty_gfn, 0x8010)
    entry.offset = 0x1234
    assert memory.read(0x8018, 8) == (0x1234).to_bytes(8, "little")
    del memory
    entry.slot = 5
    assert entry.slot == 5


def test_large_memory_costs_nothing_until_touched() -> None:
    memory = GuestMemory(1 << 36)
    memory.write((1 << 36) - 1, b"!")
    assert memory.read((1 << 36) - 1, 1) == b"!"
