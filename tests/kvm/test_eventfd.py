"""irqfd, ioeventfd, coalesced MMIO: what they refuse and what they do."""

from __future__ import annotations

import errno
import os
import time
from contextlib import contextmanager

import pytest
from tests.x86.fake_engine import port_out, store
from tests.x86.machine import Machine, machine

from anykvm.cpu.state import Exit
from anykvm.kvm.coalesced_mmio import CoalescedRing
from anykvm.uapi import kvm as uapi


@contextmanager
def eventfd():
    fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def count(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def ioeventfd(m: Machine, fd: int, addr: int, length: int, flags: int = 0, match: int = 0) -> None:
    args = uapi.kvm_ioeventfd(addr=addr, len=length, fd=fd, flags=flags, datamatch=match)
    m.vm.ioctl(uapi.KVM_IOEVENTFD, args)


def irqfd(m: Machine, fd: int, gsi: int, flags: int = 0, resamplefd: int = 0) -> None:
    args = uapi.kvm_irqfd(fd=fd & 0xFFFFFFFF, gsi=gsi, flags=flags, resamplefd=resamplefd)
    m.vm.ioctl(uapi.KVM_IRQFD, args)


MATCH, PIO = uapi.KVM_IOEVENTFD_FLAG_DATAMATCH, uapi.KVM_IOEVENTFD_FLAG_PIO
DEASSIGN = uapi.KVM_IOEVENTFD_FLAG_DEASSIGN


def test_ioeventfd_takes_the_writes_that_match():
    with machine() as m, eventfd() as fd:
        ioeventfd(m, fd, 0xD0000000, 2, MATCH, 1)
        one, two = (n.to_bytes(2, "little") for n in (1, 2))
        vcpu = m.add_vcpu(
            store(0xD0000000, one), store(0xD0000000, two), store(0xD0000000, one), Exit.HLT
        )
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        assert bytes(vcpu.mmio_data()) == two
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        assert count(fd) == 2


def test_ioeventfd_on_a_port_of_any_length():
    with machine() as m, eventfd() as fd:
        ioeventfd(m, fd, 0xC100, 0, PIO)
        script = port_out(0xC100, b"\x01"), port_out(0xC100, b"\x01\x02\x03\x04", size=4)
        assert m.add_vcpu(*script, Exit.HLT).run() == uapi.KVM_EXIT_HLT
        assert count(fd) == 2


def test_ioeventfd_deassign_needs_the_same_one():
    with machine() as m, eventfd() as fd, eventfd() as other:
        ioeventfd(m, fd, 0xC100, 2, PIO | MATCH, 7)
        for wrong in ((other, 0xC100, 2, 7), (fd, 0xC100, 4, 7), (fd, 0xC100, 2, 8)):
            with pytest.raises(OSError, match="no such ioeventfd") as raised:
                ioeventfd(m, *wrong[:3], PIO | MATCH | DEASSIGN, wrong[3])
            assert raised.value.errno == errno.ENOENT
        ioeventfd(m, fd, 0xC100, 2, PIO | MATCH | DEASSIGN, 7)
        vcpu = m.add_vcpu(port_out(0xC100, b"\x07\x00", size=2))
        assert vcpu.run() == uapi.KVM_EXIT_IO
        assert count(fd) == 0


@pytest.mark.parametrize(
    ("addr", "length", "flags", "expected"),
    [
        (0, 3, 0, errno.EINVAL),
        ((1 << 64) - 1, 4, 0, errno.EINVAL),
        (0, 4, 1 << 10, errno.EINVAL),
        (0, 0, MATCH, errno.EINVAL),
    ],
)
def test_ioeventfd_refusals(addr, length, flags, expected):
    with machine() as m, eventfd() as fd:
        with pytest.raises(OSError, match="KVM_IOEVENTFD") as raised:
            ioeventfd(m, fd, addr, length, flags)
        assert raised.value.errno == expected


def test_ioeventfds_may_not_collide():
    with machine() as m, eventfd() as fd:
        ioeventfd(m, fd, 0x100, 4, MATCH, 1)
        ioeventfd(m, fd, 0x100, 4, MATCH, 2)
        for length, flags in ((4, 0), (0, 0), (4, MATCH)):
            with pytest.raises(OSError, match="collides") as raised:
                ioeventfd(m, fd, 0x100, length, flags, 1)
            assert raised.value.errno == errno.EEXIST


def test_a_descriptor_that_is_no_eventfd():
    with machine(irqchip=True) as m, open("/dev/null", "rb") as null:
        for attempt in (lambda fd: irqfd(m, fd, 1), lambda fd: ioeventfd(m, fd, 0, 4)):
            for fd, expected in ((null.fileno(), errno.EINVAL), (99999, errno.EBADF)):
                with pytest.raises(OSError, match=f"Errno {expected}]"):
                    attempt(fd)


def eventually(condition) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    return bool(condition())


def requested(m: Machine) -> int:
    """The master 8259's IRR."""
    return m.vm.get_irqchip(uapi.KVM_IRQCHIP_PIC_MASTER).chip.pic.irr


def test_irqfd_raises_an_edge_and_takes_the_count():
    with machine(irqchip=True) as m, eventfd() as fd:
        irqfd(m, fd, 5)
        os.eventfd_write(fd, 3)
        assert eventually(lambda: requested(m) == 1 << 5)
        assert count(fd) == 0
        irqfd(m, fd, 5, uapi.KVM_IRQFD_FLAG_DEASSIGN)
        os.eventfd_write(fd, 1)
        time.sleep(0.02)
        assert count(fd) == 1


def test_an_eventfd_that_was_signalled_before_counts():
    with machine(irqchip=True) as m, eventfd() as fd:
        os.eventfd_write(fd, 1)
        irqfd(m, fd, 3)
        assert eventually(lambda: requested(m) == 1 << 3)


def test_irqfd_refusals():
    with machine() as m, eventfd() as fd:
        with pytest.raises(OSError, match="controller") as raised:
            irqfd(m, fd, 1)
        assert raised.value.errno == errno.EINVAL
        m.vm.create_irqchip()
        irqfd(m, fd, 1)
        for gsi, flags, expected in ((2, 0, errno.EBUSY), (1, 8, errno.EINVAL)):
            with pytest.raises(OSError, match=f"Errno {expected}]"):
                irqfd(m, fd, gsi, flags)


def test_a_resampling_irqfd_lowers_at_eoi_and_tells():
    """The guest's 8259 runs in auto-EOI mode, so that taking the interrupt ends it."""
    init = [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3), (0x21, 0), (0x4D0, 1 << 5)]
    with machine(irqchip=True) as m, eventfd() as fd, eventfd() as again:
        script = [port_out(port, bytes([value])) for port, value in init]
        vcpu = m.add_vcpu(*script, port_out(0x80, b"\0"), Exit.SHUTDOWN)
        assert vcpu.run() == uapi.KVM_EXIT_IO
        irqfd(m, fd, 5, uapi.KVM_IRQFD_FLAG_RESAMPLE, again)
        os.eventfd_write(fd, 1)
        assert eventually(lambda: requested(m) == 1 << 5)
        assert count(again) == 0
        m.cpu().rflags |= 1 << 9
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN
        assert m.cpu().did("interrupt") == [("interrupt", 0x35)]
        assert (count(again), requested(m)) == (1, 0)


