"""Translations on disk: what units were made of, and the records they became.

A unit is found by its RIP and mode, and used only if the guest's bytes there are those that it was
made from. The file belongs to one engine version, as the object files do (see jit.py), and its
digest is checked; without it translation costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import marshal
import threading
from pathlib import Path
from typing import NamedTuple

from anykvm.cpu.forms import Form
from anykvm.cpu.handlers import Handlers
from anykvm.cpu.jit import replace_file

MAGIC = b"anykvm units 1\n"
WORTH_SAVING = 200  # new units
MOST = 200_000  # units in the file; beyond it only those of the last run stay
log = logging.getLogger("anykvm.cpu.units")


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


class UnitCache:
    """The units of the process, by RIP and mode. Thread-safe."""

    def __init__(self, handlers: Handlers, folder: Path | None) -> None:
        self.handlers = handlers
        self._path = folder / "units.bin" if folder else None
        self._lock = threading.Lock()
        self._units: dict[tuple[int, int], UnitImage] = {}
        self._used: set[tuple[int, int]] = set()
        self._fresh = 0
        self._load()

    def find(self, rip: int, mode: int, code: bytes) -> UnitImage | None:
        """The unit at `rip` if `code` begins with what it was made from."""
        image = self._units.get((rip, mode))
        if image is None or not code.startswith(image.code):
            return None
        self._used.add((rip, mode))
        return image

    def add(self, rip: int, mode: int, image: UnitImage) -> None:
        if len(self._units) >= 2 * MOST:
            self.forget()
        self._units[rip, mode] = image
        self._used.add((rip, mode))
        self._fresh += 1

    def forget(self) -> None:
        """Drops all that is in memory; the file has what was saved."""
        with self._lock:
            self._units, self._used, self._fresh = {}, set(), 0

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            data = self._path.read_bytes()
        except OSError:
            return
        head, _, body = data.removeprefix(MAGIC).partition(b"\n")
        if not data.startswith(MAGIC) or hashlib.sha256(body).hexdigest().encode() != head:
            log.warning("translation cache: %s is damaged, translating anew", self._path.name)
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
            return
        forms, units = marshal.loads(body)
        for name, operands, attrs in forms:
            self.handlers.number(Form(name, operands, attrs))
        known = [self.handlers.number(Form(*f)) for f in forms]
        in_order = known == list(range(len(known)))
        for key, parts in units.items():
            image = UnitImage(*parts)
            if not in_order:
                image = image._replace(handlers=tuple(known[n] for n in image.handlers))
            self._units[key] = image

    def save(self) -> None:
        """Writes the file if enough has come that is not in it."""
        with self._lock:
            if self._path is None or self._fresh < WORTH_SAVING:
                return
            units = dict(self._units)
            if len(units) > MOST:
                units = {k: v for k, v in units.items() if k in self._used}
            forms = [tuple(f) for f in self.handlers.forms]
            body = marshal.dumps((forms, {k: tuple(v) for k, v in units.items()}))
            digest = hashlib.sha256(body).hexdigest().encode()
            if not replace_file(self._path, MAGIC + digest + b"\n" + body):
                self._path = None
            self._fresh = 0
