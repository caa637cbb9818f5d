"""The descriptor that delivers clients' trapped calls and takes the answers: seccomp_unotify(2)."""

from __future__ import annotations

import ctypes
import os
import threading
from errno import EBADF, EINTR, EINVAL, ENOENT
from fcntl import ioctl
from struct import Struct

from anykvm.proxy import abi

# With the GIL held.
_short = ctypes.PyDLL(None, use_errno=True).ioctl
_short.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
_clear = Struct(f"{abi.NOTIF.size}x").pack_into
Received = tuple[int, bytes]
"""A notification: its id, and the call, which is the same each time that it is made."""


class Notification:
    """A call that waits, of thread `tid`, which goes on at `ip`."""

    __slots__ = ("call", "id", "ip", "nr", "tid")

    def __init__(self, id: int, call: bytes) -> None:
        self.id, self.call = id, call
        self.tid, _, self.nr, _, self.ip = abi.NOTIF_CALL.unpack(call)[:5]

    @property
    def args(self) -> tuple[int, ...]:
        return abi.NOTIF_CALL.unpack(self.call)[5:]

    def __repr__(self) -> str:
        names = ("tid", "flags", "nr", "arch", "ip", *(f"arg{n}" for n in range(6)))
        fields = zip(names, abi.NOTIF_CALL.unpack(self.call), strict=True)
        return f"<call {' '.join(f'{name}={value:#x}' for name, value in fields)}>"


class Listener:
    """Any thread may answer; each that receives has a buffer for it. ioctl takes half a microsecond
    longer with bytes.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.addfd_sends = True
        self._response = bytearray(abi.NOTIF_RESP.size)
        self.gate = threading.RLock()  # held while a client must not go on
        flag = abi.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
        # Linux 6.6: both sides stay on one processor, and a call costs a tenth.
        self.sync = not _wide(fd, abi.SECCOMP_IOCTL_NOTIF_SET_FLAGS, flag)

    def receive(self, buffer: bytearray) -> Received | None:
        """The next notification, without the GIL meanwhile; None if there will be none any more."""
        while True:
            _clear(buffer, 0)  # the kernel insists
            try:
                ioctl(self.fd, abi.SECCOMP_IOCTL_NOTIF_RECV, buffer)
            except OSError as error:
                # ENOENT: its caller was interrupted or killed before we had it.
                if error.errno not in (EINTR, ENOENT):
                    return None
            else:
                return abi.NOTIF.unpack(buffer)

    def alive(self, notification: int) -> bool:
        """Whether its caller still waits: a signal may have taken it out of the call."""
        raw = notification.to_bytes(8, "little")
        return bool(_short(self.fd, abi.SECCOMP_IOCTL_NOTIF_ID_VALID, raw) == 0)

    def answer(self, notification: int, value: int) -> bool:
        """The call returns `value`, a negative errno for an error; False if its caller is gone."""
        error = value if value < 0 else 0
        self.gate.acquire()  # `with` takes twice as long
        try:
            abi.NOTIF_RESP.pack_into(
                self._response, 0, notification, 0 if error else value, error, 0
            )
            ioctl(self.fd, abi.SECCOMP_IOCTL_NOTIF_SEND, self._response)
        except OSError:
            return False
        finally:
            self.gate.release()
        return True

    def let_run(self, notification: int) -> None:
        """The kernel carries out the call as it was made."""
        flag = abi.SECCOMP_USER_NOTIF_FLAG_CONTINUE
        response = abi.NOTIF_RESP.pack(notification, 0, 0, flag)
        with self.gate:
            _short(self.fd, abi.SECCOMP_IOCTL_NOTIF_SEND, response)

    def give(self, notification: int, fd: int, cloexec: bool) -> int:
        """A duplicate of our `fd` for the caller: its number there. OSError, ENOENT if it left."""
        return self._addfd(notification, fd, cloexec, 0)

    def answer_fd(self, notification: int, fd: int, cloexec: bool) -> bool:
        """The call returns a duplicate of our `fd`; False if its caller is gone."""
        try:
            if self.addfd_sends:
                self._addfd(notification, fd, cloexec, abi.SECCOMP_ADDFD_FLAG_SEND)
                return True
        except OSError as error:
            if error.errno != EINVAL:
                return self._gone_or_told(notification, error)
            self.addfd_sends = False  # before Linux 5.14: two steps
        try:
            return self.answer(notification, self.give(notification, fd, cloexec))
        except OSError as error:
            return self._gone_or_told(notification, error)

    def _gone_or_told(self, notification: int, error: OSError) -> bool:
        """EMFILE and the like are the call's result."""
        if error.errno not in (ENOENT, None):
            self.answer(notification, -(error.errno or EBADF))
        return False

    def _addfd(self, notification: int, fd: int, cloexec: bool, flags: int) -> int:
        new_flags = os.O_CLOEXEC if cloexec else 0
        raw = abi.NOTIF_ADDFD.pack(notification, flags, fd, 0, new_flags)
        with self.gate:
            number: int = _short(self.fd, abi.SECCOMP_IOCTL_NOTIF_ADDFD, raw)
        if number < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return number


def _wide(fd: int, command: int, value: int) -> int:
    call = ctypes.CDLL(None, use_errno=True).ioctl
    result: int = call(fd, ctypes.c_ulong(command), ctypes.c_ulong(value))
    return result
