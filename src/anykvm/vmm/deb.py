"""A Debian binary package, read without dpkg: an ar archive of two tar archives (deb(5), ar(5)).

Members are `debian-binary` ("2.0"), `control.tar.*` and `data.tar.*`. Packages of today are
compressed with xz; gzip and no compression occur; zstd (Ubuntu's choice) is read where the running
Python has it.
"""

from __future__ import annotations

import gzip
import importlib
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AR_MAGIC = b"!<arch>\n"
AR_HEADER_SIZE = 60
AR_HEADER_END = b"`\n"


class DebError(Exception):
    """The file is no Debian package, is damaged, or lacks what was asked of it."""


class ArMember(NamedTuple):
    """Where one member of an ar archive lies in its file."""

    name: str
    offset: int
    size: int


def _open_xz(file: io.BufferedReader) -> io.BufferedIOBase:
    return lzma.LZMAFile(file)


def _open_gzip(file: io.BufferedReader) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=file)


def _open_plain(file: io.BufferedReader) -> io.BufferedIOBase:
    return file


def _open_zstd(file: io.BufferedReader) -> io.BufferedIOBase:
    try:
        zstd = importlib.import_module("compression.zstd")
    except ModuleNotFoundError:
        raise DebError(
            "the package is compressed with zstd, which Python reads from version 3.14 on"
        ) from None
    opened: io.BufferedIOBase = zstd.ZstdFile(file)
    return opened


DECOMPRESSORS: dict[str, Callable[[io.BufferedReader], io.BufferedIOBase]] = {
    ".xz": _open_xz,
    ".gz": _open_gzip,
    ".zst": _open_zstd,
    "": _open_plain,
}


class _Window(io.RawIOBase):
    """The bytes of one ar member, as a file that a decompressor can read."""

    def __init__(self, file: IO[bytes], member: ArMember) -> None:
        self._file = file
        self._left = member.size
        file.seek(member.offset)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        """Fill `buffer` as far as the member reaches; DebError where the file ends before it."""
        view = memoryview(buffer)
        data = self._file.read(min(len(view), self._left))
        if not data and self._left and len(view):
            raise DebError(f"the package ends {self._left} bytes too early")
        view[: len(data)] = data
        self._left -= len(data)
        return len(data)


def ar_members(file: IO[bytes]) -> Iterator[ArMember]:
    """The members of an ar archive, in order. Raises DebError for anything else."""
    file.seek(0, 2)
    end = file.tell()
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise DebError("no Debian package: the ar signature '!<arch>' is missing")
    offset = len(AR_MAGIC)
    while offset < end:
        file.seek(offset)
        header = file.read(AR_HEADER_SIZE)
        if len(header) < AR_HEADER_SIZE or header[58:60] != AR_HEADER_END:
            raise DebError(f"damaged package: no ar member header at byte {offset}")
        size = int(header[48:58].decode("ascii", "replace").strip() or "0")
        name = header[:16].decode("ascii", "replace").strip().rstrip("/")
        offset += AR_HEADER_SIZE
        if offset + size > end:
            raise DebError(f"truncated package: {name} needs {offset + size - end} more bytes")
        yield ArMember(name, offset, size)
        offset += size + size % 2


def _open_tar(file: IO[bytes], stem: str) -> tarfile.TarFile:
    for member in ar_members(file):
        if member.name == stem or member.name.startswith(stem + "."):
            suffix = member.name.removeprefix(stem)
            break
    else:
        raise DebError(f"no Debian package: it has no {stem}")
    if suffix not in DECOMPRESSORS:
        known = ", ".join(filter(None, DECOMPRESSORS))
        raise DebError(f"{member.name}: its compression is none of {known}")
    stream = DECOMPRESSORS[suffix](io.BufferedReader(_Window(file, member)))
    return tarfile.open(fileobj=stream, mode="r|")


def _normal(name: str) -> str:
    return str(PurePosixPath("/", name)).lstrip("/")


def read_file(
    package: Path, wanted: Callable[[str], bool], stem: str = "data.tar"
) -> tuple[str, bytes]:
    """The first regular file of `package` whose path (without a leading `./`) satisfies `wanted`.

    Returns its path and content. Reading stops there, so what comes first costs least. Raises
    DebError where there is none, or where the package is damaged.
    """
    try:
        with package.open("rb") as file, _open_tar(file, stem) as tar:
            for entry in tar:
                name = _normal(entry.name)
                content = tar.extractfile(entry) if entry.isreg() and wanted(name) else None
                if content is not None:
                    return name, content.read()
    except (tarfile.TarError, lzma.LZMAError, gzip.BadGzipFile, EOFError, ValueError) as error:
        raise DebError(f"{package.name} is damaged: {error}") from error
    raise DebError(f"{package.name} does not contain the file that was expected in it")


def control_fields(package: Path) -> dict[str, str]:
    """The fields of the package's control file (deb-control(5))."""
    _, text = read_file(package, lambda name: name == "control", "control.tar")
    return parse_fields(text.decode())


def parse_fields(text: str) -> dict[str, str]:
    """The first stanza of Debian control text: field name to value, continuation lines joined."""
    fields: dict[str, str] = {}
    name = ""
    for line in text.lstrip("\n").splitlines():
        if not line.strip():
            break
        if line[0] in " \t" and name:
            fields[name] += "\n" + line.strip()
            continue
        name, _, value = line.partition(":")
        fields[name] = value.strip()
    return fields
