"""Debian's package client as a child process: look up, download (apt-get(8), apt-cache(8)).

Needs no root. Package lists are the system's, or private ones in a folder of ours, filled from the
system's sources and checked with the system's keyrings. apt checks what it downloads against the
signed lists; `download` compares size and SHA256 with the record once more.
"""

from __future__ import annotations

import hashlib
import os
import selectors
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from anykvm.vmm.deb import parse_fields

ARCHITECTURE = "amd64"
SHOWN_ERRORS = 3

Progress = Callable[[str, float | None], None]
"""Told what is going on, and how much of it is done (0.0 to 1.0) where that is known."""


class AptError(Exception):
    """apt is absent, or did not give what was asked of it."""


@dataclass(frozen=True)
class Record:
    """One package version, as the package lists describe it."""

    package: str
    version: str
    size: int
    sha256: str
    depends: str

    @classmethod
    def parse(cls, text: str) -> Record:
        """The record that `apt-cache show` prints. Raises AptError where a field is missing."""
        fields = parse_fields(text)
        try:
            return cls(
                package=fields["Package"],
                version=fields["Version"],
                size=int(fields["Size"]),
                sha256=fields["SHA256"],
                depends=fields.get("Depends", ""),
            )
        except (KeyError, ValueError) as error:
            raise AptError(f"apt-cache show printed a record without {error}") from error


class Apt:
    """The package client with the system's lists, or with private ones in `lists`.

    `scratch` is a folder that apt may use as its cache; nothing of value stays there.
    """

    def __init__(self, scratch: Path, lists: Path | None = None) -> None:
        missing = [name for name in ("apt-get", "apt-cache") if shutil.which(name) is None]
        if missing:
            raise AptError(f"{missing[0]} is not installed")
        self._lists = lists
        cache = scratch / "cache"
        options = {
            "Dir::Cache": str(cache),
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures": ARCHITECTURE,
            "Acquire::Retries": "2",
        }
        folders = [cache / "archives" / "partial"]
        if lists is not None:
            options["Dir::State::lists"] = str(lists)
            folders.append(lists / "partial")
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        self._options = [
            word for key, value in options.items() for word in ("-o", f"{key}={value}")
        ]

    def update(self, progress: Progress) -> str:
        """Fetch the private package lists. Returns apt's complaints, if any: some sources of many
        may be out of reach without harm."""
        if self._lists is None:
            raise ValueError("only private package lists are updated")
        finished = self._watch(
            ["apt-get", "update"], Path.cwd(), "fetching package lists", progress
        )
        return _complaints(finished.stderr)

    def show(self, package: str) -> Record | None:
        """The newest version of `package`, None where the lists do not know it."""
        command = ["apt-cache", *self._options, "show", "--no-all-versions", package]
        finished = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=_environment()
        )
        if finished.returncode != 0 or not finished.stdout.strip():
            return None
        return Record.parse(finished.stdout)

    def download(self, record: Record, into: Path, progress: Progress) -> Path:
        """Download that very version into the empty folder `into`; the package file, checked."""
        what = f"downloading {record.package} {record.version}"
        command = ["apt-get", "download", f"{record.package}={record.version}"]
        finished = self._watch(command, into, what, progress)
        files = list(into.glob("*.deb"))
        if finished.returncode != 0 or len(files) != 1:
            reason = _complaints(finished.stderr) or f"apt-get ended with {finished.returncode}"
            raise AptError(f"{what} failed: {reason}")
        _check(files[0], record)
        return files[0]

    def _watch(
        self, command: list[str], folder: Path, what: str, progress: Progress
    ) -> subprocess.CompletedProcess[str]:
        progress(what, None)
        program, *words = command
        line = [program, "-q", *self._options, "-o", "APT::Status-Fd=1", *words]
        with subprocess.Popen(
            line,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(),
        ) as process:
            try:
                errors = _read_status(process, what, progress)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(line, process.returncode, "", errors)


def _environment() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


def _read_status(process: subprocess.Popen[bytes], what: str, progress: Progress) -> str:
    """Read both pipes to their ends; report `dlstatus:` lines as they come; what stderr said."""
    assert process.stdout is not None
    assert process.stderr is not None
    errors = bytearray()
    pending = b""
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdout, process.stderr):
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                pipe_file: IO[bytes] = key.fileobj  # type: ignore[assignment]
                data = os.read(pipe_file.fileno(), 65536)
                if not data:
                    selector.unregister(pipe_file)
                elif pipe_file is process.stderr:
                    errors += data
                else:
                    *lines, pending = (pending + data).split(b"\n")
                    _report(lines, what, progress)
    return errors.decode(errors="replace")


def _report(lines: list[bytes], what: str, progress: Progress) -> None:
    for line in lines:
        if line.startswith(b"dlstatus:"):
            percent = line.decode(errors="replace").split(":")[2]
            progress(what, float(percent) / 100)


def _complaints(stderr: str) -> str:
    """apt's errors and warnings, in short. That it cannot use its sandbox user is no complaint."""
    lines = [
        line[2:].strip()
        for kind in ("E:", "W:")
        for line in stderr.splitlines()
        if line.startswith(kind) and "unsandboxed" not in line
    ]
    return "; ".join(dict.fromkeys(lines[:SHOWN_ERRORS]))


def _check(file: Path, record: Record) -> None:
    size = file.stat().st_size
    if size != record.size:
        raise AptError(f"{file.name} has {size} bytes where the lists say {record.size}")
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != record.sha256:
        raise AptError(f"{file.name} has SHA256 {found} where the lists say {record.sha256}")
