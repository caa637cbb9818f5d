"""The descriptor that delivers clients' trapped calls and takes the answers: seccomp_unotify(2)."""

from __future__ import annotations

import ctypes
import os
import threading
from errno import EBADF, EINTR, EINVAL, ENOENT
from typing import NamedTuple

from anykvm.proxy import abi

# What never blocks is called with the GIL held: giving it up costs more than the call.
_short = ctypes.PyDLL(None, use_errno=True).ioctl
_short.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
_blocking = ctypes.CDLL(None, use_errno=True).ioctl
_blocking.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_SIZE = abi.NOTIF.size


class Notification(NamedTuple):
    """struct seccomp_notif: a call that waits, of thread `tid`, which goes on at `ip`."""

    id: int
    tid: int
    flags: int
    nr: int
    arch: int
    ip: int
    arg0: int
    arg1: int
    arg2: int
    arg3: int
    arg4: int
    arg5: int

    @property
    def args(self) -> tuple[int, ...]:
        return self[6:]

    def same_call(self, other: Notification) -> bool:
        """Whether it may be the other once more."""
        return self[1:] == other[1:]


class Listener:
    """Answers may come from any thread; each thread that receives has a `Receiver`."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.addfd_sends = True
        self.gate = threading.RLock()  # held while a client must not go on
        flag = abi.SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP
        # Linux 6.6: both sides stay on one processor, and a call costs a tenth.
        self.sync = not _wide(fd, abi.SECCOMP_IOCTL_NOTIF_SET_FLAGS, flag)

    def alive(self, notification: int) -> bool:
        """Whether its caller still waits: a signal may have taken it out of the call."""
        raw = notification.to_bytes(8, "little")
        return bool(_short(self.fd, abi.SECCOMP_IOCTL_NOTIF_ID_VALID, raw) == 0)

    def answer(self, notification: int, value: int) -> bool:
        """The call returns `value`, a negative errno for an error; False if its caller is gone."""
        error = value if value < 0 else 0
        raw = abi.NOTIF_RESP.pack(notification, 0 if error else value, error, 0)
        with self.gate:
            return bool(_short(self.fd, abi.SECCOMP_IOCTL_NOTIF_SEND, raw) == 0)

    def let_run(self, notification: int) -> None:
        """The kernel carries out the call as it was made."""
        flag = abi.SECCOMP_USER_NOTIF_FLAG_CONTINUE
        raw = abi.NOTIF_RESP.pack(notification, 0, 0, flag)
        with self.gate:
            _short(self.fd, abi.SECCOMP_IOCTL_NOTIF_SEND, raw)

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


class Receiver:
    """One thread's place to receive."""

    def __init__(self, listener: Listener) -> None:
        self._fd = listener.fd
        self._buffer = ctypes.create_string_buffer(_SIZE)
        self._address = ctypes.addressof(self._buffer)

    def receive(self) -> Notification | None:
        """The next call, without the GIL meanwhile; None if there will be none any more."""
        while True:
            ctypes.memset(self._address, 0, _SIZE)  # the kernel insists
            if _blocking(self._fd, abi.SECCOMP_IOCTL_NOTIF_RECV, self._address) == 0:
                return Notification._make(abi.NOTIF.unpack(self._buffer))
            # ENOENT: its caller was interrupted or killed before we had it.
            if ctypes.get_errno() not in (EINTR, ENOENT):
                return None
