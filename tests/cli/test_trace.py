"""The way of each call as text and as JSON, from trace points made here and from real calls."""

from __future__ import annotations

import json
import threading

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Kvm
from anykvm.cli import main, narrate
from anykvm.cli.filter import Filter, filtered
from anykvm.cli.narrate import Narrator, as_json, exit_text
from anykvm.cli.statistics import processor_counters
from anykvm.fs.trace import attached, call, trace
from anykvm.uapi import kvm as abi

KVM_CREATE_VM, KVM_RUN = abi.KVM_CREATE_VM, abi.KVM_RUN


def toy_dev_ioctl(file: fs.File, cmd: int, arg: int) -> int:
    if cmd == KVM_CREATE_VM:
        table = call("toy_dev_ioctl", cmd="KVM_CREATE_VM")
        with table, call("kvm_create_vm", type=arg), call("kvm_arch_alloc_vm"):
            return fs.anon_inode_getfd("toy-vm", toy_vm_fops, None)
    trace("kvm_pio", port=0x3F8, size=1)
    return 5


def toy_vcpu_ioctl(file: fs.File, cmd: int, arg: int) -> int:
    assert file.f_mapping is not None
    run = file.f_mapping.view(abi.kvm_run)
    run.exit_reason = abi.KVM_EXIT_IO
    run.io.direction, run.io.port, run.io.size = abi.KVM_EXIT_IO_OUT, 0x3F8, 1
    return 0


toy_dev_ops = fs.FileOperations(unlocked_ioctl=toy_dev_ioctl)
toy_vm_fops = fs.FileOperations()
toy_vcpu_fops = fs.FileOperations(unlocked_ioctl=toy_vcpu_ioctl)


@pytest.fixture
def device():
    misc = fs.MiscDevice(fs.MISC_DYNAMIC_MINOR, "traced", toy_dev_ops)
    fs.misc_register(misc)
    yield "/dev/traced"
    fs.misc_deregister(misc)


class Lines:
    """What a narrator wrote, without the times."""

    def __init__(self, *patterns: str) -> None:
        self.raw: list[str] = []
        self.sink = filtered(Narrator(self.raw.append), Filter.parse(patterns))

    @property
    def texts(self) -> list[str]:
        return [line[31:].split("  (")[0] for line in self.raw]


@pytest.fixture
def named(monkeypatch):
    """The toy's tables of operations, under a name as if they were in our source."""
    monkeypatch.setattr(narrate, "toy_dev_ops", toy_dev_ops, raising=False)
    monkeypatch.setattr(narrate, "toy_vm_fops", toy_vm_fops, raising=False)


def test_the_way_of_a_call(device, named):
    lines = Lines()
    with attached(lines.sink):
        fd = fs.open(device)
        vm = fs.ioctl(fd, KVM_CREATE_VM, 0)
        fs.ioctl(fd, abi.KVM_CHECK_EXTENSION, abi.KVM_CAP_IRQCHIP)
        fs.close(vm)
        fs.close(fd)
    assert lines.texts == [
        f"open {device} → toy_dev_ops = {fd}",
        "toy_dev_ioctl(KVM_CREATE_VM) → kvm_create_vm(type=0) → kvm_arch_alloc_vm"
        f' → anon_inode_getfd("toy-vm", toy_vm_fops) = {vm}',
        "toy_dev_ioctl(KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) …",
        "  kvm_pio(port=0x3f8, size=1)",
        "… toy_dev_ioctl(KVM_CHECK_EXTENSION, KVM_CAP_IRQCHIP) = 5",
        f"close(fd {vm})",
        f"close(fd {fd})",
    ]
    assert all(line[:12].strip().replace(".", "").isdigit() for line in lines.raw)
    assert all(line[12:31].split() == ["ms", "MainThread"] for line in lines.raw)


def test_a_run_tells_its_exit(device):
    fd = fs.anon_inode_getfd("kvm-vcpu:0", toy_vcpu_fops, None, size=3 * fs.PAGE_SIZE)
    lines = Lines()
    with attached(lines.sink):
        fs.ioctl(fd, KVM_RUN)
    fs.close(fd)
    assert lines.texts == ["toy_vcpu_ioctl(KVM_RUN) = 0 KVM_EXIT_IO out 0x3f8 size 1"]


