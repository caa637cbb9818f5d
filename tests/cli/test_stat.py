"""`anykvm stat`: a process whose counters rise, read from here; and made-up samples."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress

import pytest

from anykvm.api.stats import Stats, StatsFd
from anykvm.cli import counters, main
from anykvm.cli.counters import VmSample, take_sample
from anykvm.cli.errors import Status
from anykvm.cli.rates import Period, flat
from anykvm.cli.stat_output import _cells
from anykvm.kvm.binary_stats import KvmStats
from anykvm.uapi import kvm as uapi
from anykvm.x86.stats import KvmVcpuStat, KvmVmStat

HOLDER = textwrap.dedent("""
    import os, select, sys
    from anykvm.kvm.binary_stats import kvm_vcpu_stats, kvm_vm_stats
    from anykvm.x86.stats import KvmVcpuStat, KvmVmStat

    vms = [kvm_vm_stats(os.getpid(), KvmVmStat) for _ in range(2)]
    vcpus = [kvm_vcpu_stats(vms[0].stats_id, n, KvmVcpuStat) for n in range(2)]
    again = vcpus[0].getfd()
    vms[0].stat.pages_4k = 4096
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0.001)[0]:
        for n, vcpu in enumerate(vcpus):
            vcpu.stat.instructions += 1000 * (n + 1)
            vcpu.stat.userspace_exits[2] += 1
            vcpu.stat.halt_wait_hist[3] += 1
