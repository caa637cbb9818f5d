"""Every ioctl that is a row: it sends its number with its struct, and gives back what comes."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from anykvm.api import Descriptor, Kvm, Vcpu, Vm
from anykvm.api.descriptor import Call, Exchange, Get, Quad, Row, Set, StructRow, Value


def rows(*kinds: type[Row]) -> list[Any]:
    return [
        pytest.param(owner, name, row, id=f"{owner.__name__}.{name}")
        for owner in (Kvm, Vm, Vcpu)
        for base in reversed(owner.__mro__)
        for name, row in vars(base).items()
        if isinstance(row, kinds)
    ]


@pytest.fixture
def owners(kvm: Kvm, vm: Vm, vcpu: Vcpu) -> dict[type, Descriptor]:
    return {Kvm: kvm, Vm: vm, Vcpu: vcpu}


def pattern(kind: type[ctypes.Structure]) -> ctypes.Structure:
    size = ctypes.sizeof(kind)
    return kind.from_buffer_copy(bytes(i * 7 & 0xFF for i in range(size)))


@pytest.mark.parametrize(("owner", "name", "row"), rows(Get))
def test_get(fake: Any, owners: Any, owner: type, name: str, row: Get[Any]) -> None:
    expected = pattern(row.kind)
    fake.fill(row.cmd, expected)
    result = getattr(owners[owner], name)()
    assert type(result) is row.kind
    assert bytes(result) == bytes(expected)


@pytest.mark.parametrize(("owner", "name", "row"), rows(Set, Exchange))
def test_set(fake: Any, owners: Any, owner: type, name: str, row: StructRow[Any]) -> None:
    value = pattern(row.kind)
    result = getattr(owners[owner], name)(value)
    assert result is value if isinstance(row, Exchange) else result == 0
    assert bytes(fake.last(row.cmd)) == bytes(value)


@pytest.mark.parametrize(("owner", "name", "row"), rows(Set, Exchange))
def test_wrong_struct(owners: Any, owner: type, name: str, row: StructRow[Any]) -> None:
    class Other(ctypes.Structure):
        pass

    with pytest.raises(TypeError, match=f"{name} takes a {row.kind.__name__}, not Other"):
        getattr(owners[owner], name)(Other())


@pytest.mark.parametrize(("owner", "name", "row"), rows(Call))
def test_call(fake: Any, owners: Any, owner: type, name: str, row: Call) -> None:
    fake.answers[row.cmd] = 77
    assert getattr(owners[owner], name)() == 77
    assert fake.last(row.cmd) == 0


@pytest.mark.parametrize(("owner", "name", "row"), rows(Value))
def test_value(fake: Any, owners: Any, owner: type, name: str, row: Value) -> None:
    fake.answers[row.cmd] = 5
    assert getattr(owners[owner], name)(0xFFFF_F000) == 5
    assert fake.last(row.cmd) == 0xFFFF_F000


@pytest.mark.parametrize(("owner", "name", "row"), rows(Quad))
def test_quad(fake: Any, owners: Any, owner: type, name: str, row: Quad) -> None:
    assert getattr(owners[owner], name)(1 << 40) == 0
    assert fake.last(row.cmd).value == 1 << 40