def test_the_way_from_dev_kvm_to_a_run():
    """What docs/article.md shows, on anykvm's own KVM: `mov al, 4; out dx, al; hlt`."""
    lines = Lines("!KVM_GET_*", "!KVM_SET_*", "!mmap", "!close")
    with attached(lines.sink), Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(fs.PAGE_SIZE, 0x1000)
        memory.write(0x1000, b"\xb0\x04\xee\xf4")
        vm.add_memory(0, memory)
        with vm.create_vcpu(0) as vcpu:
            sregs = vcpu.get_sregs()
            sregs.cs.base, sregs.cs.selector = 0, 0
            vcpu.set_sregs(sregs)
            vcpu.set_regs(abi.kvm_regs(rip=0x1000, rdx=0x3F8, rflags=2))
            assert (vcpu.run(), vcpu.run()) == (abi.KVM_EXIT_IO, abi.KVM_EXIT_HLT)
            counters = processor_counters(vm.fd)
            opened, made, plugged = kvm.fd, vm.fd, vcpu.fd
    assert lines.texts[:3] == [
        f"open /dev/kvm → kvm_chardev_ops = {opened}",
        "kvm_dev_ioctl(KVM_CREATE_VM) → kvm_create_vm(type=0) → kvm_arch_alloc_vm"
        f' → anon_inode_getfd("kvm-vm", kvm_vm_fops) = {made}',
        "kvm_vm_ioctl(KVM_CREATE_VCPU) → kvm_arch_vcpu_create(vcpu_id=0)"
        f' → anon_inode_getfd("kvm-vcpu:0", kvm_vcpu_fops) = {plugged}',
    ]
    assert lines.texts[3].startswith("kvm_vcpu_ioctl(KVM_RUN) → ")
    assert "… kvm_vcpu_ioctl(KVM_RUN) = 0 KVM_EXIT_IO out 0x3f8 size 1" in lines.texts
    assert lines.texts[-1] == "… kvm_vcpu_ioctl(KVM_RUN) = 0 KVM_EXIT_HLT"
    assert counters["instructions_executed"] >= 1
    assert counters["units_translated"] >= 1


def test_errors_are_told():
    lines = Lines()
    with attached(lines.sink), pytest.raises(OSError, match="no"), call("kvm_create_vm", type=9):
        raise OSError(22, "no such type")
    assert lines.texts == ["kvm_create_vm(type=9) = OSError: [Errno 22] no such type"]


def test_the_hosts_descriptors_are_named_by_number():
    lines = Lines()
    with (
        attached(lines.sink),
        call("ioctl", fd=8, file=None, cmd=KVM_RUN, arg=0) as this,
    ):
        this.result = 0
    assert lines.texts == ["ioctl(fd 8, KVM_RUN) = 0"]


def test_threads_have_lines_of_their_own():
    lines = Lines()

    def other() -> None:
        with call("inner"):
            pass

    with attached(lines.sink), call("outer"):
        thread = threading.Thread(target=other, name="CPU 0/KVM")
        thread.start()
        thread.join()
    assert [line[17:30].strip() for line in lines.raw] == ["CPU 0/KVM", "MainThread"]
    assert lines.texts == ["inner", "outer"]


def some_calls() -> None:
    with call("ioctl", fd=3, file=None, cmd=KVM_CREATE_VM, arg=0), call("kvm_create_vm"):
        trace("kvm_page_fault", gva=0x1000)
    with call("ioctl", fd=5, file=None, cmd=KVM_RUN, arg=0):
        trace("kvm_pio", port=0x60)
    with call("mmap", fd=5, file="kvm-vcpu:0"):
        pass


CREATE = "ioctl(fd 3, KVM_CREATE_VM) → kvm_create_vm"


