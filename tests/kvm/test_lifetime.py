"""/dev/kvm, VMs and vCPUs: what the descriptors are, who holds whom, how calls are traced."""

from __future__ import annotations

import errno
import os

import pytest
from tests.x86.fake_engine import FakeEngine
from tests.x86.machine import machine

from anykvm import fs
from anykvm.api import Kvm
from anykvm.cpu.state import Exit
from anykvm.kvm.chardev import kvm_chardev_ops, kvm_module
from anykvm.kvm.vcpu_ioctl import kvm_vcpu_fops
from anykvm.kvm.vm_ioctl import kvm_vm_fops
from anykvm.uapi import kvm as uapi
from anykvm.x86.processor import use_engine


def behind(fd: int) -> fs.File:
    file = fs.fget(fd)
    assert file is not None
    fs.fput(file)
    return file


def test_api_version_and_mmap_size():
    with Kvm(backend="soft") as kvm:
        assert kvm.ioctl(uapi.KVM_GET_API_VERSION) == 12
        assert kvm.ioctl(uapi.KVM_GET_VCPU_MMAP_SIZE) == 3 * 4096
        with pytest.raises(OSError, match="takes no argument") as raised:
            kvm.ioctl(uapi.KVM_GET_API_VERSION, 1)
        assert raised.value.errno == errno.EINVAL


def test_each_descriptor_has_its_operations_and_its_name():
    with machine() as m:
        vcpu = m.add_vcpu()
        assert behind(m.kvm.fd).f_op is kvm_chardev_ops
        assert behind(m.vm.fd).f_op is kvm_vm_fops
        assert behind(vcpu.fd).f_op is kvm_vcpu_fops
        names = [os.readlink(f"/proc/self/fd/{d.fd}") for d in (m.kvm, m.vm, vcpu)]
        assert [n.split(":", 1)[1].split(" ")[0] for n in names] == ["kvm", "kvm-vm", "kvm-vcpu:0"]
        assert "vcpu:\t0" in fs.fdinfo(vcpu.fd)


def test_the_module_is_in_use_while_dev_kvm_is_open():
    before = kvm_module.refcount
    with Kvm(backend="soft"):
        assert kvm_module.refcount == before + 1
    assert kvm_module.refcount == before


def test_a_vcpu_keeps_its_vm():
    engine = FakeEngine()
    with use_engine(lambda: engine), Kvm(backend="soft") as kvm:
        vm = kvm.create_vm()
        vcpu = vm.create_vcpu(0)
        engine.cpus[0].script.append(Exit.HLT)
        vm.close()
        assert not engine.closed
        assert vcpu.run() == uapi.KVM_EXIT_HLT
        vcpu.close()
        assert engine.closed


def test_vm_types():
    with Kvm(backend="soft") as kvm, pytest.raises(OSError, match="type") as raised:
        kvm.create_vm(1)
    assert raised.value.errno == errno.EINVAL


def test_vcpu_ids():
    with machine() as m:
        m.add_vcpu()
        for vcpu_id, expected in ((0, errno.EEXIST), (255, errno.EINVAL)):
            with pytest.raises(OSError, match=f"Errno {expected}]"):
                m.vm.create_vcpu(vcpu_id)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="already"):
            m.vm.create_vcpu(0)
        assert len(os.listdir("/proc/self/fd")) == before


def test_unknown_ioctls_and_capabilities():
    with machine() as m:
        vcpu = m.add_vcpu()
        unknown = {m.kvm: errno.EINVAL, m.vm: errno.ENOTTY, vcpu: errno.EINVAL}
        for descriptor, expected in unknown.items():
            with pytest.raises(OSError, match="unknown to") as raised:
                descriptor.ioctl(0xAEFE)
            assert raised.value.errno == expected
        for descriptor in (m.kvm, m.vm):
            assert descriptor.check_extension(100_000) == 0
            assert descriptor.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1


def test_another_process_may_not_use_a_vm():
    with machine() as m:
        stranger = fs.task.Task(os.getppid())
        with fs.as_current(stranger), pytest.raises(OSError, match="process") as raised:
            m.vm.check_extension(uapi.KVM_CAP_USER_MEMORY)
        assert raised.value.errno == errno.EIO


def test_the_way_of_kvm_create_vm_is_traced():
    events: list[fs.trace.Event] = []
    with fs.trace.attached(events.append), machine() as m:
        fd = m.vm.fd
    entered = [e.name for e in events if e.kind == "enter"]
    at = entered.index("kvm_create_vm")
    assert entered[at : at + 3] == ["kvm_create_vm", "kvm_arch_alloc_vm", "anon_inode_getfd"]
    created = next(e for e in events if e.kind == "exit" and e.fields.get("cmd") == "KVM_CREATE_VM")
    assert (created.name, created.result) == ("kvm_dev_ioctl", fd)


def test_kvm_run_is_traced_with_its_exit():
    events: list[fs.trace.Event] = []
    with machine() as m:
        vcpu = m.add_vcpu(Exit.HLT)
        with fs.trace.attached(events.append):
            vcpu.run()
    run = next(e for e in events if e.kind == "exit" and e.name == "kvm_arch_vcpu_ioctl_run")
    assert run.result == "KVM_EXIT_HLT"
    assert [e.fields["reason"] for e in events if e.name == "kvm_exit"] == [Exit.HLT]
