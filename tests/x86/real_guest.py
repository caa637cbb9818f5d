"""A VM on the software processor whose vCPUs execute real-mode code, each in a thread if wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.uapi import kvm as uapi

PAGE = 4096
CODE, RAM = 0x1000, 0x8000


class RealGuest:
    """RAM in slot 0 from 0 on; a vCPU's code is in page 1 + its number."""

    def __init__(self, kvm: Kvm, vm: Vm) -> None:
        self.kvm, self.vm = kvm, vm
        self.memory = GuestMemory(RAM)
        vm.add_memory(0, self.memory)
        self.vcpus: list[Vcpu] = []

    def vcpu(self, code: bytes) -> Vcpu:
        """A vCPU in front of its code, all segments at 0."""
        vcpu = self.vm.create_vcpu(len(self.vcpus))
        at = CODE + PAGE * len(self.vcpus)
        self.vcpus.append(vcpu)
        self.memory.write(at, code)
        sregs = vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds, sregs.es, sregs.ss):
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(uapi.kvm_regs(rip=at, rflags=2, rsp=0x7000))
        return vcpu

    def word(self, address: int) -> int:
        return int.from_bytes(self.memory.read(address, 4), "little")


class Runner(threading.Thread):
    """Runs a vCPU until `stop`; `on_exit` says whether it has dealt with an exit."""

    def __init__(self, vcpu: Vcpu, on_exit: Callable[[Vcpu], bool]) -> None:
        super().__init__(daemon=True)
        self.vcpu, self.on_exit = vcpu, on_exit
        self.stopping = False
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self.stopping:
                reason = self.vcpu.run()
                assert reason == uapi.KVM_EXIT_INTR or self.on_exit(self.vcpu), reason
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self.stopping = True
        self.vcpu.kvm_run.immediate_exit = 1
        self.join(20)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@contextmanager
def real_guest() -> Iterator[RealGuest]:
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        guest = RealGuest(kvm, vm)
        try:
            yield guest
        finally:
            for vcpu in guest.vcpus:
                vcpu.close()
