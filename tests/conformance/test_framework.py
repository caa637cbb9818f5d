"""The framework: how a test in a child may end, what is checked of a row's errnos, the table."""

from __future__ import annotations

import os
import signal
import time
from errno import EINVAL, ENXIO

import pytest

from anykvm.kvm.ioctl import IoctlTable, Value
from anykvm.uapi import kvm as uapi
from anykvm.x86.tables import vm_ioctls

from .framework import Statement, conforms, differs, execute, host_may_differ, statement
from .host_process import PASSED, ForkServer, Outcome, run_in_child
from .machine import Machine, NotAvailable, ioctl
from .report import Report


def nothing() -> None:
    pass


def wrong() -> None:
    assert os.getpid() == 0, "not what was expected"


def unavailable() -> None:
    raise NotAvailable("no such thing")


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def stall() -> None:
    time.sleep(60)


def gone() -> None:
    os._exit(3)


@pytest.mark.parametrize(
    ("test", "status", "text"),
    [
        (nothing, "passed", ""),
        (wrong, "FAILED", "AssertionError: not what was expected"),
        (unavailable, "not available", "no such thing"),
        (crash, "crashed", "the process died with status -11"),
        (gone, "crashed", "the process died with status 3"),
        (stall, "stalled", "no answer in 0.2 s"),
    ],
)
def test_how_a_child_ends(test, status: str, text: str) -> None:
    outcome = run_in_child(test, limit=0.2)
    assert (outcome.status, outcome.text.partition("\n")[0]) == (status, text)


def test_the_server_goes_on_after_a_crash() -> None:
    server = ForkServer([crash, nothing, wrong])
    try:
        outcomes = [server.run(n).status for n in (0, 1, 2, 1)]
    finally:
        server.close()
    assert outcomes == ["crashed", "passed", "FAILED", "passed"]


def test_what_a_test_states() -> None:
    @differs(linux=1, anykvm=2, why="it is a test")
    @host_may_differ("its kernel is old")
    def function(expected: int) -> None:
        assert expected == 2

    function = conforms("KVM_RUN")(function)
    made = statement(function)
    assert made is not None
    assert made.difference is not None
    assert (made.ioctls, made.host_excuse) == (("KVM_RUN",), "its kernel is old")
    assert made.difference.ioctls == ("KVM_RUN",)
    execute(function, {}, "soft")
    with pytest.raises(AssertionError):
        execute(function, {}, "host")


def test_an_errno_that_the_row_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    table: IoctlTable[object] = IoctlTable("test")

    @table.row("KVM_SET_TSS_ADDR", Value(), errors={EINVAL: "never"})
    def refuse(vm: object, value: int) -> None:
        raise OSError(ENXIO, "always")

    monkeypatch.setattr(vm_ioctls, "rows", {**vm_ioctls.rows, **table.rows})
    with Machine("soft") as machine, pytest.raises(AssertionError, match="gave ENXIO"):
        ioctl(machine.vm, uapi.KVM_SET_TSS_ADDR)


def test_what_a_test_opened_is_closed() -> None:
    def fail_with_open_descriptors() -> None:
        with Machine("soft") as machine:
            machine.create_vcpu(machine.vm)
            machine.close(machine.vm)
            raise ZeroDivisionError

    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError):
        fail_with_open_descriptors()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_table_has_both_sides() -> None:
    report = Report()
    for name, ioctls in (("a.one", ("KVM_RUN",)), ("a.two", ("KVM_RUN", "KVM_NMI"))):
        report.add(name, "soft", Statement(ioctls), PASSED)
        report.add(name, "host", Statement(ioctls), Outcome("stalled", "no answer"))
    assert list(report.table()) == [
        "ioctl    soft      host",
        "KVM_NMI  1 passed  1 stalled",
        "KVM_RUN  2 passed  2 stalled",
    ]
    assert list(report.summary()) == ["soft: 2 passed", "host: 2 stalled"]
    assert "host: stalled: a.one: no answer" in list(report.remarks())
    assert list(Report(host_note="not run: no device").summary())[1] == "host: not run: no device"
