"""What each VMM has to show under `anykvm exec`: a table of cases, run by tools/vmms.py, some of
them by tests/proxy/test_qemu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from anykvm.vmm.images import cache_folder

from . import qemu
from .disk import BOOT_ADDRESS, FIRST_INSTRUCTIONS, READ_DONE, TEXT, make_qcow2, make_raw
from .gdb import Gdb
from .linux import COMMAND_LINE, PROMPT, Linux, obtain
from .msb import make_root, msb
from .process import EXEC, CaseError, Console
from .qemu import Machine
from .qmp import Qmp

COUNTER = "n=0; while :; do n=$((n+1)); echo count $n; usleep 50000; done"


@dataclass
class Workshop:
    """What cases make use of: a folder of theirs, the accelerator; Linux, obtained when asked."""

    folder: Path
    accel: str = "kvm"
    limit: float = 240.0

    @functools.cached_property
    def linux(self) -> Linux:
        return obtain(self.folder)

    @functools.cached_property
    def disk(self) -> Path:
        return make_raw(self.folder / "disk.raw")

    def socket(self, name: str) -> Path:
        path = self.folder / name
        path.unlink(missing_ok=True)
        return path

    def start(self, machine: Machine, *options: str | Path) -> Console:
        return machine.start(options, self.limit, self.accel)

    def boot_linux(self, machine: Machine, *options: str | Path) -> Console:
        files = ("-kernel", self.linux.kernel, "-initrd", self.linux.initrd)
        return self.start(machine, *files, "-append", COMMAND_LINE, *options)


@dataclass(frozen=True)
class Case:
    """A name and a function that raises CaseError, or OSError, where the VMM fails."""

    name: str
    run: Callable[[Workshop], None]


CASES: list[Case] = []


def case(name: str) -> Callable[[Callable[[Workshop], None]], Callable[[Workshop], None]]:
    def add(function: Callable[[Workshop], None]) -> Callable[[Workshop], None]:
        CASES.append(Case(name, function))
        return function

    return add


def check(holds: bool, complaint: str) -> None:
    if not holds:
        raise CaseError(complaint)


def say(console: Console, line: str) -> str:
    """A line for the guest's shell: what it prints. The shell's echo has the marks in quotes."""
    console.send(f"echo '<''<'; {line}; echo '>''>'\n")
    console.expect("<<")
    printed = console.expect(">>").removesuffix(">>").strip()
    console.expect(PROMPT)
    return printed


def seabios(workshop: Workshop, machine: Machine) -> None:
    """The BIOS boots from a disk, whose boot sector reads the disk once more."""
    disk = qemu.ide_disk(workshop.disk)
    if machine.machine == "microvm":
        disk = [*qemu.virtio_disk("microvm", workshop.disk), "-bios", qemu.SEABIOS]
    with workshop.start(machine, *disk) as console:
        console.expect(TEXT)


def linux(workshop: Workshop, machine: Machine) -> None:
    """Debian's kernel to a shell, all vCPUs, a disk, and power-off."""
    disk = qemu.virtio_disk(machine.machine, workshop.disk)
    with workshop.boot_linux(machine, *disk) as console:
        console.expect(PROMPT)
        found = say(console, "uname -r; nproc").split()
        check(found == [workshop.linux.release, str(machine.cpus)], f"uname, nproc: {found}")
        say(console, "for m in $(cat /modules/order); do insmod $m; done")
        read = say(console, "dd if=/dev/vda bs=512 skip=1 count=1 2>/dev/null | head -1")
        check(TEXT in read, f"/dev/vda: {read!r}")
        say(console, "yes $(seq 100) | head -2000 | md5sum")
        console.send("poweroff -f\n")
        if machine.machine == "microvm":
            console.expect("Power down")  # it has no ACPI port to be switched off by
        else:
            check(console.ended() == 0, console.report("QEMU's status is not 0"))


for _machine, _irqchip, _cpus in product(qemu.MACHINES, qemu.IRQCHIPS, (1, 2)):
    _row = Machine(_machine, _irqchip, _cpus)
    if _row.hangs_in_qemu:
        continue
    for _what in (seabios, linux):
        CASES.append(Case(f"{_what.__name__}-{_row.name}", functools.partial(_what, machine=_row)))


