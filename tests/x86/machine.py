"""A VM on the scripted processor, reached through descriptors as any VMM reaches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.x86.processor import use_engine

from .fake_engine import FakeCpu, FakeEngine, Step


@dataclass
class Machine:
    """`cpu(n)` is the processor behind `vcpus[n]`."""

    kvm: Kvm
    vm: Vm
    engine: FakeEngine
    vcpus: list[Vcpu] = field(default_factory=list)

    def add_vcpu(self, *script: Step) -> Vcpu:
        """A vCPU whose guest will do what the script says."""
        vcpu = self.vm.create_vcpu(len(self.vcpus))
        self.vcpus.append(vcpu)
        self.cpu().script.extend(script)
        return vcpu

    def cpu(self, index: int = -1) -> FakeCpu:
        return self.engine.cpus[index]

    def ram(self, size: int = 0x10000) -> GuestMemory:
        """Memory at guest-physical 0 in slot 0."""
        memory = GuestMemory(size)
        self.vm.add_memory(0, memory)
        return memory


@contextmanager
def machine(irqchip: bool = False) -> Iterator[Machine]:
    """A VM, with the in-kernel irqchip if asked; its descriptors are closed at the end."""
    engine = FakeEngine()
    with use_engine(lambda: engine), Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        if irqchip:
            vm.create_irqchip()
        made = Machine(kvm, vm, engine)
        try:
            yield made
        finally:
            for vcpu in made.vcpus:
                vcpu.close()
