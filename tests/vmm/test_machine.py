"""The machine on a scripted vCPU: how it is built, how exits reach devices, how runs end."""

from __future__ import annotations

import re
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from tests.vmm import fake_kvm as fake

from anykvm.api import Kvm
from anykvm.uapi import kvm as abi
from anykvm.vmm.machine import Machine, MachineConfig, MachineError, RunResult, gsi_routing
from anykvm.vmm.outcome import OutcomeKind
from anykvm.vmm.vcpu_setup import Place, cpuid_for
from anykvm.vmm.vcpu_thread import KICK_SIGNAL

Script = Callable[[Any], Iterator[int]]
MIB = 1 << 20
SERIAL, LSR, EXIT = 0x3F8, 0x3FD, 0xF4


class Setup:
    """A machine over a fake KVM, and what it printed."""

    def __init__(self, *scripts: Script, memory: int = 64 * MIB, cpus: int = 0) -> None:
        self.kvm = fake.FakeKvm(*scripts)
        self.printed, self.debugged = b"", b""
        self.machine = Machine(
            MachineConfig(memory, cpus or max(len(scripts), 1)),
            self._print,
            self._debug,
            lambda backend: cast(Kvm, self.kvm),
        )

    def _print(self, data: bytes) -> None:
        self.printed += data

    def _debug(self, data: bytes) -> None:
        self.debugged += data

    def run(self, timeout: float | None = 5) -> RunResult:
        with self.machine:
            return self.machine.run(timeout)


def end(vcpu: Any, status: int = 0) -> int:
    return int(vcpu.out(EXIT, bytes((status,))))


def test_the_machine_is_built_as_kvm_wants_it() -> None:
    setup = Setup(cpus=2, memory=(3 << 30) + MIB)
    vm = setup.kvm.vm
    assert vm.calls == [
        ("identity", 0xFFFBC000),
        ("tss", 0xFFFBD000),
        ("irqchip", 0),
        ("pit2", abi.KVM_PIT_SPEAKER_DUMMY),
        ("vcpu", 0),
        ("vcpu", 1),
    ]
    assert [(part.addr, part.size) for part in vm.memory.values()] == [(0, 3 << 30), (4 << 30, MIB)]
    setup.machine.memory.write(4 << 30, b"high")
    assert setup.machine.memory.read(4 << 30, 4) == b"high"
    with pytest.raises(IndexError, match="0xc0000000"):
        setup.machine.memory.read(3 << 30, 1)
    setup.machine.close()
    assert [vcpu.closed for vcpu in vm.vcpus] == [1, 1]
    assert (vm.closed, setup.kvm.closed) == (1, 1)


def test_interrupts_are_routed_as_the_acpi_tables_say() -> None:
    routes = {(e.gsi, e.u.irqchip.irqchip, e.u.irqchip.pin) for e in gsi_routing()}
    ioapic = {(gsi, pin) for gsi, chip, pin in routes if chip == abi.KVM_IRQCHIP_IOAPIC}
    assert ioapic == {(0, 2), (1, 1)} | {(gsi, gsi) for gsi in range(3, 24)}
    pics = {(gsi, chip * 8 + pin) for gsi, chip, pin in routes if chip != abi.KVM_IRQCHIP_IOAPIC}
    assert pics == {(gsi, gsi) for gsi in range(16)}


def test_vcpus_get_msrs_and_lint_wiring() -> None:
    setup = Setup()
    vcpu = setup.kvm.vm.vcpus[0]
    assert (vcpu.msrs[0x1A0], vcpu.msrs[0x2FF], vcpu.msrs[0xC0000082]) == (1, 0x806, 0)
    lvts = [struct.unpack_from("<I", bytes(vcpu.lapic.regs), at)[0] for at in (0x350, 0x360)]
    assert [lvt >> 8 & 7 for lvt in lvts] == [7, 4]
    setup.machine.close()


def test_a_refused_msr_is_named_and_nothing_stays_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake.FakeVcpu, "set_msrs", lambda self, values: 2)
    kvm = fake.FakeKvm()
    with pytest.raises(OSError, match="refused MSR 0x176"):
        Machine(MachineConfig(64 * MIB), lambda data: None, None, lambda backend: cast(Kvm, kvm))
    assert (kvm.closed, kvm.vm.closed, kvm.vm.vcpus[0].closed) == (1, 1, 1)


@pytest.mark.parametrize("cpus", [-1, 9])
def test_too_many_cpus_are_refused(cpus: int) -> None:
    with pytest.raises(MachineError, match="expected 1 to 8"):
        Setup(cpus=cpus)


