"""Translations on disk: what units were made of, and the records they became.

A unit is found by its RIP and mode, and used only if the guest's bytes there are those that it was
made from; code that is patched while the guest runs has several versions. The units of a page lie
together, for who enters a page will want more of it. The file belongs to one engine version, as the
object files do (see jit.py). It begins with a digest of its index, which has a checksum for each
page: a page is read when it is wanted. Without the file translation costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import marshal
import threading
import zlib
from pathlib import Path
from typing import NamedTuple

from anykvm.cpu.forms import Form
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.jit import replace_file

MAGIC = b"anykvm units 2\n"
WORTH_SAVING = 200  # new units
MOST = 200_000  # units in the file; beyond it only the pages of the last run stay
VERSIONS = 4  # of a unit
PAGE_SHIFT = 12
MAX_LINE = 100
log = logging.getLogger("anykvm.cpu.units")

Key = tuple[int, int]
"""A page's number, by RIP, and a mode."""


class UnitImage(NamedTuple):
    """A unit without addresses of this process."""

    code: bytes  # what it was translated from
    instructions: int
    handlers: tuple[int, ...]  # a handler's number for each record
    records: bytes  # as in memory, but for the handlers
    rips: bytes  # eight bytes a record
    branches: tuple[tuple[int, int], ...]  # index of a record, RIP that it goes to
    heads: tuple[tuple[int, int], ...]  # RIP and index of a record
    leaving: tuple[tuple[int, int], ...]  # index of a record that leaves, instructions up to it


Page = dict[int, tuple[UnitImage, ...]]
"""The versions of each unit by its RIP, the newest first."""


class Stored(NamedTuple):
    """Where a page lies behind the index."""

    offset: int
    length: int
    checksum: int
    units: int


class UnitCache:
    """The units of the process. Thread-safe."""

    def __init__(self, handlers: Handlers, folder: Path | None) -> None:
        self.handlers = handlers
        self._path = folder / "units.bin" if folder else None
        self._lock = threading.Lock()
        self._pages: dict[Key, Page] = {}
        self._stored: dict[Key, Stored] = {}  # those that were not read yet
        self._body = b""
        self._numbers: list[int] | None = None  # where a handler's is not the file's
        self._fresh = 0
        self._load()

    def page(self, rip: int, mode: int) -> Page:
        """What there is of the page around `rip`."""
        key = rip >> PAGE_SHIFT, mode
        page = self._pages.get(key)
        if page is None:
            with self._lock:
                page = self._pages.get(key)
                if page is None:
                    page = self._pages[key] = self._read(key)
        return page

    def add(self, rip: int, mode: int, image: UnitImage) -> None:
        if self._fresh >= MOST:
            self.forget()
        page = self.page(rip, mode)
        page[rip] = (image, *page.get(rip, ())[: VERSIONS - 1])
        self._fresh += 1

    def forget(self) -> None:
        """Drops all that is in memory; the file has what was saved."""
        with self._lock:
            self._pages, self._stored, self._body, self._fresh = {}, {}, b"", 0

    def _read(self, key: Key) -> Page:
        stored = self._stored.pop(key, None)
        if stored is None:
            return {}
        raw = self._raw(stored)
        if zlib.crc32(raw) != stored.checksum:
            self._damaged()
            return {}
        units = marshal.loads(raw)
        return {rip: tuple(map(self._image, versions)) for rip, versions in units.items()}

    def _image(self, parts: tuple[object, ...]) -> UnitImage:
        image = UnitImage(*parts)  # type: ignore[arg-type]
        numbers = self._numbers
        if numbers is None:
            return image
        return image._replace(handlers=tuple(numbers[n] for n in image.handlers))

    def _raw(self, stored: Stored) -> bytes:
        return self._body[stored.offset : stored.offset + stored.length]

    def _damaged(self) -> None:
        assert self._path is not None
        log.warning("translation cache: %s is damaged, translating anew", self._path.name)
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("rb") as file:
                magic, digest, length = (file.readline(MAX_LINE) for _ in range(3))
                index = file.read(int(length)) if length.strip().isdigit() else b""
                self._body = file.read()
        except OSError:
            return
        if magic != MAGIC or hashlib.sha256(index).hexdigest().encode() != digest.strip():
            self._damaged()
            return
        forms, pages = marshal.loads(index)
        known = [self.handlers.number(Form(*form)) for form in forms]
        if known != list(range(len(known))):
            self._numbers = known
        self._stored = {key: Stored(*place) for key, place in pages.items()}

    def save(self) -> None:
        """Writes the file if enough has come that is not in it."""
        with self._lock:
            if self._path is None or self._fresh < WORTH_SAVING:
                return
            pages = {key: _dumped(page) for key, page in self._pages.items() if page}
            if self._numbers is None:  # else what was not read has other numbers
                stored = {
                    key: (self._raw(place), place.units) for key, place in self._stored.items()
                }
                pages |= stored
            index, total, at = {}, 0, 0
            for key, (raw, units) in list(pages.items()):
                total += units
                if total > MOST:
                    del pages[key]
                    continue
                index[key] = at, len(raw), zlib.crc32(raw), units
                at += len(raw)
            head = marshal.dumps(([tuple(form) for form in self.handlers.forms], index))
            digest = hashlib.sha256(head).hexdigest()
            lines = MAGIC + f"{digest}\n{len(head)}\n".encode()
            data = b"".join((lines, head, *(raw for raw, _ in pages.values())))
            if not replace_file(self._path, data):
                self._path = None
            self._fresh = 0


def _dumped(page: Page) -> tuple[bytes, int]:
    """A page as in the file, and how many units it has."""
    units = {rip: tuple(map(tuple, versions)) for rip, versions in list(page.items())}
    return marshal.dumps(units), sum(map(len, units.values()))
