"""Guests for the boot tests: Debian's kernel and busybox, obtained as `anykvm boot` does it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from anykvm.vmm.images import Images, obtain

from .process import Anykvm, Result, wait_until_none_left
from .terminal import PROMPT, Terminal
from .tiny_kernel import bzimage

COLD_BOOT = 240.0
"""Seconds that the first boot may take, which fills the translation cache, on a busy machine."""
REPORT = "uname -r; nproc; sha256sum /bin/busybox; cat /proc/interrupts; exit 7"


@pytest.fixture(scope="session")
def images() -> Images:
    return obtain()


@pytest.fixture
def anykvm(tmp_path: Path) -> Iterator[Anykvm]:
    """Starts `anykvm`; afterwards nothing of it may be left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    started = Anykvm(scratch)
    yield started
    assert wait_until_none_left(started) == []


@pytest.fixture
def own_cache(anykvm: Anykvm, tmp_path: Path) -> Path:
    """A cache folder that nobody has used yet, for this test's `anykvm`."""
    folder = tmp_path / "cache"
    anykvm.environment["ANYKVM_CACHE"] = str(folder)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[[bytes], list[str]]:
    """`boot` with a kernel of a few instructions on the software processor."""

    def arguments(code: bytes) -> list[str]:
        kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
        kernel.write_bytes(bzimage(code))
        initrd.write_bytes(b"not looked at")
        files = ["--kernel", str(kernel), "--initrd", str(initrd)]
        return ["boot", "--backend", "soft", "--memory", "64M", *files]

    return arguments


@pytest.fixture(scope="session")
def report(images: Images, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """One command in Linux. The session's first boot: all others find its translations."""
    started = Anykvm(tmp_path_factory.mktemp("report"))
    result = started.run("boot", "--backend", "soft", "--json", "--exec", REPORT, timeout=COLD_BOOT)
    assert wait_until_none_left(started) == []
    return result


@pytest.fixture(scope="module")
def shell(report: Result, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """Linux on two processors, at its prompt."""
    started = Anykvm(tmp_path_factory.mktemp("shell"))
    with Terminal(started, "boot", "--backend", "soft", "--cpus", "2") as terminal:
        terminal.expect(PROMPT, COLD_BOOT)
        yield terminal
    assert wait_until_none_left(started) == []
