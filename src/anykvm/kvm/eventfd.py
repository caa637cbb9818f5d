"""irqfd and ioeventfd: eventfds that raise interrupts, and writes of the guest that signal
eventfds.

virt/kvm/eventfd.c; api.rst 4.59 (KVM_IOEVENTFD) and 4.75 (KVM_IRQFD).
"""

from __future__ import annotations

import contextlib
import os
import threading
from dataclasses import dataclass
from errno import EBUSY, EEXIST, EINVAL, ENOENT
from typing import TYPE_CHECKING

from anykvm.fs.task import current
from anykvm.kvm.errors import fail
from anykvm.kvm.iodev import KvmBus, KvmIoDevice
from anykvm.kvm.irqchip import (
    KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID,
    KVM_USERSPACE_IRQ_SOURCE_ID,
    kvm_set_irq,
)
from anykvm.uapi.kvm import (
    KVM_IOEVENTFD_FLAG_DATAMATCH,
    KVM_IOEVENTFD_FLAG_DEASSIGN,
    KVM_IOEVENTFD_FLAG_PIO,
    KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY,
    KVM_IOEVENTFD_VALID_FLAG_MASK,
    KVM_IRQFD_FLAG_DEASSIGN,
    KVM_IRQFD_FLAG_RESAMPLE,
    kvm_ioeventfd,
    kvm_irqfd,
)

if TYPE_CHECKING:
    from anykvm.kvm.kvm_main import Kvm, KvmVcpu


