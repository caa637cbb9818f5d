"""All ioctl tables by the kind of descriptor that they serve, for documentation and checks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from anykvm.kvm.chardev import kvm_chardev_ops, kvm_dev_ioctls
from anykvm.kvm.ioctl import Absent, IoctlRow, IoctlTable
from anykvm.kvm.kvm_main import arch
from anykvm.kvm.vcpu_ioctl import kvm_vcpu_fops, kvm_vcpu_ioctls
from anykvm.kvm.vm_ioctl import kvm_vm_fops, kvm_vm_ioctls

FOPS = {"system": kvm_chardev_ops, "VM": kvm_vm_fops, "vCPU": kvm_vcpu_fops}


def tables(kind: str) -> tuple[IoctlTable[Any], ...]:
    """The chain of tables of a kind of descriptor: system, VM or vCPU."""
    chains: dict[str, tuple[IoctlTable[Any], ...]] = {
        "system": (kvm_dev_ioctls, arch().dev_ioctls),
        "VM": (kvm_vm_ioctls, arch().vm_ioctls),
        "vCPU": (kvm_vcpu_ioctls, arch().vcpu_ioctls),
    }
    return chains[kind]


def rows() -> Iterator[tuple[str, IoctlRow[Any]]]:
    """Every row, with its kind of descriptor."""
    for kind in FOPS:
        for table in tables(kind):
            for row in table:
                yield kind, row


def absent() -> Iterator[tuple[str, Absent]]:
    """Every row that is marked absent, with its kind of descriptor."""
    for kind in FOPS:
        for table in tables(kind):
            for row in table.absent.values():
                yield kind, row


def unknown(kind: str) -> int:
    """The errno of a number that a kind of descriptor does not know."""
    return tables(kind)[-1].unknown
