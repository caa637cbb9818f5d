"""A guest's guest: KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE in SVM's format."""

from __future__ import annotations

import ctypes
from errno import E2BIG, EFAULT, EINVAL
from typing import Any

import pytest

from anykvm.uapi import kvm as uapi

from .framework import conforms, host_may_differ
from .machine import BAD, Machine, NotAvailable, fails, get, ioctl

VMCB_SIZE = uapi.KVM_STATE_NESTED_SVM_VMCB_SIZE
HEADER = ctypes.sizeof(uapi.kvm_nested_state)
GUEST_MODE, RUN_PENDING, EVMCS, MTF, GIF = (
    uapi.KVM_STATE_NESTED_GUEST_MODE,
    uapi.KVM_STATE_NESTED_RUN_PENDING,
    uapi.KVM_STATE_NESTED_EVMCS,
    uapi.KVM_STATE_NESTED_MTF_PENDING,
    uapi.KVM_STATE_NESTED_GIF_SET,
)
SVM, LEAF = 1 << 2, 0x80000001
EFER_SVME, EFER_LONG = 1 << 12, 0x500
CR0, CR4 = 0x80010033, 0x20
# Places in a VMCB: of the control area, and of L1's registers
INTERCEPT_VMRUN, ASID, NESTED_CTL, MSRPM = 0x10, 0x58, 0x90, 0x48
L1_EFER, L1_CR4, L1_CR3, L1_CR0, L1_RFLAGS = 0x4D0, 0x548, 0x550, 0x558, 0x570


class Nested(ctypes.Structure):
    """struct kvm_nested_state with a VMCB behind it."""

    _fields_ = [("header", uapi.kvm_nested_state), ("vmcb", ctypes.c_uint8 * VMCB_SIZE)]

    def put(self, at: int, value: int, size: int = 8) -> None:
        self.vmcb[at : at + size] = list(value.to_bytes(size, "little"))


def require_svm(machine: Machine) -> None:
    """Not available where the state is VMX's, or the capability is missing."""
    machine.require(uapi.KVM_CAP_NESTED_STATE)
    raw = (ctypes.c_ubyte * (8 + 40 * 256))()
    ctypes.c_uint32.from_buffer(raw).value = 256
    ioctl(machine.kvm, uapi.KVM_GET_SUPPORTED_CPUID, raw)
    count = ctypes.c_uint32.from_buffer(raw).value
    found = (uapi.kvm_cpuid_entry2 * count).from_buffer_copy(raw, 8)
    if not any(e.function == LEAF and e.ecx & SVM for e in found):
        raise NotAvailable("SVM")


def long_mode(vcpu: int, *, svme: bool = True) -> None:
    """A vCPU in 64-bit mode with EFER.SVME, as L2 would be."""
    sregs = get(vcpu, uapi.KVM_GET_SREGS, uapi.kvm_sregs)
    sregs.cr0, sregs.cr4, sregs.cs.l, sregs.cs.db = CR0, CR4, 1, 0
    sregs.efer = EFER_LONG | (EFER_SVME if svme else 0)
    ioctl(vcpu, uapi.KVM_SET_SREGS, sregs)


def guest_mode() -> Nested:
    """A state in guest mode that can be."""
    state = Nested()
    state.header.format = uapi.KVM_STATE_NESTED_FORMAT_SVM
    state.header.size = ctypes.sizeof(Nested)
    state.header.flags, state.header.hdr.svm.vmcb_pa = GUEST_MODE | GIF, 0x5000
    state.put(INTERCEPT_VMRUN, 1, 4)
    state.put(ASID, 1, 4)
    state.put(L1_EFER, EFER_LONG | EFER_SVME)
    state.put(L1_CR0, CR0)
    state.put(L1_CR4, CR4)
    state.put(L1_CR3, 0x3000)
    state.put(L1_RFLAGS, 0x202)
    return state


@conforms("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")
def test_a_vcpu_outside_of_guest_mode(machine: Machine, vcpu: int) -> None:
    """GIF alone; without EFER.SVME nothing else can be set."""
    require_svm(machine)
    state = Nested(header=uapi.kvm_nested_state(size=ctypes.sizeof(Nested)))
    ioctl(vcpu, uapi.KVM_GET_NESTED_STATE, state)
    assert (state.header.flags, state.header.size) == (GIF, HEADER)
    assert state.header.format == uapi.KVM_STATE_NESTED_FORMAT_SVM
    ioctl(vcpu, uapi.KVM_SET_NESTED_STATE, state)
    state.header.flags = 0
    fails(EINVAL, vcpu, uapi.KVM_SET_NESTED_STATE, state)
    long_mode(vcpu)
    ioctl(vcpu, uapi.KVM_SET_NESTED_STATE, state)
    ioctl(vcpu, uapi.KVM_GET_NESTED_STATE, state)
    assert state.header.flags == 0


