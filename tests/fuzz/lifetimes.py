"""VMs that live and die: what a life is, many of them in a row, many at once."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from anykvm.api import GuestMemory, Kvm, Vcpu
from anykvm.uapi import kvm as abi

from .fuzzer import resources

PAGE = 4096
CODE = 0x1000
PORT = 0x80
COUNT_AND_TELL = bytes.fromhex("66ff060020 e680 ebf7".replace(" ", ""))  # inc dword [2000]; out
WARM_LIVES = 100  # until caches and the heap have their size
ORDERS = tuple(itertools.permutations(range(5)))


class Closable(Protocol):
    def close(self) -> None: ...


class Descriptor:
    """One that has no class of its own."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


class Life:
    """A VM with interrupt controllers, timer, memory, statistics and a vCPU in real mode."""

    def __init__(self) -> None:
        self.kvm = Kvm(backend="soft")
        self.vm = self.kvm.create_vm()
        self.vm.create_irqchip()
        self.vm.create_pit2()
        self.memory = GuestMemory(4 * PAGE)
        self.vm.add_memory(0, self.memory)
        self.memory.write(CODE, COUNT_AND_TELL)
        self.vcpu = self.vm.create_vcpu(0)
        self._at_its_code(self.vcpu)
        self.stats = Descriptor(self.vm.ioctl(abi.KVM_GET_STATS_FD))
        self.vcpu_stats = Descriptor(self.vcpu.ioctl(abi.KVM_GET_STATS_FD))

    @staticmethod
    def _at_its_code(vcpu: Vcpu) -> None:
        sregs = vcpu.get_sregs()
        for segment in (sregs.cs, sregs.ds):
            segment.base = segment.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(abi.kvm_regs(rip=CODE, rflags=2))

    def run(self, exits: int = 2) -> None:
        for _ in range(exits):
            reason = self.vcpu.run()
            assert reason == abi.KVM_EXIT_IO
            assert self.vcpu.kvm_run.io.port == PORT

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory.read(0x2000, 4), "little")

    def close(self, order: tuple[int, ...] = ORDERS[0]) -> None:
        """In any order."""
        parts: tuple[Closable, ...]
        parts = (self.kvm, self.vm, self.vcpu, self.stats, self.vcpu_stats)
        for n in order:
            parts[n].close()


def lives(
    number: int, progress: Callable[[int], None] = lambda _: None, *, warm: int = WARM_LIVES
) -> Iterator[str]:
    """`number` lives in a row, each closed in another order; what they have left over."""
    _one_after_another(warm, lambda _: None)
    descriptors, threads, resident = resources()
    _one_after_another(number, progress)
    after = resources()
    if after[:2] != (descriptors, threads):
        yield f"descriptors and threads {(descriptors, threads)} became {after[:2]}"
    grown = after[2] - resident
    if grown > 8 * 1024 + number // 4:  # KiB: the heap's own size, and a quarter a life
        yield f"{grown} KiB more after {number} lives"


def _one_after_another(number: int, progress: Callable[[int], None]) -> None:
    for n in range(number):
        life = Life()
        life.run()
        assert life.count == 2
        life.close(ORDERS[n % len(ORDERS)])
        progress(n + 1)


@contextmanager
def all_at_once(number: int) -> Iterator[list[Life]]:
    """VMs whose vCPUs all run, each in a thread, inside of this."""
    all_of_them = [Life() for _ in range(number)]
    stopping = threading.Event()

    def serve(life: Life) -> None:
        while not stopping.is_set():
            life.run(1)

    threads = [threading.Thread(target=serve, args=(life,), daemon=True) for life in all_of_them]
    for thread in threads:
        thread.start()
    try:
        yield all_of_them
    finally:
        stopping.set()
        for thread in threads:
            thread.join(30)
        for n, life in enumerate(all_of_them):
            life.close(ORDERS[n % len(ORDERS)])
