"""`anykvm.testing` on a guest that writes to a port forever."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.testing import Faults
from anykvm.uapi import kvm as abi
from anykvm.x86 import cpu_models
from anykvm.x86.cpu_models import LEVELS, hidden_features
from anykvm.x86.cpuid import Reg, feature_names

OUT_FOREVER = b"\xe6\x80\xeb\xfc"  # out 0x80, al; jmp back
SPIN = b"\xeb\xfe"


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        yield vm


def vcpu_running(vm: Vm, code: bytes) -> Vcpu:
    memory = GuestMemory(0x1000)
    memory.write(0, code)
    vm.add_memory(0, memory)
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(abi.kvm_regs(rip=0, rflags=2))
    return vcpu


def test_the_nth_call_fails_and_the_others_do_not(vm, kvm_faults):
    rule = kvm_faults.fail("KVM_CREATE_VCPU", errno.ENOMEM, call=2)
    vm.create_vcpu(0)
    with pytest.raises(OSError, match="made to fail") as failure:
        vm.create_vcpu(1)
    assert failure.value.errno == errno.ENOMEM
    vm.create_vcpu(1)  # the failed call did nothing
    assert (rule.seen, rule.applied) == (3, 1)


def test_every_nth_call_at_most_so_often(vm, kvm_faults):
    kvm_faults.fail("KVM_GET_NR_MMU_PAGES", errno.EIO, every=2, times=2)
    outcomes = []
    for _ in range(8):
        try:
            vm.ioctl(abi.KVM_GET_NR_MMU_PAGES)
            outcomes.append(0)
        except OSError as error:
            outcomes.append(error.errno)
    assert outcomes == [0, errno.EIO, 0, errno.EIO, 0, 0, 0, 0]


def test_nothing_fails_any_more_after_the_with(vm):
    with Faults() as faults:
        faults.fail("KVM_GET_NR_MMU_PAGES", errno.EIO)
        with pytest.raises(OSError, match="made to fail"):
            vm.ioctl(abi.KVM_GET_NR_MMU_PAGES)
    assert vm.ioctl(abi.KVM_GET_NR_MMU_PAGES) == 0
    assert len(faults.calls) == 1


def test_a_spurious_interrupt_does_not_run_the_guest(vm, kvm_faults):
    vcpu = vcpu_running(vm, OUT_FOREVER)
    kvm_faults.interrupt(call=2)
    assert vcpu.run() == abi.KVM_EXIT_IO
    rip = vcpu.get_regs().rip
    assert vcpu.run() == abi.KVM_EXIT_INTR
    assert vcpu.get_regs().rip == rip
    assert vcpu.run() == abi.KVM_EXIT_IO


def test_short_runs_end_a_guest_that_never_exits(vm, kvm_faults):
    vcpu = vcpu_running(vm, SPIN)
    kvm_faults.short_runs(0.02)
    for _ in range(3):
        started = time.monotonic()
        assert vcpu.run() == abi.KVM_EXIT_INTR
        assert 0.01 < time.monotonic() - started < 5


def test_short_runs_are_for_the_main_thread():
    problems = []

    def set_up() -> None:
        try:
            Faults().short_runs(1)
        except RuntimeError as problem:
            problems.append(str(problem))

    thread = threading.Thread(target=set_up)
    thread.start()
    thread.join()
    assert problems == ["short runs can only be set up in the main thread, as signals can"]


def test_a_hidden_capability_takes_its_ioctls_with_it(vm, kvm_faults):
    assert vm.check_extension(abi.KVM_CAP_IRQFD) == 1
    kvm_faults.hide_capability("IRQFD")
    assert vm.check_extension(abi.KVM_CAP_IRQFD) == 0
    assert vm.check_extension(abi.KVM_CAP_IOEVENTFD) == 1
    with pytest.raises(OSError, match="hidden") as refused:
        vm.ioctl(abi.KVM_IRQFD, abi.kvm_irqfd())
    assert refused.value.errno == errno.ENOTTY


def test_a_hidden_capability_cannot_be_enabled(vm, kvm_faults):
    kvm_faults.hide_capability("KVM_CAP_SPLIT_IRQCHIP")
    with pytest.raises(OSError, match="hidden") as refused:
        vm.ioctl(abi.KVM_ENABLE_CAP, abi.kvm_enable_cap(cap=abi.KVM_CAP_SPLIT_IRQCHIP))
    assert refused.value.errno == errno.EINVAL


@pytest.mark.parametrize("feature", ["x2apic", (1, Reg.ECX, 21)])
def test_a_hidden_cpuid_bit_is_not_offered(kvm_faults, feature):
    def leaf_1_ecx(kvm: Kvm) -> int:
        return next(entry.ecx for entry in kvm.supported_cpuid() if entry.function == 1)

    with Kvm(backend="soft") as kvm:
        before = leaf_1_ecx(kvm)
        assert before & 1 << 21
        kvm_faults.hide_cpuid(feature)
        assert leaf_1_ecx(kvm) == before & ~(1 << 21)


def test_a_model_has_its_level_of_instructions_and_the_system_as_it_is(kvm_faults):
    with Kvm(backend="soft") as kvm:
        everything = set(feature_names(kvm.supported_cpuid()))
        kvm_faults.cpu_model("x86-64-v2")
        second = set(feature_names(kvm.supported_cpuid()))
        kvm_faults.cpu_model("x86-64-v1")
        first = set(feature_names(kvm.supported_cpuid()))
    assert second - first == LEVELS["x86-64-v2"]
    assert everything - second == hidden_features("x86-64-v2")
    assert {"movbe", "xsave"} <= everything - second
    assert LEVELS["x86-64-v1"] | {"x2apic", "smep", "kvm_clocksource", "nx"} <= first


def test_a_model_whose_instructions_are_missing_is_not_there(monkeypatch):
    monkeypatch.setattr(cpu_models, "ON", cpu_models.ON - {"ssse3"})
    assert cpu_models.models() == ("max", "x86-64-v1")


def test_a_delay_comes_before_the_call(vm, kvm_faults):
    kvm_faults.delay("KVM_GET_NR_MMU_PAGES", 0.05)
    started = time.monotonic()
    vm.ioctl(abi.KVM_GET_NR_MMU_PAGES)
    assert time.monotonic() - started >= 0.05
    assert kvm_faults.calls[-1].seconds >= 0.05


def test_every_call_is_recorded_with_its_outcome(kvm_faults):
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        vcpu = vm.create_vcpu(3)
        with pytest.raises(OSError, match="already"):
            vm.create_vcpu(3)
        vcpu.close()
    created = kvm_faults.made("KVM_CREATE_VCPU")
    assert [(c.file, c.arg, c.error) for c in created] == [
        ("anon_inode:kvm-vm", 3, None),
        ("anon_inode:kvm-vm", 3, errno.EEXIST),
    ]
    assert created[0].result is not None
    assert created[0].thread == threading.current_thread().name
    assert kvm_faults.count("KVM_CREATE_VM") == 1


def test_an_own_rule_sees_the_call_and_decides(vm, kvm_faults):
    kvm_faults.on("KVM_GET_NR_MMU_PAGES", lambda call, proceed: proceed() + 7)
    assert vm.ioctl(abi.KVM_GET_NR_MMU_PAGES) == 7


def test_ioctls_of_others_are_left_alone(kvm_faults, tmp_path):
    with open(tmp_path / "f", "w") as file, pytest.raises(OSError, match="ioctl"):
        fs.ioctl(file.fileno(), 0x5401)  # TCGETS of no terminal
    assert kvm_faults.calls == []


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        (lambda f: f.fail("KVM_CREATE_VCPUS", 1), "KVM_CREATE_VCPU"),
        (lambda f: f.hide_capability("IRQ_FD"), "KVM_CAP_IRQFD"),
        (lambda f: f.hide_cpuid("sse9"), "sse2"),
        (lambda f: f.cpu_model("i486"), "x86-64-v1"),
        (lambda f: f.fail("KVM_RUN", 1, call=1, every=2), "not both"),
        (lambda f: f.delay("KVM_RUN", 1, every=0), "1 or more"),
        (lambda f: f.count("RUN"), "KVM_RUN"),
    ],
)
def test_a_mistake_is_told_with_what_was_meant(mistake, text):
    with pytest.raises(ValueError, match=text):
        mistake(Faults())


def test_pytest_finds_the_fixture_by_itself(tmp_path):
    (tmp_path / "test_vmm.py").write_text(
        textwrap.dedent(
            """
            import errno, pytest
            from anykvm.api import Kvm

            def test_it(kvm_faults):
                kvm_faults.fail("KVM_CREATE_VM", errno.EMFILE)
                with Kvm(backend="soft") as kvm, pytest.raises(OSError):
                    kvm.create_vm()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
