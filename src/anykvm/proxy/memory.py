"""A client's address space: its user memory, and guest memory that both processes have mapped.

Guest memory must be the same pages in the client and here. What the client shares already (a memfd,
a file) is mapped from its descriptor. Private memory is replaced where it is, at the moment that it
becomes a slot: one sparse memfd per client holds every such page at a fixed distance from its
address in the client, so ranges that are split, joined or registered again need nothing new.

Here, a window is reserved for the client's addresses around the slot, and pieces are mapped into it
at their distance. An address in the client thus keeps its address here for good.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from errno import EACCES

from anykvm.fs import libc
from anykvm.fs.mapping import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_READ,
    PROT_WRITE,
    inode_key,
)
from anykvm.fs.uaccess import TASK_SIZE_MAX, UserMemory
from anykvm.fs.vmas import Vma, vmas
from anykvm.proxy.procfs import PAGE_SIZE, populated

MAP_FIXED = 0x10
ALIGNMENT = 1 << 30  # of the largest huge page, so that huge pages can be mapped
AROUND = 256 << 30  # bytes reserved below and above a first slot
# Offset in the memfd of address 0: the filter (bpf.py) traps executable mappings from lower ones.
BACKING_BASE = 1 << 32
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
COPY_SIZE = 16 << 20
NAME = "guest-memory"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]

Ident = tuple[int, int, int, bool]  # device, inode, offset of address 0, shared


@dataclass
class Window:
    """Client addresses `start` to `end`, at `base` here. `pieces` are what is mapped: (start, end,
    what).
    """

    start: int
    end: int
    base: int
    pieces: list[tuple[int, int, Ident | None]] = field(default_factory=list)

    def holds(self, start: int, end: int) -> bool:
        return self.start <= start and end <= self.end

    def address(self, client: int) -> int:
        return self.base + client - self.start

    def has(self, start: int, end: int, ident: Ident | None) -> bool:
        return any(s <= start and end <= e and i == ident for s, e, i in self.pieces)

    def note(self, start: int, end: int, ident: Ident | None) -> None:
        kept = [p for s, e, i in self.pieces for p in _around(s, e, start, end, i)]
        for piece in [p for p in kept if p[2] == ident and (p[0] == end or p[1] == start)]:
            kept.remove(piece)  # one goes on where the other ends
            start, end = min(start, piece[0]), max(end, piece[1])
        self.pieces = [*kept, (start, end, ident)]


def _around(
    start: int, end: int, cut_start: int, cut_end: int, ident: Ident | None
) -> list[tuple[int, int, Ident | None]]:
    """What is left of a piece outside of a cut."""
    parts = ((start, min(end, cut_start), ident), (max(start, cut_end), end, ident))
    return [part for part in parts if part[0] < part[1]]


Replace = Callable[["ClientMemory", list[Vma]], None]


class ClientMemory(UserMemory):
    """The memory of process `pid`. `replace` has shared memory take the place of private ranges,
    with `copy` of this, while the client stands still.
    """

    def __init__(self, pid: int, replace: Replace) -> None:
        super().__init__(pid)
        self._replace = replace
        self._lock = threading.Lock()
        self._windows: list[Window] = []
        self._backing = -1
        self._key = (0, 0)
        # VMs hold their client's memory, so nothing of it goes while a vCPU may run.
        self._held = contextlib.ExitStack()
        weakref.finalize(self, self._held.close).atexit = False

    def host_address(self, address: int, length: int) -> int:
        """Map the range here, as it is in the client now. Holes are no memory here either."""
        end = address + length
        with self._lock:
            window = self._window(address, end)
            areas = vmas(self.pid, address, end)
            private = [area for area in areas if self._is_private(area)]
            if private:
                self._replace(self, private)
                areas = vmas(self.pid, address, end)
            self._map(window, address, end, areas)
        return window.address(address)

    def _is_private(self, area: Vma) -> bool:
        """Whether the range has to be replaced: shared memory, too, if it has no descriptor."""
        if not area.shared:
            return True
        return area.key != self._key and not self._descriptor(area)

    @property
    def backing(self) -> int:
        """The memfd of replaced memory."""
        if self._backing < 0:
            self._backing = os.memfd_create(NAME, os.MFD_CLOEXEC)
            self._held.callback(os.close, self._backing)
            os.ftruncate(self._backing, BACKING_BASE + TASK_SIZE_MAX)
            self._key = inode_key(self._backing)
        return self._backing

    def _window(self, start: int, end: int) -> Window:
        found = next((w for w in self._windows if w.holds(start, end)), None)
        if found is not None:
            return found
        first = max(0, start - AROUND) // ALIGNMENT * ALIGNMENT
        size = -(-(end + AROUND - first) // ALIGNMENT) * ALIGNMENT
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        reserved = libc.mmap(0, size + ALIGNMENT, 0, flags, -1, 0)
        self._held.callback(libc.munmap, reserved, size + ALIGNMENT)
        base = -(-reserved // ALIGNMENT) * ALIGNMENT
        window = Window(first, first + size, base)
        self._windows.append(window)
        return window

    def _map(self, window: Window, start: int, end: int, areas: list[Vma]) -> None:
        at = start
        for area in areas:
            self._map_hole(window, at, area.start)
            self._map_area(window, area)
            at = area.end
        self._map_hole(window, at, end)

    def _map_hole(self, window: Window, start: int, end: int) -> None:
        if start < end and not window.has(start, end, None):
            flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED
            libc.mmap(window.address(start), end - start, 0, flags, -1, 0)
            window.note(start, end, None)

    def _map_area(self, window: Window, area: Vma) -> None:
        ours = area.key == self._key
        # A mapping that the client may not write: what the guest writes stays here.
        shared = ours or bool(area.prot & PROT_WRITE)
        ident = (*area.key, area.offset - area.start, shared)
        if window.has(area.start, area.end, ident):
            return
        fd = self.backing if ours else self._open(area)
        flags = (MAP_SHARED if shared else MAP_PRIVATE) | MAP_FIXED | MAP_NORESERVE
        try:
            libc.mmap(
                window.address(area.start),
                area.end - area.start,
                PROT_READ | PROT_WRITE,
                flags,
                fd,
                area.offset,
            )
        finally:
            if not ours:
                os.close(fd)
        window.note(area.start, area.end, ident)

    def _descriptor(self, area: Vma) -> str | None:
        """A path to the file behind a shared mapping, by a descriptor that the client has."""
        folder = f"/proc/{self.pid}/fd"
        for name in os.listdir(folder):
            with suppress(OSError):
                status = os.stat(f"{folder}/{name}")
                if (status.st_dev, status.st_ino) == area.key:
                    return f"{folder}/{name}"
        path = f"/proc/{self.pid}/map_files/{area.start:x}-{area.end:x}"
        return path if os.access(path, os.R_OK) else None

    def _open(self, area: Vma) -> int:
        path = self._descriptor(area)
        if path is None:
            raise OSError(EACCES, f"no descriptor for the memory at {area.start:#x}: {area.path}")
        mode = os.O_RDWR if area.prot & PROT_WRITE else os.O_RDONLY
        return os.open(path, mode | os.O_CLOEXEC)

    def copy(self, area: Vma) -> None:
        """Bring what the client has in a private range into the shared memory for it."""
        self._punch(BACKING_BASE + area.start, BACKING_BASE + area.end)
        runs = [(area.start, area.end)] if area.inode else populated(self.pid, area.start, area.end)
        fd = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end in runs:
                for at in range(start, end, COPY_SIZE):
                    self._copy_run(fd, at, min(COPY_SIZE, end - at))
        finally:
            os.close(fd)

    def _copy_run(self, fd: int, at: int, length: int) -> None:
        end = at + length
        while at < end:
            try:
                data = os.pread(fd, end - at, at)
            except OSError:
                at += PAGE_SIZE  # past its file's end: the page has no contents
                continue
            os.pwrite(self.backing, data, BACKING_BASE + at)
            at += len(data)

    def _punch(self, start: int, end: int) -> None:
        mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        if _libc.fallocate(self.backing, mode, start, end - start):
            error = ctypes.get_errno()
            raise OSError(error, f"cannot empty guest memory: {os.strerror(error)}")

    def release_unused(self) -> None:
        """Free the pages that the client has no mapping of any more."""
        with self._lock:
            if self._backing < 0:
                return
            used = sorted(
                (area.offset, area.offset + area.end - area.start)
                for area in vmas(self.pid, 0, TASK_SIZE_MAX)
                if area.key == self._key
            )
            at = BACKING_BASE
            for start, end in used:
                if at < start:
                    self._punch(at, start)
                at = max(at, end)
            self._punch(at, BACKING_BASE + TASK_SIZE_MAX)
