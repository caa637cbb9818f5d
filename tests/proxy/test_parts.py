"""Parts of the proxy by themselves: the filter, /proc, windows, struct layouts, doctor."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import stat
import struct

import pytest

from anykvm.cli.main import run
from anykvm.fs import Inode
from anykvm.fs.char_dev import namei
from anykvm.fs.vmas import vmas
from anykvm.proxy import abi, bpf, opens, procfs
from anykvm.proxy.memory import Window

AT_FDCWD = (1 << 64) - 100


def decide(code: bytes, nr: int, args: tuple[int, ...] = (), arch: int = abi.AUDIT_ARCH_X86_64):
    """The filter's verdict, by an interpreter of classic BPF."""
    padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", nr, arch, 0, *padded)
    at = accumulator = 0
    while True:
        operation, true, false, k = bpf.SOCK_FILTER.unpack_from(code, at * 8)
        at += 1
        if operation == bpf.RET:
            return k
        if operation == bpf.LD_W_ABS:
            accumulator = struct.unpack_from("=I", data, k)[0]
        elif operation == bpf.ALU_AND:
            accumulator &= k
        elif operation == bpf.JMP_JEQ:
            at += true if accumulator == k else false
        elif operation == bpf.JMP_JGE:
            at += true if accumulator >= k else false
        else:
            assert operation == bpf.JMP_JSET
            at += true if accumulator & k else false


SENT, RUN = abi.SECCOMP_RET_USER_NOTIF, abi.SECCOMP_RET_ALLOW


@pytest.mark.parametrize(
    ("nr", "args", "without_looks", "with_looks"),
    [
        (abi.SYS_IOCTL, (5, 0xAE80), SENT, SENT),
        (abi.SYS_IOCTL, (5, 0xC008AE88 | 0xFFFFFFFF << 32), SENT, SENT),
        (abi.SYS_IOCTL, (1, 0x5401), RUN, RUN),
        (abi.SYS_OPEN, (1, os.O_RDWR), SENT, SENT),
        (abi.SYS_OPENAT, (AT_FDCWD, 1, os.O_RDONLY | os.O_CLOEXEC), SENT, SENT),
        (abi.SYS_OPENAT, (AT_FDCWD, 1, os.O_WRONLY | os.O_CREAT), RUN, RUN),
        (abi.SYS_OPENAT, (AT_FDCWD, 1, os.O_DIRECTORY), RUN, RUN),
        (abi.SYS_OPENAT2, (AT_FDCWD, 1, 1), SENT, SENT),
        (abi.SYS_STAT, (1, 1), RUN, SENT),
        (abi.SYS_NEWFSTATAT, (3, 1, 1, bpf.AT_EMPTY_PATH), RUN, RUN),
        (abi.SYS_NEWFSTATAT, (AT_FDCWD, 1, 1, 0), RUN, SENT),
        (abi.SYS_STATX, (AT_FDCWD, 1, 0, 0x7FF, 1), RUN, SENT),
        (abi.SYS_ACCESS, (1, 4), RUN, SENT),
        (abi.SYS_READLINKAT, (AT_FDCWD, 1, 1, 100), RUN, SENT),
        (abi.SYS_READ, (0, 1, 1), RUN, RUN),
        (abi.SYS_RT_SIGACTION, (signal.SIGUSR1, 1), SENT, SENT),
        (abi.SYS_RT_SIGACTION, (signal.SIGUSR2, 1 << 32), SENT, SENT),
        (abi.SYS_RT_SIGACTION, (signal.SIGRTMAX, 1), SENT, SENT),
        (abi.SYS_RT_SIGACTION, (signal.SIGUSR1, 0), RUN, RUN),
        (abi.SYS_RT_SIGACTION, (signal.SIGINT, 1), RUN, RUN),
        (abi.SYS_RT_SIGACTION, (signal.SIGRTMIN - 1, 1), RUN, RUN),
        (abi.SYS_MMAP, (0, 1), RUN, RUN),
        (abi.SYS_MMAP, (0, 1, 1, 2, 5, bpf.RING_FIRST), SENT, SENT),
        (abi.SYS_MMAP, (0, 1, 5, 1, 5, bpf.RING_FIRST), SENT, SENT),
        (abi.SYS_MMAP, (0, 1, 3, 1, 5, bpf.RING_FIRST), RUN, RUN),
        (abi.SYS_MMAP, (0, 1, 1, 0x22, -1 % 2**64, bpf.RING_FIRST), RUN, RUN),
        (abi.SYS_MMAP, (0, 1, 1, 2, 5, bpf.RING_FIRST - 4096), RUN, RUN),
        (abi.SYS_MMAP, (0, 1, 5, 2, 5, bpf.RING_END), RUN, RUN),
        (abi.SYS_MMAP, (0, 1, 5, 1, 5, bpf.RING_FIRST + (1 << 32)), RUN, RUN),
    ],
)
def test_the_filter(nr, args, without_looks, with_looks):
    assert decide(bpf.program(looks=False), nr, args) == without_looks
    assert decide(bpf.program(looks=True), nr, args) == with_looks


