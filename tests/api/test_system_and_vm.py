"""Kvm and Vm: what is more than a row."""

from __future__ import annotations

import ctypes
import errno
import gc
from typing import Any

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, Vm
from anykvm.uapi import kvm as abi


def test_lifetimes(fake: Any) -> None:
    with Kvm("/dev/fake-kvm") as kvm:
        assert kvm.api_version() == 12
        with kvm.create_vm() as vm, vm.create_vcpu(3) as vcpu:
            assert vm.vcpu_mmap_size == 3 * 4096
            assert repr(vcpu) == f"<Vcpu fd {vcpu.fd}>"
            assert vcpu.fileno() == vcpu.fd
    assert fake.released == ["kvm-vcpu:3", "kvm-vm", "kvm"]
    kvm.close()
    assert repr(kvm) == "<Kvm closed>"
    with pytest.raises(ValueError, match="Kvm is closed"):
        kvm.api_version()


def test_from_fd_takes_the_descriptor_over(fake: Any) -> None:
    with Kvm.from_fd(fs.open("/dev/fake-kvm")) as kvm:
        assert kvm.api_version() == 12
    assert fake.released == ["kvm"]


def test_a_vcpu_that_cannot_be_mapped_is_closed_again(fake: Any, kvm: Kvm) -> None:
    vm = kvm.create_vm()
    vm.vcpu_mmap_size = 0
    with pytest.raises(OSError, match="Invalid argument"):
        vm.create_vcpu(1)
    assert fake.released == ["kvm-vcpu:1"]
    vm.close()


@pytest.mark.parametrize("n", [0, 1, 64, 65, 200])
def test_cpuid_with_as_much_room_as_it_takes(fake: Any, kvm: Kvm, n: int) -> None:
    entries = b"".join(bytes(abi.kvm_cpuid_entry2(function=i, eax=i * 3)) for i in range(n))
    fake.answer_list(abi.KVM_GET_SUPPORTED_CPUID, abi.kvm_cpuid2, entries, n)
    result = kvm.supported_cpuid()
    assert [(e.function, e.eax) for e in result] == [(i, i * 3) for i in range(n)]


def test_e2big_without_a_count_doubles_and_ends(fake: Any, kvm: Kvm) -> None:
    fake.fail(abi.KVM_GET_EMULATED_CPUID, errno.E2BIG)
    with pytest.raises(OSError, match="Argument list too long"):
        kvm.emulated_cpuid()
    asked = [c[2].nent for c in fake.calls if c[1] == abi.KVM_GET_EMULATED_CPUID]
    assert asked == [64 << i for i in range(11)]


def test_msr_lists(fake: Any, kvm: Kvm) -> None:
    indices = [0x10, 0xC0000080, *range(100, 170)]
    raw = bytes((ctypes.c_uint32 * len(indices))(*indices))
    for cmd in (abi.KVM_GET_MSR_INDEX_LIST, abi.KVM_GET_MSR_FEATURE_INDEX_LIST):
        fake.answer_list(cmd, abi.kvm_msr_list, raw, len(indices))
    assert kvm.msr_index_list() == indices
    assert kvm.msr_feature_index_list() == indices


def test_feature_msrs_up_to_the_first_unknown(fake: Any, kvm: Kvm) -> None:
    def fill(address: int) -> int:
        entry = abi.kvm_msr_entry(index=0x3A, data=5)
        fs.current().mm.write_object(address + 8, entry)
        return 1

    fake.answers[abi.KVM_GET_MSRS] = fill
    assert kvm.get_msrs([0x3A, 0x9999]) == {0x3A: 5}


def test_mce_cap(fake: Any, kvm: Kvm) -> None:
    def fill(address: int) -> int:
        fs.current().mm.write(address, (0x900_0020).to_bytes(8, "little"))
        return 0

    fake.answers[abi.KVM_X86_GET_MCE_CAP_SUPPORTED] = fill
    assert kvm.mce_cap_supported() == 0x900_0020


def test_device_attributes(fake: Any, kvm: Kvm) -> None:
    assert kvm.has_device_attr(0, abi.KVM_X86_XCOMP_GUEST_SUPP)
    fake.fail(abi.KVM_HAS_DEVICE_ATTR, errno.ENXIO)
    assert not kvm.has_device_attr(0, 9)
    assert fake.last(abi.KVM_HAS_DEVICE_ATTR).attr == 9


def test_memory_slots(fake: Any, vm: Vm) -> None:
    memory = GuestMemory(0x3000, addr=0x10_0000)
    vm.add_memory(2, memory, abi.KVM_MEM_READONLY)
    region = fake.last(abi.KVM_SET_USER_MEMORY_REGION)
    assert (region.slot, region.flags, region.guest_phys_addr) == (2, 2, 0x10_0000)
    assert (region.memory_size, region.userspace_addr) == (0x3000, memory.userspace_addr)
    address = memory.userspace_addr
    del memory
    gc.collect()
    fs.UserMemory().write(address, b"the VM keeps it")
    vm.remove_memory(2)
    assert fake.last(abi.KVM_SET_USER_MEMORY_REGION).memory_size == 0
    assert vm.memory == {}
    gc.collect()
    with pytest.raises(OSError, match="address"):
        fs.UserMemory().read(address, 1)


