"""Cases of a machine's life in QEMU: stopped, saved, restored, moved, reset, and two at a time."""

from __future__ import annotations

import shlex
import time

from . import qemu
from .linux import COMMAND_LINE, PROMPT
from .process import Console
from .qemu import Machine
from .qmp import Qmp
from .workshop import Workshop, check, say

COUNTER = "n=0; while :; do n=$((n+1)); echo count $n; usleep 50000; done"


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
    disk = qemu.virtio_disk(machine.machine, workshop.qcow2(), "qcow2")
    with workshop.boot_linux(machine, *disk, *qemu.monitor(socket)) as console:
        qmp = Qmp(socket, 60)
        try:
            console.expect(PROMPT)
            stop_and_cont(console, qmp)
            save_and_load(console, qmp)
            qmp.command("quit")
        finally:
            qmp.close()


def migrated(workshop: Workshop, machine: Machine) -> None:
    """A guest that counts is written into a file while it runs, and goes on in another QEMU."""
    socket, state = workshop.socket("qmp"), workshop.folder / "state"
    with workshop.boot_linux(machine, *qemu.monitor(socket)) as console:
        qmp = Qmp(socket, 60)
        try:
            console.expect(PROMPT)
            say(console, "place=here")
            console.send(COUNTER + "\n")
            console.expect("count 3\r\n")
            qmp.command("migrate", uri=f"exec:cat >{state}")
            _await_migration(qmp)
            check(qmp.status() == "postmigrate", qmp.status())
        finally:
            qmp.close()
        console.silent(0.5)
        reached = int(console.output.rsplit(b"count ", 2)[1].split()[0])
    with workshop.boot_linux(machine, "-incoming", f"exec:cat {state}") as console:
        console.expect(f"count {reached + 5}\r\n")
        console.send("\x03")
        console.expect(PROMPT)
        check(say(console, "echo $place") == "here", "the shell has lost its variable")
        found = say(console, "nproc")
        check(found == str(machine.cpus), f"nproc: {found}")


def _await_migration(qmp: Qmp) -> None:
    deadline = time.monotonic() + 60
    while (status := qmp.command("query-migrate")["status"]) != "completed":
        check(status in ("setup", "active", "device"), f"migration: {status}")
        check(time.monotonic() < deadline, f"migration is still {status}")
        time.sleep(0.1)


def reset(workshop: Workshop, machine: Machine) -> None:
    """By the monitor while all processors run, and by the guest's kernel."""
    socket = workshop.socket("qmp")
    options = ("-action", "reboot=reset", *qemu.monitor(socket))
    with workshop.boot_linux(machine, *options) as console:
        qmp = Qmp(socket, 60)
        try:
            console.expect(PROMPT)
            say(console, "place=lost")
            qmp.command("system_reset")
            qmp.wait_for("RESET")
            console.expect(PROMPT)
            found = say(console, "echo $(nproc) $place")
            check(found == str(machine.cpus), f"after the reset: {found!r}")
        finally:
            qmp.close()
        console.send("reboot -f\n")
        console.expect(PROMPT)


def pair(workshop: Workshop) -> None:
    """Two QEMUs of one shell under one `anykvm exec`."""
    line = f'{COMMAND_LINE} rdinit=/bin/busybox -- sh -c "busybox uname -a; busybox poweroff -f"'
    files = ("-kernel", workshop.linux.kernel, "-initrd", workshop.linux.initrd, "-append", line)
    serials = [workshop.folder / name for name in ("first", "second")]
    commands = []
    for machine, serial in zip((Machine(), Machine("q35", "split", 2)), serials, strict=True):
        command = machine.command((*files, "-serial", f"file:{serial}"), workshop.accel)
        commands.append(shlex.join(command))
    script = f"{commands[0]} & a=$!; {commands[1]} & b=$!; wait $a && wait $b"
    with Console((*qemu.WRAPPERS[workshop.accel], "sh", "-c", script), workshop.limit) as console:
        check(console.ended() == 0, console.report("a QEMU's status is not 0"))
    for serial in serials:
        check("Linux" in serial.read_text(), f"{serial.name}: {serial.read_text()[-500:]}")
