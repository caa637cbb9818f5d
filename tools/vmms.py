"""Runs other people's VMMs under `anykvm exec` and prints what works.

    vmms.py [--list] [--only REGEX] [--limit SECONDS] [--json] [--accel kvm|tcg]

Needs Debian's qemu-system-x86 and qemu-utils (apt-get install both), and apt for the guest's
kernel; for the case of microsandbox its wheel (pip install microsandbox). It takes half an hour.
With --accel tcg QEMU runs without anykvm, which tells a wrong case from a wrong answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.vmms import qemu
from tests.vmms.cases import CASES
from tests.vmms.workshop import Case, Workshop


class Row(NamedTuple):
    """One case: how long it took, and why it failed, if it did."""

    case: str
    seconds: float
    failure: str | None


def run(case: Case, workshop: Workshop) -> Row:
    began = time.monotonic()
    failure = None
    try:
        case.run(workshop)
    except Exception as error:
        failure = f"{type(error).__name__}: {error}"
    return Row(case.name, time.monotonic() - began, failure)


def rows(cases: Iterable[Case], accel: str, limit: float) -> Iterator[Row]:
    with tempfile.TemporaryDirectory(prefix="vmms.") as name:
        workshop = Workshop(Path(name), accel, limit)
        for case in cases:
            yield run(case, workshop)


def show(row: Row) -> None:
    print(f"{row.case:24} {row.seconds:7.1f}  {'FAILED' if row.failure else 'ok'}", flush=True)
    if row.failure:
        print("    " + row.failure.replace("\n", "\n    "), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="only print the cases' names")
    parser.add_argument("--only", type=re.compile, default="", help="cases whose names match")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for a case (240)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--accel", choices=("kvm", "tcg"), default="kvm")
    options = parser.parse_args()
    cases = [case for case in CASES if re.search(options.only, case.name)]
    if options.list:
        print("\n".join(case.name for case in cases))
        return 0
    if not qemu.installed():
        parser.error(f"{qemu.PROGRAM} is not installed (Debian: apt-get install qemu-system-x86)")
    found = []
    for row in rows(cases, options.accel, options.limit):
        found.append(row)
        if not options.json:
            show(row)
    failed = sum(row.failure is not None for row in found)
    if options.json:
        print(json.dumps([row._asdict() for row in found], indent=2))
    else:
        print(f"{len(found) - failed} of {len(found)} cases work")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
