"""A VM on the software processor whose vCPUs execute a few instructions at a time in long mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.uapi import kvm as uapi
from anykvm.vmm.long_mode import enter_long_mode, entry_regs, write_tables

CODE, RAM = 0x20000, 0x100000
END_PORT = 0x80
VMCALL, VMMCALL, RDMSR, WRMSR = b"\x0f\x01\xc1", b"\x0f\x01\xd9", b"\x0f\x32", b"\x0f\x30"
OUT_END = bytes((0xE6, END_PORT))
MASK64 = (1 << 64) - 1


class LongGuest:
    """`vcpus` have an in-kernel local APIC and all of the CPUID that there is."""

    def __init__(
        self, kvm: Kvm, vm: Vm, vcpus: int, cpuid: Sequence[uapi.kvm_cpuid_entry2] | None = None
    ) -> None:
        self.kvm, self.vm = kvm, vm
        vm.create_irqchip()
        self.memory = GuestMemory(RAM)
        vm.add_memory(0, self.memory)
        write_tables(self.memory)
        self.cpuid = list(kvm.supported_cpuid() if cpuid is None else cpuid)
        self.vcpus = [self._vcpu(n) for n in range(vcpus)]

    def _vcpu(self, n: int) -> Vcpu:
        vcpu = self.vm.create_vcpu(n)
        vcpu.set_cpuid2(self.cpuid)
        sregs = vcpu.get_sregs()
        enter_long_mode(sregs)
        vcpu.set_sregs(sregs)
        vcpu.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
        return vcpu

    def start(self, code: bytes, n: int = 0, **gpr: int) -> int:
        """Runs `code` from its beginning; why it came back, which for its end is KVM_EXIT_IO."""
        at = CODE + 0x1000 * n
        self._finish_last_exit(n)
        self.memory.write(at, code + OUT_END)
        regs = entry_regs(at, 0)
        regs.rsp = at + 0x1000
        for name, value in gpr.items():
            setattr(regs, name, value & MASK64)
        self.vcpus[n].set_regs(regs)
        return self.vcpus[n].run()

    def _finish_last_exit(self, n: int) -> None:
        """The instruction that ended the last run is stepped over in the next one."""
        self.vcpus[n].kvm_run.immediate_exit = 1
        assert self.vcpus[n].run() == uapi.KVM_EXIT_INTR
        self.vcpus[n].kvm_run.immediate_exit = 0

    def execute(self, code: bytes, n: int = 0, **gpr: int) -> int:
        """RAX after `code`, which must come to its end."""
        assert self.start(code, n, **gpr) == uapi.KVM_EXIT_IO
        assert self.vcpus[n].kvm_run.io.port == END_PORT
        return self.vcpus[n].get_regs().rax

    def hypercall(self, number: int, *args: int, n: int = 0) -> int:
        """KVM's ABI: the result, signed."""
        names = ("rbx", "rcx", "rdx", "rsi")
        found = self.execute(VMCALL, n, rax=number, **dict(zip(names, args, strict=False)))
        return found - (1 << 64) if found >> 63 else found

    def wrmsr(self, index: int, value: int, n: int = 0) -> bool:
        """Whether the guest could; else it had #GP, which without an IDT shuts it down."""
        gpr = {"rax": value & 0xFFFFFFFF, "rcx": index, "rdx": value >> 32}
        return self.start(WRMSR, n, **gpr) == uapi.KVM_EXIT_IO

    def rdmsr(self, index: int, n: int = 0) -> int | None:
        """What the guest reads, None for #GP."""
        if self.start(RDMSR, n, rcx=index) != uapi.KVM_EXIT_IO:
            return None
        regs = self.vcpus[n].get_regs()
        return regs.rax | regs.rdx << 32


@contextmanager
def long_guest(
    vcpus: int = 1, cpuid: Sequence[uapi.kvm_cpuid_entry2] | None = None
) -> Iterator[LongGuest]:
    """Its descriptors are closed at the end."""
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        guest = LongGuest(kvm, vm, vcpus, cpuid)
        try:
            yield guest
        finally:
            for vcpu in guest.vcpus:
                vcpu.close()
