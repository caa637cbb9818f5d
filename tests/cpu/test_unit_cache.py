"""The cache of units: its file, the versions of a unit, and that a page is placed whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from anykvm.api import Kvm
from anykvm.cpu import unit_cache
from anykvm.cpu.forms import Form
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.jit import process_jit
from anykvm.cpu.unit_cache import UnitCache, UnitImage

from .assembler import assemble
from .test_shared_heads import CODE, PROGRAM, Guest

MODE = 1


def image(code: bytes, handler: int = 0) -> UnitImage:
    return UnitImage(code, 1, (handler,), bytes(32), bytes(8), (), ((0, 0),), ())


@pytest.fixture(autouse=True)
def one_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unit_cache, "WORTH_SAVING", 1)


@pytest.fixture
def handlers() -> Handlers:
    """With two forms, none of them compiled."""
    found = Handlers(process_jit())
    assert [found.number(Form(name)) for name in ("poll", "seek")] == [0, 1]
    return found


def saved(handlers: Handlers, folder: Path, units: dict[int, UnitImage]) -> Path:
    cache = UnitCache(handlers, folder)
    for rip, unit in units.items():
        cache.add(rip, MODE, unit)
    cache.save()
    return folder / "units.bin"


def test_what_was_saved_is_there_by_pages(handlers: Handlers, tmp_path: Path) -> None:
    units = {0x1000: image(b"a"), 0x1FFF: image(b"b"), 0x2000: image(b"c")}
    saved(handlers, tmp_path, units)
    cache = UnitCache(handlers, tmp_path)
    assert cache.page(0x1234, MODE) == {0x1000: (units[0x1000],), 0x1FFF: (units[0x1FFF],)}
    assert cache.page(0x2000, MODE) == {0x2000: (units[0x2000],)}
    assert cache.page(0x2000, MODE + 1) == {}


def test_pages_that_were_not_read_stay_in_the_file(handlers: Handlers, tmp_path: Path) -> None:
    saved(handlers, tmp_path, {0x1000: image(b"a")})
    saved(handlers, tmp_path, {0x2000: image(b"b")})
    cache = UnitCache(handlers, tmp_path)
    assert cache.page(0x1000, MODE)
    assert cache.page(0x2000, MODE)


def test_the_newest_version_comes_first_and_the_oldest_goes(handlers: Handlers) -> None:
    cache = UnitCache(handlers, None)
    for n in range(6):
        cache.add(0x1000, MODE, image(bytes([n])))
    assert [unit.code[0] for unit in cache.page(0x1000, MODE)[0x1000]] == [5, 4, 3, 2]


def test_handlers_have_other_numbers_in_another_process(handlers: Handlers, tmp_path: Path) -> None:
    saved(handlers, tmp_path, {0x1000: image(b"a", 0), 0x1001: image(b"b", 1)})
    other = Handlers(process_jit())
    other.number(Form("seek"))
    page = UnitCache(other, tmp_path).page(0x1000, MODE)
    named = {rip: other.forms[unit.handlers[0]].name for rip, (unit,) in page.items()}
    assert named == {0x1000: "poll", 0x1001: "seek"}


@pytest.mark.parametrize("where", ["start", "index", "page", "short", "empty"])
def test_a_damaged_file_is_told_of_and_goes(
    handlers: Handlers, tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(handlers, tmp_path, {0x1000: image(b"a")})
    data = bytearray(path.read_bytes())
    if where == "short":
        data = data[:-1]
    elif where == "empty":
        data = bytearray()
    else:
        data[{"start": 0, "index": 90, "page": len(data) - 1}[where]] ^= 1
    path.write_bytes(data)
    cache = UnitCache(handlers, tmp_path)
    assert cache.page(0x1000, MODE) == {}
    assert "is damaged" in caplog.text
    assert not path.exists()


def test_no_more_units_are_saved_than_the_file_may_have(
    handlers: Handlers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(handlers, tmp_path, {0x1000: image(b"a"), 0x1001: image(b"b")})
    monkeypatch.setattr(unit_cache, "MOST", 2)
    saved(handlers, tmp_path, {0x2000: image(b"c")})
    cache = UnitCache(handlers, tmp_path)
    assert cache.page(0x2000, MODE)  # the last run's
    assert not cache.page(0x1000, MODE)


def test_a_page_is_placed_whole() -> None:
    with Kvm(backend="soft") as kvm:
        first = Guest(kvm)
        assert first.run(CODE) == 1
        assert first.run(CODE + 4) == 0  # HLT: a unit of its own
        first.close()
        guest = Guest(kvm)
        assert guest.run(CODE) == 1
        records = guest.translator().blocks.records
        assert {rip for rip, _, _ in records} >= {CODE, CODE + 4}
        guest.close()


def test_of_a_unit_with_several_versions_the_one_that_is_there_is_taken() -> None:
    here = 0x5678  # where no other test has code

    def versions(translator: Any) -> int:
        (mode,) = {mode for _, _, mode in translator.blocks.records}
        return len(translator.cache.page(here, mode)[here])

    with Kvm(backend="soft") as kvm:
        guest = Guest(kvm)
        for first in ("dec cx", "inc cx") * 3:
            guest.memory.write(here, assemble(PROGRAM.replace("dec cx", first), 16))
            assert guest.run(here) == 1
        assert versions(guest.translator()) == 2
        guest.close()
