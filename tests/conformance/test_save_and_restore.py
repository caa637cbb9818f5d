"""All state of a VM, read by GET ioctls and written into another VM, reads back the same."""

from __future__ import annotations

import os

from tests.state.cycles import differences, still

from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.api.state import restore, save
from anykvm.uapi import kvm as uapi

from .framework import conforms
from .machine import Machine, ioctl

MSR_STAR, MSR_PAT, MSR_TSC_AUX = 0xC0000081, 0x277, 0xC0000103
SVR, LVTT, TDCR, TMICT = 0xF0, 0x320, 0x3E0, 0x380
PARTS = (
    *("KVM_GET_SREGS2", "KVM_SET_SREGS2", "KVM_GET_XSAVE", "KVM_SET_XSAVE", "KVM_GET_XCRS"),
    *("KVM_SET_XCRS", "KVM_GET_LAPIC", "KVM_SET_LAPIC", "KVM_GET_VCPU_EVENTS"),
    *("KVM_SET_VCPU_EVENTS", "KVM_GET_IRQCHIP", "KVM_SET_IRQCHIP", "KVM_GET_PIT2", "KVM_SET_PIT2"),
    *("KVM_GET_CLOCK", "KVM_SET_CLOCK"),
)


class Pc:
    """A VM with interrupt controllers, a timer and two vCPUs, as `anykvm.api` objects."""

    def __init__(self, machine: Machine) -> None:
        self.kvm = Kvm.from_fd(machine.keep(os.dup(machine.kvm)))
        size = ioctl(machine.kvm, uapi.KVM_GET_VCPU_MMAP_SIZE)
        self.vm = Vm(machine.create_vm(), size)
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.vm.add_memory(0, GuestMemory(1 << 16))
        self.vcpus = [Vcpu(machine.create_vcpu(self.vm.fd, number), size) for number in range(2)]
        for vcpu in self.vcpus:
            vcpu.set_cpuid2(self.kvm.supported_cpuid())


def set_something(vcpu: Vcpu, seed: int) -> None:
    regs, fpu, debug = vcpu.get_regs(), vcpu.get_fpu(), vcpu.get_debugregs()
    regs.rax, regs.r15, regs.rip, regs.rflags = seed, ~seed & (1 << 64) - 1, 0x1234, 0x246
    vcpu.set_regs(regs)
    fpu.fcw, fpu.fsw, fpu.ftwx, fpu.mxcsr = 0x27F, 0x3800, 0x81, 0x3F80
    fpu.fpr[1][:10] = [seed & 0xFF] * 7 + [0x80, 0x01, 0x40]
    fpu.xmm[15][:] = range(16)
    vcpu.set_fpu(fpu)
    debug.db[3], debug.dr7 = 0x7000, 0x400
    vcpu.set_debugregs(debug)
    msrs = {MSR_STAR: 0x23001000 << 32, MSR_PAT: 0x0007010600070106, MSR_TSC_AUX: seed}
    assert vcpu.set_msrs(msrs) == len(msrs)
    lapic = vcpu.get_lapic()
    for register, value in ((SVR, 0x1FF), (LVTT, 0x200EC), (TDCR, 0xB), (TMICT, 1 << 30)):
        lapic.regs[register : register + 4] = list(value.to_bytes(4, "little"))
    vcpu.set_lapic(lapic)
    events = vcpu.get_vcpu_events()
    events.nmi.masked, events.flags = 1, uapi.KVM_VCPUEVENT_VALID_NMI_PENDING
    vcpu.set_vcpu_events(events)


@conforms(*PARTS)
def test_a_vms_state_reads_back_the_same_in_another(machine: Machine) -> None:
    source, target = Pc(machine), Pc(machine)
    for number, vcpu in enumerate(source.vcpus):
        set_something(vcpu, 0x1111 << number)
    source.vcpus[1].set_mp_state(uapi.KVM_MP_STATE_HALTED)
    chip = source.vm.get_irqchip(uapi.KVM_IRQCHIP_IOAPIC)
    chip.chip.ioapic.redirtbl[4].bits = 0x10031
    source.vm.set_irqchip(chip)
    before = save(source.kvm, source.vm, source.vcpus)
    restore(target.vm, target.vcpus, before)
    after = save(target.kvm, target.vm, target.vcpus)
    assert differences(still(before), still(after)) == []
    assert target.vcpus[1].get_regs().r15 == ~0x2222 & (1 << 64) - 1