@conforms("KVM_GET_NESTED_STATE", "KVM_SET_NESTED_STATE")
def test_guest_mode_is_set_and_read_back(machine: Machine, vcpu: int) -> None:
    """The VMCB's control area, and L1's registers."""
    require_svm(machine)
    long_mode(vcpu)
    state = guest_mode()
    ioctl(vcpu, uapi.KVM_SET_NESTED_STATE, state)
    found = Nested(header=uapi.kvm_nested_state(size=ctypes.sizeof(Nested)))
    ioctl(vcpu, uapi.KVM_GET_NESTED_STATE, found)
    assert found.header.flags & ~RUN_PENDING == GUEST_MODE | GIF
    assert (found.header.size, found.header.hdr.svm.vmcb_pa) == (ctypes.sizeof(Nested), 0x5000)
    for at in (L1_EFER, L1_CR0, L1_CR3, L1_CR4, L1_RFLAGS):
        assert found.vmcb[at : at + 8] == state.vmcb[at : at + 8]
    assert (found.vmcb[INTERCEPT_VMRUN], found.vmcb[ASID]) == (1, 1)
    long_mode(vcpu, svme=False)  # ends guest mode
    found.header.size = ctypes.sizeof(Nested)
    ioctl(vcpu, uapi.KVM_GET_NESTED_STATE, found)
    assert found.header.flags == GIF


@conforms("KVM_GET_NESTED_STATE")
def test_a_state_that_does_not_fit(machine: Machine, vcpu: int) -> None:
    """E2BIG, with the size that is needed."""
    require_svm(machine)
    state = Nested(header=uapi.kvm_nested_state(size=4))
    fails(E2BIG, vcpu, uapi.KVM_GET_NESTED_STATE, state)
    assert state.header.size == HEADER
    fails(EFAULT, vcpu, uapi.KVM_GET_NESTED_STATE, BAD)


def _header(name: str, value: int) -> Any:
    return lambda state: setattr(state.header, name, value)


def _at(place: int, value: int, size: int = 8) -> Any:
    return lambda state: state.put(place, value, size)


REFUSED = {
    "size": _header("size", HEADER - 1),
    "no room for a VMCB": _header("size", HEADER),
    "format": _header("format", uapi.KVM_STATE_NESTED_FORMAT_VMX),
    "unknown flag": _header("flags", GUEST_MODE | GIF | 1 << 9),
    "VMX's flags": _header("flags", GUEST_MODE | GIF | EVMCS),
    "VMX's other flag": _header("flags", GUEST_MODE | GIF | MTF),
    "a run is pending outside": _header("flags", RUN_PENDING | GIF),
    "VMCB's address": lambda state: setattr(state.header.hdr.svm, "vmcb_pa", 0x5008),
    "VMRUN not intercepted": _at(INTERCEPT_VMRUN, 0, 4),
    "ASID 0": _at(ASID, 0, 4),
    "MSR map": _at(MSRPM, 1 << 60),
    "L1 without SVM": _at(L1_EFER, EFER_LONG),
    "L1 without paging": _at(L1_CR0, 0x33),
    "L1 in virtual-8086 mode": _at(L1_RFLAGS, 1 << 17 | 2),
    "L1's CR0": _at(L1_CR0, CR0 | 1 << 29),
    "L1's CR4": _at(L1_CR4, CR4 | 1 << 63),
}


@conforms("KVM_SET_NESTED_STATE")
@pytest.mark.parametrize("wrong", REFUSED)
def test_a_state_that_cannot_be(machine: Machine, vcpu: int, wrong: str) -> None:
    require_svm(machine)
    long_mode(vcpu)
    state = guest_mode()
    REFUSED[wrong](state)
    fails(EINVAL, vcpu, uapi.KVM_SET_NESTED_STATE, state)


@conforms("KVM_SET_NESTED_STATE")
@host_may_differ("a KVM without SMM has no such state")
def test_there_is_no_guest_mode_in_smm(machine: Machine, vcpu: int) -> None:
    require_svm(machine)
    long_mode(vcpu)
    events = get(vcpu, uapi.KVM_GET_VCPU_EVENTS, uapi.kvm_vcpu_events)
    events.smi.smm, events.flags = 1, uapi.KVM_VCPUEVENT_VALID_SMM
    ioctl(vcpu, uapi.KVM_SET_VCPU_EVENTS, events)
    fails(EINVAL, vcpu, uapi.KVM_SET_NESTED_STATE, guest_mode())
    fails(EFAULT, vcpu, uapi.KVM_SET_NESTED_STATE, BAD)
