"""Debian packages made on the spot, and an apt that serves them."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    "": bytes,
}

FAKE_APT = """#!/bin/sh
# apt-get and apt-cache by turns, over the folder {repository}.
echo "$(basename "$0") $*" >>"{log}"
lists={repository}/lists
case "$*" in
    *Dir::State::lists=*) [ -e "{repository}/private" ] && lists={repository}/private ;;
    *) [ -e "{repository}/system-is-empty" ] && lists=/nowhere ;;
esac
for last; do :; done
case " $* " in
    *" update "*)
        [ -e "{repository}/offline" ] && echo "W: Failed to fetch the lists" >&2
        exit 0 ;;
    *" show "*)
        cat "$lists/$last" 2>/dev/null || {{ echo "E: No packages found" >&2; exit 100; }} ;;
    *" download "*)
        [ -e "{repository}/offline" ] && {{ echo "E: Could not resolve host" >&2; exit 100; }}
        echo "dlstatus:1:50.0000:Retrieving file 1 of 1"
        cp "{repository}/pool/${{last%%=*}}.deb" . ;;
esac
"""


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo("./" + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def ar(members: dict[str, bytes]) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out


def deb(files: dict[str, bytes], control: str = "Package: p\n", suffix: str = ".xz") -> bytes:
    return ar(
        {
            "debian-binary": b"2.0\n",
            f"control.tar{suffix}": COMPRESS[suffix](tar({"control": control.encode()})),
            f"data.tar{suffix}": COMPRESS[suffix](tar(files)),
        }
    )


class Repository:
    """Packages and their records, with the fake apt first on the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self.path = folder / "bin"
        for sub in ("bin", "lists", "pool"):
            (folder / sub).mkdir(parents=True)
        script = FAKE_APT.format(repository=folder, log=self.log)
        for name in ("apt-get", "apt-cache"):
            (self.path / name).write_text(script)
            (self.path / name).chmod(0o755)

    def add(
        self, package: str, version: str, content: bytes | None = None, depends: str = ""
    ) -> None:
        """A package with its record; without content only the record, as of a meta package."""
        content = content or b""
        (self.folder / "pool" / f"{package}.deb").write_bytes(content)
        (self.folder / "lists" / package).write_text(
            f"Package: {package}\nVersion: {version}\nDepends: {depends}\nSize: {len(content)}\n"
            f"Description: one line\n another\nSHA256: {hashlib.sha256(content).hexdigest()}\n"
        )

    def set(self, switch: str) -> None:
        (self.folder / switch).touch()

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def search_path(self) -> str:
        return f"{self.path}{os.pathsep}{os.environ['PATH']}"


RELEASE = "6.1.0-99-cloud-amd64"
KERNEL = bytes(0x202) + b"HdrS" + bytes(range(256)) * 64
BUSYBOX = (
    b"\x7fELF"
    + bytes(14)
    + b"\x3e\x00"
    + bytes(100)
    + b"\0".join([b"[", b"[[", *(b"a%02d" % n for n in range(30)), b"busybox", b"sh", b"sleep"])
    + b"\0aa\0"
)


def debian(folder: Path) -> Repository:
    """A repository with what `anykvm boot` wants."""
    repository = Repository(folder)
    repository.add(
        "linux-image-cloud-amd64", "6.1.9-1", depends=f"linux-image-{RELEASE} (= 6.1.9-1)"
    )
    kernel_files = {f"boot/config-{RELEASE}": b"CONFIG_TTY=y\n", f"boot/vmlinuz-{RELEASE}": KERNEL}
    repository.add(f"linux-image-{RELEASE}", "6.1.9-1", deb(kernel_files))
    repository.add("busybox-static", "1:1.35.0-4", deb({"bin/busybox": BUSYBOX}))
    return repository
