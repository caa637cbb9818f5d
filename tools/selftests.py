"""The kernel's own KVM selftests, on anykvm's /dev/kvm: `tools/selftests.py`.

    selftests.py [--keep DIR] [--only REGEX] [--limit SECONDS] [--json FILE] [--write] [--direct]

Gets Debian's package linux-source-6.1, builds tools/testing/selftests/kvm in a scratch folder and
runs each of the 68 x86-64 tests under `anykvm exec`, in the order of the kernel's Makefile. Needs
apt-get, dpkg-deb, tar, xz, make, gcc and the C library's headers:

    apt-get install --no-install-recommends gcc libc6-dev linux-libc-dev make xz-utils

The exit status is 0 if every test passed, or was skipped or failed as the table `ABSENT` says.
With `--keep` what each test printed is in DIR/output. `--write` puts the table into
docs/correctness.md. `--direct` runs the tests on the machine's own
/dev/kvm instead, to compare.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from anykvm.vmm.apt import Apt, AptError

PACKAGE = "linux-source-6.1"
ARCHIVE = f"usr/src/{PACKAGE}.tar.xz"
# What of the kernel the build reads.
PARTS = ("tools", "scripts", "include", "arch/x86/include")
SELFTESTS = "tools/testing/selftests/kvm"
LISTED = re.compile(r"^TEST_GEN_PROGS(?:_EXTENDED)?_x86_64 \+?= (\S+)$", re.M)
PROGRAMS = {
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
    "xz": "xz-utils",
    "make": "make",
    "gcc": "gcc libc6-dev linux-libc-dev",
}
# Two names of later kernels: one test uses the first, Debian's linux/kvm.h the second.
COMPATIBLE = """\
#define TEST_ASSERT_EQ(a, b) ASSERT_EQ(a, b)
#ifndef __DECLARE_FLEX_ARRAY
#define __DECLARE_FLEX_ARRAY(TYPE, NAME) struct { struct { } __empty_ ## NAME; TYPE NAME[]; }
#endif
"""
DOCUMENT = Path(__file__).resolve().parent.parent / "docs/correctness.md"
BEGIN, END = "<!-- selftests -->", "<!-- /selftests -->"
KSFT_SKIP = 4
LIMIT = 120.0
PASS, SKIP, FAIL, TIMEOUT, CRASH = "pass", "skip", "fail", "timeout", "crash"
EXEC = "from anykvm.cli.main import main; main()"
BROKEN = re.compile(r"Traceback \(most recent|a call could not be answered")

# Smaller than by default, or as the kernel's own script has it: what takes minutes otherwise.
ARGUMENTS = {
    "max_guest_memory_test": "-c 2 -m 8 -s 1",
    "memslot_modification_stress_test": "-v 2 -i 100",
    "memslot_perf_test": "-l 1 -s 512",
    "nx_huge_pages_test": "-t 887563923 -p 100",
    "set_memory_region_test": "2",
}
LONGER = {"hardware_disable_test": 900.0, "set_memory_region_test": 400.0}

# They compare clocks or rates, which other work on the machine disturbs.
TIMED = ("hyperv_clock", "rseq_test")
TRIES = 3

NESTED_VMX = "nested virtualization (VMX)"
ABSENT = {
    "access_tracking_perf_test": "the host kernel's idle page tracking",
    "amx_test": "AMX",
    "emulator_error_test": "KVM_CAP_SMALLER_MAXPHYADDR",
    "evmcs_test": NESTED_VMX,
    "mmio_warning_test": "the host's kvm_intel module",
    "nx_huge_pages_test": "huge pages in second-level page tables, of which there are none",
    "pmu_event_filter_test": "performance counters",
    "sev_migrate_tests": "memory encryption (SEV)",
    "vmx_apic_access_test": NESTED_VMX,
    "vmx_close_while_nested_test": NESTED_VMX,
    "vmx_dirty_log_test": NESTED_VMX,
    "vmx_exception_with_invalid_guest_state": "the host's kvm_intel module",
    "vmx_invalid_nested_guest_state": NESTED_VMX,
    "vmx_msrs_test": NESTED_VMX,
    "vmx_nested_tsc_scaling_test": NESTED_VMX,
    "vmx_pmu_caps_test": "performance counters",
    "vmx_preemption_timer_test": NESTED_VMX,
    "vmx_set_nested_state_test": NESTED_VMX,
    "vmx_tsc_adjust_test": NESTED_VMX,
    "xen_shinfo_test": "Xen's shared info pages and event channels",
}


class SelftestError(Exception):
    """The tests could not be obtained or built."""


@dataclass(frozen=True)
class Result:
    """One test's end. `last` is the last line that it printed."""

    name: str
    arguments: str
    outcome: str
    seconds: float
    last: str
    supervisor_sound: bool
    tries: int = 1

    @property
    def absent(self) -> str:
        return "" if self.outcome == PASS else ABSENT.get(self.name, "")

    @property
    def expected(self) -> bool:
        known = self.outcome in (SKIP, FAIL) and self.name in ABSENT
        return self.supervisor_sound and (self.outcome == PASS or known)


# The source and the build.


def run_step(command: Sequence[str], folder: Path, log: Path) -> int:
    with log.open("ab") as output:
        return subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ).returncode


