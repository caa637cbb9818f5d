"""Debian's QEMU under `anykvm exec`, as far as it takes seconds; where it is installed. All cases:
tools/vmms.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from ..vmms import qemu
from ..vmms.cases import CASES
from ..vmms.workshop import Case, Workshop

FAST = ("seabios-pc-off-1", "seabios-q35-split-2", "seabios-microvm-on-2", "debugger-pc-on-1")
LIMIT = 60.0

if qemu.installed():

    @pytest.mark.parametrize(
        "case", [case for case in CASES if case.name in FAST], ids=lambda case: case.name
    )
    def test_case(case: Case, tmp_path: Path) -> None:
        case.run(Workshop(tmp_path, limit=LIMIT))
