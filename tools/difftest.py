"""Compares the software processor with the host's for a while: `tools/difftest.py --seconds 600`.

Runs the integer cases of tests/cpu with new values in every round; a round is a seed.
Differences are printed with all that is needed to see them again, and end the run with status 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cpu import flow_cases, integer_cases
from tests.cpu.differential import compare

Round = Callable[[int, int], list[str]]


def computation(family: str) -> Round:
    def compare_round(each: int, seed: int) -> list[str]:
        made = integer_cases.cases(list(integer_cases.FAMILIES[family]()), each, seed)
        line_of = {id(case): line for line, case in made}
        return compare(
            [case for _, case in made],
            lambda case, result: integer_cases.undefined_flags(line_of[id(case)], case, result),
            lambda case: line_of[id(case)].text,
        )

    return compare_round


def flow(family: str) -> Round:
    def compare_round(each: int, seed: int) -> list[str]:
        made = list(flow_cases.FAMILIES[family](each, seed))
        name_of = {id(case): name for name, case in made}
        return compare([case for _, case in made], name=lambda case: name_of[id(case)])

    return compare_round


ROUNDS: dict[str, Round] = {
    **{name: computation(name) for name in integer_cases.FAMILIES},
    **{name: flow(name) for name in flow_cases.FAMILIES},
}


def rounds(
    names: list[str], each: int, seed: int, seconds: float
) -> Iterator[tuple[str, int, list[str]]]:
    end = time.monotonic() + seconds
    while True:
        for name in names:
            yield name, seed, ROUNDS[name](each, seed)
            if time.monotonic() > end:
                return
        seed += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="the software processor against the host's")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--each", type=int, default=8, help="cases of each instruction a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("families", nargs="*", help=f"of {' '.join(ROUNDS)}; default all")
    arguments = parser.parse_args()
    unknown = set(arguments.families) - set(ROUNDS)
    if unknown:
        parser.error(f"expected families of {' '.join(ROUNDS)}, got {' '.join(sorted(unknown))}")
    names = arguments.families or list(ROUNDS)
    failed = 0
    for name, seed, wrong in rounds(names, arguments.each, arguments.seed, arguments.seconds):
        print(f"{name} seed {seed}: {len(wrong)} differences", flush=True)
        for line in wrong[:20]:
            print("  " + line, flush=True)
        failed += len(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
