"""Interrupt controllers through ioctls: creation, routing, chips' state, PIT, split irqchip."""

from __future__ import annotations

import errno

import pytest
from tests.x86.fake_engine import port_in, port_out, sti, store, wrmsr
from tests.x86.machine import Machine, machine

from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi


def msi_route(gsi: int, vector: int, low: int = 0xFEE00000) -> uapi.kvm_irq_routing_entry:
    entry = uapi.kvm_irq_routing_entry(gsi=gsi, type=uapi.KVM_IRQ_ROUTING_MSI)
    entry.u.msi.address_lo, entry.u.msi.data = low, vector
    return entry


def chip_route(gsi: int, chip: int, pin: int) -> uapi.kvm_irq_routing_entry:
    entry = uapi.kvm_irq_routing_entry(gsi=gsi, type=uapi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = chip, pin
    return entry


def enabling(vector_register: int = 0xF0) -> object:
    """The guest enables its local APIC in software."""
    return store(0xFEE00000 + vector_register, (0x1FF).to_bytes(4, "little"))


def fails(expected: int, function, *args) -> None:
    with pytest.raises(OSError, match=f"Errno {expected}]"):
        function(*args)


def test_the_irqchip_comes_once_and_before_vcpus():
    with machine(irqchip=True) as m:
        fails(errno.EEXIST, m.vm.create_irqchip)
    with machine() as m:
        m.add_vcpu()
        fails(errno.EINVAL, m.vm.create_irqchip)


def test_without_an_irqchip():
    with machine() as m:
        vcpu = m.add_vcpu()
        fails(errno.ENXIO, m.vm.irq_line, 1, 1)
        fails(errno.ENXIO, m.vm.get_irqchip, 0)
        fails(errno.EINVAL, m.vm.set_gsi_routing, [])
        fails(errno.EINVAL, vcpu.get_lapic)
        fails(errno.ENOENT, m.vm.create_pit2)
        fails(errno.EINVAL, m.vm.signal_msi, uapi.kvm_msi(address_lo=0xFEE00000, data=0x41))


def test_default_routing_leads_to_the_pic_and_the_ioapic():
    with machine(irqchip=True) as m:
        m.add_vcpu()
        ioapic = m.vm.get_irqchip(uapi.KVM_IRQCHIP_IOAPIC)
        ioapic.chip.ioapic.redirtbl[4].bits = 0x54 | 1 << 15  # level, so that it stays asserted
        ioapic.chip.ioapic.redirtbl[20].bits = 0x64 | 1 << 15
        m.vm.set_irqchip(ioapic)
        for gsi in (4, 20):
            m.vm.irq_line(gsi, 1)
        assert m.vm.get_irqchip(uapi.KVM_IRQCHIP_IOAPIC).chip.ioapic.irr == 1 << 4 | 1 << 20
        assert m.vm.get_irqchip(uapi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr == 1 << 4


def test_a_routed_message_interrupts():
    with machine(irqchip=True) as m:
        m.vm.set_gsi_routing([msi_route(40, 0x77)])
        vcpu = m.add_vcpu(enabling(), Exit.SHUTDOWN, sti(), Exit.SHUTDOWN)
        vcpu.run()
        assert m.vm.irq_line_status(40, 1) == 1
        assert m.vm.irq_line_status(4, 1) == -1  # routed no more
        vcpu.run()
        assert m.cpu().did("interrupt") == [("interrupt", 0x77)]


@pytest.mark.parametrize(
    "entries",
    [
        [msi_route(4096, 1)],
        [msi_route(5, 1), msi_route(5, 2)],
        [chip_route(1, uapi.KVM_IRQCHIP_IOAPIC, 24)],
        [chip_route(1, uapi.KVM_IRQCHIP_PIC_MASTER, 8)],
        [chip_route(1, 3, 0)],
        [chip_route(1, 2, 1), chip_route(1, 2, 2)],
        [uapi.kvm_irq_routing_entry(gsi=1, type=99)],
    ],
)
def test_bad_routes_leave_the_table_as_it_was(entries):
    with machine(irqchip=True) as m:
        m.add_vcpu()
        fails(errno.EINVAL, m.vm.set_gsi_routing, entries)
        assert m.vm.irq_line_status(4, 1) == 1


def test_lowest_priority_goes_to_one_processor():
    with machine(irqchip=True) as m:
        vcpus = [m.add_vcpu(enabling(), Exit.SHUTDOWN), m.add_vcpu(enabling(), Exit.SHUTDOWN)]
        for vcpu in vcpus:
            vcpu.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
            vcpu.run()
        low = 0xFEE00000 | 0xFF << 12  # to all
        assert m.vm.signal_msi(uapi.kvm_msi(address_lo=low, data=0x41)) == 2
        assert m.vm.signal_msi(uapi.kvm_msi(address_lo=low, data=0x42 | 1 << 8)) == 1


def test_chip_state_round_trips():
    with machine(irqchip=True) as m:
        for chip_id in range(3):
            chip = m.vm.get_irqchip(chip_id)
            m.vm.set_irqchip(chip)
            assert bytes(m.vm.get_irqchip(chip_id)) == bytes(chip)
        fails(errno.EINVAL, m.vm.get_irqchip, 3)


def test_lapic_state_round_trips():
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu()
        state = vcpu.get_lapic()
        state.regs[0x350:0x354] = [0, 7, 0, 0]
        vcpu.set_lapic(state)
        assert bytes(vcpu.get_lapic()) == bytes(state)


def program_pit() -> list[object]:
    """Channel 0, mode 2, 1 ms; the 8259 passes IRQ 0 as vector 0x20 and ends it by itself."""
    ports = [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 3), (0x21, 0xFE)]
    ports += [(0x43, 0x34), (0x40, 1193 & 0xFF), (0x40, 1193 >> 8)]
    return [port_out(port, bytes([value])) for port, value in ports]


def test_the_pit_ticks():
    with machine(irqchip=True) as m:
        m.vm.create_pit2()
        fails(errno.EEXIST, m.vm.create_pit2)
        vcpu = m.add_vcpu(*program_pit(), sti(), sti(), sti(), Exit.SHUTDOWN)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt") == [("interrupt", 0x20)] * 3
        channel = m.vm.get_pit2().channels[0]
        assert (channel.mode, channel.count) == (2, 1193)


def test_the_speaker_port_is_the_vmms_unless_asked_for():
    dummy = uapi.KVM_PIT_SPEAKER_DUMMY
    for flags, reason in ((0, uapi.KVM_EXIT_IO), (dummy, uapi.KVM_EXIT_SHUTDOWN)):
        with machine(irqchip=True) as m:
            m.vm.create_pit2(flags)
            vcpu = m.add_vcpu(port_in(0x61), Exit.SHUTDOWN)
            assert vcpu.run() == reason


def split(m: Machine) -> None:
    m.vm.enable_cap(uapi.KVM_CAP_SPLIT_IRQCHIP, 24)


def test_split_irqchip_has_local_apics_alone():
    with machine() as m:
        split(m)
        vcpu = m.add_vcpu(store(0xFEC00000, bytes(4)), port_out(0x20, b"\x11"))
        assert len(bytes(vcpu.get_lapic())) == 1024
        fails(errno.ENXIO, m.vm.get_irqchip, 0)
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        assert vcpu.run() == uapi.KVM_EXIT_IO


def test_split_irqchip_tells_of_the_end_of_level_interrupts():
    level = 1 << 15
    with machine() as m:
        split(m)
        m.vm.set_gsi_routing([msi_route(3, 0x61 | level)])
        vcpu = m.add_vcpu(
            enabling(), Exit.REQUEST, sti(Exit.REQUEST), store(0xFEE000B0, bytes(4)), Exit.SHUTDOWN
        )
        m.cpu().script[1] = lambda cpu: (m.vm.irq_line(3, 1), Exit.REQUEST)[1]
        assert vcpu.run() == uapi.KVM_EXIT_IOAPIC_EOI
        assert vcpu.kvm_run.eoi.vector == 0x61
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


def test_split_irqchip_takes_the_vmms_interrupts():
    with machine() as m:
        split(m)
        vcpu = m.add_vcpu(sti(Exit.REQUEST), Exit.SHUTDOWN)
        vcpu.interrupt(0x35)
        fails(errno.EEXIST, vcpu.interrupt, 0x36)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt") == [("interrupt", 0x35)]


def test_tsc_deadline_wakes_a_halted_guest():
    with machine(irqchip=True) as m:
        vcpu = m.add_vcpu()
        vcpu.set_cpuid2(m.kvm.supported_cpuid())
        deadline = vcpu.get_msrs([0x10])[0x10] + 20 * vcpu.get_tsc_khz()
        script = [
            wrmsr(0x1B, 0xFEE00D00),
            wrmsr(0x80F, 0x1FF),
            wrmsr(0x832, 1 << 18 | 0x88),
            wrmsr(0x6E0, deadline),
            sti(),
            Exit.SHUTDOWN,
        ]
        m.cpu().script.extend(script)
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt", "exception") == [("interrupt", 0x88)]
        assert vcpu.get_msrs([0x10])[0x10] >= deadline
