"""Linux without the paravirtual clock: it takes the TSC's rate from CPUID and ticks by the local
APIC's own timer, at the rate of the crystal that CPUID tells."""

from __future__ import annotations

import re

import pytest

from anykvm.x86.tsc import host_tsc_khz

from .process import PATIENCE, Anykvm, Result

LOOK = (
    "cat /sys/devices/system/clocksource/clocksource0/current_clocksource /proc/interrupts;"
    "dmesg | grep -e 'tsc: ' -e kvm-clock -e deadline;"
    "cat /proc/uptime; sleep 1; cat /proc/uptime; exit 7"
)


def test_a_kernel_that_has_only_what_hardware_has(report: Result, anykvm: Anykvm) -> None:
    assert report.status == 7
    append = ["--append", "no-kvmclock lapic=notscdeadline"]
    arguments = ["boot", "--backend", "soft", *append, "--exec", LOOK]
    result = anykvm.run(*arguments, timeout=2 * PATIENCE)
    assert result.status == 7, result.out
    assert result.out.splitlines()[0] == "tsc"
    assert "kvm-clock" not in result.out
    assert "deadline timer" not in result.out
    ticks = re.search(r"^LOC: +(\d+)", result.out, re.MULTILINE)
    assert ticks is not None
    assert int(ticks[1]) > 100
    rate = re.search(r"tsc: Detected ([\d.]+) MHz TSC", result.out)
    assert rate is not None
    assert float(rate[1]) == pytest.approx(host_tsc_khz() / 1000, rel=1e-3)
    before, after = (float(line.split()[0]) for line in result.out.splitlines()[-2:])
    assert 1.0 <= after - before < 10
