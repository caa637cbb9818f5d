"""Call every ioctl with anything, from several threads, while descriptors close under them.

    fuzz_ioctls.py [--calls 1000000] [--seed TEXT] [--round 50000]

Prints a line a round; in the end how often each ioctl gave what, and all that should not be:
crashes, hangs, exceptions, errnos that the ioctl's row does not state, descriptors, threads or
memory left over. The exit status is 1 if there was any. A seed repeats the calls, though not how
threads interleave.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.fuzz.hostile import Report, hostile_calls


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--round", type=int, default=50_000, help="calls until all is closed")
    parser.add_argument("--seed", default=str(time.time_ns()))
    options = parser.parse_args()
    started, told = time.monotonic(), [0]

    def progress(report: Report) -> None:
        seconds = time.monotonic() - started
        resident, wrong = report.resident[-1] // 1024, len(report.wrong)
        for text in report.wrong[told[0] :]:
            print(text)
        told[0] = wrong
        print(
            f"{report.calls:9,} calls {seconds:6.0f} s {resident:5} MiB {wrong} wrong", flush=True
        )

    print(f"seed {options.seed}")
    report = hostile_calls(options.calls, options.seed, options.round, progress)
    for name, count in sorted(report.outcomes.items()):
        print(f"  {name:48} {count:8,}")
    for text in report.wrong[told[0] :]:
        print(text)
    print(f"{report.calls:,} calls, {len(report.wrong)} wrong")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
