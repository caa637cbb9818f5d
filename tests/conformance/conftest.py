"""Every conformance test runs on soft, here, and on the host's /dev/kvm where it opens, in a child.

See README.md. What the host gives is reported and fails the run only under --strict-host.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest

from anykvm.uapi.names import CAPABILITIES, ioctl_name

from .framework import Statement, execute, statement
from .host_process import PASSED, ForkServer, Outcome
from .machine import PROVIDED
from .report import Report

REPORT = pytest.StashKey[Report]()
SERVER = pytest.StashKey[ForkServer]()
INDEX = pytest.StashKey[int]()
SOFT_LIMIT = 30  # seconds; more than a host's test and its end may take


def host_note() -> str:
    """Why there is no host, empty where there is one."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"not run: /dev/kvm: {error.strerror}"
    return ""


def report_of(config: pytest.Config) -> Report:
    return config.stash.setdefault(REPORT, Report(host_note()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--strict-host", action="store_true", help="fail for what fails on the host")


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> str | None:
    """soft or host; None for tests that are about the framework itself."""
    return getattr(request, "param", None)


@pytest.fixture
def expected() -> None:
    """Stands for what `@differs` provides."""


def _stand_in(name: str) -> object:
    @pytest.fixture(name=name)
    def stand_in() -> None:
        """Stands for what the run's `Machine` provides."""

    return stand_in


for _name in PROVIDED:
    globals()[f"_{_name}"] = _stand_in(_name)


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Names instead of numbers."""
    if argname == "cap" and val in CAPABILITIES:
        return CAPABILITIES[val]
    return ioctl_name(val) if argname == "cmd" and isinstance(val, int) else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if statement(metafunc.function) is not None:
        metafunc.definition.add_marker(pytest.mark.timeout(SOFT_LIMIT))
        sides = ["soft"] if report_of(metafunc.config).host_note else ["soft", "host"]
        metafunc.parametrize("backend", sides, indirect=True)


def _test_of(item: pytest.Function, backend: str) -> partial[None]:
    given = {k: v for k, v in item.callspec.params.items() if k != "backend"}
    return partial(execute, item.function, given, backend)


def _is_host(item: pytest.Item) -> bool:
    made = isinstance(item, pytest.Function) and statement(item.function) is not None
    return made and item.callspec.params["backend"] == "host"


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the server while nothing has been run yet."""
    items = [item for item in session.items if _is_host(item)]
    if not items or session.config.option.collectonly:
        return
    for index, item in enumerate(items):
        item.stash[INDEX] = index
    session.config.stash[SERVER] = ForkServer([_test_of(item, "host") for item in items])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if SERVER in session.config.stash:
        session.config.stash[SERVER].close()


def _name(item: pytest.Function) -> str:
    """The test's name without its side: test_vm.test_irq_line[3]."""
    made = statement(item.function)
    assert made is not None
    parameters = [p for p in item.callspec.id.split("-") if p not in ("soft", "host")]
    return f"{made.name}[{'-'.join(parameters)}]" if parameters else made.name


def _on_host(item: pytest.Function, made: Statement) -> Outcome:
    outcome = item.config.stash[SERVER].run(item.stash[INDEX])
    if outcome.status != "passed" and made.host_excuse and outcome.status != "not available":
        return Outcome("differs", made.host_excuse, outcome.details)
    return outcome


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    made = statement(pyfuncitem.function)
    if made is None:
        return None
    report, side = report_of(pyfuncitem.config), pyfuncitem.callspec.params["backend"]
    if side == "host":
        outcome = _on_host(pyfuncitem, made)
        report.add(_name(pyfuncitem), side, made, outcome)
        strict = pyfuncitem.config.getoption("--strict-host", False)
        if strict and outcome.status in ("FAILED", "crashed", "stalled"):
            pytest.fail(outcome.details or outcome.text, pytrace=False)
        return True
    test = _test_of(pyfuncitem, side)
    report.add(_name(pyfuncitem), side, made, Outcome("FAILED"))
    test()
    report.add(_name(pyfuncitem), side, made, PASSED)
    return True


def _lines(report: Report, asked: bool, all_of_it: bool) -> Iterator[str]:
    if asked:
        yield from report.table()
        yield ""
        yield from report.unavailable()
    if all_of_it:
        yield from report.unprovoked()
    yield from report.remarks()
    yield from report.summary()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The whole table when conformance was asked for by name, otherwise what deserves a look."""
    report = report_of(config)
    if not report.outcomes:
        return
    asked = [argument for argument in config.args if "conformance" in argument]
    terminalreporter.section("conformance: soft beside host")
    for line in _lines(report, bool(asked), any(map(os.path.isdir, asked))):
        terminalreporter.line(line)
