"""The machine: a PC built from the device table on a KVM VM, its threads, and the monitor that
ends it.

One thread per vCPU (`CPU N/KVM`) and one for input and timers run beside the caller of `run`,
which is the monitor: it waits for the first reason to end, stops all vCPUs and says how it ended.
Devices share one lock.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from anykvm.api import GuestMemory, Kvm, Vcpu
from anykvm.api import state as kvm_state
from anykvm.uapi import kvm as abi
from anykvm.vmm import devices
from anykvm.vmm.acpi_pm import AcpiPm
from anykvm.vmm.bus import Bus, Claim, Device
from anykvm.vmm.device_table import DeviceRow, IrqLine, Platform, Space, Timed
from anykvm.vmm.event_loop import EventLoop
from anykvm.vmm.memory_map import (
    KVM_IDENTITY_MAP_ADDRESS,
    KVM_TSS_ADDRESS,
    ram_ranges,
)
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended
from anykvm.vmm.serial import Serial
from anykvm.vmm.snapshot import MachineState, Snapshotting, decode, encode
from anykvm.vmm.stats import ExitStats
from anykvm.vmm.vcpu_setup import Place, set_up_vcpu
from anykvm.vmm.vcpu_thread import (
    VcpuThread,
    install_kick_signal,
    leave_signals_to_main,
    name_thread,
)

IO_THREAD_NAME = "IO/anykvm"
KICK_INTERVAL = 0.01
STOP_TIMEOUT = 10.0
PIC_PINS = 8
ISA_IRQS = 16
PIT_IOAPIC_PIN = 2
# Where a PC's firmware looks for the kind of reboot; Linux writes WARM_BOOT for a warm one.
REBOOT_FLAG_ADDRESS, WARM_BOOT = 0x472, 0x1234


class MachineError(Exception):
    """The machine cannot be built or stopped; the message says why."""


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """`memory` in bytes; `backend` as for `anykvm.api.Kvm`."""

    memory: int
    cpus: int = 1
    backend: str | None = None
    devices: Sequence[DeviceRow] = devices.PC


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended, and what made the guest leave until then."""

    outcome: Outcome
    stats: ExitStats
    seconds: float


class Ram:
    """Guest memory of one or two slots, by guest-physical address."""

    def __init__(self, parts: Sequence[GuestMemory]) -> None:
        self.parts = parts

    def _part(self, gpa: int) -> GuestMemory:
        for part in self.parts:
            if gpa in part:
                return part
        raise IndexError(f"there is no memory at guest-physical {gpa:#x}")

    def read(self, gpa: int, size: int) -> bytes:
        return self._part(gpa).read(gpa, size)

    def write(self, gpa: int, data: bytes) -> None:
        self._part(gpa).write(gpa, data)


def gsi_routing() -> list[abi.kvm_irq_routing_entry]:
    """ISA interrupts go to the 8259s and the I/O APIC; there the timer is on pin 2."""
    routes: list[tuple[int, int, int]] = []
    for gsi in range(abi.KVM_IOAPIC_NUM_PINS):
        if gsi < ISA_IRQS:
            slave, pin = divmod(gsi, PIC_PINS)
            routes.append((gsi, abi.KVM_IRQCHIP_PIC_MASTER + slave, pin))
        if gsi != PIT_IOAPIC_PIN:
            routes.append((gsi, abi.KVM_IRQCHIP_IOAPIC, gsi or PIT_IOAPIC_PIN))
    return [_route(*route) for route in routes]


