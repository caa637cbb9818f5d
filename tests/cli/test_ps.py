"""`anykvm ps`: a real process with descriptors as ours, and a made-up /proc with Linux's."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from anykvm.cli import main, processes
from anykvm.cli.processes import census, guest_memory

MIB = 1 << 20

HOLDER = textwrap.dedent("""
    import ctypes, mmap, os, sys, threading
    from anykvm.vmm.vcpu_thread import name_thread

    fds = [os.memfd_create(name) for name in ("kvm", "kvm-vm", "kvm-vcpu:0", "kvm-vcpu:1")]
    again = os.dup(fds[1])
    ram = mmap.mmap(-1, 768 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    named = threading.Barrier(3)

    def vcpu(index):
        name_thread(f"CPU {index}/KVM")
        named.wait()
        threading.Event().wait()

    for index in range(2):
        threading.Thread(target=vcpu, args=(index,), daemon=True).start()
    named.wait()
    print("ready", flush=True)
    sys.stdin.read()
""")


@pytest.fixture
def holder():
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    assert process.wait(10) == 0


def test_a_process_of_ours(holder):
    found = next(p for p in census().processes if p.pid == holder.pid)
    assert (found.backend, found.vms, found.vcpus) == ("soft", 1, 2)
    assert found.memory == 768 * MIB
    assert {"CPU 0/KVM", "CPU 1/KVM"} <= set(found.threads)
    assert [d.name for d in found.descriptors].count("kvm-vm") == 2
    assert found.command.startswith(sys.executable)
    assert found.user


def test_the_json_has_it_all(holder, capsys):
    assert main.run(["ps", "--json"]) == 0
    (row,) = [r for r in json.loads(capsys.readouterr().out) if r["pid"] == holder.pid]
    assert (row["vms"], row["vcpus"], row["memory"]) == (1, 2, 768 * MIB)
    assert {"fd", "backend", "name", "inode"} == set(row["descriptors"][0])


def test_the_table_has_it_all(holder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main.run(["ps"]) == 0
    line = next(
        line
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:1] == [str(holder.pid)]
    )
    for cell in ("soft", "768 MiB", "kvm-vcpu:1", "CPU 0/KVM, CPU 1/KVM"):
        assert cell in line


def process_folder(proc: Path, pid: int, links: dict[int, str], comm: str = "qemu") -> Path:
    folder = proc / str(pid)
    (folder / "fd").mkdir(parents=True)
    for fd, target in links.items():
        (folder / "fd" / str(fd)).symlink_to(target)
    for tid, name in ((pid, comm), (pid + 1, "CPU 0/KVM")):
        (folder / "task" / str(tid)).mkdir(parents=True)
        (folder / "task" / str(tid) / "comm").write_text(name + "\n")
    (folder / "comm").write_text(comm + "\n")
    (folder / "cmdline").write_bytes(b"qemu-system-x86_64\0-accel\0kvm\0")
    (folder / "maps").write_text("7f0000000000-7f0020000000 rw-p 00000000 00:00 0 \n")
    return folder


LINUX = {
    0: "/dev/null",
    9: "/dev/kvm",
    10: "anon_inode:kvm-vm",
    11: "anon_inode:kvm-vcpu:0",
    12: "anon_inode:[eventfd]",
}


def test_a_process_of_linuxs(tmp_path):
    process_folder(tmp_path, 77, LINUX)
    process_folder(tmp_path, 78, {0: "/dev/null", 1: "/dev/kvmalloc", 2: "anon_inode:kvm-vm-x"})
    (tmp_path / "self").mkdir()
    (found,) = census(tmp_path).processes
    assert (found.pid, found.backend, found.vms, found.vcpus) == (77, "host", 1, 1)
    assert found.command == "qemu-system-x86_64 -accel kvm"
    assert found.threads == ("qemu", "CPU 0/KVM")
    assert found.memory == 512 * MIB
    assert [(d.fd, d.name) for d in found.descriptors] == [
        (9, "kvm"),
        (10, "kvm-vm"),
        (11, "kvm-vcpu:0"),
    ]


def test_both_backends_in_one_process(tmp_path):
    process_folder(tmp_path, 5, {3: "/dev/kvm", 4: "/memfd:kvm-vm (deleted)"})
    (found,) = census(tmp_path).processes
    assert found.backend == "host+soft"


def test_a_process_without_a_command_line(tmp_path):
    folder = process_folder(tmp_path, 5, LINUX, comm="kworker/0:1")
    (folder / "cmdline").write_bytes(b"")
    assert census(tmp_path).processes[0].command == "[kworker/0:1]"


def test_processes_that_end_meanwhile_and_those_of_others(tmp_path, monkeypatch):
    process_folder(tmp_path, 5, LINUX)
    process_folder(tmp_path, 6, LINUX)
    (tmp_path / "7").mkdir()
    allowed = processes._descriptors

    def descriptors(folder: Path):
        if folder.parent.name == "6":
            raise PermissionError
        return allowed(folder)

    monkeypatch.setattr(processes, "_descriptors", descriptors)
    found = census(tmp_path)
    assert ([p.pid for p in found.processes], found.unreadable) == ([5], 1)


def test_nobody_holds_any(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(processes, "PROC", tmp_path)
    monkeypatch.setattr(processes, "census", lambda: census(tmp_path))
    assert main.run(["ps"]) == 0
    assert capsys.readouterr().out == "no process holds KVM descriptors\n"


@pytest.mark.parametrize(
    ("maps", "size"),
    [
        ("", 0),
        ("1000-3000 rw-p 0 00:00 0\n5000-6000 rw-p 0 00:00 0\n", 0x2000),
        ("1000-9000 rw-p 0 00:00 0 [heap]\n5000-6000 rw-p 0 00:00 0\n", 0x1000),
        ("1000-9000 r--p 0 00:00 0\n5000-6000 rw-s 0 00:01 7 /memfd:x (deleted)\n", 0x1000),
        ("1000-9000 rw-s 0 00:01 5 /memfd:kvm-vcpu:0 (deleted)\n", 0),
        ("1000-9000 rw-p 0 08:01 5 /usr/lib/libc.so\n", 0),
        ("1000-9000 rw-s 0 00:01 5 /memfd:pc.ram (deleted)\nb000-fb000 rw-p 0 00:00 0\n", 0x8000),
        (
            "1000-2000 rw-s 0 00:01 5 /memfd:mem0 (deleted)\n"
            "4000-5000 rw-s 0 00:01 5 /memfd:mem0 (deleted)\n"
            "6000-9000 rw-s 0 00:01 6 /memfd:mem1 (deleted)\n",
            0x4000,
        ),
    ],
)
def test_guest_memory_by_the_maps(maps, size):
    assert guest_memory(maps) == size
