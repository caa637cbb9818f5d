"""Obtaining kernel and busybox, with an apt of our own: no network, the real code paths."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from anykvm.vmm import images
from anykvm.vmm.apt import Apt, AptError, Record
from anykvm.vmm.images import ImageError, Images, obtain

from .packages import BUSYBOX, KERNEL, RELEASE, Repository, deb, debian

BUSYBOX_FILE = "busybox-1:1.35.0-4"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    made = debian(tmp_path / "repository")
    monkeypatch.setenv("PATH", made.search_path())
    monkeypatch.setenv("ANYKVM_CACHE", str(tmp_path / "cache"))
    return made


@pytest.fixture
def kept(tmp_path) -> Path:
    return tmp_path / "cache" / "images"


def assert_complete(found: Images, kept: Path) -> None:
    assert found == Images(kept / f"vmlinuz-{RELEASE}", kept / BUSYBOX_FILE, RELEASE)
    assert found.kernel.read_bytes() == KERNEL
    assert found.busybox.read_bytes() == BUSYBOX
    assert sorted(path.name for path in kept.iterdir()) == sorted(
        [f"vmlinuz-{RELEASE}", BUSYBOX_FILE, "lock", "manifest.json"]
    )


def test_fetches_with_the_system_lists(repository, kept):
    told: list[tuple[str, float | None]] = []
    assert_complete(obtain(lambda what, fraction: told.append((what, fraction))), kept)
    assert not any(" update" in line for line in repository.calls())
    assert (f"downloading linux-image-{RELEASE} 6.1.9-1", 0.5) in told
    assert told[-1][0] == f"kept in {kept}; remove that folder to fetch newer ones"


def test_the_second_time_needs_no_apt(repository, kept, monkeypatch):
    obtain()
    monkeypatch.setenv("PATH", "/nowhere")
    assert_complete(obtain(), kept)


def test_private_lists_where_the_system_has_none(repository, kept):
    repository.set("system-is-empty")
    assert_complete(obtain(), kept)
    updates = [line for line in repository.calls() if line.endswith(" update")]
    assert len(updates) == 1
    assert "Dir::State::lists=" in updates[0]


def test_private_lists_where_the_system_ones_are_too_old(repository, kept):
    (repository.folder / "lists").rename(repository.folder / "private")
    (repository.folder / "lists").mkdir()
    assert_complete(obtain(), kept)


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + b"!", lambda b: b""])
@pytest.mark.parametrize("file", [f"vmlinuz-{RELEASE}", BUSYBOX_FILE])
def test_a_damaged_file_is_fetched_again(repository, kept, file, damage):
    obtain()
    (kept / file).write_bytes(damage((kept / file).read_bytes()))
    assert_complete(obtain(), kept)


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", '{"kernel": {"file": 1}, "busybox": 2}'])
def test_a_damaged_manifest_is_made_again(repository, kept, manifest):
    obtain()
    (kept / "manifest.json").write_text(manifest)
    assert_complete(obtain(), kept)


def test_a_newer_version_replaces_the_old_file(repository, kept):
    kept.mkdir(parents=True)
    (kept / "vmlinuz-5.10.0-1-cloud-amd64").write_bytes(b"old")
    (kept / "fetch.abandoned").mkdir()
    assert_complete(obtain(), kept)


def test_without_apt_it_says_what_to_pass(repository, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ImageError, match=r"apt-get is not installed.*--kernel FILE"):
        obtain()


def test_a_distribution_without_the_package(repository):
    (repository.folder / "lists" / "linux-image-cloud-amd64").unlink()
    with pytest.raises(ImageError, match="offer no linux-image-cloud-amd64"):
        obtain()


def test_offline_says_what_apt_said_and_leaves_nothing(repository, kept):
    repository.set("offline")
    with pytest.raises(ImageError, match="Could not resolve host"):
        obtain()
    assert [path.name for path in kept.iterdir()] == ["lock"]


def test_offline_with_empty_lists(repository):
    repository.set("offline")
    for record in (repository.folder / "lists").iterdir():
        record.unlink()
    with pytest.raises(ImageError, match="Failed to fetch the lists"):
        obtain()


def test_a_download_that_is_not_what_the_lists_say(repository):
    package = repository.folder / "pool" / "busybox-static.deb"
    content = package.read_bytes()
    package.write_bytes(content[:-1] + b"!")
    with pytest.raises(ImageError, match="SHA256"):
        obtain()
    package.write_bytes(content[:-1])
    with pytest.raises(ImageError, match="bytes where the lists say"):
        obtain()


@pytest.mark.parametrize(
    ("package", "files", "complaint"),
    [
        (f"linux-image-{RELEASE}", {f"boot/vmlinuz-{RELEASE}": b"MZ" * 999}, "is not a bzImage"),
        (f"linux-image-{RELEASE}", {"boot/config": b""}, "does not contain"),
        ("busybox-static", {"bin/busybox": b"\x7fELF" + bytes(99)}, "is not an x86-64 program"),
    ],
)
def test_a_package_with_other_contents(repository, package, files, complaint):
    repository.add(package, "6.1.9-1", deb(files))
    with pytest.raises(ImageError, match=complaint):
        obtain()


def test_a_meta_package_without_a_kernel(repository):
    repository.add("linux-image-cloud-amd64", "1", depends="libc6")
    with pytest.raises(ImageError, match="depends on no kernel"):
        obtain()


def test_a_second_process_waits_and_then_uses_what_the_first_got(repository, kept):
    kept.mkdir(parents=True)
    told = threading.Event()
    found: list[Images] = []
    with (kept / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = threading.Thread(
            target=lambda: found.append(
                obtain(lambda what, _: told.set() if "wait" in what else None)
            )
        )
        waiting.start()
        assert told.wait(10)
        images._fetch(kept, lambda what, fraction: None)
        before = len(repository.calls())
    waiting.join(10)
    assert_complete(found[0], kept)
    assert len(repository.calls()) == before


def test_two_processes_at_once_fetch_once(repository, kept):
    program = "from anykvm.vmm.images import obtain; print(obtain().release)"
    both = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=60)[0] for process in both] == [RELEASE + "\n"] * 2
    assert sum(" download " in line for line in repository.calls()) == 2


def test_a_cache_that_cannot_be_written(repository, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ANYKVM_CACHE", str(tmp_path / "file"))
    with pytest.raises(ImageError, match="cannot keep images"):
        obtain()


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("ANYKVM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert images.cache_folder() == Path("/x/anykvm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert images.cache_folder() == Path("/h/.cache/anykvm")
    monkeypatch.setenv("ANYKVM_CACHE", "/own")
    assert images.cache_folder() == Path("/own")


def test_the_manifest_says_where_the_files_come_from(repository, kept):
    obtain()
    rows = json.loads((kept / "manifest.json").read_text())
    assert rows["kernel"]["package"] == f"linux-image-{RELEASE}"
    assert rows["kernel"]["version"] == "6.1.9-1"
    assert rows["busybox"]["size"] == len(BUSYBOX)


def test_a_record_without_a_hash_is_refused():
    with pytest.raises(AptError, match="SHA256"):
        Record.parse("Package: p\nVersion: 1\nSize: 3\n")


def test_only_private_lists_are_updated(repository, tmp_path):
    with pytest.raises(ValueError, match="private"):
        Apt(tmp_path).update(lambda what, fraction: None)
