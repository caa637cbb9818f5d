"""Hypercalls: which instruction, who may, arguments and results of each call."""

from __future__ import annotations

import errno
import struct
import time

import pytest

from anykvm.uapi import kvm as uapi
from anykvm.vmm.memory_map import PAGE_TABLES_ADDRESS
from anykvm.x86 import kvm_para as para

from .long_guest import CODE, VMCALL, VMMCALL, LongGuest, long_guest

X2APIC_ENABLE, APIC_BASE = 0xFEE00C00, 0x1B
USER_DPL, PTE_USER = 3, 4


def amd(cpuid: list[uapi.kvm_cpuid_entry2]) -> list[uapi.kvm_cpuid_entry2]:
    leaf = next(entry for entry in cpuid if entry.function == 0)
    leaf.ebx, leaf.edx, leaf.ecx = struct.unpack("<III", b"AuthenticAMD")
    return cpuid


@pytest.mark.parametrize("wrong", [False, True], ids=["native", "other"])
@pytest.mark.parametrize("vendor", ["intel", "amd"])
def test_the_other_vendors_instruction_is_rewritten(vendor: str, wrong: bool) -> None:
    native, other = (VMMCALL, VMCALL) if vendor == "amd" else (VMCALL, VMMCALL)
    with long_guest() as guest:
        if vendor == "amd":
            guest.vcpus[0].set_cpuid2(amd(guest.cpuid))
        found = guest.execute(other if wrong else native, rax=para.KVM_HC_VAPIC_POLL_IRQ)
        assert found == 0
        assert guest.memory.read(CODE, 3) == native


def test_with_the_quirk_disabled_the_other_instruction_is_undefined() -> None:
    with long_guest() as guest:
        quirk = uapi.KVM_X86_QUIRK_FIX_HYPERCALL_INSN
        guest.vm.enable_cap(uapi.KVM_CAP_DISABLE_QUIRKS2, quirk)
        assert guest.start(VMMCALL, rax=para.KVM_HC_VAPIC_POLL_IRQ) == uapi.KVM_EXIT_SHUTDOWN
        assert guest.memory.read(CODE, 3) == VMMCALL


def test_an_unknown_call_and_one_from_user_mode() -> None:
    with long_guest() as guest:
        assert guest.hypercall(0x1234) == -para.KVM_ENOSYS
        assert guest.hypercall(para.KVM_HC_CLOCK_PAIRING, 0x3000, 1) == -para.KVM_EOPNOTSUPP
        for table in range(3):  # user pages
            at = PAGE_TABLES_ADDRESS + 0x1000 * table
            guest.memory.write(at, bytes((guest.memory.read(at, 1)[0] | PTE_USER,)))
        sregs = guest.vcpus[0].get_sregs()
        sregs.ss.dpl = sregs.cs.dpl = USER_DPL
        sregs.ss.selector |= USER_DPL
        sregs.cs.selector |= USER_DPL
        guest.vcpus[0].set_sregs(sregs)
        assert guest.hypercall(para.KVM_HC_VAPIC_POLL_IRQ) == -para.KVM_EPERM


def test_clock_pairing_tells_time_and_tsc_of_one_moment() -> None:
    with long_guest() as guest:
        before = time.time_ns()
        tsc_before = guest.vcpus[0].get_msrs([0x10])[0x10]
        assert guest.hypercall(para.KVM_HC_CLOCK_PAIRING, 0x3000, 0) == 0
        seconds, nanoseconds, tsc, flags = struct.unpack("<qqQI", guest.memory.read(0x3000, 28))
        tsc_after = guest.vcpus[0].get_msrs([0x10])[0x10]
        assert before <= seconds * 10**9 + nanoseconds <= time.time_ns()
        assert nanoseconds < 10**9
        assert tsc_before < tsc < tsc_after
        assert flags == 0
        assert guest.hypercall(para.KVM_HC_CLOCK_PAIRING, 0x4000_0000, 0) == -para.KVM_EFAULT


def x2apic(guest: LongGuest) -> None:
    for n in range(len(guest.vcpus)):
        guest.vcpus[n].set_msrs({APIC_BASE: X2APIC_ENABLE})
        guest.vcpus[n].set_msrs({0x80F: 0x1FF})


def requested(guest: LongGuest, n: int) -> int:
    """The local APIC's IRR."""
    page = bytes(guest.vcpus[n].get_lapic().regs)
    words = (int.from_bytes(page[0x200 + 16 * i :][:4], "little") << 32 * i for i in range(8))
    return sum(words)


def test_ipis_to_many_processors_by_one_call() -> None:
    with long_guest(3) as guest:
        x2apic(guest)
        icr = 0x4000 | 0x51
        assert guest.hypercall(para.KVM_HC_SEND_IPI, 0b101, 0, 0, icr) == 2
        assert [requested(guest, n) for n in range(3)] == [1 << 0x51, 0, 1 << 0x51]
        assert guest.hypercall(para.KVM_HC_SEND_IPI, 0b1, 0, 1, icr) == 1  # from ID 1 on
        assert requested(guest, 1) == 1 << 0x51
        assert guest.hypercall(para.KVM_HC_SEND_IPI, 1, 0, 0, icr | 1 << 11) == -para.KVM_EINVAL
        assert guest.hypercall(para.KVM_HC_SEND_IPI, 1, 0, 500, icr) == 0


def test_a_kick_ends_a_halt() -> None:
    with long_guest(2) as guest:
        x2apic(guest)
        guest.vcpus[1].set_mp_state(uapi.KVM_MP_STATE_HALTED)
        assert guest.hypercall(para.KVM_HC_KICK_CPU, 0, 1) == 0
        assert guest.vcpus[1].get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
        assert guest.execute(b"\x90", 1, rax=5) == 5
        assert guest.hypercall(para.KVM_HC_SCHED_YIELD, 1) == 0


def test_userspace_answers_what_it_asked_for() -> None:
    with long_guest() as guest:
        call = para.KVM_HC_MAP_GPA_RANGE
        assert guest.hypercall(call, 0x3000, 2, 1) == -para.KVM_ENOSYS
        mask = guest.vm.check_extension(uapi.KVM_CAP_EXIT_HYPERCALL)
        assert mask == 1 << call
        with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
            guest.vm.enable_cap(uapi.KVM_CAP_EXIT_HYPERCALL, 1)
        guest.vm.enable_cap(uapi.KVM_CAP_EXIT_HYPERCALL, mask)
        for bad in ((0x3001, 1), (0x3000, 0), (0x3000, -1)):
            assert guest.hypercall(call, *bad, 0) == -para.KVM_EINVAL
        code, gpr = VMCALL, {"rax": call, "rbx": 0x3000, "rcx": 2, "rdx": 1}
        assert guest.start(code, **gpr) == uapi.KVM_EXIT_HYPERCALL
        run = guest.vcpus[0].kvm_run
        assert (run.hypercall.nr, run.hypercall.longmode) == (call, 1)
        assert list(run.hypercall.args[:3]) == [0x3000, 2, 1]
        run.hypercall.ret = 77
        assert guest.vcpus[0].run() == uapi.KVM_EXIT_IO
        assert guest.vcpus[0].get_regs().rax == 77
