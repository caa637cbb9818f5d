"""A vCPU's thread: KVM_RUN and what follows each exit (api.rst, "The kvm_run structure")."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from collections.abc import Callable
from typing import Protocol

from anykvm.api import Vcpu
from anykvm.api.state import finish_exits
from anykvm.uapi import kvm as abi
from anykvm.vmm.bus import Bus
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended
from anykvm.vmm.stats import ExitStats, reason_name

KICK_SIGNAL = signal.SIGRTMIN
PR_SET_NAME = 15
COMM_LENGTH = 15

INTERNAL_ERRORS = {
    abi.KVM_INTERNAL_ERROR_EMULATION: "an instruction that cannot be emulated",
    abi.KVM_INTERNAL_ERROR_SIMUL_EX: "simultaneous exceptions",
    abi.KVM_INTERNAL_ERROR_DELIVERY_EV: "an exit while an event was being delivered",
    abi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: "an unexpected exit of the hardware",
}
SYSTEM_EVENTS = {
    abi.KVM_SYSTEM_EVENT_SHUTDOWN: (OutcomeKind.POWER_OFF, "the guest powered off"),
    abi.KVM_SYSTEM_EVENT_RESET: (OutcomeKind.RESET, "the guest reset the machine"),
    abi.KVM_SYSTEM_EVENT_CRASH: (OutcomeKind.GUEST_PANIC, "the guest reported a crash"),
}


class Wiring(Protocol):
    """What a vCPU needs of its machine."""

    ports: Bus
    mmio: Bus
    devices_lock: threading.Lock
    ending: bool
    suspending: bool

    def request(self, outcome: Outcome) -> None:
        """End the run."""

    def fail(self, error: BaseException) -> None:
        """End the run with an error of our own."""


def name_thread(name: str) -> None:
    """Set the calling thread's name in the kernel (/proc/PID/task/TID/comm)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_NAME, name.encode()[:COMM_LENGTH], 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NAME)")


