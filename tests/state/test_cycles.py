"""A running Linux is stopped, saved and continued in a new VM, a hundred times in a row.

More of the same, with other seeds and moments: tools/statecheck.py.
"""

from __future__ import annotations

from pathlib import Path

from .cycles import guest

WHILE_IT_BOOTS, AFTERWARDS, THROUGH_A_PROCESS = 20, 80, 1
SHORTEST, LONGEST = 0.001, 0.03


def test_a_hundred_times(tmp_path: Path) -> None:
    with guest(tmp_path, seed=20) as one:
        for _ in range(WHILE_IT_BOOTS):
            one.cycle(SHORTEST, 0.2)
        one.run_to_round(4)
        for _ in range(AFTERWARDS):
            one.cycle(SHORTEST, LONGEST)
        for _ in range(THROUGH_A_PROCESS):
            one.cycle_through_process(SHORTEST, LONGEST, tmp_path / "state")
        one.run_to_round(one.console.round + 8)
