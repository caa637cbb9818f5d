"""`anykvm doctor`: what this machine offers, what is missing, and which backend `auto` takes."""

from __future__ import annotations

import errno
import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated

import typer

from anykvm.cli.errors import Status

if TYPE_CHECKING:
    from anykvm.proxy.reach import Trial

GIB = 1 << 30
VALUE_WIDTH = 76
ENOUGH_MEMORY = GIB
USER_NOTIFICATION = (5, 9)  # Linux, with SECCOMP_IOCTL_NOTIF_ADDFD
SYNC_WAKE_UP = (6, 6)
YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
PTRACE_SCOPES = {
    0: "any process of the same user",
    1: "descendants only, which is enough",
    2: "administrators only: anykvm exec needs CAP_SYS_PTRACE",
    3: "nobody: anykvm exec cannot work",
}
KVM_GET_API_VERSION = 0xAE00


@dataclass(frozen=True)
class Finding:
    """One line of the report. `ok` False is something to mend; `advice` says how."""

    name: str
    value: str
    ok: bool = True
    advice: str = ""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> int:
    """Say what this machine offers to virtual machines, and what anykvm makes of it."""
    findings = [examine() for examine in EXAMINATIONS] + what_exec_does() + [backend()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            print(_line(finding, width))
    return Status.OK if all(f.ok for f in findings) else Status.UNAVAILABLE


def _line(finding: Finding, width: int) -> str:
    """The name, and beside it the value and, below, the advice."""
    mark = "  " if finding.ok else "! "
    texts = [line for text in (finding.value, finding.advice) for line in wrap(text, VALUE_WIDTH)]
    indented = f"\n{' ' * (width + 4)}".join(texts)
    return f"{mark}{finding.name:<{width}}  {indented}"


def _kernel_version() -> tuple[int, int]:
    major, minor = platform.release().split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()))


def kernel() -> Finding:
    version = _kernel_version()
    value = f"{platform.system()} {platform.release()} {platform.machine()}"
    if version < USER_NOTIFICATION:
        return Finding("kernel", value, False, "anykvm exec needs Linux 5.9 or later")
    slow = "anykvm exec is several times faster from Linux 6.6 on"
    return Finding("kernel", value, advice="" if version >= SYNC_WAKE_UP else slow)


def processor() -> Finding:
    from anykvm.fs.backend import hardware_virtualization

    extension = hardware_virtualization()
    if platform.machine() != "x86_64":
        return Finding("processor", platform.machine(), False, "anykvm's processor needs an x86-64")
    return Finding("processor", f"hardware virtualization: {extension or 'none'}")


def kvm_device() -> Finding:
    from anykvm.fs.backend import HOST_KVM, hardware_virtualization

    try:
        fd = os.open(HOST_KVM, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        advice = "add yourself to the group kvm" if error.errno == errno.EACCES else ""
        return Finding(HOST_KVM, error.strerror or str(error), advice=advice)
    os.close(fd)
    hardware = hardware_virtualization()
    kind = f"with {hardware}" if hardware else "without vmx or svm: it emulates, and is not used"
    return Finding(HOST_KVM, f"opens, {kind}")


def seccomp() -> Finding:
    """Tried in a child."""
    from anykvm.proxy.launch import filter_refusal

    refused = filter_refusal()
    if not refused:
        return Finding("seccomp notification", "yes")
    advice = "anykvm exec needs it: Linux 5.9, and a container that allows seccomp(2)"
    return Finding("seccomp notification", f"no: {refused}", False, advice)


def ptrace_scope() -> Finding:
    try:
        scope = int(YAMA.read_text())
    except (OSError, ValueError):
        scope = 0
    return Finding("ptrace scope", PTRACE_SCOPES.get(scope, str(scope)))


def tried_on_a_child(trial: Trial) -> Finding:
    """One of the things that anykvm exec does with a program."""
    from anykvm.proxy.reach import some_child

    with some_child() as pid:
        try:
            trial.does(pid)
        except OSError as error:
            advice = f"anykvm exec needs it: {trial.advice}"
            return Finding(trial.name, f"refused: {error.strerror}", False, advice)
    return Finding(trial.name, "works on descendants")


def what_exec_does() -> list[Finding]:
    from anykvm.proxy.reach import TRIALS

    return list(map(tried_on_a_child, TRIALS))


def cpu_model() -> Finding:
    from anykvm.x86.cpu_models import models
    from anykvm.x86.cpuid import feature_names, supported_cpuid

    text = " ".join(feature_names(supported_cpuid()))
    *_, last = models()
    return Finding("processor model max", f"{last} and more: {text}")


def memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as error:
        return Finding("memory", f"not known: /proc/meminfo: {error.strerror}")
    facts = {name: int(rest.split()[0]) << 10 for name, rest in (ln.split(":") for ln in lines)}
    available = facts["MemAvailable"]
    value = f"{available / GIB:.1f} GiB available of {facts['MemTotal'] / GIB:.1f} GiB"
    return Finding("memory", value, advice="" if available >= ENOUGH_MEMORY else "that is little")


def processors() -> Finding:
    return Finding("processors", str(len(os.sched_getaffinity(0))))


def backend() -> Finding:
    from anykvm.fs.backend import choose

    choice = choose()
    return Finding("backend auto takes", f"{choice.backend}: {choice.reason}")


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    kernel,
    processor,
    processors,
    memory,
    kvm_device,
    cpu_model,
    seccomp,
    ptrace_scope,
)