def leave_signals_to_main(*but: int) -> None:
    """Block signals in the calling thread, all or all but some.

    One that another thread takes does not wake the main thread, which alone runs handlers.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - set(but))


def install_kick_signal() -> None:
    """Give KICK_SIGNAL a handler, so that it interrupts KVM_RUN instead of ending the process.

    Python lets only the main thread do that; elsewhere it must have been done before.
    """
    if signal.getsignal(KICK_SIGNAL) != signal.SIG_DFL:
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError(
            "a machine that runs outside of the main thread needs install_kick_signal() called "
            "in the main thread first"
        )
    signal.signal(KICK_SIGNAL, lambda number, frame: None)


class VcpuThread:
    """Runs one vCPU until the machine ends, or is suspended: then with no exit left half done."""

    def __init__(self, index: int, vcpu: Vcpu, wiring: Wiring) -> None:
        self.index = index
        self.vcpu = vcpu
        self.stats = ExitStats()
        self._wiring = wiring
        self._run = vcpu.kvm_run
        self._io, self._mmio = vcpu.kvm_run.io, vcpu.kvm_run.mmio
        self.name = f"CPU {index}/KVM"
        self._thread = threading.Thread(target=self._main, name=self.name, daemon=True)
        self._handlers: dict[int, Callable[[], None]] = {
            abi.KVM_EXIT_IO: self._exit_io,
            abi.KVM_EXIT_MMIO: self._exit_mmio,
            abi.KVM_EXIT_INTR: self._exit_intr,
            abi.KVM_EXIT_HLT: self._exit_hlt,
            abi.KVM_EXIT_SHUTDOWN: self._exit_shutdown,
            abi.KVM_EXIT_SYSTEM_EVENT: self._exit_system_event,
            abi.KVM_EXIT_INTERNAL_ERROR: self._exit_internal_error,
            abi.KVM_EXIT_FAIL_ENTRY: self._exit_fail_entry,
        }

    def start(self) -> None:
        self._run.immediate_exit = 0
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def kick(self) -> None:
        """Make KVM_RUN return. The signal alone could arrive just before the call, the flag alone
        would not end a wait in the kernel."""
        self._run.immediate_exit = 1
        if self._thread.ident is not None and self.alive:
            signal.pthread_kill(self._thread.ident, KICK_SIGNAL)

    def join(self, timeout: float) -> bool:
        """Wait for the thread; True when it has ended or never began."""
        if self._thread.ident is not None:
            self._thread.join(timeout)
        return not self.alive

    def _main(self) -> None:
        try:
            name_thread(self.name)
            leave_signals_to_main(KICK_SIGNAL)
            while not self._wiring.ending:
                self._step()
            if self._wiring.suspending:
                finish_exits(self.vcpu, self._dispatch)
        except BaseException as error:
            self._wiring.fail(error)

    def _step(self) -> None:
        """One KVM_RUN and its exit."""
        try:
            reason = self.vcpu.run()
        except OSError as error:
            self._error(f"KVM_RUN failed: {error.strerror or os.strerror(error.errno or 0)}")
            return
        self._dispatch(reason)

    def _dispatch(self, reason: int) -> None:
        self.stats.reasons[reason] += 1
        handler = self._handlers.get(reason)
        if handler is None:
            self._error(f"{reason_name(reason)} is not an exit that this machine expects")
        else:
            handler()

    # Exits

    def _exit_io(self) -> None:
        io = self._io
        port, size, count, direction = io.port, io.size, io.count, io.direction
        self.stats.ports[port, direction] += count
        data = self.vcpu.io_data()
        ports = self._wiring.ports
        with self._wiring.devices_lock:
            for start in range(0, size * count, size):
                end = start + size
                if direction == abi.KVM_EXIT_IO_OUT:
                    ports.write(port, size, int.from_bytes(data[start:end], "little"))
                else:
                    data[start:end] = ports.read(port, size).to_bytes(size, "little")

    def _exit_mmio(self) -> None:
        mmio = self._mmio
        address, size, is_write = mmio.phys_addr, mmio.len, mmio.is_write
        self.stats.mmio[address, is_write] += 1
        data = self.vcpu.mmio_data()
        with self._wiring.devices_lock:
            if is_write:
                self._wiring.mmio.write(address, size, int.from_bytes(data, "little"))
            else:
                data[:] = self._wiring.mmio.read(address, size).to_bytes(size, "little")

    def _exit_intr(self) -> None:
        """Kicked; the loop looks at why."""

    def _exit_hlt(self) -> None:
        self._error("halted with no interrupt controller in the kernel to wake it")

    def _exit_shutdown(self) -> None:
        self._wiring.request(
            ended(OutcomeKind.TRIPLE_FAULT, f"CPU {self.index} of the guest had a triple fault")
        )

    def _exit_system_event(self) -> None:
        event = self._run.system_event.type
        if event in SYSTEM_EVENTS:
            self._wiring.request(ended(*SYSTEM_EVENTS[event]))
        else:
            self._error(f"system event {event} is not one that this machine expects")

    def _exit_internal_error(self) -> None:
        internal = self._run.internal
        cause = INTERNAL_ERRORS.get(internal.suberror, f"suberror {internal.suberror}")
        details = [f"KVM internal error: {cause}", self._where()]
        if internal.suberror == abi.KVM_INTERNAL_ERROR_EMULATION:
            details.insert(1, self._instruction())
        self._error(", ".join(detail for detail in details if detail))

    def _exit_fail_entry(self) -> None:
        reason = self._run.fail_entry.hardware_entry_failure_reason
        self._error(f"entering the guest failed, hardware reason {reason:#x}, {self._where()}")

    def _instruction(self) -> str:
        """The bytes of the instruction that KVM could not emulate, where it gave them."""
        failure = self._run.emulation_failure
        if not failure.flags & abi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            return ""
        return f"bytes {bytes(failure.insn_bytes[: failure.insn_size]).hex(' ')}"

    def _where(self) -> str:
        regs, sregs = self.vcpu.get_regs(), self.vcpu.get_sregs()
        return f"at {sregs.cs.selector:#x}:{regs.rip:#x} (cs base {sregs.cs.base:#x})"

    def _error(self, message: str) -> None:
        self._wiring.request(ended(OutcomeKind.INTERNAL_ERROR, f"CPU {self.index}: {message}"))
