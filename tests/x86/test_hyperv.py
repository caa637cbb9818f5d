"""Hyper-V's registers and calls as a guest and its VMM see them."""

from __future__ import annotations

import errno
import os
import select
import struct
import time
from collections.abc import Iterator

import pytest

from anykvm.api import Vcpu
from anykvm.uapi import kvm as uapi
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_cpuid import hv_cpuid
from anykvm.x86.hyperv_tlfs import Code, Status

from .long_guest import VMCALL, LongGuest, long_guest

HYPERCALL_PAGE, TSC_PAGE, MESSAGES, EVENTS, INPUT = 0x8000, 0x9000, 0xA000, 0xB000, 0xC000
X2APIC_ENABLE, APIC_BASE, SPIV = 0xFEE00C00, 0x1B, 0x80F
SINT, VECTOR = 3, 0x61
XMM0_LOAD = b"\x66\x48\x0f\x6e\xc0"  # movq xmm0, rax
STI_HLT = b"\xfb\xf4"


def hyperv(guest: LongGuest, **change: int) -> None:
    """Every vCPU gets Hyper-V's CPUID in place of KVM's, with these registers of HV_FEATURES."""
    theirs = hv_cpuid(local_apic=True)
    for entry in theirs:
        if entry.function == hv.HV_FEATURES:
            for name, value in change.items():
                setattr(entry, name, value)
    kept = [entry for entry in guest.cpuid if entry.function >> 8 != 0x400000]
    for vcpu in guest.vcpus:
        vcpu.set_cpuid2(kept + theirs)


@pytest.fixture
def guest() -> Iterator[LongGuest]:
    with long_guest() as made:
        hyperv(made)
        yield made


@pytest.fixture
def pair() -> Iterator[LongGuest]:
    with long_guest(2) as made:
        hyperv(made)
        for vcpu in made.vcpus:
            vcpu.set_msrs({APIC_BASE: X2APIC_ENABLE})
            vcpu.set_msrs({SPIV: 0x1FF})
        yield made


def hypercall(guest: LongGuest, param: int, first: int = 0, second: int = 0) -> int:
    return guest.execute(VMCALL, rcx=param, rdx=first, r8=second)


def identify(guest: LongGuest) -> None:
    assert guest.wrmsr(hv.GUEST_OS_ID, 0x8100 << 48)


def requested(vcpu: Vcpu) -> int:
    page = bytes(vcpu.get_lapic().regs)
    return sum(int.from_bytes(page[0x200 + 16 * i :][:4], "little") << 32 * i for i in range(8))


def test_cpuid_is_the_same_from_both_descriptors() -> None:
    with long_guest() as guest:
        size = 10
        found = []
        for owner in (guest.kvm, guest.vcpus[0]):
            room = (uapi.kvm_cpuid_entry2 * size)()
            raw = bytearray(bytes(uapi.kvm_cpuid2(nent=size)) + bytes(room))
            data = (uapi.u8 * len(raw)).from_buffer(raw)
            owner.ioctl(uapi.KVM_GET_SUPPORTED_HV_CPUID, data)
            found.append(bytes(raw))
        assert found[0] == found[1]
        entries = (uapi.kvm_cpuid_entry2 * size).from_buffer_copy(found[0][8:])
        assert [entry.function for entry in entries][:2] == [0x40000000, 0x40000001]
        assert (
            struct.pack("<III", entries[0].ebx, entries[0].ecx, entries[0].edx) == b"Linux KVM Hv"
        )
        assert entries[1].eax == hv.HV_SIGNATURE_EAX
        short = bytearray(bytes(uapi.kvm_cpuid2(nent=3)) + bytes(400))
        with pytest.raises(OSError, match=f"Errno {errno.E2BIG}]"):
            guest.kvm.ioctl(
                uapi.KVM_GET_SUPPORTED_HV_CPUID, (uapi.u8 * len(short)).from_buffer(short)
            )


def test_a_guest_without_hyperv_has_none_of_it() -> None:
    with long_guest() as guest:
        assert guest.rdmsr(hv.TIME_REF_COUNT) is None
        assert not guest.wrmsr(hv.GUEST_OS_ID, 1)
        assert guest.vcpus[0].get_msrs([hv.VP_INDEX]) == {hv.VP_INDEX: 0}


