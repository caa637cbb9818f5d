"""Stop a running Linux, save it and continue it elsewhere, many times: `tools/statecheck.py`.

    statecheck.py [--cycles 100] [--processes 10] [--seed N] [--longest SECONDS]

A guest with two processors is suspended at random moments, a quarter of them while it boots, and
goes on in a new VM, in this process and every now and then in another. It checks itself
(tests/guests/statecheck.s), and every part that is written must read back the same. Prints a line a
cycle; the exit status is 1 at the first loss.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.state.cycles import Cycles, guest

ROUNDS_AFTER = 20


def cycles(one: Cycles, options: argparse.Namespace, folder: Path) -> None:
    through = set(random.Random(options.seed).sample(range(options.cycles), options.processes))
    for number in range(options.cycles):
        if number == options.cycles // 4:
            one.run_to_round(4)
        began = time.monotonic()
        one.cycle(0.001, options.longest)
        if number in through:
            one.cycle_through_process(0.01, options.longest, folder / "state")
        took = time.monotonic() - began
        where = "and in a process of its own" if number in through else ""
        print(f"cycle {number + 1}: round {one.console.round}, {took:.2f} s {where}", flush=True)
    one.run_to_round(one.console.round + ROUNDS_AFTER)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=100)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--longest", type=float, default=0.3, help="seconds between two stops")
    parser.add_argument("--backend", default="soft")
    parser.add_argument("--append", default="", help="for the kernel, such as no-kvmclock")
    options = parser.parse_args()
    options.processes = min(options.processes, options.cycles)
    print(f"seed {options.seed}")
    with (
        tempfile.TemporaryDirectory() as name,
        guest(Path(name), options.seed, options.backend, options.append) as one,
    ):
        try:
            cycles(one, options, Path(name))
        except AssertionError:
            traceback.print_exc(file=sys.stdout)
            return 1
    print(f"{options.cycles} cycles, nothing lost")
    return 0


if __name__ == "__main__":
    sys.exit(main())
