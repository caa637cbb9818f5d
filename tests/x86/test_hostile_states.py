"""States that only a hostile or careless caller makes, each found by the fuzzer (tests/fuzz)."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache

import pytest

from anykvm import fs
from anykvm.api import Kvm
from anykvm.cpu import engine
from anykvm.uapi import kvm as uapi
from anykvm.x86.clock import NSEC_PER_SEC, kvm_get_time_scale

from .long_guest import long_guest
from .real_guest import CODE, real_guest

FLAT_CS = {"base": 0, "limit": 0xFFFFFFFF, "db": 1, "g": 1, "type": 11, "s": 1, "present": 1}
MMIO = 0x100000
PAGE = 4096


def _make_unreadable(memory: fs.Mapping) -> None:
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(memory.address), ctypes.c_size_t(len(memory)), 0) == 0


def test_an_nmi_whose_vector_table_is_mmio_before_anything_was_executed():
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        vcpu.ioctl(uapi.KVM_NMI)
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        mmio = vcpu.kvm_run.mmio
        assert (mmio.phys_addr, mmio.len, mmio.is_write) == (2 * 4, 4, 0)


@pytest.mark.parametrize("step", [False, True])
def test_an_instruction_pointer_above_4_gib_outside_of_64_bit_mode(step: bool):
    with real_guest() as guest:
        vcpu = guest.vcpu(b"\xf4")
        sregs = vcpu.get_sregs()
        sregs.cr0 |= 1
        for name, value in FLAT_CS.items():
            setattr(sregs.cs, name, value)
        vcpu.set_sregs(sregs)
        flags = 2 | (1 << 8 if step else 0)
        vcpu.set_regs(uapi.kvm_regs(rip=0xFFFF_FFFF << 32 | CODE, rflags=flags))
        assert vcpu.run() in (uapi.KVM_EXIT_HLT, uapi.KVM_EXIT_SHUTDOWN)
        assert vcpu.get_regs().rip >> 32 == 0


def test_a_page_fault_of_fetching_while_single_stepping():
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        control = uapi.KVM_GUESTDBG_ENABLE | uapi.KVM_GUESTDBG_SINGLESTEP
        debug = uapi.kvm_guest_debug(control=control)
        vcpu.ioctl(uapi.KVM_SET_GUEST_DEBUG, debug)
        regs = vcpu.get_regs()
        regs.rip = 1 << 40  # outside of the page tables; and there is no IDT
        vcpu.set_regs(regs)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


def test_fxsave_to_mmio_makes_all_its_accesses():
    with long_guest() as guest:
        vcpu, made = guest.vcpus[0], 0
        sregs = vcpu.get_sregs()
        sregs.cr4 |= 1 << 9  # OSFXSR
        vcpu.set_sregs(sregs)
        reason = guest.start(b"\x0f\xae\x07", rdi=MMIO)  # fxsave [rdi]
        while reason == uapi.KVM_EXIT_MMIO:
            mmio = vcpu.kvm_run.mmio
            assert (mmio.phys_addr, mmio.is_write) == (MMIO + made, 1)
            made += mmio.len
            reason = vcpu.run()
        assert reason == uapi.KVM_EXIT_IO
        assert made >= 416


def test_a_tsc_of_one_khz():
    assert kvm_get_time_scale(NSEC_PER_SEC, 1000)[1]
    with long_guest() as guest:
        guest.vcpus[0].set_tsc_khz(1)
        assert guest.execute(b"\x90", rax=7) == 7


def _at_the_same_time(number: int, function: Callable[[], object]) -> list[object]:
    found: list[object] = []
    barrier = threading.Barrier(number)

    def call() -> None:
        barrier.wait()
        found.append(function())

    threads = [threading.Thread(target=call) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_the_first_vms_of_a_process_may_be_made_at_the_same_time(monkeypatch: pytest.MonkeyPatch):
    made: list[object] = []

    class SlowRuntime:
        def __init__(self) -> None:
            made.append(self)
            threading.Event().wait(0.05)

    monkeypatch.setattr(engine, "_runtime", cache(SlowRuntime))
    found = _at_the_same_time(4, engine.process_runtime)
    assert len(made) == 1
    assert found == made * 4


def test_one_thread_at_a_time_keeps_vcpus_out_and_may_nest_it():
    gate, inside, most = engine.Gate(), [], []

    def alone() -> None:
        for _ in range(50):
            with gate.shut(lambda: None), gate.shut(lambda: None), gate.passed():
                inside.append(None)
                most.append(len(inside))
                threading.Event().wait(0.0001)
                inside.pop()

    _at_the_same_time(3, alone)
    assert set(most) == {1}
    assert not gate.closed
    with gate.passed():
        assert not inside


def test_an_event_with_several_accesses_to_mmio_makes_each_once():
    with real_guest() as guest:
        vcpu = guest.vcpu(b"\xf4")
        sregs = vcpu.get_sregs()
        sregs.ss.base, sregs.idt.base = MMIO, MMIO + 0x10000
        vcpu.set_sregs(sregs)
        vcpu.ioctl(uapi.KVM_NMI)
        made = []
        reason = vcpu.run()
        while reason == uapi.KVM_EXIT_MMIO:
            mmio = vcpu.kvm_run.mmio
            made.append((mmio.phys_addr, mmio.len, mmio.is_write))
            if not mmio.is_write:
                mmio.data[:4] = (CODE & 0xFF, CODE >> 8, 0, 0)
            reason = vcpu.run()
        assert reason == uapi.KVM_EXIT_HLT
        assert made == [
            (MMIO + 0x10008, 4, 0),
            (MMIO + 0x6FFE, 2, 1),
            (MMIO + 0x6FFC, 2, 1),
            (MMIO + 0x6FFA, 2, 1),
        ]


def test_a_vcpu_that_is_halted_in_the_middle_of_an_instruction():
    with long_guest() as guest:
        vcpu = guest.vcpus[0]
        assert guest.start(b"\x48\xa5\x90", rsi=MMIO, rdi=MMIO) == uapi.KVM_EXIT_MMIO  # movsq
        vcpu.set_mp_state(uapi.KVM_MP_STATE_HALTED)
        vcpu.kvm_run.immediate_exit = 1
        assert vcpu.run() == uapi.KVM_EXIT_INTR


def test_x87_flags_that_are_unmasked_but_not_summed_up():
    """FPREM runs on the host's own unit, where such a status would have raised SIGFPE."""
    with real_guest() as guest:
        guest.memory.write(16 * 4, (CODE + 0x100).to_bytes(4, "little"))  # the vector of #MF
        vcpu = guest.vcpu(b"\xd9\xf8\xf4".ljust(0x100, b"\x90") + b"\xf4")
        fpu = vcpu.get_fpu()
        fpu.fcw, fpu.fsw, fpu.ftwx = 0x340, 0x01, 0xFF
        vcpu.set_fpu(fpu)
        assert vcpu.get_fpu().fsw == 0x8081
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert vcpu.get_regs().rip == CODE + 0x101


def test_translating_by_page_tables_whose_memory_has_gone():
    """The walk is made outside of KVM_RUN; what is missing must not end the process."""
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm, vm.create_vcpu(0) as vcpu:
        tables = fs.Mapping(PAGE, fs.PROT_READ, fs.MAP_PRIVATE | fs.MAP_ANONYMOUS)
        vm.set_user_memory_region(0, 0, PAGE, tables.address)
        sregs = vcpu.get_sregs()
        sregs.cr0 |= 1 | 1 << 31
        sregs.cr3 = 0
        vcpu.set_sregs(sregs)
        _make_unreadable(tables)
        assert not vcpu.translate(0x400000).valid
