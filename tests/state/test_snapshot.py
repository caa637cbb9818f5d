"""Machines that are suspended, saved, written to files and restored; their devices' registers."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from anykvm.api.state import StateError
from anykvm.vmm.acpi_pm import PM1_EN, TIMER, AcpiPm
from anykvm.vmm.demo import Demo, DemoOptions
from anykvm.vmm.machine import Machine, MachineConfig, MachineError
from anykvm.vmm.outcome import OutcomeKind
from anykvm.vmm.serial import IER, MCR, MCR_OUT2, MCR_RTS, RBR_THR, Serial
from anykvm.vmm.snapshot import MachineState, Snapshotting, decode, encode

NS_PER_SECOND, PM_TIMER_HZ = 1_000_000_000, 3_579_545
SHORTEST, MOST_CYCLES = 0.01, 200


class Printed:
    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


@pytest.fixture
def demo() -> Iterator[Machine]:
    """The demo's guest on two processors, which ends with status 0 if no count is missing."""
    with Demo(DemoOptions(backend="soft")).machine(Printed()) as machine:
        yield machine


def suspended_after(machine: Machine, seconds: float) -> OutcomeKind:
    timer = threading.Timer(seconds, machine.suspend)
    timer.start()
    outcome = machine.run(30).outcome
    timer.cancel()
    timer.join()
    assert outcome.kind in (OutcomeKind.SUSPENDED, OutcomeKind.EXIT), outcome
    assert outcome.status == 0
    return outcome.kind


def through_a_file(state: MachineState) -> MachineState:
    file = io.BytesIO()
    state.write(file)
    file.seek(0)
    return MachineState.read(file)


def restored(state: MachineState, printed: Printed) -> Machine:
    config = MachineConfig(state.memory_size, state.cpus, "soft")
    machine = Machine(config, printed, memory=state.memory)
    machine.restore(state)
    return machine


def test_a_guest_goes_on_from_files_to_its_end() -> None:
    """Real mode, SIPI, long mode, timer interrupts: in pieces that know nothing of each other."""
    printed, seconds = Printed(), SHORTEST
    machine = Demo(DemoOptions(backend="soft")).machine(printed)
    for _ in range(MOST_CYCLES):
        ended = suspended_after(machine, seconds)
        if ended is OutcomeKind.EXIT:
            break
        state = through_a_file(machine.save())
        machine.close()
        machine = restored(state, printed)
        seconds *= 1.2
    machine.close()
    assert ended is OutcomeKind.EXIT
    whole = Printed()
    with Demo(DemoOptions(backend="soft")).machine(whole) as machine:
        machine.run(30)
    assert len(printed.data.splitlines()) == len(whole.data.splitlines())


def test_a_suspended_machine_runs_on(demo: Machine) -> None:
    demo.suspend()
    assert demo.run(30).outcome.kind is OutcomeKind.SUSPENDED
    assert demo.save().cpus == 2
    assert demo.run(30).outcome.kind is OutcomeKind.EXIT


def test_a_machine_that_has_ended_neither_runs_nor_is_saved(demo: Machine) -> None:
    assert demo.run(30).outcome.kind is OutcomeKind.EXIT
    with pytest.raises(MachineError, match="run to its end"):
        demo.run(30)
    with pytest.raises(MachineError, match="only a machine that was suspended"):
        demo.save()


def test_input_that_the_guest_has_not_read_is_saved(demo: Machine) -> None:
    demo.send(b"typed early")
    demo.suspend()
    demo.run(30)
    state = through_a_file(demo.save())
    with restored(state, Printed()) as machine:
        assert machine.save().input == b"typed early"


def test_every_devices_registers_survive_json(demo: Machine) -> None:
    saving = [d for d in demo.devices.values() if isinstance(d, Snapshotting)]
    assert len(saving) == 6
    for device in saving:
        snapshot = device.snapshot()
        again = json.loads(json.dumps(encode(snapshot)))
        assert decode(type(device.state), again) == snapshot


def test_another_machines_devices_are_refused(demo: Machine) -> None:
    state = demo.save()
    devices = {name: state.devices[name] for name in ("rtc", "serial")}
    with pytest.raises(MachineError, match="a machine with rtc, serial; this one has acpi_pm"):
        demo.restore(replace(state, devices=devices))


def test_registers_that_a_device_does_not_have_are_refused(demo: Machine) -> None:
    state = demo.save()
    devices = state.devices | {"post_port": {"colour": 3}}
    with pytest.raises(StateError, match="no state of post_port"):
        demo.restore(replace(state, devices=devices))


def test_a_state_of_a_vm_alone_is_no_machines() -> None:
    from anykvm.api.state_file import write_sections

    file = io.BytesIO()
    write_sections(file, {"vm/clock": bytes(48)})
    file.seek(0)
    with pytest.raises(StateError, match="no machine's state: KeyError"):
        MachineState.read(file)


class Clock:
    """Another process's clock may show anything."""

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def acpi_pm(clock: Clock) -> AcpiPm:
    return AcpiPm(lambda level: None, clock, lambda outcome: None, lambda: None)


def test_the_acpi_timer_counts_on_under_another_clock() -> None:
    clock, other = Clock(5 * NS_PER_SECOND), Clock(0)
    timer = acpi_pm(clock)
    clock.now += 2 * NS_PER_SECOND
    saved = timer.snapshot()
    clock.now += NS_PER_SECOND  # while it is saved, time stands still
    other.now = 77 * NS_PER_SECOND
    again = acpi_pm(other)
    again.restore(saved)
    assert again.read(TIMER, 4) == 2 * PM_TIMER_HZ
    other.now += NS_PER_SECOND
    assert again.read(TIMER, 4) == 3 * PM_TIMER_HZ
    assert again.read(PM1_EN, 2) == timer.read(PM1_EN, 2)


def test_a_characters_time_out_comes_as_late_under_another_clock() -> None:
    clock, other = Clock(NS_PER_SECOND), Clock(9 * NS_PER_SECOND)
    lines = [
        Serial(lambda level: None, Printed(), c, lambda: None, lambda: None) for c in (clock, other)
    ]
    uart, again = lines
    uart.write(2, 1, 0xC1)  # the FIFO interrupts at 14 bytes
    uart.write(MCR, 1, MCR_OUT2 | MCR_RTS)
    uart.write(IER, 1, 1)
    uart.receive(b"x")
    due = uart.next_deadline()
    assert due is not None
    again.restore(uart.snapshot())
    assert again.next_deadline() == due - clock.now + other.now
    assert again.read(RBR_THR, 1) == ord("x")
