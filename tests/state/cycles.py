"""Linux on two processors, stopped at random moments, saved, and continued in a new VM each time.

What runs in it is tests/guests/statecheck.s, which ends with FAIL at the first thing lost. Besides,
whatever was written with SET ioctls must come back from the GET ioctls, but for clocks that run.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from anykvm.api.state import MSR_IA32_TSC, VcpuState, VmState
from anykvm.uapi import kvm as uapi
from anykvm.vmm.boot import Boot, BootOptions
from anykvm.vmm.cpio import Cpio
from anykvm.vmm.exit_port import EXIT_PORT
from anykvm.vmm.images import obtain
from anykvm.vmm.initramfs import Guest, build
from anykvm.vmm.machine import Machine, MachineConfig
from anykvm.vmm.outcome import Outcome, OutcomeKind
from anykvm.vmm.snapshot import MachineState

PROGRAM = Path(__file__).resolve().parent.parent / "guests/statecheck.elf"
MEMORY, CPUS = 128 << 20, 2
LONGEST_RUN = 120.0
APIC_TMCCT, APIC_IRR = slice(0x390, 0x394), 0x200
TIMER_PINS = (0, 2)  # of the I/O APIC, by KVM's usual routes and by a PC's
HV_X64_MSR_VP_RUNTIME, HV_X64_MSR_TIME_REF_COUNT = 0x40000010, 0x40000020
HV_X64_MSR_TSC_FREQUENCY = 0x40000022  # measured anew by each process
RUNNING_MSRS = (
    MSR_IA32_TSC,
    HV_X64_MSR_VP_RUNTIME,
    HV_X64_MSR_TIME_REF_COUNT,
    HV_X64_MSR_TSC_FREQUENCY,
)
Parts = dict[str, bytes | dict[int, int]]
ROUND = re.compile(rb"round (\d+)\r?\n")


def initrd() -> bytes:
    """Busybox and the program, which the kernel takes as two archives."""
    archive = Cpio()
    archive.file("statecheck", PROGRAM.read_bytes(), 0o755)
    guest = Guest(exit_port=EXIT_PORT, command="/statecheck", translate_newlines=False)
    return build(obtain().busybox.read_bytes(), guest) + archive.finish()


@dataclass
class Console:
    """What the guest printed, over all its machines."""

    printed: bytearray = field(default_factory=bytearray)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def write(self, data: bytes) -> None:
        with self.changed:
            self.printed += data
            self.changed.notify_all()

    @property
    def round(self) -> int:
        """The highest that the guest has finished. They come in order, none twice."""
        rounds = [int(number) for number in ROUND.findall(bytes(self.printed))]
        assert rounds == list(range(4, 4 * len(rounds) + 1, 4)), self.tail()
        return rounds[-1] if rounds else 0

    def tail(self) -> str:
        return self.printed[-400:].decode("latin-1")

    def wait_for_round(self, number: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.round >= number, LONGEST_RUN), self.tail()


class Cycles:
    """One guest's life: `machine` is where it is now."""

    def __init__(self, folder: Path, seed: int, backend: str = "soft", append: str = "") -> None:
        self.backend = backend
        self.random = random.Random(seed)
        self.console = Console()
        image = folder / "initrd"
        image.write_bytes(initrd())
        options = BootOptions(
            obtain().kernel, image, append, memory=MEMORY, cpus=CPUS, backend=backend
        )
        self.machine = Boot(options).machine(self.console.write)

    def close(self) -> None:
        self.machine.close()

    def run_for(self, seconds: float) -> Outcome:
        """Let the guest run, and suspend it wherever it is then."""
        timer = threading.Timer(seconds, self.machine.suspend)
        timer.start()
        return self._run(timer.join)

    def run_to_round(self, number: int) -> Outcome:
        """Let the guest run until it has printed that round."""

        def wait() -> None:
            self.console.wait_for_round(number)
            self.machine.suspend()

        thread = threading.Thread(target=wait)
        thread.start()
        return self._run(thread.join)

    def _run(self, join: Callable[[], object]) -> Outcome:
        outcome = self.machine.run(LONGEST_RUN).outcome
        join()
        assert outcome.kind is OutcomeKind.SUSPENDED, f"{outcome}\n{self.console.tail()}"
        return outcome

    def save(self) -> MachineState:
        return self.machine.save()

    def continue_from(self, state: MachineState) -> None:
        """Into a new VM, with the old one's memory; and what was written comes back."""
        self.machine.close()
        config = MachineConfig(state.memory_size, state.cpus, self.backend)
        self.machine = Machine(config, self.console.write, memory=state.memory)
        self.machine.restore(state)
        again = self.machine.save()
        assert_same(state, again)

    def cycle(self, shortest: float, longest: float) -> None:
        """Run for a random time, save, continue in a new VM."""
        self.run_for(self.random.uniform(shortest, longest))
        self.continue_from(self.save())

    def cycle_through_process(self, shortest: float, longest: float, file: Path) -> None:
        """The same, but a process of its own runs it for that time, from a file to another."""
        with file.open("wb") as opened:
            self.save().write(opened)
        seconds = self.random.uniform(shortest, longest)
        command = [sys.executable, str(Path(__file__)), str(file), str(seconds), self.backend]
        done = subprocess.run(command, capture_output=True, timeout=LONGEST_RUN)
        assert done.returncode == 0, done.stderr.decode()
        self.console.write(done.stdout)
        with file.open("rb") as opened:
            self.continue_from(MachineState.read(opened))