@pytest.mark.parametrize("index", [0, 3])
def test_cpuid_places_each_vcpu_in_the_topology(index: int) -> None:
    supported = fake.FakeKvm().supported_cpuid()
    before = [bytes(entry) for entry in supported]
    entries = {(e.function, e.index): e for e in cpuid_for(supported, Place(index, 4, True))}
    assert [bytes(entry) for entry in supported] == before
    one = entries[1, 0]
    assert one.ebx == index << 24 | 4 << 16 | 0x0800
    assert one.ecx & (1 << 31 | 1 << 24 | 1 << 21) == 1 << 31 | 1 << 24 | 1 << 21
    assert one.edx >> 28 & 1
    caches = [(entries[4, i].eax >> 14 & 0xFFF, entries[4, i].eax >> 26) for i in range(3)]
    assert caches == [(0, 3), (3, 3), (0, 0)]
    levels = [entries[0xB, i] for i in range(3)]
    found = [(e.eax, e.ebx, e.ecx, e.edx, e.flags) for e in levels]
    assert found == [(0, 1, 0x100, index, 1), (2, 4, 0x201, index, 1), (0, 0, 2, index, 1)]
    assert (0x1F, 0) not in entries
    assert entries[0xA, 0].eax == 0
    assert entries[0x8000_0008, 0].ecx == 0x2003
    assert (entries[0x8000_001E, 0].eax, entries[0x8000_001E, 0].ebx) == (index, index)
    assert entries[0x4000_0000, 0].ebx == 0x4B4D564B


def test_a_single_vcpu_has_no_neighbours() -> None:
    supported = fake.FakeKvm().supported_cpuid()
    one = next(e for e in cpuid_for(supported, Place(0, 1, False)) if e.function == 1)
    assert (one.edx >> 28 & 1, one.ecx >> 24 & 1) == (0, 0)


# Exits


def test_output_string_io_and_statistics() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.in_(LSR)
        assert vcpu.io_data()[0] & 0x60 == 0x60
        yield vcpu.out(SERIAL, b"hello\n")
        yield vcpu.out(0xE9, b"!")
        yield end(vcpu, 7)

    setup = Setup(script)
    result = setup.run()
    assert (result.outcome.kind, result.outcome.status) == (OutcomeKind.EXIT, 7)
    assert (setup.printed, setup.debugged) == (b"hello\n", b"!")
    assert result.stats.reasons[abi.KVM_EXIT_IO] == 4
    assert result.stats.ports[SERIAL, abi.KVM_EXIT_IO_OUT] == 6
    rows = result.stats.rows()
    assert rows[0] == ("exit", "KVM_EXIT_IO", 4)
    assert ("port", "0x03fd in", 1) in rows
    assert 0 < result.seconds < 5


@pytest.mark.parametrize(
    ("port", "size", "count", "data"),
    [
        (0x2F8, 1, 1, b"\xff"),
        (0x2F8, 4, 2, b"\xff" * 8),
        (0xCFC, 4, 1, b"\xff" * 4),
        (0x604, 2, 1, b"\x01\x00"),
        (0x60, 4, 1, b"\x00\xff\xff\xff"),
        (LSR, 1, 3, b"\x60\x60\x60"),
    ],
)
def test_port_reads(port: int, size: int, count: int, data: bytes) -> None:
    seen = []

    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.in_(port, size, count)
        seen.append(bytes(vcpu.io_data()))
        yield end(vcpu)

    assert Setup(script).run().outcome.status == 0
    assert seen == [data]


def test_mmio_reaches_devices_and_reads_all_ones_elsewhere() -> None:
    seen = []

    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.mmio(0xFED00000, 8)
        seen.append(bytes(vcpu.mmio_data()))
        yield vcpu.mmio(0xFED00000, 4, b"\1\2\3\4")
        yield vcpu.mmio(0xFEB00000, 4, struct.pack("<I", 9))

    result = Setup(script).run()
    assert seen == [b"\xff" * 8]
    assert result.outcome.status == 9
    assert ("mmio", "0xfed00000 read", 1) in result.stats.rows()
    assert ("mmio", "0xfeb00000 write", 1) in result.stats.rows()


def exit_with(reason: int, prepare: Callable[[Any], None] = lambda run: None) -> Script:
    """A script of one exit."""

    def script(vcpu: Any) -> Iterator[int]:
        prepare(vcpu.kvm_run)
        vcpu.regs.rip, vcpu.sregs.cs.selector = 0x1234, 0x10
        yield reason

    return script


def emulation_failure(run: Any) -> None:
    failure = run.emulation_failure
    failure.suberror, failure.ndata, failure.flags = abi.KVM_INTERNAL_ERROR_EMULATION, 3, 1
    failure.insn_size = 3
    failure.insn_bytes[:3] = [0x0F, 0x0B, 0x90]


def bare_emulation_failure(run: Any) -> None:
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_EMULATION


