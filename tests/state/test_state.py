"""`anykvm.api.state`: what is read from one VM and written into another is all there again."""

from __future__ import annotations

import io
import random
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.state.cycles import assert_same_time, differences, still
from tests.x86.machine import Machine, machine

from anykvm.api import GuestMemory, Vcpu
from anykvm.api.state import StateError, VmState, restore, save
from anykvm.api.state_file import (
    load_memory,
    memory_section,
    read_sections,
    vm_sections,
    vm_state,
    write_sections,
)
from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi

MSR_TSC_DEADLINE, MSR_SYSTEM_TIME, MSR_TSC_AUX = 0x6E0, 0x4B564D01, 0xC0000103
LVTT, TMICT, TMCCT, TDCR, SPIV, IRR = 0x320, 0x380, 0x390, 0x3E0, 0xF0, 0x200
ONE_SHOT, PERIODIC, TSC_DEADLINE = 0, 1 << 17, 2 << 17
VECTOR, APIC_ON, DIVIDE_BY_1 = 0xEC, 0x1FF, 0xB
PVCLOCK_AT = 0x2000


class Pair:
    """A VM with two vCPUs, and an empty one like it."""

    def __init__(self, stack: ExitStack) -> None:
        self.source, self.target = (self._vm(stack) for _ in range(2))

    def _vm(self, stack: ExitStack) -> Machine:
        made = stack.enter_context(machine(irqchip=True))
        made.vm.create_pit2(uapi.KVM_PIT_SPEAKER_DUMMY)
        made.ram()
        for _ in range(2):
            made.add_vcpu().set_cpuid2(made.kvm.supported_cpuid())
        return made

    def save(self) -> VmState:
        return save(self.source.kvm, self.source.vm, self.source.vcpus)

    def restore(self, state: VmState) -> VmState:
        """Written into the other VM, and read from there."""
        target = self.target
        restore(target.vm, target.vcpus, state)
        return save(target.kvm, target.vm, target.vcpus)


@pytest.fixture
def pair() -> Iterator[Pair]:
    with ExitStack() as stack:
        yield Pair(stack)


def registers(lapic: uapi.kvm_lapic_state, values: dict[int, int]) -> uapi.kvm_lapic_state:
    raw = bytearray(lapic.regs)
    for offset, value in values.items():
        struct.pack_into("<I", raw, offset, value)
    lapic.regs[:] = list(raw)
    return lapic


def start_timer(vcpu: Vcpu, mode: int, count: int) -> None:
    values = {SPIV: APIC_ON, LVTT: mode | VECTOR, TDCR: DIVIDE_BY_1, TMICT: count, TMCCT: count}
    vcpu.set_lapic(registers(vcpu.get_lapic(), values))


def register(vcpu: Vcpu, offset: int) -> int:
    return int(struct.unpack_from("<I", bytes(vcpu.get_lapic().regs), offset)[0])


