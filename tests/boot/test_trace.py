"""`anykvm trace -- boot`: of a size that people can read, and filters that leave what was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from .process import Anykvm
from .tiny_kernel import exit_with

Tiny = Callable[[bytes], list[str]]
LINE = re.compile(r" *\d+\.\d{3} ms  \S.*")
LEFT = "anykvm: KVM: soft"


def traced(anykvm: Anykvm, tiny: Tiny, *options: str) -> list[str]:
    result = anykvm.run("trace", *options, "--", *tiny(exit_with(5)))
    assert (result.status, result.out) == (5, "ready\n")
    return [line for line in result.err.splitlines() if not line.startswith(LEFT)]


def test_the_way_of_every_call(anykvm: Anykvm, tiny: Tiny) -> None:
    lines = traced(anykvm, tiny)
    assert all(LINE.fullmatch(line) for line in lines)
    text = "\n".join(lines)
    for step in (
        r"open /dev/kvm → kvm_chardev_ops = \d+",
        r"kvm_dev_ioctl\(KVM_CREATE_VM\) → kvm_create_vm\(type=0\) → kvm_arch_alloc_vm → "
        r'anon_inode_getfd\("kvm-vm", kvm_vm_fops\) = \d+',
        r'kvm_arch_vcpu_create\(vcpu_id=0\) → anon_inode_getfd\("kvm-vcpu:0", kvm_vcpu_fops\) = ',
        r"CPU 0/KVM +kvm_vcpu_ioctl\(KVM_RUN\) → kvm_arch_vcpu_ioctl_run\(vcpu_id=0\)",
        r"KVM_EXIT_IO out 0x3f8 size 1",
        r"KVM_EXIT_IO out 0xf4 size 1",
    ):
        assert re.search(step, text), step
    assert len(lines) < 200


def test_only_what_was_asked_for(anykvm: Anykvm, tiny: Tiny) -> None:
    lines = traced(anykvm, tiny, "--filter", "KVM_CREATE_*")
    made = ["KVM_CREATE_VM", "KVM_CREATE_IRQCHIP", "KVM_CREATE_PIT2", "KVM_CREATE_VCPU"]
    assert [re.search(r"KVM_CREATE_\w+", line)[0] for line in lines] == made  # type: ignore[index]


def test_without_what_was_not(anykvm: Anykvm, tiny: Tiny) -> None:
    lines = traced(anykvm, tiny, "--filter", "!kvm_run", "--json")
    records = [json.loads(line) for line in lines]
    assert {"open", "ioctl", "close"} <= {record["name"] for record in records}
    assert not [record for record in records if "KVM_RUN" in record["label"]]
