"""How long a boot takes: from starting the program to the first line that `/init` prints.

    boot.py [--rounds N] [--json] [--kernel FILE] [--machine pc|microvm] [--memory MIB]

The same kernel, initrd and command line on anykvm with an empty translation cache (cold), with the
one that this left (warm), and on QEMU's translator; one vCPU each, taken in turns, medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import qemu

from anykvm.vmm import images
from anykvm.vmm.boot import BootOptions
from anykvm.vmm.exit_port import EXIT_PORT
from anykvm.vmm.initramfs import MARKER, Guest, build

LIMIT = 180.0
KEPT_OUTPUT = 2000
START = "from anykvm.cli.main import main; main()"
COLD, WARM, QEMU = "anykvm, cold", "anykvm, warm", "QEMU TCG"


@dataclass(frozen=True)
class Guests:
    """The files to boot and the kernel's command line, the same for all; memory in MiB."""

    kernel: Path
    initrd: Path
    command_line: str
    memory: int


def prepare(folder: Path, kernel: Path | None, memory: int) -> Guests:
    """Debian's kernel and busybox from the cache, where they stay."""
    obtained = images.obtain(lambda what, fraction: None)
    initrd = folder / "initrd"
    initrd.write_bytes(build(obtained.busybox.read_bytes(), Guest(EXIT_PORT)))
    kernel = kernel or obtained.kernel
    return Guests(kernel, initrd, BootOptions(kernel).command_line, memory)


def end(process: subprocess.Popen[bytes]) -> None:
    """Lets it end by itself, which is when anykvm writes its translations down."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def seconds_to_marker(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Runs the program until it prints the marker. SystemExit when it does not."""
    with ExitStack() as stack:
        began = time.monotonic()
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        stack.enter_context(process)
        stack.callback(end, process)
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        seen = b""
        while MARKER.encode() not in seen:
            piece = process.stdout.read()
            if piece == b"" or time.monotonic() - began > LIMIT:
                tail = seen[-KEPT_OUTPUT:].decode(errors="replace")
                raise SystemExit(f"{command[0]} printed no {MARKER!r}:\n{tail}")
            seen += piece or b""
            time.sleep(0 if piece else 0.002)
        return time.monotonic() - began


def anykvm_command(guests: Guests) -> list[str]:
    program = (sys.executable, "-c", START, "boot", "--backend", "soft")
    files = ("--kernel", str(guests.kernel), "--initrd", str(guests.initrd))
    return [*program, *files, "--memory", f"{guests.memory}M"]


def qemu_command(guests: Guests, machine: str) -> list[str] | None:
    files = ("-kernel", guests.kernel, "-initrd", guests.initrd, "-append", guests.command_line)
    return qemu.command(*files, "-serial", "stdio", machine=machine, memory=guests.memory)


def measure(guests: Guests, machine: str, rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of every round, by what was measured."""
    ours, theirs = anykvm_command(guests), qemu_command(guests, machine)
    found: dict[str, list[float]] = {}
    if theirs is None:
        print(qemu.ABSENT, file=sys.stderr)
    for number in range(rounds):
        cache = {"ANYKVM_CACHE": str(folder / f"cache{number}")}
        runs = [(COLD, ours, cache), (WARM, ours, cache)]
        if theirs is not None:
            runs.append((QEMU, theirs, {}))
        for name, command, environment in runs:
            seconds = seconds_to_marker(command, environment)
            found.setdefault(name, []).append(seconds)
            print(f"round {number + 1}: {name} {seconds:.2f} s", file=sys.stderr)
    return found


def summary(found: Mapping[str, list[float]]) -> dict[str, dict[str, float | list[float] | None]]:
    """Median, all rounds, and the ratio to QEMU where that was measured."""
    medians = {name: statistics.median(seconds) for name, seconds in found.items()}
    base = medians.get(QEMU)
    return {
        name: {
            "median_seconds": medians[name],
            "seconds": seconds,
            "times_qemu": medians[name] / base if base else None,
        }
        for name, seconds in found.items()
    }


def show(found: Mapping[str, list[float]]) -> str:
    rows = []
    base = statistics.median(found[QEMU]) if QEMU in found else None
    for name, seconds in found.items():
        median = statistics.median(seconds)
        ratio = f"{median / base:.2f}" if base else "-"
        rows.append((name, f"{median:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", ratio))
    return qemu.table(("power-on to /init", "median s", "min", "max", "x QEMU"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kernel", type=Path)
    parser.add_argument("--machine", default="pc", help="QEMU's (pc)")
    parser.add_argument("--memory", type=int, default=512, help="MiB (512)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="anykvm-bench.") as name:
        folder = Path(name)
        guests = prepare(folder, options.kernel, options.memory)
        found = measure(guests, options.machine, options.rounds, folder)
    print(json.dumps(summary(found), indent=2) if options.json else show(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
