"""`anykvm boot` at a terminal: one guest with two processors, looked at from inside and outside.

The tests share the guest; the last one ends it.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from anykvm.vmm.images import Images

from .process import Anykvm
from .terminal import COLUMNS, CTRL_C, PROMPT, ROWS, Terminal

HOG = "(i=0; while [ $i -lt 40000 ]; do i=$((i+1)); done)"
JIFFIES_PER_SECOND = 100
CPU_LINE = re.compile(r"^cpu(\d) (.*)", re.MULTILINE)


def test_what_it_says_at_first(shell: Terminal) -> None:
    lines = shell.shown.decode().split("\r\n")
    assert re.fullmatch(r"anykvm: KVM: soft \(.*\); 2 CPU, 512 MiB; Ctrl-A X leaves", lines[0])
    assert "anykvm: /init" in lines


def test_a_command(shell: Terminal, images: Images) -> None:
    assert shell.shell("uname -r; nproc") == f"{images.release}\n2\n"
    assert shell.shell("stty size").strip() == f"{ROWS} {COLUMNS}"


def test_descriptors_and_threads_as_of_any_kvm_process(shell: Terminal) -> None:
    folder = Path(f"/proc/{shell.process.pid}")
    links = [str(path.readlink()) for path in (folder / "fd").iterdir()]
    names = [re.sub(r"/memfd:(.*) \(deleted\)", r"\1", link) for link in links]
    for name in ("kvm", "kvm-vm", "kvm-vcpu:0", "kvm-vcpu:1"):
        assert names.count(name) == 1, names
    comms = [(task / "comm").read_text().strip() for task in (folder / "task").iterdir()]
    assert {"CPU 0/KVM", "CPU 1/KVM", "IO/anykvm"} <= set(comms)


def test_ps_lists_it(shell: Terminal, anykvm: Anykvm) -> None:
    listed = json.loads(anykvm.run("ps", "--json").out)
    (found,) = (record for record in listed if record["pid"] == shell.process.pid)
    assert (found["backend"], found["vms"], found["vcpus"]) == ("soft", 1, 2)
    assert found["memory"] == 512 << 20
    assert {"CPU 0/KVM", "CPU 1/KVM"} <= set(found["threads"])
    table = anykvm.run("ps").out
    (row,) = (line for line in table.splitlines() if line.split()[:1] == [str(shell.process.pid)])
    assert "512 MiB" in row
    assert "kvm-vcpu:1" in row
    assert "CPU 1/KVM" in row
    assert "boot --backend soft --cpus 2" in row


def test_floating_point(shell: Terminal) -> None:
    """The same operations in the same order give the same bits."""
    program = "for (n = 1; n <= 300; n++) s += 1 / (n * n + 0.1); a = -7.9 / 3"
    printed = shell.shell(f"awk 'BEGIN {{ {program}; printf \"%.17g %.17g %d\", s, a, a }}'")
    total = 0.0
    for n in range(1, 301):
        total += 1 / (n * n + 0.1)
    assert printed.split() == [f"{total:.17g}", f"{-7.9 / 3:.17g}", "-2"]


def test_the_clock_is_the_hosts(shell: Terminal) -> None:
    guest = int(shell.shell("date +%s"))
    assert abs(guest - time.time()) < 10


def test_a_second_takes_a_second(shell: Terminal) -> None:
    began = time.monotonic()
    uptimes = shell.shell("cat /proc/uptime; sleep 2; cat /proc/uptime")
    took = time.monotonic() - began
    before, after = (float(line.split()[0]) for line in uptimes.splitlines())
    assert 2.0 <= after - before <= took + 0.02
    assert took < 8


def test_the_guest_uses_what_kvm_offers_it(shell: Terminal) -> None:
    """And its local APICs, some of whose EOIs are skipped, go on interrupting."""
    said = shell.shell("dmesg | grep -e kvm-guest -e kvm-clock")
    for what in ("PV spinlocks enabled", "setup PV IPIs", "pv remote TLB flush", "PV sched yield"):
        assert what in said, said
    ticks = [local_timer_interrupts(shell) for _ in range(2)]
    assert all(after > before for before, after in zip(*ticks, strict=True))


def local_timer_interrupts(shell: Terminal) -> list[int]:
    """Of each processor, after some work on both."""
    shell.shell("(i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done) & sleep 0.2; wait")
    (line,) = re.findall(r"LOC: +(\d+) +(\d+)", shell.shell("cat /proc/interrupts"))
    return [int(count) for count in line]


def test_ctrl_c_ends_the_program_in_the_foreground(shell: Terminal) -> None:
    shell.type(b"sleep 1000\r")
    shell.expect(re.compile(rb"sleep 1000\r\n"))
    time.sleep(0.5)
    shell.type(CTRL_C)
    shell.expect(PROMPT, 20)
    assert shell.shell("true") == ""


def busy(shell: Terminal) -> dict[str, int]:
    """Each processor's time in user mode, in jiffies."""
    return {
        cpu: int(rest.split()[0]) for cpu, rest in CPU_LINE.findall(shell.shell("cat /proc/stat"))
    }


def host_seconds(pid: int, name: str) -> float:
    """Processor time that threads of that name have had from the host."""
    jiffies = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        comm, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
        jiffies += int(rest.split()[11]) if comm == name else 0
    return jiffies / JIFFIES_PER_SECOND


def both_vcpus(pid: int) -> list[float]:
    return [host_seconds(pid, f"CPU {cpu}/KVM") for cpu in "01"]


def test_both_processors_work_at_once(shell: Terminal) -> None:
    pid = shell.process.pid
    before, host_before = busy(shell), both_vcpus(pid)
    began = time.monotonic()
    shell.shell(f"{HOG} & {HOG}; wait")
    took = time.monotonic() - began
    after, host_after = busy(shell), both_vcpus(pid)
    had = [now - then for then, now in zip(host_before, host_after, strict=True)]
    assert min(had) > 0.1 * took, (had, took)  # on a machine that does other things, too
    for cpu, seconds in zip("01", had, strict=True):
        jiffies = after[cpu] - before[cpu]
        assert jiffies > 0.5 * seconds * JIFFIES_PER_SECOND, (cpu, jiffies, seconds)


def test_a_panic_is_shown_and_has_a_status_of_its_own(shell: Terminal) -> None:
    shell.type(b"echo c >/proc/sysrq-trigger\r")
    assert shell.end() == 121
    shown = shell.shown.decode(errors="replace")
    assert "Kernel panic - not syncing: sysrq triggered crash" in shown
    assert shown.rstrip().endswith("anykvm: the guest's kernel panicked")
    assert shell.attributes() == shell.before