def requested(vcpu: Vcpu, vector: int) -> bool:
    return bool(register(vcpu, IRR + vector // 32 * 16) >> vector % 32 & 1)


def run_until_kicked(vcpu: Vcpu) -> None:
    """Into KVM_RUN and out again."""
    vcpu.kvm_run.immediate_exit = 1
    assert vcpu.run() == uapi.KVM_EXIT_INTR
    vcpu.kvm_run.immediate_exit = 0


# Everything.


def scramble(vcpu: Vcpu, rng: random.Random) -> None:
    """Values that no reset leaves, in every part of a vCPU."""
    regs = vcpu.get_regs()
    for name, _ in uapi.kvm_regs._fields_:
        setattr(regs, name, rng.getrandbits(64))
    regs.rflags = 0x10246 | 1 << 21
    vcpu.set_regs(regs)
    sregs = vcpu.get_sregs2()
    sregs.cr0, sregs.cr4, sregs.efer = 0x80050033, 0x620, 0xD01
    sregs.cr2, sregs.cr3, sregs.cr8 = rng.getrandbits(64), 0x5000, 0
    sregs.gdt.base, sregs.idt.limit = rng.getrandbits(47), 0xFFF
    for name in ("ds", "fs", "gs", "tr", "ldt"):
        segment = getattr(sregs, name)
        segment.base, segment.selector = rng.getrandbits(47), rng.getrandbits(16)
        segment.limit = rng.getrandbits(32)
    sregs.cs.l, sregs.cs.db, sregs.ss.dpl, sregs.es.unusable = 1, 0, 3, 1
    sregs.es.present = 0
    vcpu.set_sregs2(sregs)
    fpu = vcpu.get_fpu()
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr = 0x27F, 0x3800 | 0x4500, 0xA5, 0x5FC0
    fpu.last_opcode, fpu.last_ip, fpu.last_dp = 0x5D8, rng.getrandbits(47), rng.getrandbits(47)
    for register_ in (*fpu.fpr, *fpu.xmm):
        register_[:] = list(rng.randbytes(10).ljust(16, b"\0"))
    vcpu.set_fpu(fpu)
    debug = uapi.kvm_debugregs(dr6=0xFFFF0FF1, dr7=0x400)
    debug.db[:] = [rng.getrandbits(47) for _ in range(4)]
    vcpu.set_debugregs(debug)
    vcpu.set_msrs(
        {
            MSR_TSC_AUX: rng.getrandbits(32),
            0x3B: rng.getrandbits(64),
            0xC0000081: rng.getrandbits(64),
            0xC0000102: rng.getrandbits(47),
            0x277: 0x0007010600070106,
            0x2FF: 0xC06,
            0x200: 0xC0000006,
            0x402: rng.getrandbits(64),
            MSR_SYSTEM_TIME: PVCLOCK_AT | 1,
        }
    )
    start_timer(vcpu, PERIODIC, 50_000_000)
    events = vcpu.get_vcpu_events()
    events.exception.injected, events.exception.nr = 1, 13
    events.exception.has_error_code, events.exception.error_code = 1, 0x1234
    events.interrupt.shadow = uapi.KVM_X86_SHADOW_INT_STI
    events.nmi.masked, events.nmi.pending = 1, 1
    events.flags = uapi.KVM_VCPUEVENT_VALID_NMI_PENDING | uapi.KVM_VCPUEVENT_VALID_SHADOW
    vcpu.set_vcpu_events(events)


def scramble_chips(source: Machine) -> None:
    chip = source.vm.get_irqchip(uapi.KVM_IRQCHIP_PIC_SLAVE)
    chip.chip.pic.imr, chip.chip.pic.irq_base, chip.chip.pic.isr = 0xB9, 0x28, 0x10
    source.vm.set_irqchip(chip)
    chip = source.vm.get_irqchip(uapi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[9].bits = 1 << 16 | 1 << 15 | 0x39
    chip.chip.ioapic.ioregsel, chip.chip.ioapic.irr = 0x22, 1 << 9
    source.vm.set_irqchip(chip)
    pit = source.vm.get_pit2()
    channel = pit.channels[0]
    channel.count, channel.mode, channel.rw_mode = 0x4A9, 2, 3
    channel.read_state, channel.write_state, channel.latched_count = 3, 3, 0x123
    source.vm.set_pit2(pit)


@pytest.mark.parametrize("seed", range(4))
def test_everything_comes_back(pair: Pair, seed: int) -> None:
    rng = random.Random(seed)
    for vcpu in pair.source.vcpus:
        scramble(vcpu, rng)
    scramble_chips(pair.source)
    pair.source.vcpus[1].set_mp_state(uapi.KVM_MP_STATE_HALTED)
    state = pair.save()
    blank = save(pair.target.kvm, pair.target.vm, pair.target.vcpus)
    assert all(blank.vcpus[0].parts[n] != state.vcpus[0].parts[n] for n in ("regs", "events"))
    after = pair.restore(state)
    assert differences(still(state), still(after)) == []


def test_a_part_is_its_ioctls_struct(pair: Pair) -> None:
    vcpu = pair.source.vcpus[0]
    scramble(vcpu, random.Random(1))
    state = pair.save().vcpus[0]
    assert state.part("regs", uapi.kvm_regs).rip == vcpu.get_regs().rip
    assert state.parts["xsave"] == vcpu.get_xsave2(4096)
    assert state.msrs[MSR_TSC_AUX] == vcpu.get_msrs((MSR_TSC_AUX,))[MSR_TSC_AUX]


def test_an_sipi_that_has_arrived_is_in_the_registers(pair: Pair) -> None:
    """KVM_GET_MP_STATE acts on it, so it is asked first."""
    boot, other = pair.source.vcpus
    other.set_mp_state(uapi.KVM_MP_STATE_SIPI_RECEIVED)
    state = pair.save().vcpus[1]
    assert state.part("mp_state", uapi.kvm_mp_state).mp_state == uapi.KVM_MP_STATE_RUNNABLE
    assert state.part("regs", uapi.kvm_regs).rip == 0
    assert boot.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE


# Time.


def test_tsc_and_clock_go_on_together(pair: Pair) -> None:
    """To the tick, and although the guest is too young for KVM to tell its TSC from a new one."""
    source = pair.source
    source.vm.set_clock(uapi.kvm_clock_data(clock=123_456_789_000))
    source.vcpus[1].set_msrs({0x10: 1 << 40})
    state = pair.save()
    time.sleep(0.02)
    began = time.monotonic_ns()
    after = pair.restore(state)
    took = time.monotonic_ns() - began
    clocks = [uapi.kvm_clock_data.from_buffer_copy(s.parts["clock"]).clock for s in (state, after)]
    passed = clocks[1] - clocks[0]
    assert 0 < passed <= took  # and not while it was saved
    for old, new in zip(state.vcpus, after.vcpus, strict=True):
        assert_same_time(old, new, passed)


def test_where_kvm_knows_no_offset_the_tsc_itself_is_written(pair: Pair) -> None:
    source = pair.source.vcpus[0]
    source.set_msrs({0x10: 1 << 50})
    state = pair.save()
    alone = [type(vcpu)(vcpu.parts, None) for vcpu in state.vcpus]
    after = pair.restore(VmState(state.parts, alone))
    assert after.vcpus[0].msrs[0x10] >= state.vcpus[0].msrs[0x10] >= 1 << 50


@pytest.mark.parametrize("mode", [ONE_SHOT, PERIODIC])
def test_a_counter_that_runs_out_while_stopped_interrupts_afterwards(pair: Pair, mode: int) -> None:
    start_timer(pair.source.vcpus[0], mode, 1_000_000)
    time.sleep(0.003)
    state = pair.save()
    assert not requested(pair.source.vcpus[0], VECTOR)
    pair.restore(state)
    vcpu = pair.target.vcpus[0]
    time.sleep(0.001)
    assert not requested(vcpu, VECTOR)
    run_until_kicked(vcpu)
    assert requested(vcpu, VECTOR)


def test_a_deadline_that_passes_while_stopped_interrupts_afterwards(pair: Pair) -> None:
    """The deadline is in an MSR, the interrupt in the local APIC: between reading the one and the
    other nothing may move over.
    """
    source, target = pair.source.vcpus[0], pair.target.vcpus[0]
    start_timer(source, TSC_DEADLINE, 0)
    deadline = source.get_msrs((0x10,))[0x10] + source.get_tsc_khz()
    source.set_msrs({MSR_TSC_DEADLINE: deadline})
    time.sleep(0.003)
    state = pair.save()
    assert state.vcpus[0].msrs[MSR_TSC_DEADLINE] == deadline
    assert not requested(source, VECTOR)
    pair.restore(state)
    run_until_kicked(target)
    assert requested(target, VECTOR)
    assert target.get_msrs((MSR_TSC_DEADLINE,))[MSR_TSC_DEADLINE] == 0


def test_the_clocks_page_gets_a_version_that_a_reader_notices(pair: Pair) -> None:
    source, target = pair.source, pair.target
    source.vcpus[0].set_msrs({MSR_SYSTEM_TIME: PVCLOCK_AT | 1})
    run_until_kicked(source.vcpus[0])
    source.vm.memory[0].write(PVCLOCK_AT, (8).to_bytes(4, "little"))
    source.vm.memory[0].write(PVCLOCK_AT + 29, b"\x02")  # stopped, says KVM_KVMCLOCK_CTRL
    target.vm.memory[0].write(PVCLOCK_AT, source.vm.memory[0].read(PVCLOCK_AT, 32))
    pair.restore(pair.save())
    target.cpu(0).script.append(lambda cpu: cpu_exit())
    assert target.vcpus[0].run() == uapi.KVM_EXIT_SHUTDOWN
    page = target.vm.memory[0].read(PVCLOCK_AT, 32)
    assert int.from_bytes(page[:4], "little") == 10
    assert page[29] == 3


def cpu_exit() -> Exit:
    return Exit.SHUTDOWN


# As bytes.


def test_through_a_file(pair: Pair) -> None:
    scramble(pair.source.vcpus[1], random.Random(3))
    state, file = pair.save(), io.BytesIO()
    write_sections(file, vm_sections(state))
    file.seek(0)
    assert vm_state(read_sections(file)) == state


def test_memory_is_written_without_what_is_zero() -> None:
    parts = [GuestMemory(1 << 20), GuestMemory(1 << 16, 1 << 32)]
    parts[0].write(0x45678, b"here")
    parts[0].write(0xFFFFE, b"at")
    parts[1].write(1 << 32, b"and above 4 GiB")
    section = memory_section(parts)
    assert len(section) < 4 << 16
    others = [GuestMemory(1 << 20), GuestMemory(1 << 16, 1 << 32)]
    load_memory(others, section)
    for part, other in zip(parts, others, strict=True):
        assert part.read(part.addr, part.size) == other.read(part.addr, part.size)
    with pytest.raises(StateError, match="does not fit"):
        load_memory([GuestMemory(1 << 16)], section)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"no state" + data, "not a saved state"),
        (lambda data: data[:-1], "ends early"),
        (lambda data: data[:13] + b"\x09" + data[14:], "of version 9"),
        (lambda data: data[:21] + b"\xff\xff" + data[23:], "damaged"),
    ],
)
def test_what_is_no_state_is_refused(damage, message) -> None:  # type: ignore[no-untyped-def]
    file = io.BytesIO()
    write_sections(file, {"vm/clock": bytes(48)})
    with pytest.raises(StateError, match=message):
        read_sections(io.BytesIO(damage(file.getvalue())))