def _route(gsi: int, irqchip: int, pin: int) -> abi.kvm_irq_routing_entry:
    entry = abi.kvm_irq_routing_entry(gsi=gsi, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.irqchip, entry.u.irqchip.pin = irqchip, pin
    return entry


class Machine:
    """A PC. Use it as a context manager: load memory, set vCPU 0's registers, `run`. A run that
    `suspend` ended can be followed by another, or by `save` and a machine that `restore`s it.

    `memory` is taken over from another machine; else it is new and zero. `console_output` and
    `debug_output` get what the guest writes to its serial line and to port 0xe9; they are called
    from vCPU threads.
    """

    def __init__(
        self,
        config: MachineConfig,
        console_output: Callable[[bytes], None],
        debug_output: Callable[[bytes], None] | None = None,
        open_kvm: Callable[[str | None], Kvm] = lambda backend: Kvm(backend=backend),
        memory: Sequence[GuestMemory] | None = None,
    ) -> None:
        self.config = config
        self.devices: dict[str, Device] = {}
        self.ports, self.mmio = Bus("port"), Bus("address")
        self.devices_lock = threading.Lock()
        self.ending = self.suspending = False
        self._resumable = True
        self._ends: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self._loop = EventLoop(self.devices_lock, time.monotonic_ns)
        self._stack = ExitStack()
        with self._stack:
            self._kvm = self._stack.enter_context(open_kvm(config.backend))
            self.vm = self._stack.enter_context(self._kvm.create_vm())
            self.memory = self._add_memory(memory)
            self._create_interrupt_controllers()
            self.vcpus = self._create_vcpus()
            self._threads: list[VcpuThread] = []
            self._build_devices(console_output, debug_output or _discard)
            self._stack = self._stack.pop_all()

    # Building

    def _add_memory(self, memory: Sequence[GuestMemory] | None) -> Ram:
        size = self.config.memory
        try:
            parts = memory or [GuestMemory(ram.size, ram.base) for ram in ram_ranges(size)]
        except OSError as error:
            what = f"{size >> 20} MiB of memory for the guest"
            raise MachineError(f"cannot get {what}: {error.strerror}") from error
        for slot, part in enumerate(parts):
            self.vm.add_memory(slot, part)
        return Ram(parts)

    def _create_interrupt_controllers(self) -> None:
        # KVM on Intel wants its private pages before the first vCPU.
        self.vm.set_identity_map_addr(KVM_IDENTITY_MAP_ADDRESS)
        self.vm.set_tss_addr(KVM_TSS_ADDRESS)
        self.vm.create_irqchip()
        self.vm.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)
        self.vm.set_gsi_routing(gsi_routing())

    def _create_vcpus(self) -> list[Vcpu]:
        cpus = self.config.cpus
        limit = self._kvm.check_extension(abi.KVM_CAP_MAX_VCPUS)
        if not 1 <= cpus <= limit:
            raise MachineError(f"{cpus} CPUs: expected 1 to {limit}, which is KVM's limit")
        supported = self._kvm.supported_cpuid()
        tsc_deadline = self._kvm.check_extension(abi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
        vcpus = [self._stack.enter_context(self.vm.create_vcpu(index)) for index in range(cpus)]
        for index, vcpu in enumerate(vcpus):
            set_up_vcpu(vcpu, supported, Place(index, cpus, tsc_deadline))
        return vcpus

    def _build_devices(
        self, console_output: Callable[[bytes], None], debug_output: Callable[[bytes], None]
    ) -> None:
        low = ram_ranges(self.config.memory)[0].size
        platform = Platform(
            irq_line=self._irq_line,
            clock=time.monotonic_ns,
            wall_clock=time.time_ns,
            console_output=console_output,
            debug_output=debug_output,
            console_ready=self._loop.wake,
            deadline_changed=self._loop.wake,
            request=self.request,
            memory_below_4g=low,
            memory_above_4g=self.config.memory - low,
            cpus=self.config.cpus,
        )
        buses = {Space.PORT: self.ports, Space.MMIO: self.mmio}
        for row in self.config.devices:
            device = self.devices[row.name] = row.build(platform)
            for window in row.windows:
                claim = Claim(window.base, window.size, row.width, device, row.name, window.offset)
                buses[window.space].claim(claim)

    def _irq_line(self, gsi: int) -> IrqLine:
        return lambda level: self.vm.irq_line(gsi, int(level))

    # Ending

    def request(self, outcome: Outcome) -> None:
        """End the run with this outcome, unless something ended it before. From any thread."""
        self.ending = True
        self._ends.put(outcome)

    def fail(self, error: BaseException) -> None:
        """End the run by raising `error` out of `run`. From any thread."""
        self.ending = True
        self._ends.put(error)

    def stop(self, message: str = "stopped by the user") -> None:
        """End the run from outside. From any thread and from a signal handler."""
        self.request(ended(OutcomeKind.STOPPED, message))

    def suspend(self) -> None:
        """End the run so that it can go on, here or from what `save` gives. From any thread."""
        self.suspending = True
        self.request(ended(OutcomeKind.SUSPENDED, "suspended"))

    # Saving

    def save(self) -> MachineState:
        """The state of a machine whose last run was suspended. MachineError for any other."""
        if not self._resumable:
            raise MachineError("only a machine that was suspended can be saved")
        states = {
            name: encode(device.snapshot())
            for name, device in self.devices.items()
            if isinstance(device, Snapshotting)
        }
        vm_state = kvm_state.save(self._kvm, self.vm, self.vcpus)
        return MachineState(vm_state, states, self._loop.pending, self.memory.parts)

    def restore(self, state: MachineState) -> None:
        """Put a saved state into this machine, which has its memory and has not run yet.

        Devices first: they raise their lines, of which the interrupt controllers' state then says
        what has become of them. Raises MachineError and StateError.
        """
        saving = {n: d for n, d in self.devices.items() if isinstance(d, Snapshotting)}
        if saving.keys() != state.devices.keys():
            raise MachineError(
                f"the state is of a machine with {', '.join(sorted(state.devices))}; "
                f"this one has {', '.join(sorted(saving))}"
            )
        for name, device in saving.items():
            try:
                device.restore(decode(type(device.state), state.devices[name]))
            except (KeyError, TypeError, ValueError) as error:
                raise kvm_state.StateError(f"this is no state of {name}: {error}") from error
        self._loop.send(state.input)
        kvm_state.restore(self.vm, self.vcpus, state.kvm)

    # What the outside does to the guest

    def send(self, data: bytes) -> None:
        """Input for the guest's serial line. Waits while the guest does not read."""
        self._loop.send(data)

    def press_power_button(self) -> None:
        """Ask the guest to shut down, if it listens."""
        button = self.devices.get("acpi_pm")
        if isinstance(button, AcpiPm):
            with self.devices_lock:
                button.press_power_button()

    # Running

    def run(self, timeout: float | None = None) -> RunResult:
        """Run the guest to its end, `timeout` seconds at most; again only after `suspend`."""
        if not self._resumable:
            raise MachineError("this machine has run to its end")
        install_kick_signal()
        self.ending = self._resumable = False
        self._threads = [VcpuThread(index, vcpu, self) for index, vcpu in enumerate(self.vcpus)]
        began = time.monotonic()
        timed = [device for device in self.devices.values() if isinstance(device, Timed)]
        serial = self.devices.get("serial")
        self._loop.connect(timed, serial if isinstance(serial, Serial) else None)
        io_thread = threading.Thread(target=self._serve, name=IO_THREAD_NAME, daemon=True)
        io_thread.start()
        try:
            for thread in self._threads:
                thread.start()
            outcome = self._wait(timeout)
        finally:
            self._loop.stop()
            io_thread.join()
            self._stop_vcpus()
        outcome = self._last_word(outcome)
        self.suspending = False
        self._resumable = outcome.kind is OutcomeKind.SUSPENDED
        stats = ExitStats.total(thread.stats for thread in self._threads)
        return RunResult(self._classify(outcome), stats, time.monotonic() - began)

    def _serve(self) -> None:
        try:
            name_thread(IO_THREAD_NAME)
            leave_signals_to_main()
            self._loop.run()
        except BaseException as error:
            self.fail(error)

    def _wait(self, timeout: float | None) -> Outcome:
        """The monitor: the first end that anyone asks for."""
        try:
            end = self._ends.get(timeout=timeout)
        except queue.Empty:
            return ended(OutcomeKind.TIMEOUT, f"the guest was still running after {timeout:g} s")
        if isinstance(end, BaseException):
            raise end
        return end

    def _last_word(self, outcome: Outcome) -> Outcome:
        """What went wrong in a thread after the run had ended must not go unnoticed, nor a guest
        that ended while it was suspended.
        """
        while not self._ends.empty():
            end = self._ends.get()
            if isinstance(end, BaseException):
                raise end
            if outcome.kind is OutcomeKind.SUSPENDED:
                outcome = end
        return outcome

    def _stop_vcpus(self) -> None:
        """Kick every vCPU until its thread has ended; one kick may come before the vCPU runs."""
        self.ending = True
        deadline = time.monotonic() + STOP_TIMEOUT
        left = list(self._threads)
        while left:
            for thread in left:
                thread.kick()
            left = [thread for thread in left if not thread.join(KICK_INTERVAL)]
            if left and time.monotonic() > deadline:
                names = ", ".join(thread.name for thread in left)
                raise MachineError(f"{names} did not leave KVM_RUN within {STOP_TIMEOUT:g} s")

    def _classify(self, outcome: Outcome) -> Outcome:
        """A reset that a Linux with `reboot=panic_warm` asked for warm is the end of a panic."""
        if outcome.kind in (OutcomeKind.RESET, OutcomeKind.TRIPLE_FAULT):
            flag = int.from_bytes(self.memory.read(REBOOT_FLAG_ADDRESS, 2), "little")
            if flag == WARM_BOOT:
                return ended(OutcomeKind.GUEST_PANIC, "the guest's kernel panicked")
        return outcome

    # Lifetime

    def close(self) -> None:
        """Close the vCPUs, the VM and KVM, in this order."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _discard(data: bytes) -> None:
    """What the guest writes to a debug port that nobody listens to."""


def loaded(machine: Machine, load: Callable[[Machine], object]) -> Machine:
    """The machine with what `load` puts into it; closed if that fails."""
    try:
        load(machine)
    except BaseException:
        machine.close()
        raise
    return machine
