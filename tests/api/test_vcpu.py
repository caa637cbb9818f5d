"""Vcpu: running, its memory, state of variable length."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from anykvm import fs
from anykvm.api import Vcpu
from anykvm.uapi import kvm as abi


def driver_run(vcpu: Vcpu) -> abi.kvm_run:
    """The vCPU's memory as its driver has it."""
    file = fs.fget(vcpu.fd)
    assert file is not None
    fs.fput(file)
    assert file.f_mapping is not None
    return file.f_mapping.view(abi.kvm_run)


def exits(vcpu: Vcpu, change: Callable[[abi.kvm_run], None]) -> Callable[[int], int]:
    def run(arg: int) -> int:
        change(driver_run(vcpu))
        return 0

    return run


def test_run_gives_the_exit_reason(fake: Any, vcpu: Vcpu) -> None:
    def hlt(run: abi.kvm_run) -> None:
        run.exit_reason = abi.KVM_EXIT_HLT

    fake.answers[abi.KVM_RUN] = exits(vcpu, hlt)
    assert vcpu.run() == abi.KVM_EXIT_HLT
    assert vcpu.kvm_run.exit_reason == abi.KVM_EXIT_HLT
    assert fake.calls[-1] == ("kvm-vcpu:0", abi.KVM_RUN, 0)


@pytest.mark.parametrize("number", [errno.EINTR, errno.EAGAIN])
def test_interruption_is_an_exit(fake: Any, vcpu: Vcpu, number: int) -> None:
    vcpu.kvm_run.exit_reason = abi.KVM_EXIT_IO
    fake.fail(abi.KVM_RUN, number)
    assert vcpu.run() == abi.KVM_EXIT_INTR


def test_other_errors_of_run_are_raised(fake: Any, vcpu: Vcpu) -> None:
    fake.fail(abi.KVM_RUN, errno.EFAULT)
    with pytest.raises(OSError, match="Bad address"):
        vcpu.run()


def test_io_data_both_ways(fake: Any, vcpu: Vcpu) -> None:
    run = driver_run(vcpu)
    run.io.size, run.io.count, run.io.data_offset = 2, 3, 4096
    page = fs.mmap(vcpu.fd, 4096, offset=4096)
    page.buffer[0:6] = list(b"abcdef")
    assert bytes(vcpu.io_data()) == b"abcdef"
    vcpu.io_data()[:] = b"ABCDEF"
    assert bytes(page.buffer[0:7]) == b"ABCDEF\0"


def test_mmio_data_both_ways(vcpu: Vcpu) -> None:
    run = driver_run(vcpu)
    run.mmio.len = 4
    run.mmio.data[0:8] = list(range(8))
    assert bytes(vcpu.mmio_data()) == bytes(range(4))
    vcpu.mmio_data()[:] = b"wxyz"
    assert bytes(run.mmio.data) == b"wxyz\4\5\6\7"


def test_kvm_run_survives_close(fake: Any, vcpu: Vcpu) -> None:
    run = vcpu.kvm_run
    vcpu.close()
    run.immediate_exit = 1
    assert run.immediate_exit == 1
    assert fake.released == ["kvm-vcpu:0"]


def test_cpuid2_round_trip(fake: Any, vcpu: Vcpu) -> None:
    stored: list[bytes] = []

    def store(address: int) -> int:
        stored.append(fs.current().mm.read(address + 8, 2 * 40))
        return 0

    fake.answers[abi.KVM_SET_CPUID2] = store
    vcpu.set_cpuid2([abi.kvm_cpuid_entry2(function=f, ebx=f + 1) for f in (0, 0x8000_0000)])
    assert fake.last(abi.KVM_SET_CPUID2).nent == 2
    fake.answer_list(abi.KVM_GET_CPUID2, abi.kvm_cpuid2, stored[0], 2)
    assert [(e.function, e.ebx) for e in vcpu.get_cpuid2()] == [(0, 1), (1 << 31, (1 << 31) + 1)]


def test_msrs(fake: Any, vcpu: Vcpu) -> None:
    written: list[tuple[int, int]] = []

    def store(address: int) -> int:
        for entry in fs.current().mm.read_object(address + 8, abi.kvm_msr_entry * 2):
            written.append((entry.index, entry.data))
        return 1

    fake.answers[abi.KVM_SET_MSRS] = store
    assert vcpu.set_msrs({0x174: 8, 0xDEAD: 1 << 63}) == 1
    assert written == [(0x174, 8), (0xDEAD, 1 << 63)]
    fake.answers[abi.KVM_GET_MSRS] = 2
    assert vcpu.get_msrs([0x10, 0x1B]) == {0x10: 0, 0x1B: 0}


def test_signal_mask(fake: Any, vcpu: Vcpu) -> None:
    masks: list[bytes] = []

    def note(address: int) -> int:
        if address:
            masks.append(fs.current().mm.read(address, 12))
        return 0

    fake.answers[abi.KVM_SET_SIGNAL_MASK] = note
    vcpu.set_signal_mask([1, 10, 64])
    vcpu.set_signal_mask(None)
    assert masks == [b"\x08\0\0\0" + b"\x01\x02\0\0\0\0\0\x80"]
    assert fake.last(abi.KVM_SET_SIGNAL_MASK) == 0


def test_plain_values(fake: Any, vcpu: Vcpu) -> None:
    fake.fill(abi.KVM_GET_MP_STATE, abi.kvm_mp_state(abi.KVM_MP_STATE_HALTED))
    assert vcpu.get_mp_state() == abi.KVM_MP_STATE_HALTED
    vcpu.set_mp_state(abi.KVM_MP_STATE_RUNNABLE)
    assert fake.last(abi.KVM_SET_MP_STATE).mp_state == 0
    vcpu.interrupt(0x20)
    assert fake.last(abi.KVM_INTERRUPT).irq == 0x20
    vcpu.enable_cap(abi.KVM_CAP_HYPERV_SYNIC, flags=1)
    assert fake.last(abi.KVM_ENABLE_CAP).flags == 1


def test_translate(fake: Any, vcpu: Vcpu) -> None:
    fake.fill(abi.KVM_TRANSLATE, abi.kvm_translation(physical_address=0x5000, valid=1))
    assert vcpu.translate(0x7000).physical_address == 0x5000
    assert fake.last(abi.KVM_TRANSLATE).linear_address == 0x7000


def test_xsave2_of_any_size(fake: Any, vcpu: Vcpu) -> None:
    def fill(address: int) -> int:
        fs.current().mm.write(address, bytes([7]) * 8192)
        return 0

    fake.answers[abi.KVM_GET_XSAVE2] = fill
    assert vcpu.get_xsave2(8192) == bytes([7]) * 8192


def test_any_other_ioctl(fake: Any, vcpu: Vcpu) -> None:
    fake.fail(abi.KVM_SMI, errno.EINVAL)
    with pytest.raises(OSError, match="Invalid argument"):
        vcpu.ioctl(abi.KVM_SMI)
    value = abi.kvm_one_reg(id=1 << 60)
    assert vcpu.ioctl(abi.KVM_SET_ONE_REG, value) == 0
    assert fake.last(abi.KVM_SET_ONE_REG).id == 1 << 60
