"""The translation cache on disk: damaged, shared, or not there, a guest runs all the same."""

from __future__ import annotations

import json
import re
from itertools import cycle
from pathlib import Path
from typing import Any

from .process import Anykvm, Result, finished

DEMO = ("boot", "--demo", "--backend", "soft", "--json")
MAX_WARNINGS = 3


def counters(result: Result) -> dict[str, Any]:
    """What the processor did, of a demo that went well."""
    assert result.status == 0, result.err
    last = result.out.splitlines()[-1]
    found = re.fullmatch(r"2 CPUs counted (\d+) together and (\d+) in all", last)
    assert found is not None
    assert found[1] == found[2]
    record: dict[str, Any] = json.loads(result.err[result.err.index("{") :])
    return record["cpu"]


def warnings(result: Result) -> list[str]:
    """What was said apart from the greeting and the statistics."""
    lines = result.err[: result.err.index("{")].splitlines()
    return [line for line in lines if not line.startswith("anykvm: KVM: soft")]


def files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "code").rglob("*") if path.is_file())


def halve(data: bytes) -> bytes:
    return data[: len(data) // 2]


def empty(_: bytes) -> bytes:
    return b""


def flip(data: bytes) -> bytes:
    at = len(data) - 7
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


def test_damaged(anykvm: Anykvm, own_cache: Path) -> None:
    first = anykvm.run(*DEMO)
    assert counters(first)["handlers_compiled"] > 50
    assert warnings(first) == []
    for path, damage in zip(files(own_cache), cycle((halve, flip, empty)), strict=False):
        path.write_bytes(damage(path.read_bytes()))
    second = anykvm.run(*DEMO)
    assert counters(second)["handlers_compiled"] > 50
    said = warnings(second)
    assert 1 <= len(said) <= MAX_WARNINGS
    assert "is damaged" in said[0]
    third = anykvm.run(*DEMO)
    assert counters(third)["handlers_compiled"] == 0
    assert warnings(third) == []


def test_two_processes_fill_one(anykvm: Anykvm, own_cache: Path) -> None:
    with anykvm.running(*DEMO) as one, anykvm.running(*DEMO) as other:
        results = [finished(one), finished(other)]
    for result in results:
        assert counters(result)["handlers_compiled"] > 0
        assert warnings(result) == []
    assert counters(anykvm.run(*DEMO))["handlers_compiled"] == 0
    assert not [path.name for path in files(own_cache) if path.name.startswith("tmp")]


def test_no_folder_for_it(anykvm: Anykvm, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    anykvm.environment["ANYKVM_CACHE"] = str(file / "cache")
    result = anykvm.run(*DEMO)
    assert counters(result)["handlers_compiled"] > 50
    (warning,) = warnings(result)
    assert warning.startswith(f"anykvm: no translation cache in {file}/cache/code/")
    assert file.read_text() == "in the way"