def test_a_state_without_vcpus_is_refused() -> None:
    with pytest.raises(StateError, match="no vCPU"):
        vm_state({"vm/clock": bytes(48)})


# Refusals.


def test_another_number_of_vcpus_is_refused(pair: Pair) -> None:
    state = pair.save()
    with pytest.raises(StateError, match="2 vCPUs, the VM has 1"):
        restore(pair.target.vm, pair.target.vcpus[:1], state)


def test_what_kvm_refuses_is_named(pair: Pair) -> None:
    state = pair.save()
    parts = state.vcpus[0].parts
    sregs = state.vcpus[0].part("sregs2", uapi.kvm_sregs2)
    sregs.cr4 = 1 << 63
    parts["sregs2"] = bytes(sregs)
    with pytest.raises(StateError, match=r"state's sregs2: .*Errno 22"):
        pair.restore(state)


def test_an_msr_that_kvm_refuses_is_named(pair: Pair) -> None:
    state = pair.save()
    parts = state.vcpus[0].parts
    parts["msrs"] = parts["msrs"].replace(
        struct.pack("<IIQ", 0x277, 0, 0x0007040600070406), struct.pack("<IIQ", 0x277, 0, 2)
    )
    with pytest.raises(StateError, match="refused 0x2 for MSR 0x277"):
        pair.restore(state)