@pytest.mark.parametrize(
    ("patterns", "shown"),
    [
        (["kvm_run"], ["ioctl(fd 5, KVM_RUN) …", "  kvm_pio(port=0x60)", "… ioctl(fd 5, KVM_RUN)"]),
        (["kvm_pio"], ["  kvm_pio(port=0x60)"]),
        (["KVM_PIO,mmap"], ["  kvm_pio(port=0x60)", "mmap(fd 5)"]),
        (["kvm-vcpu*"], ["mmap(fd 5)"]),
        (["!ioctl"], ["mmap(fd 5)"]),
        (["!KVM_RUN", "!KVM_CREATE_VM"], ["mmap(fd 5)"]),
        (["!KVM_RUN", "!kvm_p*"], [CREATE, "mmap(fd 5)"]),
        (["!kvm_p*", "ioctl"], [CREATE, "ioctl(fd 5, KVM_RUN)"]),
        (["nothing"], []),
    ],
)
def test_filters(patterns, shown):
    lines = Lines(*patterns)
    with attached(lines.sink):
        some_calls()
    assert lines.texts == shown


def test_json_lines(device):
    written: list[str] = []
    with attached(as_json(written.append)):
        fd = fs.open(device)
        fs.ioctl(fd, KVM_CREATE_VM + 1, 3)
        fs.close(fd)
    events = [json.loads(line) for line in written]
    kinds = [(e["kind"], e["name"], e["depth"]) for e in events]
    assert kinds == [
        ("enter", "open", 0),
        ("exit", "open", 0),
        ("enter", "ioctl", 0),
        ("event", "kvm_pio", 1),
        ("exit", "ioctl", 0),
        ("enter", "close", 0),
        ("exit", "close", 0),
    ]
    assert events[3]["fields"] == {"port": 0x3F8, "size": 1}
    assert events[4]["result"] == 5
    assert events[4]["fields"]["file"] == device
    assert events[4]["duration_ns"] > 0


def test_other_exits():
    run = abi.kvm_run(exit_reason=abi.KVM_EXIT_MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0xFEE00000, 4, 1
    assert exit_text(run) == "KVM_EXIT_MMIO write 0xfee00000 size 4"
    assert exit_text(abi.kvm_run(exit_reason=abi.KVM_EXIT_HLT)) == "KVM_EXIT_HLT"
    assert exit_text(abi.kvm_run(exit_reason=9999)) == "exit reason 9999"


@pytest.fixture
def traced_command(monkeypatch):
    def make_calls() -> int:
        some_calls()
        return 9

    monkeypatch.setattr(main, "COMMANDS", (*main.COMMANDS, main.Command("calls", make_calls)))


def test_the_command_writes_a_file(traced_command, tmp_path, capsys):
    out = tmp_path / "trace"
    assert main.run(["trace", "--output", str(out), "--filter", "KVM_RUN", "--", "calls"]) == 9
    assert [line.split(None, 3)[3].split("  (")[0] for line in out.read_text().splitlines()] == [
        "ioctl(fd 5, KVM_RUN) …",
        "kvm_pio(port=0x60)",
        "… ioctl(fd 5, KVM_RUN)",
    ]
    assert capsys.readouterr() == ("", "")


def test_the_command_writes_json(traced_command, tmp_path):
    out = tmp_path / "trace"
    assert main.run(["trace", "--json", "--output", str(out), "calls"]) == 9
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 10


def test_the_command_writes_standard_error(traced_command, capfd):
    assert main.run(["trace", "calls"]) == 9
    assert "kvm_page_fault(gva=0x1000)" in capfd.readouterr().err


def test_what_cannot_be_traced(tmp_path, capsys):
    assert main.run(["trace", "--", "trace", "--", "ps"]) == 2
    assert main.run(["trace", "--output", str(tmp_path), "ps"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith("anykvm: trace cannot trace itself")
    assert err[1] == f"anykvm: cannot write {tmp_path}: Is a directory"
    assert main.run(["trace", "--", "nope"]) == 2


def test_nothing_stays_attached(traced_command, tmp_path):
    main.run(["trace", "--output", str(tmp_path / "t"), "calls"])
    assert not fs_trace_enabled()


def fs_trace_enabled() -> bool:
    from anykvm.fs import trace as points

    return points.enabled()