def stop_and_cont(console: Console, qmp: Qmp) -> None:
    """While a guest is stopped it does nothing, and goes on afterwards."""
    console.send(COUNTER + "\n")
    console.expect("count 3\r\n")
    check(qmp.status() == "running", qmp.status())
    qmp.command("stop")
    check(qmp.status() == "paused", qmp.status())
    console.silent(0.5)
    check(console.silent(1.0), "a stopped guest goes on counting")
    registers = qmp.monitor("info registers")
    check("CR3=" in registers and "EFER=" in registers, registers)
    qmp.command("cont")
    check(not console.silent(20), "after cont it counts no more")
    console.send("\x03")
    console.expect(PROMPT)


def save_and_load(console: Console, qmp: Qmp) -> None:
    """A snapshot brings back what the guest had in its memory, and the guest lives."""
    say(console, "place=before")
    said = qmp.monitor("savevm here")
    check(not said.strip(), f"savevm: {said}")
    check(say(console, "echo $place; place=after") == "before", "the variable is lost")
    said = qmp.monitor("loadvm here")
    check(not said.strip(), f"loadvm: {said}")
    check(say(console, "echo $place") == "before", "loadvm did not bring the memory back")
    say(console, "usleep 200000; date")


def monitored(workshop: Workshop, machine: Machine) -> None:
    socket = workshop.socket("qmp")
    image = make_qcow2(workshop.folder / "disk.qcow2", workshop.disk)
    disk = qemu.virtio_disk(machine.machine, image, "qcow2")
    with workshop.boot_linux(machine, *disk, *qemu.monitor(socket)) as console:
        qmp = Qmp(socket, 60)
        try:
            console.expect(PROMPT)
            stop_and_cont(console, qmp)
            save_and_load(console, qmp)
            qmp.command("quit")
        finally:
            qmp.close()


for _row in (Machine(), Machine("q35", "split", 2), Machine("pc", "off")):
    CASES.append(Case(f"monitor-{_row.name}", functools.partial(monitored, machine=_row)))


@case("sandbox")
def sandboxed(workshop: Workshop) -> None:
    """QEMU's own seccomp filter besides ours."""
    disk = qemu.ide_disk(workshop.disk)
    with workshop.start(Machine(), *disk, "-sandbox", "on") as console:
        console.expect(TEXT)


@case("microsandbox")
def microsandbox(workshop: Workshop) -> None:
    """msb, which is libkrun and its kernel: a command in a folder's file system, its status."""
    folder = workshop.folder / "msb"
    make_root(folder / "root")
    options = ("run", "--no-tty", "--no-stdin", "-c", "1", "-m", "256M", folder / "root")
    script = "uname -s; cat /etc/passwd | wc -l; exit 3"
    command = (*EXEC, *map(str, (msb(), *options)), "--", "/bin/sh", "-c", script)
    environment = {"HOME": str(folder), "ANYKVM_CACHE": str(cache_folder())}
    with Console(command, workshop.limit, environment) as console:
        status = console.ended()
        said = console.output.split()
        check((status, said) == (3, [b"Linux", b"1"]), console.report(f"status {status}"))


@case("debugger")
def debugged(workshop: Workshop) -> None:
    """Breakpoints of both kinds, single steps, registers and memory, in a boot sector."""
    socket = workshop.socket("gdb")
    options = (*qemu.ide_disk(workshop.disk), *qemu.debugger(socket), "-S")
    with workshop.start(Machine(), *options) as console:
        gdb = Gdb(socket, 60)
        try:
            check("PacketSize" in gdb.features, gdb.features)
            check(gdb.rip() == 0xFFF0, f"reset at {gdb.rip():#x}")
            gdb.expect_ok(f"Z1,{BOOT_ADDRESS:x},1")
            stops = [gdb.ask("c"), *(gdb.ask("s") for _ in FIRST_INSTRUCTIONS[1:])]
            check(all(stop.startswith("T05") for stop in stops), f"stops: {stops}")
            check(gdb.rip() == FIRST_INSTRUCTIONS[-1], f"stepped to {gdb.rip():#x}")
            gdb.expect_ok(f"z1,{BOOT_ADDRESS:x},1")
            gdb.expect_ok(f"Z0,{READ_DONE:x},1")
            gdb.ask("c")
            check(gdb.rip() == READ_DONE, f"software breakpoint: stopped at {gdb.rip():#x}")
            check(gdb.memory(0x7E00, len(TEXT)) == TEXT.encode(), "memory differs")
            gdb.expect_ok(f"z0,{READ_DONE:x},1")
            gdb.send("c")
            console.expect(TEXT)
            check(gdb.interrupt().startswith("T02"), "no stop on request")
        finally:
            gdb.close()
