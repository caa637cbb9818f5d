"""What `anykvm boot` refuses before there is a guest: one line that says why, and a status."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from anykvm.cli import guest, main
from anykvm.vmm.images import Images

from .process import Anykvm
from .tiny_kernel import SPIN

USAGE, UNAVAILABLE = 2, 120
NOBODY = 65534


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--memory", "8M"], "8 MiB of memory is too little: the kernel ends at "),
        (["--memory", "lots"], "--memory lots: expected a size such as 512M or 2G"),
        (["--memory", "0"], "memory of 0 bytes: expected a multiple of 4096"),
        (["--memory", "99999999T"], "70368744177664 at most"),
        (["--cpus", "two"], "Invalid value for '--cpus'"),
        (["--cpus", "-1"], "--cpus -1: expected 1 or more"),
        (["--cpus", "5000"], "5000 processors: ACPI can name 4096 here"),
        (["--cpus", "1025"], "1025 CPUs: expected 1 to "),
        (["--backend", "vax"], "'vax' is not one of 'auto', 'soft', 'host'"),
        (["--timeout", "soon"], "Invalid value for '--timeout'"),
        (["--bogus"], "No such option: --bogus"),
        (["vmlinuz"], "unexpected extra argument"),
        (["--kernel", "/nowhere"], "cannot read the kernel /nowhere: No such file"),
        (["--initrd", "/nowhere"], "cannot read the initrd /nowhere: No such file"),
        (["--kernel", "/proc"], "cannot read the kernel /proc: Is a directory"),
        (["--initrd", "/proc"], "cannot read the initrd /proc: Is a directory"),
        # Opens, and gives EIO when it is read: for root, too.
        (["--kernel", "/proc/self/mem"], "cannot read the kernel /proc/self/mem: Input/output"),
        (["--initrd", "/proc/self/mem"], "cannot read the initrd /proc/self/mem: Input/output"),
        (["--kernel", "/dev/null"], "/dev/null: not a Linux kernel: 0 bytes"),
        (["--kernel", __file__], f"{__file__}: not a bzImage: expected 'HdrS'"),
    ],
    ids=" ".join,
)
def test_one_line_and_status_2(
    images: Images, capfd: pytest.CaptureFixture[str], arguments: list[str], complaint: str
) -> None:
    backend = [] if "--backend" in arguments else ["--backend", "soft"]
    assert main.run(["boot", *backend, *arguments]) == USAGE
    out, err = capfd.readouterr()
    assert out == ""
    *before, last = err.splitlines()
    assert last.startswith("anykvm: ")
    assert complaint in last
    assert all(line.startswith("anykvm: KVM: soft") for line in before)


def test_as_a_process(anykvm: Anykvm) -> None:
    result = anykvm.run("boot", "--kernel", __file__, "--exec", "true")
    assert (result.status, result.out) == (USAGE, "")
    assert "not a bzImage" in result.err
    assert len(result.err.splitlines()) == 1


def test_a_kernel_that_is_cut_short(
    images: Images, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "vmlinuz"
    short.write_bytes(images.kernel.read_bytes()[: 1 << 20])
    assert main.run(["boot", "--kernel", str(short), "--exec", "true"]) == USAGE
    assert f"{short}: the kernel is cut short" in capfd.readouterr().err


def test_a_file_without_the_right_to_it(anykvm: Anykvm, tmp_path: Path) -> None:
    """Root reads everything, so as root this needs a reader who is nobody."""
    assert guest.STDOUT == 1  # imported already, since nobody may not read the sources
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(b"secret")
    kernel.chmod(0)
    arguments = ["boot", "--kernel", str(kernel), "--backend", "soft"]
    if os.geteuid() != 0:
        result = anykvm.run(*arguments)
        assert (result.status, result.err) == (USAGE, denied(kernel))
        return
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(NOBODY)
        with os.fdopen(writing, "w") as sys.stderr:
            status = main.run(arguments)
        os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == USAGE
    assert text == denied(kernel)


def denied(kernel: Path) -> str:
    return f"anykvm: cannot read the kernel {kernel}: Permission denied\n"


def test_the_hosts_kvm_where_there_is_none(
    tiny: Callable[[bytes], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    missing = str(tmp_path / "kvm")
    monkeypatch.setattr("anykvm.api.Kvm.__init__.__defaults__", (missing,))
    assert main.run([*tiny(SPIN), "--backend", "host"]) == UNAVAILABLE
    assert (
        f"cannot use KVM: [Errno 2] No such file or directory: '{missing}'"
        in capfd.readouterr().err
    )


def without_apt(folder: Path) -> str:
    """A PATH with python's needs and no package client."""
    folder.mkdir()
    return str(folder)


def test_a_damaged_busybox_and_no_apt(
    anykvm: Anykvm, own_cache: Path, images: Images, tmp_path: Path
) -> None:
    shutil.copytree(images.kernel.parent, own_cache / "images")
    (own_cache / "images" / images.busybox.name).write_bytes(b"\x7fELF")
    anykvm.environment["PATH"] = without_apt(tmp_path / "bin")
    result = anykvm.run("boot", "--backend", "soft", "--exec", "true")
    assert result.status == UNAVAILABLE
    assert result.complaint == (
        "anykvm: cannot obtain a guest kernel: apt-get is not installed. "
        "Pass --kernel FILE and --initrd FILE instead"
    )
    assert not list((own_cache / "images").glob("fetch.*"))


def test_a_cache_folder_that_cannot_be_made(anykvm: Anykvm, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    anykvm.environment["ANYKVM_CACHE"] = str(file / "cache")
    result = anykvm.run("boot", "--backend", "soft", "--exec", "true")
    assert result.status == UNAVAILABLE
    assert f"cannot keep images in {file}/cache/images: " in result.complaint
    assert "Not a directory" in result.complaint


def test_ps_when_there_is_nobody(anykvm: Anykvm) -> None:
    result = anykvm.run("ps", "--json")
    assert result.status == 0
    assert isinstance(json.loads(result.out), list)
