"""immediate_exit in the middle of an instruction: it is finished first, whatever exits that takes
(`complete_emulated_mmio`), so that the registers which userspace then reads miss nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.cpu.assembler import assemble

from anykvm.api import GuestMemory, Kvm
from anykvm.api.state import finish_exits, restore, save
from anykvm.uapi import kvm as uapi

DEVICE = 0xD000_0000
CODE, DATA = 0x1000, 0x3000
Access = tuple[bool, int, bytes]


class Guest:
    """A vCPU in real mode at `code`, whose DS and ES lie over a device that answers with its
    accesses' count.
    """

    def __init__(self, kvm: Kvm, code: bytes, es: int = DEVICE) -> None:
        self.vm = kvm.create_vm()
        self.vm.create_irqchip()
        self.memory = GuestMemory(0x10000)
        self.memory.write(CODE, code + b"\xf4")
        self.vm.add_memory(0, self.memory)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        sregs.ds.base, sregs.es.base = DEVICE, es
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=2, rsp=0x8000, rsi=8, rdi=16, rbx=24))
        self.seen: list[Access] = []

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()

    def access(self, reason: int) -> None:
        assert reason == uapi.KVM_EXIT_MMIO
        mmio, data = self.vcpu.kvm_run.mmio, self.vcpu.mmio_data()
        if not mmio.is_write:
            data[:] = (len(self.seen) + 0x40).to_bytes(mmio.len, "little")
        self.seen.append((bool(mmio.is_write), mmio.phys_addr - DEVICE, bytes(data)))


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm(backend="soft") as kvm:
        yield kvm


ROWS = [
    ("inc word ptr [bx]", [(False, 24, b"\x40\0"), (True, 24, b"\x41\0")]),
    ("movsd", [(False, 8, b"\x40\0\0\0"), (True, 16, b"\x40\0\0\0")]),
    ("xchg ax, [bx]", [(False, 24, b"\x40\0"), (True, 24, b"\0\0")]),
    ("cmpsw", [(False, 8, b"\x40\0"), (False, 16, b"\x41\0")]),
]


@pytest.mark.parametrize(("text", "accesses"), ROWS, ids=[row[0] for row in ROWS])
def test_all_accesses_are_made_before_eintr(kvm: Kvm, text: str, accesses: list[Access]) -> None:
    code = assemble(text, 16)
    guest = Guest(kvm, code)
    guest.access(guest.vcpu.run())
    finish_exits(guest.vcpu, guest.access)
    assert guest.seen == accesses
    assert guest.vcpu.get_regs().rip == CODE + len(code)
    guest.close()


def test_a_repeated_instruction_stops_after_its_turn(kvm: Kvm) -> None:
    guest = Guest(kvm, assemble("rep movsw", 16))
    regs = guest.vcpu.get_regs()
    regs.rcx = 1000
    guest.vcpu.set_regs(regs)
    guest.access(guest.vcpu.run())
    finish_exits(guest.vcpu, guest.access)
    assert [write for write, _, _ in guest.seen] == [False, True]
    after = guest.vcpu.get_regs()
    assert (after.rip, after.rcx, after.rsi, after.rdi) == (CODE, 999, 10, 18)
    guest.close()


def test_the_rest_is_made_in_another_vm(kvm: Kvm) -> None:
    """Stopped after every exit, each turn still reaches the device and memory once, in order."""
    guest = Guest(kvm, assemble("rep movsb", 16), es=DATA)
    regs = guest.vcpu.get_regs()
    regs.rcx = 5
    guest.vcpu.set_regs(regs)
    while guest.vcpu.get_regs().rcx:
        guest.access(guest.vcpu.run())
        finish_exits(guest.vcpu, guest.access)
        other = Guest(kvm, b"")
        other.memory.write(0, guest.memory.read(0, 0x10000))
        restore(other.vm, [other.vcpu], save(kvm, guest.vm, [guest.vcpu]))
        other.seen = guest.seen
        guest.close()
        guest = other
    assert [(write, address) for write, address, _ in guest.seen] == [
        (False, 8 + n) for n in range(5)
    ]
    assert guest.memory.read(DATA + 16, 5) == bytes(range(0x40, 0x45))
    guest.close()


def test_an_access_inside_of_kvm_and_one_outside(kvm: Kvm) -> None:
    """The local APIC answers the read, userspace the write."""
    guest = Guest(kvm, assemble("movsd", 16))
    sregs = guest.vcpu.get_sregs()
    sregs.ds.base = 0xFEE0_0030 - 8  # the version register
    guest.vcpu.set_sregs(sregs)
    assert guest.vcpu.run() == uapi.KVM_EXIT_MMIO
    guest.access(uapi.KVM_EXIT_MMIO)
    finish_exits(guest.vcpu, guest.access)
    assert guest.seen == [(True, 16, (0x50014).to_bytes(4, "little"))]
    guest.close()
