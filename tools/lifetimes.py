"""Make and destroy many VMs, and run many at once.

    lifetimes.py [--vms 10000] [--at-once 20]

A VM has interrupt controllers, a timer, memory, statistics descriptors and a vCPU that runs; its
descriptors are closed in a different order each time. The exit status is 1 if descriptors, threads
or memory are left over.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.fuzz.fuzzer import resources
from tests.fuzz.lifetimes import all_at_once, lives


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vms", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=20)
    options = parser.parse_args()
    started = time.monotonic()

    def progress(number: int) -> None:
        if number % 1000 == 0:
            seconds = time.monotonic() - started
            print(f"{number:7,} lives {seconds:5.0f} s {resources()[2] // 1024} MiB", flush=True)

    wrong = list(lives(options.vms, progress))
    before = resources()[:2]
    with all_at_once(options.at_once) as running:
        while not all(life.count > 100 for life in running):
            time.sleep(0.01)
    if resources()[:2] != before:
        wrong.append(f"{options.at_once} at once: {before} became {resources()[:2]}")
    for text in wrong:
        print(text)
    print(f"{options.vms:,} VMs in a row and {options.at_once} at once, {len(wrong)} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