def test_coalesced_writes_wait_in_the_ring():
    with machine() as m:
        m.vm.register_coalesced_mmio(0xB8000, 0x1000)
        m.vm.register_coalesced_mmio(0x3C0, 0x20, pio=True)
        vcpu = m.add_vcpu(
            store(0xB8010, b"\x41\x07"),
            port_out(0x3D4, b"\x0e"),
            store(0xB8FFE, bytes(4)),
            Exit.HLT,
        )
        assert vcpu.run() == uapi.KVM_EXIT_MMIO  # beyond the zone's end
        ring = vcpu._mapping.view(CoalescedRing, 0x2000)
        assert (ring.first, ring.last) == (0, 2)
        first, second = ring.coalesced_mmio[0], ring.coalesced_mmio[1]
        assert (first.phys_addr, first.len, first.pio, bytes(first.data[:2])) == (
            0xB8010,
            2,
            0,
            b"\x41\x07",
        )
        assert (second.phys_addr, second.len, second.pio) == (0x3D4, 1, 1)


def test_a_full_ring_exits():
    with machine() as m:
        m.vm.register_coalesced_mmio(0xB8000, 0x1000)
        vcpu = m.add_vcpu(*[store(0xB8000, b"x")] * uapi.KVM_COALESCED_MMIO_MAX, Exit.HLT)
        assert vcpu.run() == uapi.KVM_EXIT_MMIO
        ring = vcpu._mapping.view(CoalescedRing, 0x2000)
        ring.first = ring.last
        m.vm.unregister_coalesced_mmio(0xB8000, 0x1000)
        assert vcpu.run() == uapi.KVM_EXIT_HLT
