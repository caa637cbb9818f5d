"""`anykvm boot --exec`: one command in Debian's kernel, and its status."""

from __future__ import annotations

import hashlib
import json
import re

from anykvm.vmm.images import Images

from .process import Anykvm, Result


def test_its_output_is_all_there_is(report: Result, images: Images) -> None:
    lines = report.out.splitlines()
    digest = hashlib.sha256(images.busybox.read_bytes()).hexdigest()
    assert lines[:3] == [images.release, "1", f"{digest}  /bin/busybox"]
    assert lines[3].split() == ["CPU0"]
    assert all(re.match(r" *\w+: +\d+", line) for line in lines[4:])


def test_its_status_is_the_commands(report: Result) -> None:
    assert report.status == 7


def test_interrupts_were_taken(report: Result) -> None:
    counts = dict(re.findall(r"^ *(\w+): +(\d+)", report.out, re.MULTILINE))
    assert int(counts["LOC"]) > 10
    assert int(counts["4"]) > 0
    assert (counts["ERR"], counts["MIS"], counts["SPU"]) == ("0", "0", "0")


def test_statistics_for_programs(report: Result) -> None:
    """Standard error has nothing else, on a machine that has the images already."""
    record = json.loads(report.err[report.err.index("{") :])
    assert (record["outcome"], record["status"]) == ("exit", 7)
    assert record["cpu"]["instructions_executed"] > 100_000_000
    assert record["exit"]["KVM_EXIT_IO"] >= record["port"]["0x03f8 out"] > len(report.out)


def test_a_kernel_without_an_init_panics(report: Result, anykvm: Anykvm) -> None:
    """No messages but a panic's reach the console, and they say what is wrong."""
    assert report.status == 7
    arguments = ["boot", "--backend", "soft", "--append", "rdinit=/nowhere init=/nowhere"]
    result = anykvm.run(*arguments, "--exec", "true")
    assert result.status == 121
    assert "Kernel panic - not syncing: " in result.out
    assert "Call Trace:" in result.out
    assert result.complaint == "anykvm: the guest's kernel panicked"
