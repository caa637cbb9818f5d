"""Kick a vCPU of a client of `anykvm exec` again and again, and count the kicks that are lost.

    kicks.py [--kicks 1000000] [--round 10000]

A kick is what VMMs do: immediate_exit is set and the vCPU's thread gets a signal, whose handler
has SA_RESTART in every other round; KVM_RUN then has to end. The guest spins, and a kick takes some
2 ms. After each round comes a second of a guest that exits all the time, under a rain of signals:
no exit may be lost or come twice. Prints a line a round; the exit status is 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CLIENT = Path(__file__).resolve().parent.parent / "tests/proxy/client.py"
ANYKVM = (sys.executable, "-c", "from anykvm.cli.main import main; main()")
EXEC = (*ANYKVM, "exec", "--backend", "soft", "--")
SECONDS = 0.1  # for a kick, at most


def client(*arguments: str, limit: float) -> dict[str, Any]:
    """What a scenario says."""
    done = subprocess.run(
        [*EXEC, sys.executable, str(CLIENT), *arguments],
        stdout=subprocess.PIPE,
        timeout=limit,
        check=True,
    )
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kicks", type=int, default=1_000_000)
    parser.add_argument("--round", type=int, default=10_000, help="kicks of one client")
    options = parser.parse_args()
    kicked = exits = interrupted = stale = lost = 0
    for number in range(-(-options.kicks // options.round)):
        count = min(options.round, options.kicks - kicked)
        said = client("kicks", str(number % 2), str(count), limit=60 + count * SECONDS)
        kicked += count
        lost += len(said["late"]) + len(said["errors"])
        rain = client("nothing_lost", "1", limit=60)
        exits, interrupted = exits + rain["exits"], interrupted + rain["interrupted"]
        lost, stale = lost + len(rain["wrong"]), stale + rain["stale"]
        print(
            f"{kicked:9,} kicks, {exits:9,} exits with {interrupted:7,} interruptions,"
            f" {stale} of them before we had the call: {lost} lost",
            flush=True,
        )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
