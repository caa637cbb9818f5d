"""The ioctl numbers, all of them, as literal numbers."""

from __future__ import annotations

import ctypes
from pathlib import Path

from anykvm.uapi import kvm as abi
from anykvm.uapi.names import capability_name, exit_name, ioctl_name

# Name and number, a line each, as a C program prints them on x86-64.
TABLE = Path(__file__).with_name("ioctls.txt")


def expected() -> dict[str, int]:
    return {name: int(number, 16) for name, number in map(str.split, TABLE.open())}


def test_every_number() -> None:
    assert {row.name: row.number for row in abi.IOCTLS.values()} == expected()


def test_every_number_is_a_constant_of_its_own() -> None:
    for name, number in expected().items():
        assert getattr(abi, name) == number


def test_encoded_size_is_that_of_the_argument() -> None:
    for row in abi.IOCTLS.values():
        assert row.size == (ctypes.sizeof(row.arg) if row.arg else 0), row.name


def test_direction_and_number_of_known_ones() -> None:
    run, regs, msrs = (abi.IOCTLS[f"KVM_{n}"] for n in ("RUN", "GET_REGS", "GET_MSRS"))
    assert (run.direction, run.nr, run.arg) == ("_IO", 0x80, None)
    assert (regs.direction, regs.nr, regs.arg) == ("_IOR", 0x81, abi.kvm_regs)
    assert (msrs.direction, msrs.nr, msrs.size) == ("_IOWR", 0x88, 8)


def test_exit_reasons_are_reasons_only() -> None:
    assert abi.EXIT_REASONS[2] == "KVM_EXIT_IO"
    assert sorted(abi.EXIT_REASONS) == list(range(38))
    assert "KVM_EXIT_IO_OUT" not in abi.EXIT_REASONS.values()


def test_capabilities_by_number() -> None:
    assert abi.CAPABILITIES[abi.KVM_CAP_SPLIT_IRQCHIP] == "KVM_CAP_SPLIT_IRQCHIP"
    assert abi.CAPABILITIES[136] == "KVM_CAP_IMMEDIATE_EXIT"


def test_names_of_numbers() -> None:
    assert ioctl_name(0xAE80) == "KVM_RUN"
    assert ioctl_name(0x5421) == "0x5421"
    assert exit_name(abi.KVM_EXIT_HLT) == "KVM_EXIT_HLT"
    assert capability_name(0) == "KVM_CAP_IRQCHIP"