""")
ANYKVM = [sys.executable, "-c", "from anykvm.cli.main import main; main()"]


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


def stat(holder, *options: str) -> int:
    return main.run(["stat", "--pid", str(holder.pid), *options])


def test_a_sample_has_each_vm_with_its_vcpus(holder):
    first, second = take_sample([holder.pid]).vms
    assert (first.id, second.id) == (f"kvm-{holder.pid}", f"kvm-{holder.pid}-2")
    assert [s.id for s in first.vcpus] == [f"{first.id}/vcpu-0", f"{first.id}/vcpu-1"]
    assert second.vcpus == ()
    assert first.stats["pages_4k"].value == 4096
    assert first.pid == holder.pid
    assert first.command.startswith(sys.executable)
    later = take_sample([holder.pid]).vms[0]
    assert later.vcpus[0]["instructions"].value >= first.vcpus[0]["instructions"].value > 0


def test_once_prints_totals(holder, capsys):
    assert stat(holder, "--once") == 0
    out = capsys.readouterr().out
    heading = next(line for line in out.splitlines() if "STATISTIC" in line)
    assert heading.split() == ["STATISTIC", "TOTAL", "vcpu-0", "vcpu-1"]
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["instructions"])
    total, *each = (int(cell.replace(",", "")) for cell in row[1:])
    assert total == sum(each) > 0
    assert "userspace_exits[io]" in out
    assert f"kvm-{holder.pid}-2" in out


def test_lines_where_there_is_no_terminal(holder, capsys):
    assert stat(holder, "--count", "2", "--interval", "0.1", "--fields", "^instructions$") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1:3] for line in lines] == [[f"kvm-{holder.pid}", "instructions"]] * 2
    assert int(lines[0][3]) < int(lines[1][3])
    assert float(lines[1][4]) > 1000


def test_json_has_totals_then_rates(holder, capsys):
    assert stat(holder, "--count", "1", "--interval", "0.1", "--json") == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    before, after = first["vms"][0], second["vms"][0]
    assert "rates" not in before
    assert (after["id"], after["pid"]) == (f"kvm-{holder.pid}", holder.pid)
    assert after["statistics"]["pages_4k"] == 4096
    vcpu = after["vcpus"][1]
    assert vcpu["id"] == f"kvm-{holder.pid}/vcpu-1"
    assert vcpu["statistics"]["halt_wait_hist"][3] > 0
    assert len(vcpu["statistics"]["userspace_exits"]) > uapi.KVM_EXIT_IO
    assert after["rates"]["instructions"] > after["rates"]["userspace_exits[io]"] > 0


def test_the_last_vm_ends(holder, capsys, monkeypatch):
    samples = iter([take_sample([holder.pid]), counters.Sample(time.monotonic(), (), 0)])
    monkeypatch.setattr(counters, "take_sample", lambda pids: next(samples))
    assert stat(holder, "--interval", "0.05") == 0
    assert "the last VM has ended" in capsys.readouterr().err


def test_nobody_runs_a_vm(capsys):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait(20)
    assert main.run(["stat", "--pid", str(ended.pid)]) == Status.UNAVAILABLE
    error = capsys.readouterr().err
    assert f"no VM of process {ended.pid} runs on anykvm's KVM" in error


@pytest.mark.parametrize("options", [["--fields", "("], ["--interval", "0"], ["--count", "0"]])
def test_options_that_mean_nothing(options, capsys):
    assert main.run(["stat", *options]) == Status.USAGE
    assert capsys.readouterr().err.count("\n") == 1


def test_a_screen_until_ctrl_c(holder):
    ours, theirs = pty.openpty()
    command = [*ANYKVM, "stat", "--interval", "0.1", "--pid", str(holder.pid)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as shown:
        os.close(theirs)
        try:
            seen = b""
            while not re.search(rb"/S.*instructions", seen, re.S):
                seen += os.read(ours, 1 << 16)
            shown.send_signal(signal.SIGINT)
            with suppress(OSError):  # EIO once the other side is closed
                while data := os.read(ours, 1 << 16):
                    seen += data
            assert shown.wait(20) == 0
        finally:
            shown.kill()
            os.close(ours)
    assert b"Ctrl-C ends" in seen
    assert b"Traceback" not in seen
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1


def vm_sample(vm: KvmStats[KvmVmStat], *vcpus: KvmStats[KvmVcpuStat]) -> VmSample:
    def read(stats) -> Stats:
        with StatsFd(stats.getfd()) as descriptor:
            return descriptor.read()

    return VmSample(vm.stats_id, 1, "a command", read(vm), tuple(map(read, vcpus)))


def made_up() -> tuple[KvmStats[KvmVmStat], KvmStats[KvmVcpuStat], KvmStats[KvmVcpuStat]]:
    return (
        KvmStats("made-up", "kvm-1", KvmVmStat),
        KvmStats("made-up", "kvm-1/vcpu-0", KvmVcpuStat),
        KvmStats("made-up", "kvm-1/vcpu-1", KvmVcpuStat),
    )


def test_rows_are_totals_and_rates_the_busiest_first():
    vm, one, two = made_up()
    one.stat.exits, two.stat.exits, two.stat.io_exits, two.stat.blocking = 10, 20, 1000, 1
    before = vm_sample(vm, one, two)
    one.stat.exits, two.stat.exits = 30, 70
    vm.stat.pages_4k = 5
    rows = Period(vm_sample(vm, one, two), before, 2.0).rows()
    assert [(r.name, r.total, r.rate) for r in rows] == [
        ("exits", 100, 35.0),
        ("io_exits", 1000, 0.0),
        ("pages_4k", 5, None),
        ("blocking", 1, None),
    ]
    assert (rows[0].vcpu_totals, rows[0].vcpu_rates) == ((30, 70), (10.0, 25.0))


def test_times_come_last_in_seconds_and_shares_of_the_interval():
    vm, one, two = made_up()
    one.stat.halt_wait_ns, one.stat.exits = 500_000_000, 3
    before = vm_sample(vm, one, two)
    one.stat.halt_wait_ns += 1_000_000_000
    exits, waited = Period(vm_sample(vm, one, two), before, 2.0).rows()
    assert (exits.name, waited.name, waited.is_time) == ("exits", "halt_wait_ns", True)
    assert list(_cells(waited, True, 2)) == ["halt_wait_ns", "1.50 s", "50.0%", "50.0%", "0.0%"]
    assert list(_cells(waited, False, 1)) == ["halt_wait_ns", "1.50 s", "1.50 s"]


def test_a_vcpu_that_came_since_counts_from_nothing():
    vm, one, two = made_up()
    one.stat.exits, two.stat.exits = 10, 8
    (row,) = Period(vm_sample(vm, one, two), vm_sample(vm, one), 2.0).rows()
    assert (row.total, row.rate, row.vcpu_rates) == (18, 4.0, (0.0, 4.0))


def test_without_an_earlier_sample_there_are_totals_only():
    vm, one, two = made_up()
    one.stat.exits = 10
    (row,) = Period(vm_sample(vm, one, two)).rows()
    assert (row.total, row.rate) == (10, None)


def test_exits_to_userspace_are_shown_by_reason_and_other_histograms_not():
    _, one, _ = made_up()
    one.stat.userspace_exits[uapi.KVM_EXIT_MMIO] = 4
    one.stat.halt_wait_hist[7] = 9
    with StatsFd(one.getfd()) as descriptor:
        values = flat(descriptor.read())
    assert values["userspace_exits[mmio]"].now == values["userspace_exits"].now == 4
    assert [name for name in values if "hist" in name] == []


def test_a_file_of_that_name_that_holds_no_statistics():
    fd = os.memfd_create("kvm-vm-stats")
    try:
        assert counters._read(counters.PROC / "self" / "fd" / str(fd)) is None
    finally:
        os.close(fd)