def test_32_bit_programs_run_untouched():
    assert decide(bpf.program(looks=True), abi.SYS_IOCTL, (5, 0xAE80), 0x40000003) == RUN


def test_struct_layouts():
    node = namei("/dev/kvm")
    assert isinstance(node, Inode)
    assert opens.STAT.size == 144
    assert opens.STATX.size == 256
    mode, rdev = opens.STAT.unpack(opens.stat_bytes(node))[3], os.makedev(10, 232)
    assert stat.S_ISCHR(mode)
    assert opens.STAT.unpack(opens.stat_bytes(node))[7] == rdev
    assert struct.unpack_from("=II", opens.statx_bytes(node), 128) == (10, 232)
    assert (abi.NOTIF.size, abi.NOTIF_RESP.size, abi.NOTIF_ADDFD.size) == (80, 24, 24)
    assert ctypes.sizeof(abi.user_regs_struct) == 216


def test_populated_pages():
    area = mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    area.madvise(mmap.MADV_NOHUGEPAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for page in (3, 4, 5, 700, 16383):
        area[page << 12] = 1
    found = list(procfs.populated(os.getpid(), start, start + len(area)))
    pages = [(low - start >> 12, high - start >> 12) for low, high in found]
    assert pages == [(3, 6), (700, 701), (16383, 16384)]


def test_mappings_are_clipped():
    area = mmap.mmap(-1, 16 << 12, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    (vma,) = vmas(os.getpid(), start + 4096, start + 3 * 4096)
    assert (vma.start, vma.end, vma.prot, vma.shared) == (start + 4096, start + 12288, 3, False)


def test_a_window_knows_what_is_mapped():
    window = Window(0, 1 << 30, 0x7000_0000_0000)
    one, two = (1, 1, 0, True), (1, 2, 0, True)
    window.note(0x1000, 0x9000, one)
    window.note(0x3000, 0x5000, two)
    assert window.has(0x1000, 0x3000, one)
    assert window.has(0x3000, 0x5000, two)
    assert window.has(0x5000, 0x9000, one)
    assert not window.has(0x2000, 0x4000, one)
    assert window.address(0x3000) == 0x7000_0000_3000
    window.note(0x3000, 0x5000, one)
    assert window.pieces == [(0x1000, 0x9000, one)]


def test_doctor(capsys):
    status = run(["doctor", "--json"])
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert {"kernel", "processor", "/dev/kvm", "seccomp notification", "ptrace"} <= set(findings)
    assert status == (0 if all(finding["ok"] for finding in findings.values()) else 120)
    assert run(["doctor"]) == status
    assert "backend auto takes" in capsys.readouterr().out
