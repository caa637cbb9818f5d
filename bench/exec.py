"""What `anykvm exec` costs: a KVM ioctl, an exit to the client and back, and the boot of Debian.

    exec.py [--calls N] [--rounds N] [--machine pc|q35|microvm] [--cpu MODEL] [--memory MIB]
            [--json]

The client that times its calls is compiled where there is a C compiler (exec_client.c); else it is
the tests' Python one, whose own time counts too. The boots, of one kernel with one initrd and one
command line, are taken in turns: QEMU with -accel kvm under `anykvm exec`, and `anykvm boot`; both
have booted once before, so that their translations are there. Both guests have one processor, that
of `anykvm boot`: QEMU is told its family and model, for `-cpu host` alone takes them from this
machine and its default is an old family 15, and by these Linux decides which mitigations
(retpolines, page table isolation, …) it goes through. `--cpu host` and `--cpu qemu64` show those.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import qemu

from anykvm.x86.cpuid import FAMILY, MODEL, STEPPING
from boot import START, Guests, anykvm_command, prepare, seconds_to_marker

HERE = Path(__file__).resolve().parent
PYTHON_CLIENT = HERE.parent / "tests" / "proxy" / "client.py"
EXEC = (sys.executable, "-c", START, "exec", "--backend", "soft", "--")
SAME_PROCESSOR = f"host,family={FAMILY},model={MODEL},stepping={STEPPING}"
LIMIT = 120.0
GOALS = {"ioctl": 20.0, "exit": 30.0, "boot": 1.5}
"""Microseconds, microseconds, times `anykvm boot`."""


def run_client(*command: str | Path) -> str:
    done = subprocess.run(
        [*EXEC, *map(str, command)], capture_output=True, text=True, timeout=LIMIT
    )
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def compiled(folder: Path) -> Path | None:
    """The client in C; None where there is no compiler, or not the kernel's headers."""
    compiler = shutil.which("cc")
    program = folder / "client"
    if compiler is None:
        return None
    command = [compiler, "-O2", "-o", str(program), str(HERE / "exec_client.c")]
    return None if subprocess.run(command, capture_output=True).returncode else program


def call_costs(calls: int, folder: Path) -> dict[str, float]:
    """Medians, in microseconds; of the Python client, means."""
    program = compiled(folder)
    if program is None:
        print("no C compiler: timed from Python", file=sys.stderr)
        said = json.loads(run_client(sys.executable, PYTHON_CLIENT, "cost", str(calls)))
        return {"ioctl": said["ioctl"], "exit": said["exit"]}
    times = [int(line) / 1000 for line in run_client(program, str(calls)).split()]
    ioctls, exits = times[:calls], times[calls:]
    return {"ioctl": statistics.median(ioctls), "exit": statistics.median(exits)}


def qemu_command(guests: Guests, machine: str, cpu: str) -> list[str] | None:
    files = ("-kernel", guests.kernel, "-initrd", guests.initrd, "-append", guests.command_line)
    options = (*files, "-serial", "stdio", "-cpu", cpu)
    command = qemu.command(*options, machine=machine, memory=guests.memory, accel="kvm")
    return None if command is None else [*EXEC, *command]


def boot_costs(
    machine: str, cpu: str, rounds: int, memory: int, folder: Path
) -> dict[str, float] | None:
    """Medians, in seconds, and their ratio."""
    guests = prepare(folder, None, memory)
    theirs = qemu_command(guests, machine, cpu)
    if theirs is None:
        print(qemu.ABSENT, file=sys.stderr)
        return None
    commands = {"exec": theirs, "boot": anykvm_command(guests)}
    cache = {"ANYKVM_CACHE": str(folder / "cache")}
    found: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        for name, command in commands.items():
            seconds = seconds_to_marker(command, cache)
            print(f"round {number}: {name} {seconds:.2f} s", file=sys.stderr)
            if number:
                found[name].append(seconds)
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {**medians, "ratio": medians["exec"] / medians["boot"]}


def show(calls: dict[str, float], boots: dict[str, float] | None) -> str:
    rows = [
        ("one ioctl, µs", f"{calls['ioctl']:.1f}", f"{GOALS['ioctl']:.0f}"),
        ("an exit and back, µs", f"{calls['exit']:.1f}", f"{GOALS['exit']:.0f}"),
    ]
    if boots is not None:
        rows += [
            ("anykvm boot, s", f"{boots['boot']:.2f}", ""),
            ("QEMU under anykvm exec, s", f"{boots['exec']:.2f}", ""),
            ("the latter by the former", f"{boots['ratio']:.2f}", f"{GOALS['boot']:.1f}"),
        ]
    return qemu.table(("", "median", "goal"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=3, help="boots; 0 for none (3)")
    parser.add_argument("--machine", default="pc", help="QEMU's (pc)")
    parser.add_argument("--cpu", default=SAME_PROCESSOR, help=f"QEMU's ({SAME_PROCESSOR})")
    parser.add_argument("--memory", type=int, default=512, help="MiB (512)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anykvm-bench.") as name:
        folder = Path(name)
        calls = call_costs(options.calls, folder)
        boots = None
        if options.rounds:
            boots = boot_costs(options.machine, options.cpu, options.rounds, options.memory, folder)
    print(json.dumps({**calls, "boot": boots}) if options.json else show(calls, boots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