def delivery_failure(run: Any) -> None:
    run.internal.suberror = abi.KVM_INTERNAL_ERROR_DELIVERY_EV


def system_event(kind: int) -> Callable[[Any], None]:
    def prepare(run: Any) -> None:
        run.system_event.type = kind

    return prepare


def entry_failure(run: Any) -> None:
    run.fail_entry.hardware_entry_failure_reason = 0x80000021


INTERNAL = abi.KVM_EXIT_INTERNAL_ERROR
ENDS = [
    (exit_with(abi.KVM_EXIT_SHUTDOWN), OutcomeKind.TRIPLE_FAULT, 122, "CPU 0.*triple fault"),
    (exit_with(INTERNAL, emulation_failure), OutcomeKind.INTERNAL_ERROR, 123, "0f 0b 90, at 0x10"),
    (
        exit_with(INTERNAL, bare_emulation_failure),
        OutcomeKind.INTERNAL_ERROR,
        123,
        "cannot be emulated, at 0x10:0x1234",
    ),
    (exit_with(INTERNAL, delivery_failure), OutcomeKind.INTERNAL_ERROR, 123, "being delivered"),
    (
        exit_with(abi.KVM_EXIT_FAIL_ENTRY, entry_failure),
        OutcomeKind.INTERNAL_ERROR,
        123,
        "80000021",
    ),
    (exit_with(abi.KVM_EXIT_HLT), OutcomeKind.INTERNAL_ERROR, 123, "halted"),
    (exit_with(abi.KVM_EXIT_DEBUG), OutcomeKind.INTERNAL_ERROR, 123, "KVM_EXIT_DEBUG is not"),
    (exit_with(999), OutcomeKind.INTERNAL_ERROR, 123, "exit reason 999"),
    (exit_with(abi.KVM_EXIT_SYSTEM_EVENT, system_event(1)), OutcomeKind.POWER_OFF, 0, "powered"),
    (exit_with(abi.KVM_EXIT_SYSTEM_EVENT, system_event(2)), OutcomeKind.RESET, 0, "reset"),
    (exit_with(abi.KVM_EXIT_SYSTEM_EVENT, system_event(3)), OutcomeKind.GUEST_PANIC, 121, "crash"),
    (exit_with(abi.KVM_EXIT_SYSTEM_EVENT, system_event(9)), OutcomeKind.INTERNAL_ERROR, 123, "9"),
]


@pytest.mark.parametrize(("script", "kind", "status", "message"), ENDS)
def test_exits_that_end_the_run(
    script: Script, kind: OutcomeKind, status: int, message: str
) -> None:
    outcome = Setup(script).run().outcome
    assert (outcome.kind, outcome.status) == (kind, status)
    assert re.search(message, outcome.message)


def test_a_failing_kvm_run_is_an_internal_error() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        raise OSError(14, "Bad address")
        yield

    outcome = Setup(script).run().outcome
    assert outcome.kind is OutcomeKind.INTERNAL_ERROR
    assert outcome.message == "CPU 0: KVM_RUN failed: Bad address"


def test_an_error_of_ours_comes_out_of_run() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        raise ZeroDivisionError("a bug")
        yield

    setup = Setup(script, lambda vcpu: iter(()))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        setup.run()
    assert threads() == set()


# Ends


def threads() -> set[str]:
    names = {thread.name for thread in threading.enumerate()}
    return {name for name in names if "KVM" in name or "anykvm" in name}


def power_off(vcpu: Any) -> Iterator[int]:
    yield vcpu.out(0x604, struct.pack("<H", 5 << 10 | 1 << 13), 2)


def reset(vcpu: Any) -> Iterator[int]:
    yield vcpu.out(0x64, b"\xfe")


def test_power_off_stops_every_vcpu() -> None:
    setup = Setup(power_off, lambda vcpu: iter(()), lambda vcpu: iter(()))
    assert setup.run().outcome.kind is OutcomeKind.POWER_OFF
    assert threads() == set()
    assert all(vcpu.closed for vcpu in setup.kvm.vm.vcpus)


def test_threads_are_named_in_python_and_in_the_kernel() -> None:
    def waiting(vcpu: Any) -> Iterator[int]:
        time.sleep(0.05)
        yield end(vcpu)

    setup = Setup(waiting, lambda vcpu: iter(()))
    setup.run()
    assert [(v.thread_name, v.comm) for v in setup.kvm.vm.vcpus] == [
        ("CPU 0/KVM", "CPU 0/KVM"),
        ("CPU 1/KVM", "CPU 1/KVM"),
    ]


