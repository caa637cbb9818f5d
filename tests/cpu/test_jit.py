"""The cache of compiled code on disk: whatever happens to it costs time and nothing else."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import pytest

from anykvm.cpu.jit import MAGIC

# In processes of their own: several engines in one cannot be torn down in any order.
PROGRAM = """
import ctypes, json, sys
from pathlib import Path
from anykvm.cpu.ir import Function
from anykvm.cpu.jit import Jit, callable_at

def make(names):
    functions = []
    for name in names:
        f = Function(name, "i64", (("a", "i64"),))
        f.ret(f.args[0] * int(name[1:]))
        functions.append(f)
    return functions

folder, *batches = sys.argv[1:]
jit = Jit(Path(folder) if folder else None)
results = {}
for batch in batches:
    names = batch.split(",")
    for name, address in zip(names, jit.addresses(names, make)):
        results[name] = callable_at(address, ctypes.c_uint64, ctypes.c_uint64)(10)
print(json.dumps({"compiled": jit.compiled, "loaded": jit.loaded, "results": results}))
"""


class Outcome(TypedDict):
    """What one process did."""

    compiled: int
    loaded: int
    results: dict[str, int]


def _start(folder: Path | str, *batches: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(folder), *batches],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen[str]) -> Outcome:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    outcome: Outcome = json.loads(out)
    for name, value in outcome["results"].items():
        assert value == 10 * int(name[1:])
    return outcome


def _run(folder: Path | str, *batches: str) -> tuple[int, int]:
    outcome = _finish(_start(folder, *batches))
    return outcome["compiled"], outcome["loaded"]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.batch"))


def test_what_one_process_compiles_the_next_one_loads(tmp_path: Path) -> None:
    assert _run(tmp_path, "f1,f2", "f3") == (3, 0)
    assert len(_files(tmp_path)) == 2
    assert _run(tmp_path, "f1", "f2,f3,f4") == (1, 3)
    assert _run("", "f1") == (1, 0)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _replace(path: Path) -> None:
    path.write_bytes(b"\x7fELF is not what was kept here\n" * 9)


def _sign_nonsense(path: Path) -> None:
    """The digest is right, the content is not."""
    rest = b"neither names nor code"
    path.write_bytes(MAGIC + hashlib.sha256(rest).hexdigest().encode() + b"\n" + rest)


def _make_unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (_truncate, _empty, _flip_a_bit, _replace, _sign_nonsense, _make_unreadable)


@pytest.mark.parametrize("damage", DAMAGES, ids=[d.__name__.strip("_") for d in DAMAGES])
def test_a_damaged_file_is_compiled_anew(tmp_path: Path, damage: object) -> None:
    _run(tmp_path, "f1,f2", "f3")
    with_two = next(p for p in _files(tmp_path) if b'"f2"' in p.read_bytes())
    assert callable(damage)
    damage(with_two)
    assert _run(tmp_path, "f1,f2", "f3") == (2, 1)
    if damage is not _make_unreadable:
        assert _run(tmp_path, "f1,f2", "f3") == (0, 3)


def test_a_file_that_vanishes_after_it_was_listed(tmp_path: Path) -> None:
    """Someone clears the cache while a process runs: deleted files cost a compilation."""
    _run(tmp_path, "f1")
    program = PROGRAM.replace(
        "results = {}", "results = {}\n[p.unlink() for p in Path(folder).rglob('*.batch')]"
    )
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path), "f1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert json.loads(process.stdout)["compiled"] == 1


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    """Not a folder, or one that no file can be created in: everything works without the cache."""
    (tmp_path / "file").write_text("")
    assert _run(tmp_path / "file" / "cache", "f1") == (1, 0)
    assert _run("/proc/self/cache", "f1,f2") == (2, 0)


def test_another_version_of_the_sources_has_a_folder_of_its_own(tmp_path: Path) -> None:
    _run(tmp_path, "f1")
    (version,) = (tmp_path / "code").iterdir()
    version.rename(version.with_name("0" * 20))
    assert _run(tmp_path, "f1") == (1, 0)


def test_processes_share_a_folder(tmp_path: Path) -> None:
    """At the same time, the same and different functions."""
    running = [_start(tmp_path, "f1,f2", f"f{n}") for n in (3, 4, 3)]
    outcomes = [_finish(process) for process in running]
    assert all(set(o["results"]) >= {"f1", "f2"} for o in outcomes)
    assert _run(tmp_path, "f1,f2", "f3", "f4")[0] == 0
    for path in _files(tmp_path):
        assert path.read_bytes().startswith(MAGIC)
    assert not list(tmp_path.rglob("tmp*"))