class EventfdCtx:
    """struct eventfd_ctx: an eventfd held by a duplicate, and recognised whichever descriptor names
    it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = current().dup_fd(fd)  # EBADF for no descriptor at all
        try:
            self.id = self._identify(self.fd)
        except OSError:
            os.close(self.fd)
            raise

    @staticmethod
    def _identify(fd: int) -> int:
        with open(f"/proc/self/fdinfo/{fd}") as info:
            for line in info:
                if line.startswith("eventfd-id:"):
                    return int(line.split()[1])
        raise fail(EINVAL, f"descriptor {fd} is no eventfd")

    def signal(self) -> None:
        os.eventfd_write(self.fd, 1)

    def consume(self) -> None:
        """Take the count, without waiting where someone else was faster."""
        with contextlib.suppress(BlockingIOError):
            os.preadv(self.fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def put(self) -> None:
        os.close(self.fd)


@dataclass(eq=False)
class Irqfd:
    """struct kvm_kernel_irqfd: one eventfd that raises one GSI; with `resample`, a level one."""

    kvm: Kvm
    gsi: int
    eventfd: EventfdCtx
    resample: EventfdCtx | None

    def wakeup(self) -> None:
        """The eventfd was signalled: a level stays raised until the guest ends it, an edge is a
        pulse.
        """
        self.eventfd.consume()
        if self.resample is not None:
            kvm_set_irq(self.kvm, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID, self.gsi, 1)
            return
        kvm_set_irq(self.kvm, KVM_USERSPACE_IRQ_SOURCE_ID, self.gsi, 1)
        kvm_set_irq(self.kvm, KVM_USERSPACE_IRQ_SOURCE_ID, self.gsi, 0)

    def resampler_ack(self) -> None:
        """The guest ended the interrupt: lower the line, and let its source raise it again."""
        kvm_set_irq(self.kvm, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID, self.gsi, 0)
        if self.resample is not None:
            self.resample.signal()

    def put(self) -> None:
        self.eventfd.put()
        if self.resample is not None:
            self.resample.put()


@dataclass(eq=False)
class Ioeventfd(KvmIoDevice):
    """struct _ioeventfd: signals its eventfd for a write of this length (0: any) and value (None:
    any).
    """

    addr: int
    length: int
    eventfd: EventfdCtx
    datamatch: int | None
    bus: KvmBus

    def collides(self, other: Ioeventfd) -> bool:
        same_place = self.bus == other.bus and self.addr == other.addr
        any_length = not self.length or not other.length
        any_value = self.datamatch is None or other.datamatch is None
        same_length = any_length or self.length == other.length
        return same_place and same_length and (any_value or self.datamatch == other.datamatch)

    def write(self, vcpu: KvmVcpu, addr: int, data: bytes) -> bool:
        if addr != self.addr or (self.length and len(data) != self.length):
            return False
        if self.datamatch is not None and int.from_bytes(data, "little") != self.datamatch:
            return False
        self.eventfd.signal()
        return True

    def destructor(self) -> None:
        self.eventfd.put()


class KvmEventfds:
    """The irqfds and ioeventfds of one VM."""

    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm
        self._lock = threading.Lock()
        self._irqfds: list[Irqfd] = []
        self._ioeventfds: list[Ioeventfd] = []

    def irqfd(self, args: kvm_irqfd) -> None:
        """KVM_IRQFD."""
        if args.flags & ~(KVM_IRQFD_FLAG_DEASSIGN | KVM_IRQFD_FLAG_RESAMPLE):
            raise fail(EINVAL, f"unknown flags {args.flags:#x}")
        if args.flags & KVM_IRQFD_FLAG_DEASSIGN:
            self._irqfd_deassign(args)
        else:
            self._irqfd_assign(args)

    def _irqfd_assign(self, args: kvm_irqfd) -> None:
        resample = bool(args.flags & KVM_IRQFD_FLAG_RESAMPLE)
        if not self._kvm.kvm_arch_irqfd_allowed(resample):
            raise fail(EINVAL, "no in-kernel interrupt controller, or none that resamples")
        eventfd = EventfdCtx(_signed(args.fd))
        try:
            resampler = EventfdCtx(_signed(args.resamplefd)) if resample else None
        except OSError:
            eventfd.put()
            raise
        irqfd = Irqfd(self._kvm, args.gsi, eventfd, resampler)
        with self._lock:
            if any(other.eventfd.id == eventfd.id for other in self._irqfds):
                irqfd.put()
                raise fail(EBUSY, "the eventfd is an irqfd already")
            self._irqfds.append(irqfd)
            if resampler is not None:
                notifiers = self._kvm.irq_ack_notifiers.setdefault(args.gsi, [])
                notifiers.append(irqfd.resampler_ack)
        # Already signalled counts: epoll reports a readable descriptor at once.
        self._kvm.worker.listen(eventfd.fd, irqfd.wakeup)

    def _irqfd_deassign(self, args: kvm_irqfd) -> None:
        eventfd = EventfdCtx(_signed(args.fd))
        try:
            with self._lock:
                for irqfd in list(self._irqfds):
                    if irqfd.eventfd.id == eventfd.id and irqfd.gsi == args.gsi:
                        self._shutdown(irqfd)
        finally:
            eventfd.put()

    def _shutdown(self, irqfd: Irqfd) -> None:
        self._irqfds.remove(irqfd)
        self._kvm.worker.ignore(irqfd.eventfd.fd)
        if irqfd.resample is not None:
            self._kvm.irq_ack_notifiers[irqfd.gsi].remove(irqfd.resampler_ack)
            kvm_set_irq(self._kvm, KVM_IRQFD_RESAMPLE_IRQ_SOURCE_ID, irqfd.gsi, 0)
        irqfd.put()

    def resample(self, gsi: int) -> bool:
        """Ask those who resample a GSI to look at their line again; whether there is anyone."""
        resamplers = [i.resample for i in self._irqfds if i.gsi == gsi and i.resample is not None]
        for resampler in resamplers:
            resampler.signal()
        return bool(resamplers)

    def ioeventfd(self, args: kvm_ioeventfd) -> None:
        """KVM_IOEVENTFD."""
        _check_ioeventfd(args)
        eventfd = EventfdCtx(args.fd)
        match = args.datamatch if args.flags & KVM_IOEVENTFD_FLAG_DATAMATCH else None
        wanted = Ioeventfd(args.addr, args.len, eventfd, match, _bus_of(args.flags))
        try:
            with self._kvm.slots_lock:
                if args.flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
                    self._ioeventfd_deassign(wanted)
                else:
                    self._ioeventfd_assign(wanted)
        except OSError:
            eventfd.put()
            raise
        if args.flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
            eventfd.put()

    def _ioeventfd_assign(self, new: Ioeventfd) -> None:
        if any(new.collides(other) for other in self._ioeventfds):
            raise fail(EEXIST, f"there is an ioeventfd at {new.addr:#x} that collides")
        self._kvm.buses[new.bus].register_dev(new.addr, new.length, new)
        self._ioeventfds.append(new)

    def _ioeventfd_deassign(self, wanted: Ioeventfd) -> None:
        key = (wanted.bus, wanted.addr, wanted.length, wanted.datamatch, wanted.eventfd.id)
        for p in self._ioeventfds:
            if (p.bus, p.addr, p.length, p.datamatch, p.eventfd.id) == key:
                self._ioeventfds.remove(p)
                self._kvm.buses[p.bus].unregister_dev(p)
                return
        raise fail(ENOENT, f"there is no such ioeventfd at {wanted.addr:#x}")

    def release(self) -> None:
        """The VM goes: `kvm_irqfd_release`; ioeventfds leave with their buses."""
        with self._lock:
            for irqfd in list(self._irqfds):
                self._shutdown(irqfd)
        self._ioeventfds.clear()


def _signed(fd: int) -> int:
    return fd - (1 << 32) if fd >> 31 else fd


def _bus_of(flags: int) -> KvmBus:
    if flags & KVM_IOEVENTFD_FLAG_PIO:
        return KvmBus.PIO_BUS
    if flags & KVM_IOEVENTFD_FLAG_VIRTIO_CCW_NOTIFY:
        return KvmBus.VIRTIO_CCW_NOTIFY_BUS
    return KvmBus.MMIO_BUS


def _check_ioeventfd(args: kvm_ioeventfd) -> None:
    if args.flags & KVM_IOEVENTFD_FLAG_DEASSIGN:
        return  # whatever was not allowed is not there
    rules = (
        (args.len not in (0, 1, 2, 4, 8), f"length {args.len}"),
        (args.addr + args.len > 1 << 64, f"{args.addr:#x} wraps around"),
        (args.flags & ~KVM_IOEVENTFD_VALID_FLAG_MASK, f"unknown flags {args.flags:#x}"),
        (not args.len and args.flags & KVM_IOEVENTFD_FLAG_DATAMATCH, "a match needs a length"),
    )
    for wrong, text in rules:
        if wrong:
            raise fail(EINVAL, f"KVM_IOEVENTFD: {text}")