def test_what_is_enforced(guest: LongGuest) -> None:
    hyperv(guest, eax=int(hv.Access.HYPERCALL), ebx=0, edx=0)
    assert guest.rdmsr(hv.VP_INDEX) == 0
    identify(guest)
    connection = Code.SIGNAL_EVENT | hv.FAST
    assert hypercall(guest, connection, 9) == Status.INVALID_HYPERCALL_INPUT
    guest.vcpus[0].enable_cap(uapi.KVM_CAP_HYPERV_ENFORCE_CPUID, 1)
    assert hypercall(guest, connection, 9) == Status.ACCESS_DENIED
    assert guest.rdmsr(hv.VP_INDEX) is None
    assert guest.vcpus[0].get_msrs([hv.VP_INDEX]) == {hv.VP_INDEX: 0}


def test_all_listed_registers_round_trip(guest: LongGuest) -> None:
    vcpu = guest.vcpus[0]
    listed = [i for i in guest.kvm.msr_index_list() if 0x40000000 <= i < 0x40001000]
    values = vcpu.get_msrs(listed)
    assert len(values) == len(listed) > 25
    assert vcpu.set_msrs(values) == len(values)
    changed = {hv.CRASH_P0: 5, hv.VP_INDEX: 7, hv.REENLIGHTENMENT_CONTROL: 0x100FF}
    assert vcpu.set_msrs(changed) == len(changed)
    assert vcpu.get_msrs(list(changed)) == changed


def test_the_hypercall_page_holds_the_instruction(guest: LongGuest) -> None:
    assert guest.wrmsr(hv.HYPERCALL, HYPERCALL_PAGE | 1)
    assert guest.rdmsr(hv.HYPERCALL) == 0  # nobody has said who it is
    identify(guest)
    assert guest.wrmsr(hv.HYPERCALL, HYPERCALL_PAGE | 1)
    assert guest.memory.read(HYPERCALL_PAGE, 4) == VMCALL + b"\xc3"
    call = b"\xb8" + HYPERCALL_PAGE.to_bytes(4, "little") + b"\xff\xd0"  # mov eax, page; call rax
    assert guest.execute(call, rcx=0x7777) == Status.INVALID_HYPERCALL_CODE
    assert guest.wrmsr(hv.GUEST_OS_ID, 0)
    assert guest.rdmsr(hv.HYPERCALL) == HYPERCALL_PAGE


def test_time_by_register_and_by_page_agree(guest: LongGuest) -> None:
    first = guest.rdmsr(hv.TIME_REF_COUNT)
    began = time.monotonic_ns()
    time.sleep(0.02)
    passed = (time.monotonic_ns() - began) // 100
    second = guest.rdmsr(hv.TIME_REF_COUNT)
    assert first is not None
    assert second is not None
    assert passed <= second - first < passed + 5_000_000
    assert guest.wrmsr(hv.REFERENCE_TSC, TSC_PAGE | 1)
    guest.execute(b"\x90")
    sequence, scale, offset = struct.unpack("<I4xQq", guest.memory.read(TSC_PAGE, 24))
    assert sequence not in (0, 0xFFFFFFFF)
    code = b"\x0f\x31\x48\xc1\xe2\x20\x48\x09\xd0"  # rdtsc; shl rdx, 32; or rax, rdx
    by_page = (guest.execute(code) * scale >> 64) + offset
    third = guest.rdmsr(hv.TIME_REF_COUNT)
    assert third is not None
    assert second < by_page < third
    guest.vm.set_clock(uapi.kvm_clock_data(clock=0))
    guest.execute(b"\x90")
    after = struct.unpack("<I4xQq", guest.memory.read(TSC_PAGE, 24))
    assert after[0] == sequence + 1
    assert after[2] != offset
    assert (guest.rdmsr(hv.TIME_REF_COUNT) or 0) < third


def test_a_crash_and_a_reset_reach_the_vmm(guest: LongGuest) -> None:
    run = guest.vcpus[0].kvm_run
    assert guest.wrmsr(hv.CRASH_P0, 0xBAD)
    for index, value, kind in (
        (hv.CRASH_CTL, hv.CRASH_NOTIFY, uapi.KVM_SYSTEM_EVENT_CRASH),
        (hv.RESET, 1, uapi.KVM_SYSTEM_EVENT_RESET),
    ):
        gpr = {"rax": value & 0xFFFFFFFF, "rdx": value >> 32, "rcx": index}
        assert guest.start(b"\x0f\x30", **gpr) == uapi.KVM_EXIT_SYSTEM_EVENT
        assert run.system_event.type == kind
    assert guest.vcpus[0].get_msrs([hv.CRASH_P0]) == {hv.CRASH_P0: 0xBAD}


