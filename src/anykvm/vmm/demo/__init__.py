"""The demo: a guest of our own that needs nothing from outside.

`guest.s` takes every processor from real mode to long mode and lets them count under timer
interrupts; `guest.bin` is what tools/assemble_demo.py makes of it. It ends through the exit port:
0, or 1 where counts went missing, or 2 after an exception.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from anykvm.uapi.kvm import kvm_regs
from anykvm.vmm.long_mode import RFLAGS_FIXED
from anykvm.vmm.machine import Machine, MachineConfig, RunResult, loaded
from anykvm.vmm.memory_map import ram_ranges

ORIGIN = 0x8000
"""Where the guest lies, and where processor 0 begins as if a SIPI had sent it there."""

CPUS = 2
MAX_CPUS = 64
MEMORY = 2 << 20


class DemoError(Exception):
    """The demo cannot be run so; the message says why."""


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """`memory` in bytes, `timeout` in seconds; `backend` as for `anykvm.api.Kvm`."""

    cpus: int = CPUS
    memory: int = MEMORY
    backend: str | None = None
    timeout: float | None = None


def image() -> bytes:
    """The guest's memory from ORIGIN on."""
    return files(__name__).joinpath("guest.bin").read_bytes()


class Demo:
    """Checked before a machine exists, as `anykvm.vmm.boot.Boot` is. Raises DemoError."""

    def __init__(self, options: DemoOptions) -> None:
        self.options = options
        if not 1 <= options.cpus <= MAX_CPUS:
            raise DemoError(f"{options.cpus} CPUs: the demo takes 1 to {MAX_CPUS}")
        try:
            ram_ranges(options.memory)
        except ValueError as error:
            raise DemoError(str(error)) from error

    def load(self, machine: Machine) -> None:
        """Put the guest in memory and processor 0 at its beginning."""
        machine.memory.write(ORIGIN, image())
        vcpu = machine.vcpus[0]
        sregs = vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = ORIGIN, ORIGIN >> 4
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=0, rflags=RFLAGS_FIXED))

    def machine(self, console_output: Callable[[bytes], None]) -> Machine:
        """The machine with the guest in it, ready to run."""
        options = self.options
        config = MachineConfig(options.memory, options.cpus, options.backend)
        return loaded(Machine(config, console_output), self.load)


def run(options: DemoOptions, console_output: Callable[[bytes], None]) -> RunResult:
    """Build, run to the end, clean up."""
    with Demo(options).machine(console_output) as machine:
        return machine.run(options.timeout)
