"""GSI routing: what an interrupt line or message of the VMM leads to (`virt/kvm/irqchip.c`; api.rst
4.52).

The table is replaced as a whole; look-ups take no lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from errno import EINVAL
from typing import TYPE_CHECKING

from anykvm.kvm.errors import fail
from anykvm.uapi.kvm import (
    KVM_IRQ_ROUTING_IRQCHIP,
    KVM_IRQ_ROUTING_MSI,
    KVM_MSI_VALID_DEVID,
    KVM_NR_IRQCHIPS,
    kvm_irq_routing_entry,
)

if TYPE_CHECKING:
    from anykvm.kvm.kvm_main import Kvm

KVM_MAX_IRQ_ROUTES = 4096
KVM_USERSPACE_IRQ_SOURCE_ID = 0
KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID = 1
KVM_PIT_IRQ_SOURCE_ID = 2

# (irq_source_id, level) -> delivered: >0 to how many, 0 coalesced, <0 ignored
SetIrq = Callable[["KernelIrqRoutingEntry", int, int], int]


@dataclass(slots=True)
class KernelIrqRoutingEntry:
    """struct kvm_kernel_irq_routing_entry."""

    gsi: int
    type: int
    set: SetIrq
    irqchip: int = -1
    pin: int = -1
    address_lo: int = 0
    address_hi: int = 0
    data: int = 0
    hv_sint: tuple[int, int] = (-1, -1)  # processor and source of Hyper-V's SynIC


class IrqRoutingTable:
    """struct kvm_irq_routing_table."""

    def __init__(self, entries: Iterable[KernelIrqRoutingEntry] = ()) -> None:
        self.by_gsi: dict[int, list[KernelIrqRoutingEntry]] = {}
        self.by_pin: dict[tuple[int, int], int] = {}
        for entry in entries:
            self._add(entry)

    def _add(self, entry: KernelIrqRoutingEntry) -> None:
        """One gsi may lead to a pin of each chip, or to one message alone."""
        others = self.by_gsi.setdefault(entry.gsi, [])
        for other in others:
            same_chip = other.irqchip == entry.irqchip
            if KVM_IRQ_ROUTING_MSI in (other.type, entry.type) or same_chip:
                raise fail(EINVAL, f"gsi {entry.gsi} is routed twice")
        others.append(entry)
        if entry.type == KVM_IRQ_ROUTING_IRQCHIP:
            self.by_pin[entry.irqchip, entry.pin] = entry.gsi


def check_routing_entry(entry: kvm_irq_routing_entry) -> None:
    """What is wrong with an entry on every architecture: EINVAL."""
    if entry.gsi >= KVM_MAX_IRQ_ROUTES:
        raise fail(EINVAL, f"gsi {entry.gsi} is above {KVM_MAX_IRQ_ROUTES - 1}")
    allowed = KVM_MSI_VALID_DEVID if entry.type == KVM_IRQ_ROUTING_MSI else 0
    if entry.flags & ~allowed:
        raise fail(EINVAL, f"gsi {entry.gsi}: unknown flags {entry.flags:#x}")
    if entry.type == KVM_IRQ_ROUTING_IRQCHIP and entry.u.irqchip.irqchip >= KVM_NR_IRQCHIPS:
        raise fail(EINVAL, f"there is no irqchip {entry.u.irqchip.irqchip}")


def kvm_set_irq(kvm: Kvm, source_id: int, irq: int, level: int) -> int:
    """Raise or lower a GSI: how many processors it was delivered to, 0 coalesced, negative if
    nowhere.
    """
    delivered = -1
    for entry in kvm.irq_routing.by_gsi.get(irq, ()):
        result = entry.set(entry, source_id, level)
        if result >= 0:
            delivered = result + max(delivered, 0)
    return delivered


def kvm_notify_acked_irq(kvm: Kvm, irqchip: int, pin: int) -> None:
    """The guest has ended the interrupt of a pin: tell who resamples its line."""
    gsi = kvm.irq_routing.by_pin.get((irqchip, pin))
    if gsi is not None:
        for notify in list(kvm.irq_ack_notifiers.get(gsi, ())):
            notify()
