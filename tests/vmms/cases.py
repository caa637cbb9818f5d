"""What each VMM has to show under `anykvm exec`: a table of cases, run by tools/vmms.py, some of
them by tests/proxy/test_qemu.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from itertools import product

from anykvm.vmm.images import cache_folder

from . import devices, life, qemu
from .disk import BOOT_ADDRESS, FIRST_INSTRUCTIONS, READ_DONE, TEXT
from .gdb import Gdb
from .linux import PROMPT
from .msb import make_root, msb
from .process import EXEC, Console
from .qemu import Machine
from .workshop import Case, Workshop, check, load, say


def seabios(workshop: Workshop, machine: Machine) -> None:
    """The BIOS boots from a disk, whose boot sector reads the disk once more."""
    with workshop.start(machine, *qemu.boot_disk(machine.machine, workshop.disk)) as console:
        console.expect(TEXT)


def linux(workshop: Workshop, machine: Machine) -> None:
    """Debian's kernel to a shell, all vCPUs, a disk, and power-off."""
    disk = qemu.virtio_disk(machine.machine, workshop.disk)
    with workshop.boot_linux(machine, *disk) as console:
        console.expect(PROMPT)
        found = say(console, "uname -r; nproc").split()
        check(found == [workshop.linux.release, str(machine.cpus)], f"uname, nproc: {found}")
        load(console, "disk")
        read = say(console, "dd if=/dev/vda bs=512 skip=1 count=1 2>/dev/null | head -1")
        check(TEXT in read, f"/dev/vda: {read!r}")
        say(console, "yes $(seq 100) | head -2000 | md5sum")
        console.send("poweroff -f\n")
        if machine.machine == "microvm":
            console.expect("Power down")  # it has no ACPI port to be switched off by
        else:
            check(console.ended() == 0, console.report("QEMU's status is not 0"))


def sandboxed(workshop: Workshop) -> None:
    """QEMU's own seccomp filter besides ours."""
    disk = qemu.ide_disk(workshop.disk)
    with workshop.start(Machine(), *disk, "-sandbox", "on") as console:
        console.expect(TEXT)


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


def debugged(workshop: Workshop, machine: Machine) -> None:
    """Breakpoints of both kinds, single steps, registers and memory, in a boot sector."""
    socket = workshop.socket("gdb")
    options = (*qemu.boot_disk(machine.machine, workshop.disk), *qemu.debugger(socket), "-S")
    with workshop.start(machine, *options) as console:
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


def _on(
    machines: Iterable[Machine], **functions: Callable[[Workshop, Machine], None]
) -> list[Case]:
    """A case for each function on each machine."""
    return [
        Case(f"{name}-{machine.name}", functools.partial(function, machine=machine))
        for machine, (name, function) in product(machines, functions.items())
    ]


ALL = [Machine(*row) for row in product(qemu.MACHINES, qemu.IRQCHIPS, (1, 2))]
SOME = (Machine(), Machine("q35", "split", 2), Machine("pc", "off"))

CASES = [
    *_on((m for m in ALL if not m.hangs_in_qemu), seabios=seabios, linux=linux),
    *_on(SOME, monitor=life.monitored),
    *_on((Machine(), Machine("q35", "split", 2), Machine("microvm")), debugger=debugged),
    *_on((Machine("q35", "on", 2),), migrate=life.migrated, reset=life.reset),
    Case("pair", life.pair),
    Case("ide", devices.ide),
    Case("snapshot", devices.snapshot),
    Case("network", devices.network),
    Case("e1000", devices.e1000),
    Case("screen", devices.screen),
    Case("balloon", devices.balloon),
    Case("four-processors", devices.four_processors),
    Case("much-memory", devices.much_memory),
    Case("no-paravirtualization", devices.no_paravirtualization),
    Case("sandbox", sandboxed),
    Case("microsandbox", microsandbox),
]
