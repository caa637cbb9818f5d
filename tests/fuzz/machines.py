"""VMs in deep states for hostile callers: with memory, interrupt controllers, vCPUs in real, 32-bit
and long mode, single-stepped, in SMM, with a dirty ring; and what one can write into kvm_run.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
from collections.abc import Callable, Iterator
from typing import Any

from anykvm import fs
from anykvm.uapi import kvm as abi
from anykvm.vmm.long_mode import BOOT_CS, BOOT_DS, enter_long_mode, entry_regs, segment

from .guest import CODE_PAGES, GUEST_PAGES, PAGE, GuestPages

RING_BYTES = 1 << 16
TOP_OF_4G = 1 << 32
RUN_PAGES = 3
LOG, READONLY = abi.KVM_MEM_LOG_DIRTY_PAGES, abi.KVM_MEM_READONLY
Pointer = ctypes.Structure | ctypes.Array[Any]


def _ioctl(fd: int, number: int, argument: Pointer | int = 0) -> int:
    if isinstance(argument, int):
        return fs.ioctl(fd, number, argument)
    return fs.ioctl(fd, number, ctypes.addressof(argument))


def _enable(fd: int, cap: int, *args: int) -> None:
    wanted = abi.kvm_enable_cap(cap=cap)
    for n, value in enumerate(args):
        wanted.args[n] = value
    _ioctl(fd, abi.KVM_ENABLE_CAP, wanted)


VM_CAPABILITIES: tuple[tuple[int, ...], ...] = (
    (abi.KVM_CAP_DIRTY_LOG_RING, RING_BYTES),
    (abi.KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, 3),
    (abi.KVM_CAP_EXCEPTION_PAYLOAD, 1),
    (abi.KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1),
    (abi.KVM_CAP_X86_USER_SPACE_MSR, 7),
    (abi.KVM_CAP_X86_DISABLE_EXITS, 15),
    (abi.KVM_CAP_X86_BUS_LOCK_EXIT, 2),
    (abi.KVM_CAP_EXIT_ON_EMULATION_FAILURE, 1),
    (abi.KVM_CAP_X2APIC_API, 3),
)


def _set_up_vm(vm: int, r: random.Random, guest: GuestPages) -> None:
    for cap in VM_CAPABILITIES:
        if r.random() < 0.2:
            _enable(vm, *cap)
    irqchip = r.choice(("kernel", "kernel", "split", "none"))
    if irqchip == "kernel":
        _ioctl(vm, abi.KVM_CREATE_IRQCHIP)
        _ioctl(vm, abi.KVM_CREATE_PIT2, abi.kvm_pit_config())
    elif irqchip == "split":
        _enable(vm, abi.KVM_CAP_SPLIT_IRQCHIP, 24)
    slots = (
        (0, guest.address, 0, GUEST_PAGES, r.choice((0, LOG))),
        (1, guest.address + CODE_PAGES[0] * PAGE, TOP_OF_4G - PAGE, 1, READONLY),
        (2, guest.file, 1 << 24, 16, r.choice((0, LOG))),
        (1 << 16, guest.address, 0, GUEST_PAGES, 0),
    )
    for slot, address, gpa, pages, flags in slots:
        region = abi.kvm_userspace_memory_region(
            slot=slot,
            flags=flags,
            guest_phys_addr=gpa,
            memory_size=pages * PAGE,
            userspace_addr=address,
        )
        _ioctl(vm, abi.KVM_SET_USER_MEMORY_REGION, region)


def _real(sregs: abi.kvm_sregs) -> None:
    for each in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
        each.base = each.selector = 0


def _flat(sregs: abi.kvm_sregs) -> None:
    """32 bits, without paging."""
    enter_long_mode(sregs)
    sregs.cs, sregs.ss = segment(BOOT_CS), segment(BOOT_DS)
    sregs.cs.l, sregs.cs.db = 0, 1
    sregs.cr0, sregs.cr4, sregs.efer = 0x11, 0, 0


def _set_up_vcpu(vcpu: int, r: random.Random, cpuid: Any) -> None:
    sregs = abi.kvm_sregs()
    _ioctl(vcpu, abi.KVM_SET_CPUID2, cpuid)
    _ioctl(vcpu, abi.KVM_GET_SREGS, sregs)
    mode = r.choice((_real, _flat, enter_long_mode))
    mode(sregs)
    _ioctl(vcpu, abi.KVM_SET_SREGS, sregs)
    pages = CODE_PAGES[:8] if mode is _real else CODE_PAGES
    regs = entry_regs(r.choice(pages) * PAGE & (0xFFFF if mode is _real else ~0), 0x5000)
    regs.rflags |= r.choice((0, 1 << 9, 1 << 8))
    regs.rdi = r.choice((0x8000, 1 << 24, TOP_OF_4G - PAGE, 0xD0000000))
    _ioctl(vcpu, abi.KVM_SET_REGS, regs)
    _ioctl(vcpu, abi.KVM_SET_MP_STATE, abi.kvm_mp_state(abi.KVM_MP_STATE_RUNNABLE))
    if r.random() < 0.2:
        control = r.choice((1, 3, 0x10001, 0x20001, 0x100003))  # ENABLE, SINGLESTEP, USE_*
        _ioctl(vcpu, abi.KVM_SET_GUEST_DEBUG, abi.kvm_guest_debug(control=control))
    for number in (abi.KVM_SMI, abi.KVM_NMI):
        if r.random() < 0.2:
            _ioctl(vcpu, number)


def supported_cpuid(system: int) -> Any:
    """KVM_GET_SUPPORTED_CPUID's answer, as KVM_SET_CPUID2 takes it."""
    entries = 256
    raw = (ctypes.c_uint8 * (8 + entries * ctypes.sizeof(abi.kvm_cpuid_entry2)))()
    abi.kvm_cpuid2.from_buffer(raw).nent = entries
    _ioctl(system, abi.KVM_GET_SUPPORTED_CPUID, raw)
    return raw


