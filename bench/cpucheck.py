"""The loops of cpucheck, each a kind of work, on anykvm and on QEMU's translator: rates and ratios.

    cpucheck.py [--only NAME ...] [--rounds N] [--seconds S] [--json]

How often a loop turns is found for each side by itself, so that it runs for S seconds (0.5).
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
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import qemu

from anykvm.vmm.firmware import Firmware, FirmwareOptions
from anykvm.vmm.outcome import OutcomeKind

IMAGE = Path(__file__).resolve().parent.parent / "tests/guests/cpucheck.bin"
NUMBER, COUNT = 0xFF00, 0xFF08  # where the image is told what to run, and how often
BOOTED, START, END = b"RiPL\n", b"S", b"E"
MEMORY = 128  # MiB
LIMIT = 60.0
MOST = 1000  # times as many turns from one trial to the next


@dataclass(frozen=True)
class Loop:
    """A row: the benchmark's number, what one turn counts for, and in which unit."""

    name: str
    number: int
    per_turn: float
    unit: str = "M instr/s"


INSTRUCTIONS, EVENTS = 1e6, 1e3
LOOPS = (
    Loop("dec, jnz", 1, 2),
    Loop("sum of 16 MiB", 2, 8_388_608),
    Loop("store of 16 MiB", 17, 8_388_608),
    Loop("call, ret, branches", 3, 14.5),
    Loop("SSE2", 4, 8),
    Loop("x87", 16, 5),
    Loop("8,192 pages in turn", 15, 32_768),
    Loop("out", 5, 1, "k/s"),
    Loop("in", 6, 1, "k/s"),
    Loop("MMIO read", 7, 1, "k/s"),
    Loop("MMIO write", 8, 1, "k/s"),
    Loop("int n, iretq", 9, 1, "k/s"),
    Loop("syscall, sysret", 10, 1, "k/s"),
    Loop("page fault, iretq", 11, 1, "k/s"),
    Loop("mov cr3, touch", 12, 1, "k/s"),
    Loop("invlpg, touch", 18, 1, "k/s"),
    Loop("patch, call", 13, 1, "k/s"),
    Loop("hlt, interrupt", 19, 1, "k/s"),
)
SCALE = {"M instr/s": INSTRUCTIONS, "k/s": EVENTS}


class Stopwatch:
    """Fed with what the guest prints: takes the time at its START and at its END."""

    def __init__(self) -> None:
        self.seen = b""
        self.start = self.end = 0.0

    def feed(self, data: bytes) -> None:
        now = time.perf_counter()
        self.seen += data
        _, booted, rest = self.seen.partition(BOOTED)
        if booted and START in rest and not self.start:
            self.start = now
        if END in rest and not self.end:
            self.end = now

    @property
    def seconds(self) -> float:
        """Between the two. SystemExit when the guest did not come to its end."""
        if not self.end:
            raise SystemExit(f"the guest did not finish: it printed {self.seen!r}")
        return self.end - self.start


def patched(loop: Loop, turns: int) -> bytes:
    image = bytearray(IMAGE.read_bytes())
    image[NUMBER] = loop.number
    image[COUNT : COUNT + 8] = turns.to_bytes(8, "little")
    return bytes(image)


def on_anykvm(loop: Loop, turns: int) -> float:
    """Seconds for so many turns on the software processor."""
    watch = Stopwatch()
    firmware = Firmware(FirmwareOptions(patched(loop, turns), MEMORY << 20, backend="soft"))
    with firmware.machine(lambda data: None, watch.feed) as machine:
        outcome = machine.run(LIMIT).outcome
    if outcome.kind is not OutcomeKind.EXIT:
        raise SystemExit(f"{loop.name}: {outcome.message}; printed {watch.seen!r}")
    return watch.seconds


def on_qemu(loop: Loop, turns: int) -> float:
    """Seconds for so many turns on TCG."""
    watch = Stopwatch()
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile(prefix="anykvm-bench."))
        file.write(patched(loop, turns))
        file.flush()
        port = ("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
        command = qemu.command("-bios", file.name, "-debugcon", "stdio", *port, memory=MEMORY)
        assert command is not None
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdout is not None
        while piece := os.read(process.stdout.fileno(), 4096):
            watch.feed(piece)
    return watch.seconds


Runner = Callable[[Loop, int], float]


def rate(loop: Loop, run: Runner, seconds: float, rounds: int) -> float:
    """The loop's rate in its unit: the median of `rounds` runs of about `seconds`."""
    turns = 1
    run(loop, turns)  # what is compiled the first time
    while (taken := run(loop, turns)) < seconds / 4:
        turns = max(turns * 2, int(turns * min(MOST, seconds / max(taken, 1e-6))))
    rates = [turns / run(loop, turns) for _ in range(rounds)]
    return statistics.median(rates) * loop.per_turn / SCALE[loop.unit]


def measure(names: list[str], seconds: float, rounds: int) -> list[dict[str, str | float | None]]:
    """A record for each loop: its name, unit, both rates, ours as a multiple of QEMU's."""
    have_qemu = qemu.command(memory=MEMORY) is not None
    if not have_qemu:
        print(qemu.ABSENT, file=sys.stderr)
    records: list[dict[str, str | float | None]] = []
    for loop in LOOPS:
        if names and loop.name not in names:
            continue
        ours = rate(loop, on_anykvm, seconds, rounds)
        theirs = rate(loop, on_qemu, seconds, rounds) if have_qemu else None
        ratio = ours / theirs if theirs else None
        records.append(
            {
                "loop": loop.name,
                "unit": loop.unit,
                "anykvm": ours,
                "qemu_tcg": theirs,
                "times_qemu": ratio,
            }
        )
        print(f"{loop.name}: {ours:,.1f} {loop.unit}", file=sys.stderr)
    return records


def show(records: list[dict[str, str | float | None]]) -> str:
    def cell(value: str | float | None) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        return f"{value:,.2f}" if value >= 0.1 else f"{value:.4f}"

    heads = ("loop", "unit", "anykvm", "QEMU TCG", "x QEMU")
    return qemu.table(heads, [[cell(value) for value in record.values()] for record in records])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], choices=[p.name for p in LOOPS])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    records = measure(options.only, options.seconds, options.rounds)
    print(json.dumps(records, indent=2) if options.json else show(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