@pytest.mark.parametrize(("flag", "kind"), [(0, "reset"), (0x1234, "guest panic")])
@pytest.mark.parametrize("script", [reset, exit_with(abi.KVM_EXIT_SHUTDOWN)])
def test_a_warm_reboot_is_the_end_of_a_panic(script: Script, flag: int, kind: str) -> None:
    setup = Setup(script)
    setup.machine.memory.write(0x472, struct.pack("<H", flag))
    found = setup.run().outcome.kind.value
    assert found == ("triple fault" if script is not reset and not flag else kind)


def test_timeout() -> None:
    outcome = Setup().run(timeout=0.05).outcome
    assert (outcome.kind, outcome.status) == (OutcomeKind.TIMEOUT, 124)
    assert "0.05 s" in outcome.message


def test_stop_from_another_thread() -> None:
    setup = Setup()
    timer = threading.Timer(0.05, setup.machine.stop)
    timer.start()
    outcome = setup.run().outcome
    timer.join()
    assert (outcome.kind, outcome.status) == (OutcomeKind.STOPPED, 130)


def test_the_first_reason_to_end_wins() -> None:
    setup = Setup(power_off)
    setup.machine.stop("first")
    assert setup.run().outcome.message == "first"


def test_a_vcpu_that_does_not_stop_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()

    def stuck(vcpu: Any) -> Iterator[int]:
        release.wait(5)
        yield end(vcpu)

    monkeypatch.setattr("anykvm.vmm.machine.STOP_TIMEOUT", 0.05)
    setup = Setup(stuck)
    with pytest.raises(MachineError, match="CPU 0/KVM did not leave KVM_RUN"):
        setup.run(timeout=0.05)
    release.set()


def test_outside_of_the_main_thread_the_kick_signal_must_be_ready() -> None:
    before = signal.signal(KICK_SIGNAL, signal.SIG_DFL)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            Setup().run(timeout=0.05)
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    signal.signal(KICK_SIGNAL, before)
    assert "install_kick_signal()" in str(raised[0])


# Input, interrupts, timers


def test_input_arrives_with_its_interrupt_and_waits_for_room() -> None:
    received = bytearray()
    text = bytes(range(256)) * 8

    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.out(0x3FA, b"\x81")
        yield vcpu.out(0x3F9, b"\x01")
        yield vcpu.out(0x3FC, b"\x0b")
        while len(received) < len(text):
            yield vcpu.in_(LSR)
            if vcpu.io_data()[0] & 1:
                yield vcpu.in_(SERIAL)
                received.append(vcpu.io_data()[0])
            else:
                time.sleep(0.0005)
        yield end(vcpu)

    setup = Setup(script)
    setup.machine.send(text)
    assert setup.run().outcome.kind is OutcomeKind.EXIT
    assert bytes(received) == text
    assert (4, 1) in setup.kvm.vm.lines
    assert (4, 0) in setup.kvm.vm.lines


def test_a_few_characters_interrupt_by_timeout() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.out(0x3FA, b"\x81")
        yield vcpu.out(0x3F9, b"\x01")
        yield vcpu.out(0x3FC, b"\x0b")
        deadline = time.monotonic() + 3
        while (4, 1) not in setup.kvm.vm.lines and time.monotonic() < deadline:
            yield abi.KVM_EXIT_INTR
        yield vcpu.in_(0x3FA)
        yield end(vcpu, vcpu.io_data()[0])

    setup = Setup(script)
    setup.machine.send(b"hi")
    assert setup.run().outcome.status == 0xCC


def test_a_sender_waits_until_the_guest_reads_and_is_let_go_at_the_end() -> None:
    setup = Setup()
    setup.machine.send(bytes(5000))
    done = threading.Event()

    def send() -> None:
        setup.machine.send(b"more")
        done.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert not done.wait(0.05)
    setup.run(timeout=0.05)
    assert done.wait(2)
    sender.join()


def test_clock_interrupts_come_from_the_io_thread() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        for register, value in ((0x0A, 0x26), (0x0B, 0x42)):
            yield vcpu.out(0x70, bytes((register,)))
            yield vcpu.out(0x71, bytes((value,)))
        deadline = time.monotonic() + 3
        while (8, 1) not in setup.kvm.vm.lines and time.monotonic() < deadline:
            time.sleep(0.001)
        yield end(vcpu)

    setup = Setup(script)
    setup.run()
    assert setup.kvm.vm.lines[0] == (8, 1)


def test_power_button_raises_the_sci() -> None:
    def script(vcpu: Any) -> Iterator[int]:
        yield vcpu.out(0x602, b"\x00\x01", 2)
        setup.machine.press_power_button()
        yield vcpu.in_(0x600, 2)
        yield end(vcpu, vcpu.io_data()[1])

    setup = Setup(script)
    assert setup.run().outcome.status == 1
    assert setup.kvm.vm.lines == [(9, 1)]