def machine(system: int, r: random.Random, guest: GuestPages) -> Iterator[tuple[int, str]]:
    """Descriptors, one by one, of a VM and its vCPUs that could run Linux if there was one."""
    cpuid = supported_cpuid(system)
    vm = fs.ioctl(system, abi.KVM_CREATE_VM, 0)
    with contextlib.suppress(OSError):  # some combinations are refused
        _set_up_vm(vm, r, guest)
    for n in range(r.choice((1, 2))):
        vcpu = fs.ioctl(vm, abi.KVM_CREATE_VCPU, n)
        with contextlib.suppress(OSError):
            _set_up_vcpu(vcpu, r, cpuid)
        yield vcpu, "vCPU"
    yield vm, "VM"


class RunPages:
    """A mapping of a vCPU's kvm_run, PIO page and ring, and what a hostile thread writes there."""

    def __init__(self, fd: int) -> None:
        self._mapping = fs.mmap(fd, RUN_PAGES * PAGE)
        self._run = self._mapping.view(abi.kvm_run)
        self._ring = self._mapping.view(abi.kvm_coalesced_mmio_ring, 2 * PAGE)

    def scribble(self, r: random.Random) -> None:
        run, any64 = self._run, r.getrandbits(64)
        choices: tuple[Callable[[], None], ...] = (
            lambda: setattr(run, "immediate_exit", r.choice((0, 0, 1, 255))),
            lambda: setattr(run, "request_interrupt_window", r.choice((0, 1, 255))),
            lambda: setattr(run, "cr8", r.choice((0, 1, 15, 16, any64))),
            lambda: setattr(run, "kvm_valid_regs", r.choice((0, 1, 2, 4, 7, 8, any64))),
            lambda: setattr(run, "kvm_dirty_regs", r.choice((0, 1, 2, 4, 7, 8, any64))),
            lambda: setattr(run, "exit_reason", r.choice((0, 2, 5, 6, any64 & 0xFFFFFFFF))),
            lambda: self._noise(r, 0, ctypes.sizeof(abi.kvm_run)),
            lambda: self._noise(r, abi.kvm_run.s.offset, 1024),
            lambda: self._noise(r, PAGE, PAGE),
            lambda: setattr(self._ring, "first", r.choice((0, 1, 169, 170, any64 & 0xFFFFFFFF))),
            lambda: setattr(self._ring, "last", r.choice((0, 1, 169, 170, any64 & 0xFFFFFFFF))),
            lambda: ctypes.memset(self._mapping.address, 0, RUN_PAGES * PAGE),
        )
        r.choice(choices)()

    def _noise(self, r: random.Random, start: int, size: int) -> None:
        """A few bytes of `size` from `start` on."""
        length = r.choice((1, 4, 8, 64))
        at = start + r.randrange(size - length)
        ctypes.memmove(self._mapping.address + at, r.randbytes(length), length)

    def close(self) -> None:
        self._run = self._ring = None
        self._mapping.unmap()
