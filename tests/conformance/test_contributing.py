"""CONTRIBUTING.md on "one row, one handler, one test", done with an ioctl that Linux has not."""

from __future__ import annotations

import importlib.util
import sys
from ctypes import Structure, addressof, c_uint32
from errno import EFAULT, ENOTTY, ENXIO
from pathlib import Path
from types import ModuleType

import pytest

import anykvm.x86  # noqa: F401  (enters the rows)
from anykvm.kvm import tables
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import IOCTLS, InOut
from anykvm.uapi import kvm as uapi
from anykvm.uapi.ioctl import Ioctl
from anykvm.x86.kvm_host import KvmX86
from anykvm.x86.tables import vm_ioctls

from .machine import BAD, Machine, fails, ioctl
from .test_coverage import named, untested

ROOT = Path(__file__).resolve().parents[2]


class kvm_sum(Structure):
    """The argument of the ioctl that is not there."""

    _fields_ = [("a", c_uint32), ("b", c_uint32), ("sum", c_uint32)]


KVM_SUM = 3 << 30 | 12 << 16 | 0xAE << 8 | 0xFD  # _IOWR(KVMIO, 0xfd, struct kvm_sum)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The number, as the generated header would have it, and the row on its handler."""
    monkeypatch.setitem(IOCTLS, "KVM_SUM", Ioctl("KVM_SUM", KVM_SUM, kvm_sum))
    monkeypatch.setattr(vm_ioctls, "rows", dict(vm_ioctls.rows))

    @vm_ioctls.row(
        "KVM_SUM",
        InOut(kvm_sum),
        uapi.KVM_CAP_USER_MEMORY,
        errors={ENXIO: "the sum is too large"},
    )
    def kvm_vm_ioctl_sum(kvm: KvmX86, args: kvm_sum) -> None:
        """Add two numbers that are small."""
        if args.a + args.b > 99:
            raise fail(ENXIO, f"{args.a} + {args.b} is above 99")
        args.sum = args.a + args.b


def gen_api_docs() -> ModuleType:
    """tools/gen_api_docs.py."""
    spec = importlib.util.spec_from_file_location("gen_api_docs", ROOT / "tools/gen_api_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_its_row_the_number_is_unknown() -> None:
    with Machine("soft") as machine:
        fails(ENOTTY, machine.vm, KVM_SUM)


@pytest.mark.usefixtures("row")
def test_a_row_and_a_handler_are_an_ioctl() -> None:
    with Machine("soft") as machine:
        value = kvm_sum(a=40, b=2)
        assert ioctl(machine.vm, KVM_SUM, addressof(value)) == 0
        assert value.sum == 42
        fails(EFAULT, machine.vm, KVM_SUM, BAD)
        fails(ENXIO, machine.vm, KVM_SUM, kvm_sum(a=99, b=1))


@pytest.mark.usefixtures("row")
def test_a_row_without_a_test_is_missed() -> None:
    rows = [(kind, each.name) for kind, each in tables.rows()]
    assert "KVM_SUM" in untested(rows, named())
    assert "KVM_SUM" not in untested(rows, {*named(), "KVM_SUM"})


@pytest.mark.usefixtures("row")
def test_a_row_is_its_section_in_the_documentation() -> None:
    docs = gen_api_docs()
    text = docs.text(docs.Sources(differences=[]))
    assert (
        f"""\
### KVM_SUM (VM)

Add two numbers that are small.

- number: `{KVM_SUM:#010x}`
- capability: `KVM_CAP_USER_MEMORY`
- parameter: struct kvm_sum, in and out
- returns: 0
- errors:
  - EFAULT: the argument does not point to memory that can be read or written as needed
  - ENXIO: the sum is too large
"""
        in text
    )
