"""A guest to boot: Debian's newest cloud kernel and static busybox, obtained once and kept.

They come through the system's own package client (`apt`), are unpacked without dpkg (`deb`) and
lie in `$ANYKVM_CACHE`, or `$XDG_CACHE_HOME/anykvm`, under `images/`, listed in `manifest.json` with
size and SHA256. What is there and intact is used without any network. To refresh: remove that
folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from anykvm.vmm import deb
from anykvm.vmm.apt import Apt, AptError, Progress, Record

BZIMAGE_MAGIC_OFFSET = 0x202
BZIMAGE_MAGIC = b"HdrS"
ELF_MAGIC = b"\x7fELF"
ELF_MACHINE_OFFSET = 18
EM_X86_64 = 62
MANIFEST = "manifest.json"


class ImageError(Exception):
    """No kernel and busybox could be had; says why, and what to pass instead."""


@dataclass(frozen=True)
class Image:
    """One kept file and the package version that it came from. Size in bytes."""

    file: str
    package: str
    version: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Images:
    """A kernel (bzImage) and a static busybox for x86-64."""

    kernel: Path
    busybox: Path
    release: str
    """The kernel's release, as `uname -r` prints it in the guest."""


def is_bzimage(content: bytes) -> bool:
    """Whether it bears the magic of the Linux/x86 boot protocol."""
    magic = content[BZIMAGE_MAGIC_OFFSET : BZIMAGE_MAGIC_OFFSET + 4]
    return magic == BZIMAGE_MAGIC


def is_x86_64_elf(content: bytes) -> bool:
    """Whether it is an ELF program for x86-64."""
    if len(content) < ELF_MACHINE_OFFSET + 2 or not content.startswith(ELF_MAGIC):
        return False
    (machine,) = struct.unpack_from("<H", content, ELF_MACHINE_OFFSET)
    return bool(machine == EM_X86_64)


@dataclass(frozen=True)
class Wanted:
    """A row: the package to ask for, what it stands for, the file in it, what that must be."""

    package: str
    depends: re.Pattern[str] | None
    path: re.Pattern[str]
    is_expected: Callable[[bytes], bool]
    expected: str


WANTED: dict[str, Wanted] = {
    "kernel": Wanted(
        "linux-image-cloud-amd64",
        re.compile(r"\blinux-image-\d\S*"),
        re.compile(r"boot/vmlinuz-.+"),
        is_bzimage,
        "a bzImage",
    ),
    "busybox": Wanted(
        "busybox-static",
        None,
        re.compile(r"(usr/)?bin/busybox"),
        is_x86_64_elf,
        "an x86-64 program",
    ),
}


def cache_folder() -> Path:
    """Where anykvm keeps what it can obtain or make again."""
    own = os.environ.get("ANYKVM_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "anykvm"


def _quiet(_what: str, _fraction: float | None) -> None:
    return None


def obtain(progress: Progress = _quiet) -> Images:
    """The kept images; where they are absent or damaged, obtained anew.

    Two processes that come at once obtain them once. Raises ImageError.
    """
    folder = cache_folder() / "images"
    kept = _load(folder)
    if kept is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / "lock", progress):
                kept = _load(folder) or _fetch(folder, progress)
        except OSError as error:
            raise ImageError(f"cannot keep images in {folder}: {error}") from error
    kernel = folder / kept["kernel"].file
    return Images(kernel, folder / kept["busybox"].file, kernel.name.removeprefix("vmlinuz-"))


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another anykvm that is fetching the images", None)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _load(folder: Path) -> dict[str, Image] | None:
    """The manifest's images if every one of them is there and intact."""
    try:
        rows = json.loads((folder / MANIFEST).read_text())
        kept = {name: Image(**rows[name]) for name in WANTED}
        intact = all(_digest(folder / image.file) == image.sha256 for image in kept.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kept if intact else None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(folder: Path, progress: Progress) -> dict[str, Image]:
    """With the system's package lists; where those lack a package or are too old, with our own."""
    for abandoned in folder.glob("fetch.*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    reasons: list[str] = []
    for private in (False, True):
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch.") as scratch:
            try:
                kept = _fetch_all(Path(scratch), private, folder, progress)
            except (AptError, deb.DebError) as error:
                reasons.append(str(error))
                continue
            _store(folder, kept)
            progress(f"kept in {folder}; remove that folder to fetch newer ones", None)
            return kept
    why = "; ".join(dict.fromkeys(reasons))
    raise ImageError(
        f"cannot obtain a guest kernel: {why}. Pass --kernel FILE and --initrd FILE instead"
    )


def _fetch_all(scratch: Path, private: bool, folder: Path, progress: Progress) -> dict[str, Image]:
    apt = Apt(scratch, scratch / "lists" if private else None)
    complaints = apt.update(progress) if private else ""
    kept: dict[str, Image] = {}
    for name, wanted in WANTED.items():
        record = _resolve(apt, wanted)
        if record is None:
            reason = f": {complaints}" if complaints else ""
            raise AptError(f"apt's sources offer no {wanted.package}{reason}")
        into = scratch / name
        into.mkdir()
        package = apt.download(record, into, progress)
        progress(f"unpacking {record.package}", None)
        kept[name] = _unpack(package, record, wanted, folder)
    return kept


def _resolve(apt: Apt, wanted: Wanted) -> Record | None:
    """The real package: a meta package's record names it among its dependencies."""
    record = apt.show(wanted.package)
    if record is None or wanted.depends is None:
        return record
    real = wanted.depends.search(record.depends)
    if real is None:
        raise AptError(f"{wanted.package} depends on no kernel, but on {record.depends!r}")
    return apt.show(real.group())


def _unpack(package: Path, record: Record, wanted: Wanted, folder: Path) -> Image:
    path, content = deb.read_file(package, lambda name: wanted.path.fullmatch(name) is not None)
    if not wanted.is_expected(content):
        raise deb.DebError(f"{path} in {package.name} is not {wanted.expected}")
    name = Path(path).name
    image = Image(
        file=name if wanted.depends else f"{name}-{record.version}",
        package=record.package,
        version=record.version,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    _write(folder / image.file, content)
    return image


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all: beside it first, then renamed onto it."""
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _store(folder: Path, kept: dict[str, Image]) -> None:
    """Write the manifest, and drop files that it no longer lists."""
    rows = {name: asdict(image) for name, image in kept.items()}
    _write(folder / MANIFEST, json.dumps(rows, indent=2).encode())
    listed = {MANIFEST, "lock", *(image.file for image in kept.values())}
    for path in folder.iterdir():
        if path.is_file() and path.name not in listed:
            path.unlink()
