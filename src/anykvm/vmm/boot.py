"""Boot Linux: from a kernel's path to a machine that runs it, and how that ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anykvm.vmm.acpi import build_acpi
from anykvm.vmm.bzimage import (
    BootError,
    KernelImage,
    LoadedKernel,
    check_fit,
    load_linux,
    parse_bzimage,
)
from anykvm.vmm.long_mode import enter_long_mode, entry_regs, write_tables
from anykvm.vmm.machine import Machine, MachineConfig, RunResult, loaded
from anykvm.vmm.vmlinux import ELF_MAGIC, parse_vmlinux

DEFAULT_COMMAND_LINE = (
    "console=ttyS0",
    # The same kernel at the same address at every boot, so translations of it are found again.
    "nokaslr",
    # Reboot at once after a panic, and mark that reboot as warm: so the machine can tell it.
    "panic=-1",
    "reboot=panic_warm",
    # The PCI bus is empty, which Linux takes for a fatal error unless told that mechanism #1 works.
    "pci=conf1,noearly",
    # The self-tests of every cipher would take a fifth of the boot.
    "cryptomgr.notests",
    # One serial line is all there is to find.
    "8250.nr_uarts=1",
)
# Level 1 leaves emergencies, such as a panic's, and nothing else.
QUIET = ("quiet", "loglevel=1")


@dataclass(frozen=True, slots=True)
class BootOptions:
    """What to boot. `append` goes after the default command line, so it wins.

    `memory` is in bytes, `timeout` in seconds; `backend` is as for `anykvm.api.Kvm`; `quiet` keeps
    the kernel's own messages off the console.
    """

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    memory: int = 512 << 20
    cpus: int = 1
    backend: str | None = None
    timeout: float | None = None
    quiet: bool = True

    @property
    def command_line(self) -> str:
        words = (*DEFAULT_COMMAND_LINE, *(QUIET if self.quiet else ()), self.append)
        return " ".join(word for word in words if word)


def read_file(path: Path, what: str) -> bytes:
    """The whole file. Raises BootError that names it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BootError(f"cannot read the {what} {path}: {error.strerror}") from error


def parse_kernel(data: bytes, name: str) -> KernelImage:
    """A bzImage or an ELF vmlinux."""
    parse = parse_vmlinux if data.startswith(ELF_MAGIC) else parse_bzimage
    return parse(data, name)


class Boot:
    """A boot that was checked against all that can be wrong before a machine exists.

    Raises BootError.
    """

    def __init__(self, options: BootOptions) -> None:
        self.options = options
        self.kernel = parse_kernel(read_file(options.kernel, "kernel"), str(options.kernel))
        self.initrd = read_file(options.initrd, "initrd") if options.initrd else b""
        if options.cpus < 1:
            raise BootError(f"{options.cpus} CPUs: expected 1 or more")
        try:
            self.acpi = build_acpi(list(range(options.cpus)))
        except ValueError as error:
            raise BootError(str(error)) from error
        check_fit(self.kernel, options.memory, len(self.initrd), options.command_line)

    def load(self, machine: Machine) -> LoadedKernel:
        """Fill memory and set the boot processor's registers."""
        memory = machine.memory
        memory.write(self.acpi.base, self.acpi.image)
        write_tables(memory)
        options = self.options
        loaded = load_linux(
            memory, options.memory, self.kernel, self.initrd, options.command_line, self.acpi.rsdp
        )
        vcpu = machine.vcpus[0]
        sregs = vcpu.get_sregs()
        enter_long_mode(sregs)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(entry_regs(loaded.entry, loaded.zero_page))
        return loaded

    def machine(
        self,
        console_output: Callable[[bytes], None],
        debug_output: Callable[[bytes], None] | None = None,
    ) -> Machine:
        """The machine with the kernel in it, ready to run."""
        options = self.options
        config = MachineConfig(options.memory, options.cpus, options.backend)
        return loaded(Machine(config, console_output, debug_output), self.load)


def boot(options: BootOptions, console_output: Callable[[bytes], None]) -> RunResult:
    """Boot, run to the end, clean up. For input, build a `Boot` and use its machine's `send`."""
    with Boot(options).machine(console_output) as machine:
        return machine.run(options.timeout)
