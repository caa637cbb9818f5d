"""A client's ioctl, found out once: the same thread makes the same call again and again."""

from __future__ import annotations

from functools import partial

from anykvm.proxy.client import ClientThread
from anykvm.proxy.descriptors import Handle
from anykvm.uapi.names import IOCTLS

KVM_RUN = IOCTLS["KVM_RUN"].number


class ClientCall:
    """An ioctl of a thread on the file behind its descriptor `fd`; `make` makes it: the result, or
    a negative errno.
    """

    __slots__ = ("_handle", "_known", "command", "make", "runs", "thread")

    def __init__(
        self, thread: ClientThread, handle: Handle, fd: int, command: int, argument: int
    ) -> None:
        self.thread, self._handle, self.command = thread, handle, command
        self.runs = handle.runs if command == KVM_RUN else None
        self.make = partial(handle.ioctl, thread, fd, command, argument)
        self._known = thread.files.known(fd)

    def holds(self) -> bool:
        """Whether thread and descriptor are what they were, as far as can be told."""
        known = self._known
        return known is not None and known.holds() and not (self.thread.gone or self._handle.closed)
