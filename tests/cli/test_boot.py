"""`anykvm boot` around the machine: what it asks of it, prints, and exits with.

The machine is a stand-in here; the rest is real: apt's child processes (a script that serves a
package made on the spot), the initramfs, the checks of the kernel file, the terminal.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from anykvm.cli import boot as command
from anykvm.cli import guest, main
from anykvm.cli.errors import CommandError
from anykvm.uapi import kvm as abi
from anykvm.vmm import boot
from anykvm.vmm.machine import MachineError, RunResult
from anykvm.vmm.outcome import Outcome, OutcomeKind, ended, exited
from anykvm.vmm.stats import ExitStats

from ..vmm.packages import RELEASE, Repository, deb, debian

MIB = 1 << 20


def bzimage() -> bytes:
    """A file that passes for a small 64-bit kernel."""
    header = bytearray(4096)
    header[0x1F1] = 7
    struct.pack_into("<I", header, 0x1F4, 16)
    struct.pack_into("<H", header, 0x1FE, 0xAA55)
    header[0x200:0x202] = b"\xeb\x66"
    header[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", header, 0x206, 0x20F)
    struct.pack_into("<I", header, 0x22C, 0x7FFFFFFF)
    struct.pack_into("<I", header, 0x230, 2 * MIB)
    struct.pack_into("<H", header, 0x236, 1)
    struct.pack_into("<I", header, 0x238, 2047)
    struct.pack_into("<Q", header, 0x258, 16 * MIB)
    struct.pack_into("<I", header, 0x260, 4 * MIB)
    return bytes(header) + bytes(256)


class StandIn:
    """In place of a machine: prints, then ends as told."""

    def __init__(self, outcome: Outcome | BaseException, prints: bytes = b"") -> None:
        self.outcome = outcome
        self.prints = prints
        self.prepared: boot.Boot
        self.write: Callable[[bytes], None]
        self.timeout: float | None = None
        self.closed = False
        self.vm = SimpleNamespace(fd=sys.__stdin__.fileno())

    def build(self, prepared: boot.Boot, console_output: Callable[[bytes], None]) -> StandIn:
        self.prepared, self.write = prepared, console_output
        return self

    def run(self, timeout: float | None) -> RunResult:
        self.timeout = timeout
        self.write(self.prints)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        stats = ExitStats()
        stats.reasons[abi.KVM_EXIT_IO] = 1234567
        stats.ports[0x3F8, abi.KVM_EXIT_IO_OUT] = 7
        return RunResult(self.outcome, stats, 1.5)

    def send(self, data: bytes) -> None:
        """Typed input, which this guest does not read."""

    def stop(self) -> None:
        raise AssertionError("nobody asked to leave")

    def __enter__(self) -> StandIn:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed = True


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    made = debian(tmp_path / "repository")
    made.add(f"linux-image-{RELEASE}", "6.1.9-1", deb({f"boot/vmlinuz-{RELEASE}": bzimage()}))
    monkeypatch.setenv("PATH", made.search_path())
    monkeypatch.setenv("ANYKVM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ANYKVM_BACKEND", raising=False)
    return made


@pytest.fixture
def stand_in(repository, monkeypatch):
    def install(outcome: Outcome | BaseException, prints: bytes = b"") -> StandIn:
        made = StandIn(outcome, prints)
        monkeypatch.setattr(boot.Boot, "machine", lambda self, write: made.build(self, write))
        return made

    return install


SOFT = ["boot", "--backend", "soft"]


def test_the_commands_output_and_status_are_the_guests(stand_in, capfd):
    machine = stand_in(exited(7), b"6.1\n")
    assert main.run([*SOFT, "--exec", "uname -r; exit 7"]) == 7
    out, err = capfd.readouterr()
    assert out == "6.1\n"
    assert all("Ctrl-A" not in line for line in err.splitlines())
    assert machine.closed
    assert b"uname -r; exit 7" in machine.prepared.initrd
    assert b"translate_newlines=no" in machine.prepared.initrd


def test_what_reaches_the_machine(stand_in):
    machine = stand_in(exited(0))
    arguments = ["--memory", "1G", "--cpus", "3", "--timeout", "2.5", "--append", "a=b c"]
    assert main.run([*SOFT, *arguments, "--exec", "true"]) == 0
    options = machine.prepared.options
    assert (options.memory, options.cpus, options.backend) == (1 << 30, 3, "soft")
    assert options.command_line.endswith(" a=b c")
    assert options.kernel.name == f"vmlinuz-{RELEASE}"
    assert machine.timeout == 2.5


def test_interactive_says_which_kvm_and_how_to_leave(stand_in, capfd):
    machine = stand_in(ended(OutcomeKind.POWER_OFF, "the guest powered off"), b"/ # ")
    assert main.run(SOFT) == 0
    out, err = capfd.readouterr()
    assert out == "/ # "
    assert err.endswith(
        "anykvm: KVM: soft (backend='soft' was asked for); 1 CPU, 512 MiB; Ctrl-A X leaves\n"
    )
    assert b"anykvm/command\0" not in machine.prepared.initrd


@pytest.mark.parametrize(
    ("kind", "with_command", "status", "said"),
    [
        (OutcomeKind.POWER_OFF, False, 0, ""),
        (OutcomeKind.RESET, False, 0, "anykvm: how it ended\n"),
        (OutcomeKind.POWER_OFF, True, 121, "anykvm: how it ended before its command had ended\n"),
        (OutcomeKind.RESET, True, 121, "anykvm: how it ended before its command had ended\n"),
        (OutcomeKind.GUEST_PANIC, True, 121, "anykvm: how it ended\n"),
        (OutcomeKind.TRIPLE_FAULT, True, 122, "anykvm: how it ended\n"),
        (OutcomeKind.INTERNAL_ERROR, True, 123, "anykvm: how it ended\n"),
        (OutcomeKind.TIMEOUT, False, 124, "anykvm: how it ended\n"),
        (OutcomeKind.STOPPED, False, 130, "anykvm: how it ended\n"),
    ],
)
def test_every_other_end(capsys, kind, with_command, status, said):
    assert guest.conclude(ended(kind, "how it ended"), with_command) == status
    assert capsys.readouterr().err == said


def test_ctrl_c(stand_in, capfd):
    machine = stand_in(KeyboardInterrupt())
    assert main.run([*SOFT, "--exec", "sleep 9"]) == 130
    assert machine.closed
    assert capfd.readouterr().err.endswith("anykvm: interrupted\n")


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (MachineError("300 CPUs: expected 1 to 255"), 2, "300 CPUs: expected 1 to 255"),
        (OSError(19, "No such device", "/dev/kvm"), 120, "cannot use KVM: [Errno 19]"),
    ],
)
def test_a_machine_that_cannot_be_built(repository, monkeypatch, capfd, error, status, said):
    def fail(self: boot.Boot, write: Callable[[bytes], None]) -> StandIn:
        raise error

    monkeypatch.setattr(boot.Boot, "machine", fail)
    assert main.run([*SOFT, "--exec", "true"]) == status
    assert said in capfd.readouterr().err


def test_statistics(stand_in, capfd):
    stand_in(exited(0))
    assert main.run([*SOFT, "--stats", "--exec", "true"]) == 0
    lines = [line.split() for line in capfd.readouterr().err.splitlines()]
    assert ["exit", "KVM_EXIT_IO", "1,234,567"] in lines
    assert ["port", "0x03f8", "out", "7"] in lines


def test_statistics_for_programs(stand_in, capfd):
    stand_in(exited(3))
    assert main.run([*SOFT, "--exec", "true"]) == 3
    capfd.readouterr()
    assert main.run([*SOFT, "--json", "--exec", "true"]) == 3
    record = json.loads(capfd.readouterr().err)
    assert record["exit"] == {"KVM_EXIT_IO": 1234567}
    assert (record["outcome"], record["status"], record["seconds"]) == ("exit", 3, 1.5)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * MIB), ("2G", 2 << 30), ("96", 96 * MIB), ("1t", 1 << 40), ("64k", 64 << 10)],
)
def test_memory_sizes(text, size):
    assert command.memory_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "1Q", "-1M", "1.5G", "0x10M", "one"])
def test_bad_memory_sizes(text):
    with pytest.raises(CommandError, match="expected a size such as 512M"):
        command.memory_size(text)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--cpus", "0"], "--cpus 0: expected 1 or more"),
        (["--timeout", "0"], "--timeout 0: expected seconds above 0"),
        (["--timeout", "nan"], "--timeout nan: expected seconds above 0"),
        (["--memory", "16M"], "16 MiB of memory is too little"),
        (["--kernel", "/nowhere"], "cannot read the kernel /nowhere: No such file"),
        (["--initrd", "/nowhere"], "cannot read the initrd /nowhere: No such file"),
        (["--kernel", __file__], "not a bzImage"),
        (["--exec", "true", "--initrd", __file__], "it excludes --initrd"),
        (["--append", "x" * 3000], "the command line has"),
    ],
)
def test_bad_input_is_one_line_and_status_2(repository, capfd, arguments, complaint):
    assert main.run([*SOFT, *arguments]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("anykvm: ")
    assert complaint in last


def test_a_bad_variable(repository, monkeypatch, capfd):
    monkeypatch.setenv("ANYKVM_BACKEND", "vax")
    assert main.run(["boot"]) == 2
    assert "ANYKVM_BACKEND is 'vax'" in capfd.readouterr().err


def test_a_missing_file_is_noticed_before_anything_is_fetched(repository):
    assert main.run([*SOFT, "--kernel", "/nowhere"]) == 2
    assert repository.calls() == []


def test_own_kernel_and_initrd_need_no_apt(stand_in, repository, tmp_path):
    (tmp_path / "kernel").write_bytes(bzimage())
    (tmp_path / "initrd").write_bytes(b"070701")
    machine = stand_in(ended(OutcomeKind.POWER_OFF, "off"))
    files = ["--kernel", str(tmp_path / "kernel"), "--initrd", str(tmp_path / "initrd")]
    assert main.run([*SOFT, *files]) == 0
    assert machine.prepared.initrd == b"070701"
    assert repository.calls() == []


def test_without_apt(repository, monkeypatch, capfd):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main.run([*SOFT, "--exec", "true"]) == 120
    assert "Pass --kernel FILE and --initrd FILE instead" in capfd.readouterr().err


def test_the_first_run_says_what_it_fetches(stand_in, capfd, tmp_path):
    stand_in(exited(0))
    assert main.run([*SOFT, "--exec", "true"]) == 0
    err = capfd.readouterr().err.splitlines()
    assert f"anykvm: downloading linux-image-{RELEASE} 6.1.9-1" in err
    assert f"anykvm: kept in {tmp_path}/cache/images; remove that folder to fetch newer ones" in err
    assert main.run([*SOFT, "--exec", "true"]) == 0
    assert capfd.readouterr().err == ""


INTERACTIVE = textwrap.dedent("""
    import sys, threading
    from anykvm.cli import guest, main
    from anykvm.vmm import boot
    from anykvm.vmm.machine import RunResult
    from anykvm.vmm.outcome import OutcomeKind, ended
    from anykvm.vmm.stats import ExitStats

    class Guest:
        def __init__(self, write):
            self.write, self.left = write, threading.Event()
        def run(self, timeout):
            self.write(b"/ # ")
            while not self.left.wait(0.05):
                continue
            return RunResult(ended(OutcomeKind.STOPPED, "stopped"), ExitStats(), 0.0)
        def send(self, data):
            self.write(b"<" + data + b">")
        def stop(self):
            self.left.set()
        def __enter__(self):
            return self
        def __exit__(self, *_):
            pass

    boot.Boot.machine = lambda self, write: Guest(write)
    sys.exit(main.run(["boot", "--backend", "soft"]))
""")


def read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    deadline = time.monotonic() + 30
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        seen += os.read(descriptor, 1024)
    return seen


@pytest.mark.parametrize(
    ("leave", "status", "said"),
    [
        (lambda process, terminal: os.write(terminal, b"\x01x"), 130, b"anykvm: stopped"),
        (lambda process, terminal: process.send_signal(signal.SIGTERM), 143, b""),
        (lambda process, terminal: process.send_signal(signal.SIGINT), 130, b"interrupted"),
    ],
)
def test_a_real_terminal(repository, tmp_path: Path, leave, status, said):
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    (tmp_path / "program.py").write_text(INTERACTIVE)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    read_until(ours, b"/ # ")
    os.write(ours, b"\x03ls\r")
    read_until(ours, b"<\x03ls\r>")
    leave(process, ours)
    assert process.wait(30) == status
    assert termios.tcgetattr(theirs) == before
    os.set_blocking(ours, False)
    assert said in os.read(ours, 4096)
    os.close(ours)
    os.close(theirs)