def download(folder: Path) -> Path:
    """The package, from the system's own sources."""
    found = sorted(folder.glob(f"{PACKAGE}_*.deb"))
    if found:
        return found[-1]
    apt = Apt(folder / "apt")
    record = apt.show(PACKAGE)
    if record is None:
        raise SelftestError(f"apt knows no package {PACKAGE}; apt-get update, or Debian 12's list")
    return apt.download(record, folder, lambda what, fraction: None)


def unpack(folder: Path) -> Path:
    """The kernel's folder."""
    source = folder / PACKAGE
    if not (source / SELFTESTS / "Makefile").exists():
        print(f"getting {PACKAGE}", file=sys.stderr)
        package = download(folder)
        log = folder / "unpack.log"
        parts = [f"{PACKAGE}/{part}" for part in PARTS]
        if run_step(["dpkg-deb", "-x", str(package), "."], folder, log) or run_step(
            ["tar", "-xf", ARCHIVE, *parts], folder, log
        ):
            raise SelftestError(f"cannot unpack {package}: see {log}")
    return source


def build(folder: Path) -> tuple[Path, list[str]]:
    """Where the programs are, and their names with folders."""
    missing = {program: name for program, name in PROGRAMS.items() if not shutil.which(program)}
    if missing:
        packages = " ".join(missing.values())
        raise SelftestError(f"{', '.join(missing)} missing: apt-get install {packages}")
    source, output, log = unpack(folder), folder / "build", folder / "build.log"
    names = LISTED.findall((source / SELFTESTS / "Makefile").read_text())
    if not all((output / name).exists() for name in names):
        print("building", file=sys.stderr)
        header = folder / "compatible.h"
        header.write_text(COMPATIBLE)
        words = [f"OUTPUT={output}", "ARCH=x86_64", f"EXTRA_CFLAGS=-include {header}"]
        jobs = f"-j{len(os.sched_getaffinity(0))}"
        if run_step(["make", "-k", jobs, *words], source / SELFTESTS, log):
            raise SelftestError(f"the build failed: see {log}")
    return output, names


@contextmanager
def scratch(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="selftests-") as name:
        yield Path(name)


# Running.


def run_one(program: Path, log: Path, limit: float, direct: bool) -> Result:
    name = program.name
    arguments = ARGUMENTS.get(name, "")
    under = [] if direct else [sys.executable, "-c", EXEC, "exec", "--backend", "soft", "--"]
    limit = max(limit, LONGER.get(name, 0))
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*under, str(program), *arguments.split()],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            outcome = outcome_of(process.wait(limit))
        except subprocess.TimeoutExpired:
            outcome = TIMEOUT
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - began
    text = log.read_text(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    sound = not BROKEN.search(text)
    return Result(name, arguments, outcome, seconds, lines[-1] if lines else "", sound)


def run_timed(program: Path, log: Path, limit: float, direct: bool) -> Result:
    """The same, more than once if the test is about time and failed."""
    for tries in range(1, TRIES + 1):
        result = replace(run_one(program, log, limit, direct), tries=tries)
        if result.outcome != FAIL or program.name not in TIMED:
            break
    return result


def outcome_of(status: int) -> str:
    if status < 0:
        return CRASH
    return {0: PASS, KSFT_SKIP: SKIP}.get(status, FAIL)


def show(result: Result) -> None:
    words = f"{result.name} {result.arguments}".rstrip()
    note = f"needs {result.absent}" if result.absent else result.last
    tried = f"{result.tries} tries; " if result.tries > 1 else ""
    broken = "" if result.supervisor_sound else " (the supervisor reported an error)"
    print(f"{words:52} {result.outcome:8}{result.seconds:6.1f} s  {tried}{note}{broken}")
    sys.stdout.flush()


def summary(results: Sequence[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    words = (f"{counts[outcome]} {outcome}" for outcome in (PASS, SKIP, FAIL, TIMEOUT, CRASH))
    return f"{len(results)} tests: {', '.join(words)}"


# The document.


def table(results: Sequence[Result]) -> str:
    rows = ["| test | result | seconds | what is absent |", "| --- | --- | --- | --- |"]
    for result in results:
        words = f"`{result.name}{' ' if result.arguments else ''}{result.arguments}`"
        absent = result.absent or ("" if result.outcome == PASS else result.last.replace("|", "/"))
        outcome = result.outcome if result.tries == 1 else f"{result.outcome}, try {result.tries}"
        rows.append(f"| {words} | {outcome} | {result.seconds:.1f} | {absent} |")
    return "\n".join([f"{summary(results)}.", "", *rows])


def write(results: Sequence[Result]) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise SelftestError(f"{DOCUMENT} has no {BEGIN} and {END}")
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="use and keep this folder")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for a test")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--write", action="store_true", help="the table into docs/correctness.md")
    parser.add_argument("--direct", action="store_true", help="on the machine's own /dev/kvm")
    options = parser.parse_args()
    if options.write and (options.direct or options.only.pattern):
        parser.error("--write is for all tests on anykvm")
    results = []
    try:
        with scratch(options.keep) as folder:
            output, names = build(folder)
            logs = folder / "output"
            logs.mkdir(exist_ok=True)
            for name in names:
                if options.only.search(name):
                    log = logs / f"{Path(name).name}.log"
                    results.append(run_timed(output / name, log, options.limit, options.direct))
                    show(results[-1])
        if options.write:
            write(results)
    except (SelftestError, AptError) as error:
        print(f"selftests: {error}", file=sys.stderr)
        return 2
    print(summary(results))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    return 0 if all(result.expected for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
