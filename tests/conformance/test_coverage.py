"""Every row of the ioctl tables has a test, and every ioctl of the header is accounted for."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import anykvm.x86  # noqa: F401  (enters the rows)
from anykvm.kvm import tables
from anykvm.kvm.ioctl import IoctlTable, Value
from anykvm.uapi.kvm import ABSENT_ON_X86, IOCTLS

from .framework import REGISTRY


def named() -> set[str]:
    """What the tests of this folder name."""
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        importlib.import_module(f".{path.stem}", __package__)
    return {name for made in REGISTRY.by_test.values() for name in made.ioctls}


def untested(rows: list[tuple[str, str]], names: set[str]) -> list[str]:
    """The rows (kind, ioctl) that no test names; where there are several, one must say which."""
    kinds = Counter(name for _, name in rows)
    missing = [row for row in rows if ":".join(row) not in names]
    return [
        f"{kind}:{name}" if kinds[name] > 1 else name
        for kind, name in missing
        if kinds[name] > 1 or name not in names
    ]


def test_every_row_has_a_conformance_test() -> None:
    missing = untested([(kind, row.name) for kind, row in tables.rows()], named())
    assert not missing, f"no test in tests/conformance says @conforms of: {', '.join(missing)}"


def test_tests_name_ioctls_that_there_are() -> None:
    known = {row.name for _, row in tables.rows()}
    known |= {f"{kind}:{row.name}" for kind, row in tables.rows()}
    assert named() <= known


def test_every_ioctl_of_the_header_is_a_row_or_marked_absent() -> None:
    rows = {row.name for _, row in tables.rows()}
    absent = {row.name for _, row in tables.absent()}
    assert {*IOCTLS, *ABSENT_ON_X86} - rows - absent == set()


def test_nothing_is_both_there_and_absent_on_a_descriptor() -> None:
    rows = {(kind, row.name) for kind, row in tables.rows()}
    assert not rows & {(kind, row.name) for kind, row in tables.absent()}


def test_every_absence_has_a_reason() -> None:
    assert all(row.why and row.errno for _, row in tables.absent())


def test_a_new_row_without_a_test_is_found() -> None:
    table: IoctlTable[object] = IoctlTable("kvm_arch_vm_ioctl")
    table.row("KVM_S390_ENABLE_SIE", Value())(lambda vm, value: 0)
    rows = [("VM", row.name) for row in table]
    assert untested(rows, named()) == ["KVM_S390_ENABLE_SIE"]
    twice = [*rows, ("vCPU", "KVM_S390_ENABLE_SIE")]
    assert untested(twice, {"vCPU:KVM_S390_ENABLE_SIE"}) == ["VM:KVM_S390_ENABLE_SIE"]
