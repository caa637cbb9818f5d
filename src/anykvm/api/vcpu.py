"""A virtual processor (api.rst: vCPU ioctls, and "The kvm_run structure")."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterable, Mapping, Sequence

from anykvm import fs
from anykvm.api.descriptor import Call, Exchange, Get, Quad, Set, Value
from anykvm.api.device import Attributes
from anykvm.api.flexible import CPUID2, MSRS, SIGNAL_MASK, enable_cap, read_msrs
from anykvm.api.stats import Counting
from anykvm.uapi import kvm as abi

# KVM_RUN says EAGAIN to a vCPU that has just been started by another: run again.
_NOTHING_TO_DO = (errno.EINTR, errno.EAGAIN)


class Vcpu(Attributes, Counting):
    """A vCPU with its `kvm_run` mapped. All but `kvm_run.immediate_exit` is its thread's alone."""

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        try:
            self._mapping = fs.mmap(fd, mmap_size)
        except BaseException:
            self.close()
            raise
        self.kvm_run = self._mapping.view(abi.kvm_run)
        self._bytes = memoryview(self._mapping.buffer).cast("B")

    get_regs = Get(abi.KVM_GET_REGS, abi.kvm_regs)
    set_regs = Set(abi.KVM_SET_REGS, abi.kvm_regs)
    get_sregs = Get(abi.KVM_GET_SREGS, abi.kvm_sregs)
    set_sregs = Set(abi.KVM_SET_SREGS, abi.kvm_sregs)
    get_sregs2 = Get(abi.KVM_GET_SREGS2, abi.kvm_sregs2)
    set_sregs2 = Set(abi.KVM_SET_SREGS2, abi.kvm_sregs2)
    get_fpu = Get(abi.KVM_GET_FPU, abi.kvm_fpu)
    set_fpu = Set(abi.KVM_SET_FPU, abi.kvm_fpu)
    get_xsave = Get(abi.KVM_GET_XSAVE, abi.kvm_xsave)
    set_xsave = Set(abi.KVM_SET_XSAVE, abi.kvm_xsave)
    get_xcrs = Get(abi.KVM_GET_XCRS, abi.kvm_xcrs)
    set_xcrs = Set(abi.KVM_SET_XCRS, abi.kvm_xcrs)
    get_debugregs = Get(abi.KVM_GET_DEBUGREGS, abi.kvm_debugregs)
    set_debugregs = Set(abi.KVM_SET_DEBUGREGS, abi.kvm_debugregs)
    get_lapic = Get(abi.KVM_GET_LAPIC, abi.kvm_lapic_state)
    set_lapic = Set(abi.KVM_SET_LAPIC, abi.kvm_lapic_state)
    get_vcpu_events = Get(abi.KVM_GET_VCPU_EVENTS, abi.kvm_vcpu_events)
    set_vcpu_events = Set(abi.KVM_SET_VCPU_EVENTS, abi.kvm_vcpu_events)
    set_guest_debug = Set(abi.KVM_SET_GUEST_DEBUG, abi.kvm_guest_debug)
    tpr_access_reporting = Exchange(abi.KVM_TPR_ACCESS_REPORTING, abi.kvm_tpr_access_ctl)
    set_vapic_addr = Set(abi.KVM_SET_VAPIC_ADDR, abi.kvm_vapic_addr)
    setup_mce = Quad(abi.KVM_X86_SETUP_MCE)
    set_mce = Set(abi.KVM_X86_SET_MCE, abi.kvm_x86_mce)
    get_tsc_khz = Call(abi.KVM_GET_TSC_KHZ)
    set_tsc_khz = Value(abi.KVM_SET_TSC_KHZ)
    nmi = Call(abi.KVM_NMI)
    smi = Call(abi.KVM_SMI)
    kvmclock_ctrl = Call(abi.KVM_KVMCLOCK_CTRL)

    # -- running

    def run(self) -> int:
        """KVM_RUN: the exit reason.

        An interruption is an exit like any other: KVM_EXIT_INTR, for a signal, for
        `kvm_run.immediate_exit`, and for the moment in which another vCPU starts this one (EAGAIN).
        A Python signal handler has run by then, and its exception comes out of here.
        """
        try:
            fs.ioctl(self.fd, abi.KVM_RUN)
        except OSError as error:
            if error.errno not in _NOTHING_TO_DO:
                raise
            return abi.KVM_EXIT_INTR
        return self.kvm_run.exit_reason

    def io_data(self) -> memoryview:
        """The data of a KVM_EXIT_IO, writable: `count` items of `size` bytes."""
        io = self.kvm_run.io
        return self._bytes[io.data_offset : io.data_offset + io.size * io.count]

    def mmio_data(self) -> memoryview:
        """The data of a KVM_EXIT_MMIO, writable: `len` bytes."""
        mmio = self.kvm_run.mmio
        return memoryview(mmio.data).cast("B")[: mmio.len]

    def set_signal_mask(self, signals: Iterable[int] | None) -> None:
        """The signals that are blocked inside of KVM_RUN; None takes the mask away."""
        if signals is None:
            self.ioctl(abi.KVM_SET_SIGNAL_MASK, 0)
            return
        mask = sum(1 << (number - 1) for number in set(signals))
        self.ioctl(abi.KVM_SET_SIGNAL_MASK, SIGNAL_MASK.pack(list(mask.to_bytes(8, "little"))))

    # -- state of variable length, and plain values

    def get_cpuid2(self) -> list[abi.kvm_cpuid_entry2]:
        """KVM_GET_CPUID2."""
        return CPUID2.query(self, abi.KVM_GET_CPUID2)

    def set_cpuid2(self, entries: Sequence[abi.kvm_cpuid_entry2]) -> None:
        """KVM_SET_CPUID2."""
        self.ioctl(abi.KVM_SET_CPUID2, CPUID2.pack(entries))

    def get_msrs(self, indices: Sequence[int]) -> dict[int, int]:
        """Values by index, up to the first that KVM does not know."""
        return read_msrs(self, indices)

    def set_msrs(self, values: Mapping[int, int]) -> int:
        """How many were set: KVM stops at the first that it refuses."""
        entries = [abi.kvm_msr_entry(index=i, data=v) for i, v in values.items()]
        return self.ioctl(abi.KVM_SET_MSRS, MSRS.pack(entries))

    def get_xsave2(self, size: int) -> bytes:
        """KVM_GET_XSAVE2: `size` is what KVM_CAP_XSAVE2 says."""
        area = (ctypes.c_ubyte * size)()
        self.ioctl(abi.KVM_GET_XSAVE2, area)
        return bytes(area)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*."""
        state = abi.kvm_mp_state()
        self.ioctl(abi.KVM_GET_MP_STATE, state)
        return state.mp_state

    def set_mp_state(self, state: int) -> None:
        """KVM_MP_STATE_*."""
        self.ioctl(abi.KVM_SET_MP_STATE, abi.kvm_mp_state(state))

    def interrupt(self, vector: int) -> None:
        """KVM_INTERRUPT: queue a hardware interrupt, where the VM has no in-kernel irqchip."""
        self.ioctl(abi.KVM_INTERRUPT, abi.kvm_interrupt(vector))

    def translate(self, linear_address: int) -> abi.kvm_translation:
        """KVM_TRANSLATE: walk the guest's page tables."""
        translation = abi.kvm_translation(linear_address=linear_address)
        self.ioctl(abi.KVM_TRANSLATE, translation)
        return translation

    def enable_cap(self, cap: int, *args: int, flags: int = 0) -> int:
        """KVM_ENABLE_CAP with up to four arguments."""
        return self.ioctl(abi.KVM_ENABLE_CAP, enable_cap(cap, args, flags))