def synic(guest: LongGuest, n: int = 0) -> Vcpu:
    vcpu = guest.vcpus[n]
    vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC2)
    vcpu.set_msrs({hv.SIMP: MESSAGES | 1, hv.SINT0 + SINT: VECTOR})
    return vcpu


def test_the_synic_is_the_vmms_to_activate(guest: LongGuest) -> None:
    assert guest.rdmsr(hv.SCONTROL) is None
    vcpu = guest.vcpus[0]
    with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
        vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC2, 1)
    vcpu.enable_cap(uapi.KVM_CAP_HYPERV_SYNIC)
    assert guest.rdmsr(hv.SVERSION) == 1
    guest.memory.write(MESSAGES, b"x" * 4096)
    gpr = {"rax": MESSAGES | 1, "rcx": hv.SIMP, "rdx": 0}
    assert guest.start(b"\x0f\x30", **gpr) == uapi.KVM_EXIT_HYPERV
    exit_ = vcpu.kvm_run.hyperv
    assert exit_.type == uapi.KVM_EXIT_HYPERV_SYNIC
    assert (exit_.u.synic.msr, exit_.u.synic.msg_page) == (hv.SIMP, MESSAGES | 1)
    assert guest.memory.read(MESSAGES, 4096) == bytes(4096)
    assert not guest.wrmsr(hv.SINT0, 5)
    assert guest.wrmsr(hv.SINT0, hv.SINT_MASKED)


def test_a_route_to_a_sint_interrupts(pair: LongGuest) -> None:
    synic(pair, 1)
    entry = uapi.kvm_irq_routing_entry(gsi=20, type=uapi.KVM_IRQ_ROUTING_HV_SINT)
    entry.u.hv_sint.vcpu, entry.u.hv_sint.sint = 1, SINT
    pair.vm.set_gsi_routing([entry])
    pair.vm.irq_line(20, 1)
    assert requested(pair.vcpus[1]) == 1 << VECTOR
    assert requested(pair.vcpus[0]) == 0


def test_a_timer_sends_a_message(pair: LongGuest) -> None:
    vcpu = synic(pair)
    config, soon = 1 | SINT << 16, (pair.rdmsr(hv.TIME_REF_COUNT) or 0) + 20_000
    assert pair.wrmsr(hv.STIMER0_COUNT, soon)
    assert pair.wrmsr(hv.STIMER0_CONFIG, config)
    deadline = time.monotonic() + 5
    while not requested(vcpu) and time.monotonic() < deadline:
        pair.execute(b"\x90")
    assert requested(vcpu) == 1 << VECTOR
    slot = pair.memory.read(MESSAGES + SINT * hv.MESSAGE_SIZE, 40)
    kind, size, flags, _, index, expiry, delivery = struct.unpack("<IBB2xQI4xQQ", slot)
    assert (kind, size, flags, index) == (hv.HVMSG_TIMER_EXPIRED, 24, 0, 0)
    assert expiry == soon <= delivery
    assert pair.rdmsr(hv.STIMER0_CONFIG) == config & ~1
    # The slot is taken: another waits until the guest has ended the message.
    assert pair.wrmsr(hv.STIMER0_CONFIG, config)
    pair.execute(b"\x90")
    assert pair.memory.read(MESSAGES + SINT * hv.MESSAGE_SIZE + hv.MESSAGE_FLAGS, 1) == b"\1"
    pair.memory.write(MESSAGES + SINT * hv.MESSAGE_SIZE, bytes(4))
    assert pair.wrmsr(hv.EOM, 0)
    pair.execute(b"\x90")
    assert pair.memory.read(MESSAGES + SINT * hv.MESSAGE_SIZE, 4) == slot[:4]


def test_a_direct_timer_wakes_a_halted_processor(pair: LongGuest) -> None:
    vcpu = synic(pair)
    assert pair.wrmsr(hv.STIMER0_COUNT, 50_000)
    assert pair.wrmsr(hv.STIMER0_CONFIG, 1 << 1 | 1 | 1 << 12 | VECTOR << 4)  # periodic
    assert pair.start(b"\xf4") == uapi.KVM_EXIT_IO  # HLT, interrupts off: woken all the same
    assert requested(vcpu) == 1 << VECTOR
    assert pair.rdmsr(hv.STIMER0_CONFIG) == 1 << 1 | 1 | 1 << 12 | VECTOR << 4


