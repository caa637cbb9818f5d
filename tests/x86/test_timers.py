"""Timers as a guest meets them: real-mode code whose interrupt handler looks at the TSC.

The machine may be busy, so nothing is said about how late an interrupt comes; only that none comes
early, that the PIT's missed ticks are made up for and that the local APIC's are not.
"""

from __future__ import annotations

import pytest
from tests.cpu.assembler import assemble

from anykvm.api import Vcpu
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import supported_cpuid
from anykvm.x86.tsc import host_tsc_khz

from .real_guest import RealGuest, real_guest

KHZ = host_tsc_khz()
HANDLER, DUE, COUNT, LIMIT = 0x3000, 0x4000, 0x4008, 0x400C
DONE, EARLY, TOO_MANY = 0xE0, 0xE1, 0xE2  # ports that nobody answers
PIT_VECTOR, LAPIC_VECTOR = 0x20, 0x40
ONESHOT, PERIODIC, DEADLINE = range(3)


def wrmsr(msr: int, value: int) -> str:
    return f"mov ecx, {msr}; mov eax, {value & 0xFFFFFFFF}; mov edx, {value >> 32}; wrmsr;"


def outs(*writes: tuple[int, int]) -> str:
    return "".join(f"mov al, {value}; out {port}, al;" for port, value in writes)


X2APIC = wrmsr(0x1B, 0xFEE00D00) + wrmsr(0x80F, 0x1FF) + wrmsr(0x83E, 0xB)
COUNT_1_MS = wrmsr(0x838, 1_000_000)
DEADLINE_1_MS = f"rdtsc; add eax, {KHZ}; adc edx, 0; mov ecx, 0x6e0; wrmsr;"
MASTER_PIC = outs((0x20, 0x11), (0x21, PIT_VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xFE))
PIT_8_MS = outs((0x43, 0x34), (0x40, 9546 & 0xFF), (0x40, 9546 >> 8))  # a little more
PIC_EOI, X2APIC_EOI = outs((0x20, 0x20)), wrmsr(0x80B, 0)
NOW_IN_DUE = f"rdtsc; mov dword ptr [{DUE}], eax; mov dword ptr [{DUE + 4}], edx;"
MASKED_200_MS = f"rdtsc; mov ebx, eax; add ebx, {200 * KHZ}; 1: rdtsc; sub eax, ebx; js 1b;"
WAYS_TO_WAIT = {"halted": "9: hlt; jmp 9b", "busy": "9: inc ebx; jmp 9b"}


def check(period_ms: int) -> str:
    """In a handler: this interrupt is due a period after the one before. EBP: how late it is."""
    return (
        f"add dword ptr [{DUE}], {period_ms * KHZ}; adc dword ptr [{DUE + 4}], 0;"
        f"rdtsc; sub eax, dword ptr [{DUE}]; sbb edx, dword ptr [{DUE + 4}];"
        f"jns 2f; out {EARLY}, al; 2: mov ebp, eax; jz 3f; mov ebp, -1; 3: "
        f"inc dword ptr [{COUNT}]; mov eax, dword ptr [{LIMIT}];"
        f"cmp dword ptr [{COUNT}], eax; jb 4f; out {TOO_MANY}, al; 4: "
    )


def done_if_behind_by_less_than(ms: int) -> str:
    return f"cmp ebp, {ms * KHZ}; ja 5f; out {DONE}, al; 5: "


def vcpu_with(guest: RealGuest, code: str, handler: str, vector: int, limit: int) -> Vcpu:
    """In front of the code; the handler stands behind that vector."""
    guest.vm.create_irqchip()
    guest.vm.create_pit2()
    vcpu = guest.vcpu(assemble("xor ax, ax; mov ds, ax;" + code, 16))
    vcpu.set_cpuid2(supported_cpuid())
    guest.memory.write(HANDLER, assemble(handler, 16))
    guest.memory.write(4 * vector, HANDLER.to_bytes(4, "little"))
    guest.memory.write(LIMIT, limit.to_bytes(4, "little"))
    return vcpu


def port_left_at(vcpu: Vcpu) -> int:
    assert vcpu.run() == uapi.KVM_EXIT_IO
    return int(vcpu.kvm_run.io.port)


@pytest.mark.parametrize("waiting", WAYS_TO_WAIT)
@pytest.mark.parametrize(
    ("mode", "arm", "again"),
    [
        (ONESHOT, COUNT_1_MS, NOW_IN_DUE + COUNT_1_MS),
        (PERIODIC, COUNT_1_MS, ""),
        (DEADLINE, DEADLINE_1_MS, NOW_IN_DUE + DEADLINE_1_MS),
    ],
    ids=["one-shot", "periodic", "deadline"],
)
def test_the_local_apics_timer_is_never_early(
    waiting: str, mode: int, arm: str, again: str
) -> None:
    lvt = wrmsr(0x832, LAPIC_VECTOR | mode << 17)
    code = X2APIC + lvt + NOW_IN_DUE + arm + "sti;" + WAYS_TO_WAIT[waiting]
    handler = check(1) + again + X2APIC_EOI + "iret"
    with real_guest() as guest:
        vcpu = vcpu_with(guest, code, handler, LAPIC_VECTOR, limit=30)
        assert port_left_at(vcpu) == TOO_MANY


def test_the_local_apic_does_not_make_up_for_missed_periods() -> None:
    lvt = wrmsr(0x832, LAPIC_VECTOR | PERIODIC << 17)
    code = X2APIC + lvt + NOW_IN_DUE + COUNT_1_MS + MASKED_200_MS + "sti; 9: hlt; jmp 9b"
    handler = check(1) + done_if_behind_by_less_than(100) + X2APIC_EOI + "iret"
    with real_guest() as guest:
        vcpu = vcpu_with(guest, code, handler, LAPIC_VECTOR, limit=20)
        assert port_left_at(vcpu) == TOO_MANY


@pytest.mark.parametrize("waiting", WAYS_TO_WAIT)
def test_the_pit_makes_up_for_missed_ticks(waiting: str) -> None:
    """After interrupts were masked for 200 ms the guest is soon no more than two ticks behind."""
    code = MASTER_PIC + NOW_IN_DUE + PIT_8_MS + MASKED_200_MS + "sti;" + WAYS_TO_WAIT[waiting]
    handler = check(8) + done_if_behind_by_less_than(2 * 8) + PIC_EOI + "iret"
    with real_guest() as guest:
        vcpu = vcpu_with(guest, code, handler, PIT_VECTOR, limit=200)
        assert port_left_at(vcpu) == DONE
        assert guest.word(COUNT) >= 200 // 8 - 2
