"""Reading packages: what is in them, and every way they can be damaged."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from anykvm.vmm.deb import DebError, ar_members, control_fields, parse_fields, read_file

from .packages import ar, deb, tar


@pytest.fixture
def written(tmp_path: Path):
    def write(content: bytes) -> Path:
        path = tmp_path / "p.deb"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("suffix", [".xz", ".gz", ""])
def test_reads_a_file_of_every_compression(written, suffix):
    package = written(deb({"usr/share/x": b"no", "boot/vmlinuz-1": b"kernel" * 999}, suffix=suffix))
    assert read_file(package, lambda name: name.startswith("boot/")) == (
        "boot/vmlinuz-1",
        b"kernel" * 999,
    )


def test_reads_the_control_file(written):
    package = written(
        deb({}, control="Package: busybox-static\nVersion: 1:2\nDescription: a\n b\n")
    )
    assert control_fields(package) == {
        "Package": "busybox-static",
        "Version": "1:2",
        "Description": "a\nb",
    }


def test_only_the_first_stanza_counts():
    assert parse_fields("\nPackage: a\n\nPackage: b\n") == {"Package": "a"}


def test_members_of_odd_size_are_padded(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(ar({"one": b"1", "two": b"22"}))
    with path.open("rb") as file:
        members = list(ar_members(file))
    assert [(m.name, m.size) for m in members] == [("one", 1), ("two", 2)]
    assert members[1].offset == 8 + 60 + 2 + 60


def test_the_file_must_be_there(written):
    with pytest.raises(DebError, match="does not contain"):
        read_file(written(deb({"a": b"b"})), lambda name: name == "c")


def test_another_kind_of_file_is_refused(written):
    with pytest.raises(DebError, match="no Debian package"):
        read_file(written(b"PK\x03\x04" * 20), lambda name: True)


def test_an_archive_without_data_is_refused(written):
    with pytest.raises(DebError, match=r"has no data\.tar"):
        read_file(written(ar({"debian-binary": b"2.0\n"})), lambda name: True)


def test_unknown_compression_is_named(written):
    with pytest.raises(DebError, match=r"data\.tar\.lzma"):
        read_file(written(ar({"data.tar.lzma": b"x"})), lambda name: True)


@pytest.mark.parametrize("kept", [100, 300, -1, -40])
def test_a_truncated_package_is_noticed(written, kept):
    whole = deb({"boot/vmlinuz-1": bytes(range(256)) * 64}, suffix="")
    with pytest.raises(DebError, match=r"truncated|damaged|has no"):
        read_file(written(whole[:kept]), lambda name: name.startswith("boot/"))


@pytest.mark.parametrize("suffix", [".xz", ".gz"])
def test_flipped_bytes_are_noticed(written, suffix):
    whole = bytearray(deb({"boot/vmlinuz-1": bytes(range(256)) * 64}, suffix=suffix))
    middle = whole.index(b"data.tar") + 60 + 40
    whole[middle : middle + 8] = b"\xff" * 8
    with pytest.raises(DebError, match="damaged"):
        read_file(written(bytes(whole)), lambda name: name.startswith("boot/"))


def test_zstd_is_read_or_refused_with_the_reason(written):
    content = tar({"a": b"b"})
    if importlib.util.find_spec("compression") is None:
        package = written(ar({"data.tar.zst": b"\x28\xb5\x2f\xfd"}))
        with pytest.raises(DebError, match="zstd"):
            read_file(package, lambda name: True)
    else:
        from compression import zstd

        package = written(ar({"data.tar.zst": zstd.compress(content)}))
        assert read_file(package, lambda name: True) == ("a", b"b")
