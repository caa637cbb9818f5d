"""Numbers of the ABI as their names, for traces, messages and tables: the generated header's, and
what came later.
"""

from __future__ import annotations

from anykvm.uapi import kvm, later
from anykvm.uapi.ioctl import Ioctl

IOCTLS: dict[str, Ioctl] = kvm.IOCTLS | later.IOCTLS
EXIT_REASONS: dict[int, str] = kvm.EXIT_REASONS | later.EXIT_REASONS
CAPABILITIES: dict[int, str] = kvm.CAPABILITIES | later.CAPABILITIES


def _by_number() -> dict[int, str]:
    names: dict[int, str] = {}
    for row in IOCTLS.values():
        names.setdefault(row.number, row.name)
    return names


_IOCTL_NAMES = _by_number()


def ioctl_name(number: int) -> str:
    """`KVM_RUN` for 0xae80; the number in hex where it is none of KVM's."""
    return _IOCTL_NAMES.get(number & 0xFFFFFFFF, f"{number:#x}")


def exit_name(reason: int) -> str:
    """`KVM_EXIT_IO` for 2; the number where there is no such reason."""
    return EXIT_REASONS.get(reason, str(reason))


def capability_name(cap: int) -> str:
    """`KVM_CAP_IRQCHIP` for 0; the number where there is no such capability."""
    return CAPABILITIES.get(cap, str(cap))
