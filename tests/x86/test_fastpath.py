"""The short way of KVM_RUN (x86/fastpath.py) against the long one, which tracing makes it take."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest

from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.fs.trace import attached
from anykvm.uapi import kvm as uapi
from anykvm.x86 import fastpath
from anykvm.x86.fastpath import Way

CODE, PORT, DEVICE = 0x1000, 0x80, 0x100000
PASSES = 8
COUNTED = ("io_exits", "mmio_exits")
OUTS = {1: b"\xee", 2: b"\xef", 4: b"\x66\xef"}  # out dx, al; ax; eax
INS = {1: b"\xec", 2: b"\xed", 4: b"\x66\xed"}
MMIO = (
    *(b"\x8a\x07", b"\x8b\x07", b"\x66\x8b\x07"),  # mov al, [bx]; ax; eax
    *(b"\x88\x07", b"\x89\x07", b"\x66\x89\x07"),  # and back
    *(b"\xfe\x07", b"\xa5", b"\xa4"),  # inc byte ptr [bx]; movsw; movsb
)
LOOP = b"\xee\xeb\xfd"  # out dx, al; jmp to it
STI, NOP, HLT = b"\xfb", b"\x90", b"\xf4"


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[Way]:
    """What each KVM_RUN took."""
    taken: list[Way] = []
    enter: Callable[[fastpath.VcpuFastpath], Way] = fastpath.VcpuFastpath.enter

    def noted(self: fastpath.VcpuFastpath) -> Way:
        taken.append(enter(self))
        return taken[-1]

    monkeypatch.setattr(fastpath.VcpuFastpath, "enter", noted)
    return taken


class Machine:
    """A real-mode guest that has `code` at CODE, and PORT in DX."""

    def __init__(self, code: bytes, irqchip: bool = False) -> None:
        self.vm: Vm = Kvm(backend="soft").create_vm()
        if irqchip:
            self.vm.create_irqchip()
        self.memory = GuestMemory(0x10000, 0)
        self.vm.add_memory(0, self.memory)
        self.memory.write(CODE, code)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        sregs.ds.base = sregs.es.base = DEVICE  # which no slot covers
        self.vcpu.set_sregs(sregs)
        self.set(rip=CODE, rflags=2, rdx=PORT, rsp=0x8000, rax=0x1122334455667788)

    def set(self, **values: int) -> None:
        regs = self.vcpu.get_regs()
        for name, value in values.items():
            setattr(regs, name, value)
        self.vcpu.set_regs(regs)

    def give(self, value: int) -> None:
        """What an IN or a load that has left gets."""
        port = self.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
        data = self.vcpu.io_data() if port else self.vcpu.mmio_data()
        data[:] = (value & (1 << 8 * len(data)) - 1).to_bytes(len(data), "little")

    def exit(self) -> tuple[int, ...]:
        """Runs to the next exit: its reason and, of a port access, all of it."""
        self.vcpu.run()
        run = self.vcpu.kvm_run
        ready = run.ready_for_interrupt_injection
        shared = (run.exit_reason, run.if_flag, ready, run.cr8, run.apic_base, run.flags)
        if run.exit_reason == uapi.KVM_EXIT_MMIO:
            mmio = run.mmio
            return (*shared, mmio.phys_addr, mmio.len, mmio.is_write, *mmio.data)
        if run.exit_reason != uapi.KVM_EXIT_IO:
            return shared
        io = run.io
        out = io.direction == uapi.KVM_EXIT_IO_OUT
        data = int.from_bytes(self.vcpu.io_data(), "little") if out else 0
        fields = (io.direction, io.size, io.port, io.count, io.data_offset, data)
        return (*shared, *fields)

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()


@pytest.fixture
def machine() -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def make(code: bytes, **options: bool) -> Machine:
        made.append(Machine(code, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def program(seed: int) -> bytes:
    """Accesses of every size among instructions that show what they did."""
    rng = random.Random(seed)
    code = b""
    for _ in range(60):
        code += rng.choice((*OUTS.values(), *INS.values(), *MMIO))
        code += rng.choice((NOP, b"\x66\xd1\xc0", b"\x66\x01\xc3", b"\x66\xf7\xd0", STI, b"\xfa"))
    back = -(len(code) + 3) & 0xFFFF
    return code + b"\xe9" + back.to_bytes(2, "little")


@pytest.mark.parametrize("irqchip", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_both_ways_see_the_same(
    machine: Callable[..., Machine], ways: list[Way], seed: int, irqchip: bool
) -> None:
    seen = []
    for sink in (None, lambda event: None):
        guest = machine(program(seed), irqchip=irqchip)
        rng, exits = random.Random(seed), []
        with attached(sink) if sink else nullcontext():
            for _ in range(PASSES * 60):
                exits.append(guest.exit())
                guest.give(rng.getrandbits(32))
        regs = guest.vcpu.get_regs()
        values = [int(getattr(regs, name)) for name, _ in regs._fields_]
        seen.append((exits, values, [guest.vcpu.stats()[name].value for name in COUNTED]))
    assert seen[0] == seen[1]
    assert ways.count(Way.DONE) > 60  # the first pass has its code translated
    assert ways.count(Way.REFUSED) >= PASSES * 60


def test_exits_are_counted(machine: Callable[..., Machine], ways: list[Way]) -> None:
    guest = machine(LOOP)
    for _ in range(100):
        guest.exit()
    assert ways.count(Way.DONE) > 90
    stats = guest.vcpu.stats()
    assert stats["io_exits"].value == 100
    assert stats["userspace_exits"].values[uapi.KVM_EXIT_IO] == 100
    assert stats["instructions"].value == 2 * 99


def test_an_access_that_userspace_moved_away_from_is_dropped(
    machine: Callable[..., Machine], ways: list[Way]
) -> None:
    guest = machine(INS[1] + NOP * 30 + HLT)
    guest.exit()
    guest.give(0x5A)
    guest.set(rip=CODE + 20, rax=0)
    assert guest.exit()[0] == uapi.KVM_EXIT_HLT
    assert guest.vcpu.get_regs().rax == 0


def test_registers_written_in_between_count(
    machine: Callable[..., Machine], ways: list[Way]
) -> None:
    guest = machine((INS[2] + NOP) * 3 + HLT)
    for value in (0x1111, 0x2222, 0x3333):
        guest.exit()
        guest.set(rax=0xAAAA_0000)
        guest.give(value)
    assert guest.exit()[0] == uapi.KVM_EXIT_HLT
    assert guest.vcpu.get_regs().rax == 0xAAAA_3333


def test_immediate_exit_completes_the_access_first(
    machine: Callable[..., Machine], ways: list[Way]
) -> None:
    guest = machine(INS[1] + LOOP)
    guest.exit()
    guest.give(0x77)
    guest.vcpu.kvm_run.immediate_exit = 1
    assert guest.vcpu.run() == uapi.KVM_EXIT_INTR
    regs = guest.vcpu.get_regs()
    assert (regs.rip, regs.rax & 0xFF) == (CODE + 1, 0x77)
    guest.vcpu.kvm_run.immediate_exit = 0
    guest.exit()
    assert guest.vcpu.kvm_run.io.direction == uapi.KVM_EXIT_IO_OUT


def test_an_interrupt_window_is_opened(machine: Callable[..., Machine], ways: list[Way]) -> None:
    guest = machine(LOOP + HLT)
    guest.exit()
    guest.set(rflags=0x202)
    guest.vcpu.kvm_run.request_interrupt_window = 1
    assert guest.exit()[0] == uapi.KVM_EXIT_IRQ_WINDOW_OPEN
    guest.vcpu.kvm_run.request_interrupt_window = 0
    guest.memory.write(4 * 0x21, (CODE + 3).to_bytes(2, "little") + bytes(2))
    guest.vcpu.interrupt(0x21)
    assert guest.exit()[0] == uapi.KVM_EXIT_HLT


def test_synchronised_registers(machine: Callable[..., Machine], ways: list[Way]) -> None:
    guest = machine(LOOP)
    guest.exit()
    run = guest.vcpu.kvm_run
    run.kvm_valid_regs = uapi.KVM_SYNC_X86_REGS
    guest.exit()
    run.s.regs.regs.rax = 0x42
    run.kvm_dirty_regs = uapi.KVM_SYNC_X86_REGS
    guest.exit()
    assert guest.vcpu.io_data()[0] == 0x42


def test_a_load_gets_what_userspace_gave(machine: Callable[..., Machine], ways: list[Way]) -> None:
    guest = machine(b"\x66\x8b\x07\xeb\xfb")  # mov eax, [bx]; jmp to it
    for value in range(0x1000_0000, 0x1000_0064):
        guest.exit()
        if value > 0x1000_0000:
            assert guest.vcpu.get_regs().rax == value - 1
        guest.give(value)
    assert guest.vcpu.stats()["userspace_exits"].values[uapi.KVM_EXIT_MMIO] == 100


def test_mmio_of_a_device_in_here_is_answered(
    machine: Callable[..., Machine], ways: list[Way]
) -> None:
    guest = machine(b"\x88\x07\x88\x07" + LOOP, irqchip=True)
    event = os.eventfd(0)
    guest.exit()
    guest.vm.ioeventfd(event, DEVICE, 1)
    assert guest.exit()[0] == uapi.KVM_EXIT_IO
    assert os.eventfd_read(event) == 1
    os.close(event)


def test_a_device_that_comes_takes_the_access(
    machine: Callable[..., Machine], ways: list[Way]
) -> None:
    guest = machine(OUTS[1] * 3 + HLT)
    guest.exit()
    event = os.eventfd(0)
    guest.vm.ioeventfd(event, PORT, 1, flags=uapi.KVM_IOEVENTFD_FLAG_PIO)
    assert guest.exit()[0] == uapi.KVM_EXIT_HLT
    os.close(event)


def test_single_steps(machine: Callable[..., Machine], ways: list[Way]) -> None:
    guest = machine(LOOP)
    guest.exit()
    debug = uapi.kvm_guest_debug()
    debug.control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP
    guest.vcpu.set_guest_debug(debug)
    assert guest.exit()[0] == uapi.KVM_EXIT_DEBUG