def in_a_process(file: Path, seconds: float, backend: str) -> None:
    """What the other process does: restore, run, save; what the guest prints goes to stdout."""
    with file.open("rb") as opened:
        state = MachineState.read(opened)
    config = MachineConfig(state.memory_size, state.cpus, backend)
    with Machine(config, lambda data: print_bytes(data), memory=state.memory) as machine:
        machine.restore(state)
        timer = threading.Timer(seconds, machine.suspend)
        timer.start()
        outcome = machine.run(LONGEST_RUN).outcome
        timer.join()
        if outcome.kind is not OutcomeKind.SUSPENDED:
            raise SystemExit(str(outcome))
        with file.open("wb") as opened:
            machine.save().write(opened)


def print_bytes(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


# What must come back.


def assert_same(before: MachineState, after: MachineState) -> None:
    """Everything but clocks that go on running, byte for byte."""
    lost = differences(still(before.kvm), still(after.kvm))
    assert not lost, lost
    assert devices_still(before) == devices_still(after)
    clocks = [uapi.kvm_clock_data.from_buffer_copy(s.kvm.parts["clock"]) for s in (before, after)]
    passed = clocks[1].clock - clocks[0].clock
    assert passed >= 0
    for old, new in zip(before.kvm.vcpus, after.kvm.vcpus, strict=True):
        assert_same_time(old, new, passed)


def assert_same_time(old: VcpuState, new: VcpuState, passed_ns: int) -> None:
    """The TSC has counted what the clock has."""
    if old.tsc is not None and new.tsc is not None:
        khz = int.from_bytes(new.parts["tsc_khz"], "little")
        assert abs(new.tsc - old.tsc - passed_ns * khz // 1_000_000) <= 100
    elif new.tsc is not None:
        assert new.msrs[MSR_IA32_TSC] >= old.msrs[MSR_IA32_TSC]


def differences(before: Parts, after: Parts) -> list[str]:
    """What is not the same, in words."""
    found = [f"{name} is only in one" for name in before.keys() ^ after.keys()]
    for name in before.keys() & after.keys():
        old, new = before[name], after[name]
        if isinstance(old, dict) and isinstance(new, dict):
            pairs = ((f"{i:#x}", old.get(i), new.get(i)) for i in old.keys() | new.keys())
        else:
            pairs = ((f"byte {i:#x}", a, b) for i, (a, b) in enumerate(zip(old, new, strict=True)))
        found += [f"{name} {where}: {a!r} became {b!r}" for where, a, b in pairs if a != b]
    return found


def still(state: VmState) -> Parts:
    """The parts without what runs: clocks, the PIT and its interrupt, the APIC timers' counts."""
    found: Parts = {}
    for name, data in state.parts.items():
        if name in CHIPS:
            chip = CHIPS[name][0].from_buffer_copy(data)
            CHIPS[name][1](chip)
            data = bytes(chip)
        if name != "clock":
            found[name] = data
    vectors = _timer_vectors(state)
    for number, vcpu in enumerate(state.vcpus):
        found |= {f"{number}/{name}": part for name, part in _vcpu_still(vcpu, vectors)}
    return found


def _stop_pit(pit: uapi.kvm_pit_state2) -> None:
    for channel in pit.channels:
        channel.count_load_time = 0


def _lower_pic(chip: uapi.kvm_irqchip) -> None:
    chip.chip.pic.irr &= ~1
    chip.chip.pic.last_irr &= ~1


def _lower_ioapic(chip: uapi.kvm_irqchip) -> None:
    for pin in TIMER_PINS:
        chip.chip.ioapic.irr &= ~(1 << pin)


# The PIT ticks on while nobody runs, into the interrupt controllers.
CHIPS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "pit2": (uapi.kvm_pit_state2, _stop_pit),
    "pic_master": (uapi.kvm_irqchip, _lower_pic),
    "ioapic": (uapi.kvm_irqchip, _lower_ioapic),
}


def _timer_vectors(state: VmState) -> set[int]:
    if "ioapic" not in state.parts:
        return set()
    ioapic = uapi.kvm_irqchip.from_buffer_copy(state.parts["ioapic"]).chip.ioapic
    return {ioapic.redirtbl[pin].bits & 0xFF for pin in TIMER_PINS}


def _vcpu_still(
    vcpu: VcpuState, timer_vectors: set[int]
) -> Iterator[tuple[str, bytes | dict[int, int]]]:
    for name, data in vcpu.parts.items():
        if name == "msrs":
            yield name, {i: value for i, value in vcpu.msrs.items() if i not in RUNNING_MSRS}
        elif name == "lapic":
            registers = bytearray(data)
            registers[APIC_TMCCT] = bytes(4)
            for vector in timer_vectors:
                registers[APIC_IRR + vector // 32 * 16 + vector % 32 // 8] &= ~(1 << vector % 8)
            yield name, bytes(registers)
        elif name != "tsc_khz":  # measured anew by each process
            yield name, data


def devices_still(state: MachineState) -> dict[str, object]:
    """Device registers without the age of the ACPI timer and of a character's time-out."""
    running = {("acpi_pm", "started"), ("serial", "timeout_at")}
    return {
        f"{device}.{name}": value
        for device, registers in state.devices.items()
        for name, value in registers.items()
        if (device, name) not in running
    }


@contextmanager
def guest(folder: Path, seed: int, backend: str = "soft", append: str = "") -> Iterator[Cycles]:
    """A guest that is about to boot; `append` goes to its kernel's command line."""
    cycles = Cycles(folder, seed, backend, append)
    try:
        yield cycles
    finally:
        cycles.close()


if __name__ == "__main__":
    in_a_process(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