def test_a_refused_slot_is_not_kept(fake: Any, vm: Vm) -> None:
    fake.fail(abi.KVM_SET_USER_MEMORY_REGION, errno.EEXIST)
    with pytest.raises(FileExistsError):
        vm.add_memory(0, GuestMemory(4096))
    assert vm.memory == {}


def test_dirty_log(fake: Any, vm: Vm) -> None:
    def fill(address: int) -> int:
        log = fs.current().mm.read_object(address, abi.kvm_dirty_log)
        fs.current().mm.write(log.dirty_bitmap, b"\x05" + bytes(15))
        return log.slot - 3

    fake.answers[abi.KVM_GET_DIRTY_LOG] = fill
    assert vm.get_dirty_log(3, 65 * 4096) == b"\x05" + bytes(15)


def test_interrupts(fake: Any, vm: Vm) -> None:
    vm.irq_line(4, 1)
    level = fake.last(abi.KVM_IRQ_LINE)
    assert (level.irq, level.level) == (4, 1)
    fake.fill(abi.KVM_IRQ_LINE_STATUS, abi.kvm_irq_level(status=-1))
    assert vm.irq_line_status(4, 0) == -1
    vm.create_pit2(abi.KVM_PIT_SPEAKER_DUMMY)
    assert fake.last(abi.KVM_CREATE_PIT2).flags == 1
    fake.fill(abi.KVM_GET_IRQCHIP, abi.kvm_irqchip(chip_id=2, pad=9))
    assert vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC).pad == 9
    assert fake.last(abi.KVM_GET_IRQCHIP).chip_id == 2


def test_gsi_routing(fake: Any, vm: Vm) -> None:
    table: list[abi.kvm_irq_routing_entry] = []

    def note(address: int) -> int:
        mm = fs.current().mm
        head = mm.read_object(address, abi.kvm_irq_routing)
        kind = abi.kvm_irq_routing_entry * head.nr
        table.extend(mm.read_object(address + 8, kind))
        return 0

    fake.answers[abi.KVM_SET_GSI_ROUTING] = note
    entry = abi.kvm_irq_routing_entry(gsi=7, type=abi.KVM_IRQ_ROUTING_IRQCHIP)
    entry.u.irqchip.pin = 5
    vm.set_gsi_routing([abi.kvm_irq_routing_entry(gsi=1), entry])
    assert [(e.gsi, e.u.irqchip.pin) for e in table] == [(1, 0), (7, 5)]


def test_eventfds(fake: Any, vm: Vm) -> None:
    vm.irqfd(9, 5, abi.KVM_IRQFD_FLAG_RESAMPLE, 10)
    irqfd = fake.last(abi.KVM_IRQFD)
    assert (irqfd.fd, irqfd.gsi, irqfd.flags, irqfd.resamplefd) == (9, 5, 2, 10)
    vm.ioeventfd(9, 0xFEED_0000, 4)
    assert fake.last(abi.KVM_IOEVENTFD).flags == 0
    vm.ioeventfd(9, 0x60, 2, datamatch=0, flags=abi.KVM_IOEVENTFD_FLAG_PIO)
    request = fake.last(abi.KVM_IOEVENTFD)
    assert (request.fd, request.addr, request.len, request.flags) == (9, 0x60, 2, 3)


def test_coalesced_ranges(fake: Any, vm: Vm) -> None:
    vm.register_coalesced_mmio(0xA0000, 0x1000)
    vm.unregister_coalesced_mmio(0x70, 1, pio=True)
    zone = fake.last(abi.KVM_REGISTER_COALESCED_MMIO)
    assert (zone.addr, zone.size, zone.pio) == (0xA0000, 0x1000, 0)
    assert fake.last(abi.KVM_UNREGISTER_COALESCED_MMIO).pio == 1


def test_capabilities_and_devices(fake: Any, vm: Vm) -> None:
    vm.enable_cap(abi.KVM_CAP_SPLIT_IRQCHIP, 24, 1)
    request = fake.last(abi.KVM_ENABLE_CAP)
    assert (request.cap, list(request.args)) == (abi.KVM_CAP_SPLIT_IRQCHIP, [24, 1, 0, 0])

    def make(address: int) -> int:
        fd = fake.descriptor("kvm-vfio")
        fs.current().mm.write(address + 4, fd.to_bytes(4, "little"))
        return 0

    fake.answers[abi.KVM_CREATE_DEVICE] = make
    with vm.create_device(abi.KVM_DEV_TYPE_VFIO) as device:
        attribute = abi.kvm_device_attr(group=1, attr=2)
        device.set_device_attr(attribute)
        assert fake.calls[-1][:2] == ("kvm-vfio", abi.KVM_SET_DEVICE_ATTR)
