"""Xen's hypercalls: the page that an MSR gives the guest, and the exit that userspace answers."""

from __future__ import annotations

import ctypes
from errno import EINVAL

import pytest

from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_para import KVM_HC_VAPIC_POLL_IRQ

from .long_guest import MASK64, VMCALL, WRMSR, LongGuest, long_guest

MSR, PAGE = 0x40000200, 0x80000
INTERCEPT = uapi.KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL
CALL_RAX = b"\xff\xd0"
PARAMS = {"rdi": 11, "rsi": 12, "rdx": 13, "r10": 14, "r8": 15, "r9": 16}


@pytest.fixture
def guest():
    with long_guest() as made:
        yield made


def configure(guest: LongGuest, flags: int = INTERCEPT, **fields: int) -> None:
    guest.vm.xen_hvm_config(uapi.kvm_xen_hvm_config(flags=flags, msr=MSR, **fields))


def write_msr(guest: LongGuest, value: int) -> int:
    return guest.start(WRMSR, rcx=MSR, rax=value & 0xFFFF_FFFF, rdx=value >> 32)


def test_the_capability_says_what_there_is(guest):
    supported = guest.kvm.check_extension(uapi.KVM_CAP_XEN_HVM)
    assert supported == uapi.KVM_XEN_HVM_CONFIG_HYPERCALL_MSR | INTERCEPT


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": uapi.KVM_XEN_HVM_CONFIG_EVTCHN_SEND},
        {"flags": 1},
        {"blob_size_32": 1},
        {"blob_size_64": 1},
        {"blob_addr_64": 4096},
    ],
)
def test_configurations_that_cannot_be(guest, fields):
    with pytest.raises(OSError, match=f"Errno {EINVAL}]"):
        configure(guest, **{"flags": INTERCEPT, **fields})


def test_a_hypercall_goes_to_userspace_and_back(guest):
    configure(guest)
    assert guest.start(VMCALL, rax=0x1234, **PARAMS) == uapi.KVM_EXIT_XEN
    vcpu = guest.vcpus[0]
    xen = vcpu.kvm_run.xen
    call = xen.u.hcall
    assert (xen.type, call.longmode, call.cpl) == (uapi.KVM_EXIT_XEN_HCALL, 1, 0)
    assert (call.input, list(call.params)) == (0x1234, [11, 12, 13, 14, 15, 16])
    call.result = MASK64 - 37
    assert vcpu.run() == uapi.KVM_EXIT_IO
    assert vcpu.get_regs().rax == MASK64 - 37


def test_kvms_own_page(guest):
    configure(guest)
    assert write_msr(guest, PAGE) == uapi.KVM_EXIT_IO
    page = guest.memory.read(PAGE, 4096)
    assert page[32 * 9 :][:32] == (b"\xb8\x09\0\0\0" + VMCALL + b"\xc3").ljust(32, b"\xcc")
    assert guest.start(CALL_RAX, rax=PAGE + 32 * 77, **PARAMS) == uapi.KVM_EXIT_XEN
    assert guest.vcpus[0].kvm_run.xen.u.hcall.input == 77


@pytest.mark.parametrize("value", [PAGE + 1, 0x4000_0000])
def test_pages_that_there_are_not(guest, value):
    """#GP, which shuts down for want of an IDT."""
    configure(guest)
    assert write_msr(guest, value) == uapi.KVM_EXIT_SHUTDOWN


def test_the_vmms_pages(guest):
    blob = ctypes.create_string_buffer(b"\x01" * 4096 + b"\x02" * 4096, 8192)
    configure(guest, 0, blob_addr_64=ctypes.addressof(blob), blob_size_64=2)
    for number in (0, 1):
        assert write_msr(guest, PAGE + number) == uapi.KVM_EXIT_IO
        assert guest.memory.read(PAGE, 4096) == bytes((number + 1,)) * 4096
    assert guest.hypercall(KVM_HC_VAPIC_POLL_IRQ) == 0  # KVM's own are as before
    assert write_msr(guest, PAGE + 2) == uapi.KVM_EXIT_SHUTDOWN


def test_without_an_msr_nothing_is_xens(guest):
    configure(guest)
    guest.vm.xen_hvm_config(uapi.kvm_xen_hvm_config())
    assert guest.hypercall(KVM_HC_VAPIC_POLL_IRQ) == 0
    assert write_msr(guest, PAGE) == uapi.KVM_EXIT_SHUTDOWN
