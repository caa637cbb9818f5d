"""A cpio archive in the `newc` format, as Linux unpacks it into its root file system.

Kernel: Documentation/driver-api/early-userspace/buffer-format.rst. Owner is root and time is 0
everywhere, so the same entries make the same bytes.
"""

from __future__ import annotations

import stat

MAGIC = b"070701"
TRAILER = "TRAILER!!!"
ALIGNMENT = 4


class Cpio:
    """An archive under construction. Paths are relative to the root, without a leading slash."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._inode = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._entry(path, stat.S_IFDIR | mode, links=2)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self._entry(path, stat.S_IFREG | mode, content)

    def symlink(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive, trailer included."""
        self._inode = -1
        self._entry(TRAILER, 0)
        return bytes(self._archive)

    def _entry(
        self,
        path: str,
        mode: int,
        content: bytes = b"",
        links: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        fields = (
            self._inode,
            mode,
            0,  # owner
            0,  # group
            links,
            0,  # time
            len(content),
            0,  # device of the file system: major
            0,  # and minor
            *device,
            len(name),
            0,  # checksum, unused in this format
        )
        self._archive += MAGIC + b"".join(b"%08X" % field for field in fields)
        self._append(name)
        self._append(content)

    def _append(self, data: bytes) -> None:
        self._archive += data
        self._archive += bytes(-len(self._archive) % ALIGNMENT)
