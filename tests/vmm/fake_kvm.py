"""Stand-ins for `anykvm.api`: a VM that records, vCPUs that play a script of exits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from anykvm.uapi import kvm as abi

IO_DATA_OFFSET = 0x1000
# Where linux/kvm.h puts kvm_run's mmio.data.
MMIO_DATA_OFFSET = 40


class Closing:
    """Counts its closings."""

    def __init__(self) -> None:
        self.closed = 0

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *rest: object) -> None:
        self.closed += 1


class FakeVcpu(Closing):
    """`script` fills in `kvm_run` and yields exit reasons; at its end the vCPU waits as in HLT."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self._area = bytearray(0x3000)
        self.kvm_run = abi.kvm_run.from_buffer(self._area)
        self.script: Callable[[FakeVcpu], Iterator[int]] = lambda vcpu: iter(())
        self._playing: Iterator[int] | None = None
        self.cpuid: list[abi.kvm_cpuid_entry2] = []
        self.msrs: dict[int, int] = {}
        self.refused: int | None = None
        self.lapic = abi.kvm_lapic_state()
        self.regs, self.sregs = abi.kvm_regs(), abi.kvm_sregs()
        self.thread_name = ""
        self.comm = ""

    # Setting up

    def set_cpuid2(self, entries: list[abi.kvm_cpuid_entry2]) -> None:
        self.cpuid = entries

    def set_msrs(self, values: dict[int, int]) -> int:
        kept = list(values.items())[: self.refused]
        self.msrs.update(kept)
        return len(kept)

    def get_lapic(self) -> abi.kvm_lapic_state:
        return abi.kvm_lapic_state.from_buffer_copy(self.lapic)

    def set_lapic(self, state: abi.kvm_lapic_state) -> int:
        self.lapic = state
        return 0

    def get_sregs(self) -> abi.kvm_sregs:
        return self.sregs

    def set_sregs(self, sregs: abi.kvm_sregs) -> int:
        self.sregs = sregs
        return 0

    def get_regs(self) -> abi.kvm_regs:
        return self.regs

    def set_regs(self, regs: abi.kvm_regs) -> int:
        self.regs = regs
        return 0

    # Running

    def run(self) -> int:
        if self._playing is None:
            self.thread_name = threading.current_thread().name
            with open(f"/proc/self/task/{threading.get_native_id()}/comm") as comm:
                self.comm = comm.read().strip()
            self._playing = self.script(self)
        for reason in self._playing:
            return reason
        while not self.kvm_run.immediate_exit:
            time.sleep(0.001)
        return abi.KVM_EXIT_INTR

    def io_data(self) -> memoryview:
        io = self.kvm_run.io
        start = io.data_offset
        return memoryview(self._area)[start : start + io.size * io.count]

    def mmio_data(self) -> memoryview:
        start = MMIO_DATA_OFFSET
        return memoryview(self._area)[start : start + self.kvm_run.mmio.len]

    # What scripts use

    def out(self, port: int, data: bytes, size: int = 1) -> int:
        self._io(abi.KVM_EXIT_IO_OUT, port, size, len(data) // size)
        self.io_data()[:] = data
        return abi.KVM_EXIT_IO

    def in_(self, port: int, size: int = 1, count: int = 1) -> int:
        self._io(abi.KVM_EXIT_IO_IN, port, size, count)
        return abi.KVM_EXIT_IO

    def _io(self, direction: int, port: int, size: int, count: int) -> None:
        io = self.kvm_run.io
        io.direction, io.port, io.size, io.count = direction, port, size, count
        io.data_offset = IO_DATA_OFFSET

    def mmio(self, address: int, size: int, data: bytes | None = None) -> int:
        mmio = self.kvm_run.mmio
        mmio.phys_addr, mmio.len, mmio.is_write = address, size, data is not None
        if data is not None:
            self.mmio_data()[:] = data
        return abi.KVM_EXIT_MMIO


class FakeVm(Closing):
    """Records what a machine asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.vcpus: list[FakeVcpu] = []
        self.memory: dict[int, Any] = {}
        self.calls: list[tuple[str, int]] = []
        self.lines: list[tuple[int, int]] = []
        self.routing: list[abi.kvm_irq_routing_entry] = []
        self.scripts: list[Callable[[FakeVcpu], Iterator[int]]] = []

    def add_memory(self, slot: int, memory: Any) -> None:
        self.memory[slot] = memory

    def set_tss_addr(self, address: int) -> None:
        self.calls.append(("tss", address))

    def set_identity_map_addr(self, address: int) -> None:
        self.calls.append(("identity", address))

    def create_irqchip(self) -> None:
        self.calls.append(("irqchip", 0))

    def create_pit2(self, flags: int) -> None:
        self.calls.append(("pit2", flags))

    def set_gsi_routing(self, entries: list[abi.kvm_irq_routing_entry]) -> None:
        self.routing = entries

    def create_vcpu(self, index: int) -> FakeVcpu:
        self.calls.append(("vcpu", index))
        vcpu = FakeVcpu(index)
        if index < len(self.scripts):
            vcpu.script = self.scripts[index]
        self.vcpus.append(vcpu)
        return vcpu

    def irq_line(self, gsi: int, level: int) -> None:
        self.lines.append((gsi, level))


class FakeKvm(Closing):
    """/dev/kvm with one VM."""

    capabilities = {abi.KVM_CAP_MAX_VCPUS: 8, abi.KVM_CAP_TSC_DEADLINE_TIMER: 1}

    def __init__(self, *scripts: Callable[[FakeVcpu], Iterator[int]]) -> None:
        super().__init__()
        self.vm = FakeVm()
        self.vm.scripts = list(scripts)

    def check_extension(self, cap: int) -> int:
        return self.capabilities.get(cap, 0)

    def create_vm(self) -> FakeVm:
        return self.vm

    def supported_cpuid(self) -> list[abi.kvm_cpuid_entry2]:
        rows = (
            (0x0, 0, 0x16, 0, 0, 0),
            (0x1, 0, 0x806F8, 0x00FF_0800, 1 << 21, 1 << 28 | 1 << 9),
            (0x4, 0, 0x1C004121, 0x2C0003F, 0x3F, 0),
            (0x4, 1, 0x1C03C163, 0x3C0003F, 0x3FFF, 4),
            (0x4, 2, 0, 0, 0, 0),
            (0xA, 0, 0x7300404, 0, 0, 0x603),
            (0xB, 0, 1, 2, 0x100, 5),
            (0xB, 1, 6, 64, 0x201, 5),
            (0x1F, 0, 1, 2, 0x100, 5),
            (0x4000_0000, 0, 0x4000_0001, 0x4B4D564B, 0x564B4D56, 0x4D),
            (0x8000_0008, 0, 0x3030, 0, 0x50F7, 0),
            (0x8000_001E, 0, 99, 0x1FF, 0x123, 0),
        )
        names = ("function", "index", "eax", "ebx", "ecx", "edx")
        return [abi.kvm_cpuid_entry2(**dict(zip(names, row, strict=True))) for row in rows]
