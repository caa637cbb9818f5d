"""VMs that are made, run, and destroyed in every order: nothing is left, nothing goes too early."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest
from tests.fuzz.fuzzer import resources
from tests.fuzz.lifetimes import ORDERS, Life, all_at_once, lives

from anykvm import fs
from anykvm.uapi import kvm as abi

LIVES, WARM = 100, 30
RUNS_ON_AT_EXIT = """
import threading
from tests.fuzz.lifetimes import Life
life = Life()
life.memory.write(0x1000, bytes.fromhex("ebfe"))
started = threading.Event()
def serve():
    started.set()
    life.vcpu.run()
threading.Thread(target=serve, daemon=True).start()
started.wait()
while life.vcpu.kvm_run.exit_reason != {intr}:
    pass
"""


def test_many_lives_in_a_row_leave_nothing():
    assert list(lives(LIVES, warm=WARM)) == []


@pytest.mark.parametrize("number", [2, 20])
def test_vms_that_run_at_once(number: int):
    before = resources()[:2]
    with all_at_once(number) as running:
        deadline = time.monotonic() + 60
        while not all(life.count > 10 for life in running):
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert resources()[:2] == before


@pytest.mark.parametrize("order", ORDERS[::7])
def test_what_is_open_works_whatever_was_closed_before(order: tuple[int, ...]):
    life = Life()
    for step, part in enumerate(order):
        left = order[step:]
        if 2 in left:
            life.run(1)
        if 3 in left:
            assert os.pread(life.stats.fd, 8, 0)
        (life.kvm, life.vm, life.vcpu, life.stats, life.vcpu_stats)[part].close()


def test_statistics_and_kvm_run_outlive_their_vcpu():
    life = Life()
    run = fs.mmap(life.vcpu.fd, abi.KVM_COALESCED_MMIO_PAGE_OFFSET * 4096)
    life.run()
    stats, header = life.vcpu_stats.fd, os.pread(life.vcpu_stats.fd, 24, 0)
    for part in (life.vcpu, life.vm, life.kvm, life.stats):
        part.close()
    assert os.pread(stats, 24, 0) == header
    assert run.view(abi.kvm_run).exit_reason == abi.KVM_EXIT_IO
    life.vcpu_stats.close()


def _python(code: str) -> int:
    return subprocess.run([sys.executable, "-c", code], timeout=60).returncode


def test_a_process_may_end_with_a_vcpu_running():
    assert _python(RUNS_ON_AT_EXIT.format(intr=abi.KVM_EXIT_INTR)) == 0


def test_a_child_of_fork_may_not_use_the_vm_and_harms_it_not():
    life = Life()
    life.run(1)
    child = os.fork()
    if not child:
        try:
            life.vcpu.run()
        except OSError as error:
            os._exit(error.errno or 0)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert (os.WIFEXITED(status), os.WEXITSTATUS(status)) == (True, errno.EIO)
    life.run(1)
    assert life.count == 2
    life.close()