def test_the_apic_by_its_registers(pair: LongGuest) -> None:
    icr = 1 << 32 | 0x4000 | VECTOR
    assert pair.wrmsr(hv.ICR, icr)
    assert requested(pair.vcpus[1]) == 1 << VECTOR
    assert pair.rdmsr(hv.ICR) == icr
    assert pair.wrmsr(hv.TPR, 0x30)
    assert pair.rdmsr(hv.TPR) == 0x30
    assert pair.vcpus[0].get_sregs().cr8 == 3
    assert pair.wrmsr(hv.EOI, 0)
    assert pair.wrmsr(hv.VP_ASSIST_PAGE, 0xD001)
    assert pair.rdmsr(hv.VP_ASSIST_PAGE) == 0xD001


def test_ipis_and_flushes_of_sets_of_processors(pair: LongGuest) -> None:
    identify(pair)
    fast = hv.FAST
    assert hypercall(pair, Code.SEND_IPI | fast, VECTOR, 0b10) == Status.SUCCESS
    assert requested(pair.vcpus[1]) == 1 << VECTOR
    assert hypercall(pair, Code.SEND_IPI | fast, 5, 0b10) == Status.INVALID_HYPERCALL_INPUT
    pair.memory.write(INPUT, struct.pack("<IIQQQ", VECTOR + 1, 0, hv.SET_SPARSE, 1, 0b10))
    one_bank = 1 << hv.VAR_SHIFT
    assert hypercall(pair, Code.SEND_IPI_EX | one_bank, INPUT) == Status.SUCCESS
    assert requested(pair.vcpus[1]) == 3 << VECTOR
    assert hypercall(pair, Code.SEND_IPI_EX, INPUT) == Status.INVALID_HYPERCALL_INPUT
    pair.memory.write(INPUT, struct.pack("<QQQ", 0, hv.FLUSH_ALL_PROCESSORS, 0))
    assert hypercall(pair, Code.FLUSH_SPACE, INPUT) == Status.SUCCESS
    count = 2 << hv.REP_COUNT_SHIFT
    assert hypercall(pair, Code.FLUSH_LIST | count, INPUT) == Status.SUCCESS | count
    assert hypercall(pair, Code.FLUSH_LIST, INPUT) == Status.INVALID_HYPERCALL_INPUT
    assert hypercall(pair, Code.FLUSH_SPACE | 1 << 27, INPUT) == Status.INVALID_HYPERCALL_INPUT


def test_signals_go_to_an_eventfd_and_messages_to_userspace(pair: LongGuest) -> None:
    identify(pair)
    vcpu, eventfd = pair.vcpus[0], os.eventfd(0, os.EFD_NONBLOCK)
    signal = Code.SIGNAL_EVENT | hv.FAST
    try:
        assign = uapi.kvm_hyperv_eventfd(conn_id=9, fd=eventfd)
        pair.vm.ioctl(uapi.KVM_HYPERV_EVENTFD, assign)
        for wrong, code in (
            (assign, errno.EEXIST),
            (uapi.kvm_hyperv_eventfd(conn_id=1 << 24, fd=eventfd), errno.EINVAL),
            (uapi.kvm_hyperv_eventfd(conn_id=8, flags=1), errno.ENOENT),
            (uapi.kvm_hyperv_eventfd(conn_id=8, fd=-1), errno.EBADF),
        ):
            with pytest.raises(OSError, match=f"Errno {code}]"):
                pair.vm.ioctl(uapi.KVM_HYPERV_EVENTFD, wrong)
        assert hypercall(pair, signal, 9) == Status.SUCCESS
        assert select.select([eventfd], [], [], 0)[0]
        pair.vm.ioctl(uapi.KVM_HYPERV_EVENTFD, uapi.kvm_hyperv_eventfd(conn_id=9, flags=1))
    finally:
        os.close(eventfd)
    assert hypercall(pair, signal, 9) == Status.INVALID_HYPERCALL_INPUT  # no SynIC
    synic(pair)
    assert pair.start(VMCALL, rcx=Code.POST_MESSAGE, rdx=INPUT, r8=5) == uapi.KVM_EXIT_HYPERV
    hcall = vcpu.kvm_run.hyperv.u.hcall
    assert (hcall.input, list(hcall.params)) == (Code.POST_MESSAGE, [INPUT, 5])
    hcall.result = 0x1234
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert vcpu.get_regs().rax == 0x1234
