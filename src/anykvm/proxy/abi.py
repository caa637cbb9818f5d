"""Numbers and structs of Linux that the standard library lacks: seccomp, ptrace, pidfd, x86-64
system calls (linux/seccomp.h, linux/ptrace.h, asm/unistd_64.h), and raw calls with them.
"""

from __future__ import annotations

import ctypes
import os
from struct import Struct

SYS_READ, SYS_OPEN, SYS_STAT, SYS_LSTAT, SYS_MMAP, SYS_IOCTL = 0, 2, 4, 6, 9, 16
SYS_RT_SIGACTION = 13
SYS_ACCESS, SYS_CLOSE, SYS_READLINK, SYS_OPENAT, SYS_NEWFSTATAT = 21, 3, 89, 257, 262
SYS_READLINKAT, SYS_FACCESSAT, SYS_STATX, SYS_OPENAT2, SYS_FACCESSAT2 = 267, 269, 332, 437, 439
SYS_MUNMAP, SYS_SENDMSG, SYS_TGKILL, SYS_SECCOMP, SYS_PIDFD_GETFD = 11, 46, 234, 317, 438

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 36, 38

SECCOMP_SET_MODE_FILTER = 1
SECCOMP_GET_ACTION_AVAIL = 2
SECCOMP_FILTER_FLAG_NEW_LISTENER = 8
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 32
SECCOMP_RET_USER_NOTIF = 0x7FC00000
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_USER_NOTIF_FLAG_CONTINUE = 1
SECCOMP_ADDFD_FLAG_SEND = 2
SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP = 1
SECCOMP_IOCTL_NOTIF_RECV = 0xC0502100
SECCOMP_IOCTL_NOTIF_SEND = 0xC0182101
SECCOMP_IOCTL_NOTIF_ID_VALID = 0x40082102
SECCOMP_IOCTL_NOTIF_ADDFD = 0x40182103
SECCOMP_IOCTL_NOTIF_SET_FLAGS = 0x40082104
AUDIT_ARCH_X86_64 = 0xC000003E

NOTIF = Struct("=Q72s")
"""struct seccomp_notif: id, and all the rest: the call."""
NOTIF_CALL = Struct("=IIiIQ6Q")
"""The call: pid, flags; then seccomp_data: nr, arch, instruction_pointer, args."""
IOCTL_ARGS = Struct("=24xI4xI4xQ24x")
"""Of that the arguments, as ioctl takes them."""
NOTIF_RESP = Struct("=QqiI")
"""struct seccomp_notif_resp: id, val, error, flags."""
NOTIF_ADDFD = Struct("=QIIII")
"""struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags."""

MSGHDR = Struct("=QI4xQQQQi4x")
"""struct msghdr: name, namelen; iov, iovlen; control, controllen; flags (sendmsg(2))."""
IOVEC = Struct("=QQ")
CMSG_FD = Struct("=QIIi4x")
"""struct cmsghdr with a descriptor: len, level, type; fd (cmsg(3))."""

PTRACE_CONT, PTRACE_DETACH, PTRACE_SYSCALL = 7, 17, 24
PTRACE_GETREGS, PTRACE_SETREGS = 12, 13
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207
PTRACE_O_TRACESYSGOOD = 1
WALL = 0x40000000  # __WALL: threads as well as processes


class user_regs_struct(ctypes.Structure):
    """sys/user.h."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags "
            "rsp ss fs_base gs_base ds es fs gs"
        ).split()
    ]
    rax: int
    rdx: int
    rsi: int
    rdi: int
    r8: int
    r9: int
    r10: int
    orig_rax: int
    rip: int


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]


# This one keeps the GIL: giving it up and getting it back costs more than a read of /proc.
_pread = ctypes.PyDLL(None, use_errno=True).pread
_pread.restype = ctypes.c_ssize_t
_pread.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_long]


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def seccomp(operation: int, flags: int, argument: bytes) -> int:
    """seccomp(2)."""
    return _checked(_libc.syscall(SYS_SECCOMP, operation, flags, argument))


def prctl(option: int, argument: int) -> None:
    """prctl(2) with one argument."""
    _checked(_libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0))


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """pidfd_getfd(2): our duplicate of another process's descriptor, closed on exec."""
    return _checked(_libc.syscall(SYS_PIDFD_GETFD, pidfd, ctypes.c_int(fd), 0))


def ptrace(request: int, tid: int, data: int = 0, address: int = 0) -> None:
    """ptrace(2)."""
    _checked(_libc.ptrace(request, tid, address, data))


def set_death_signal(number: int) -> None:
    """This process gets the signal when the thread that made it ends."""
    prctl(PR_SET_PDEATHSIG, number)


def tgkill(pid: int, tid: int, number: int) -> None:
    """tgkill(2): a signal for one thread."""
    _checked(_libc.syscall(SYS_TGKILL, pid, tid, number))


def pread(fd: int, length: int) -> bytes:
    """What a file that never blocks begins with, other threads waiting meanwhile."""
    buffer = ctypes.create_string_buffer(length)
    return ctypes.string_at(buffer, _checked(_pread(fd, buffer, length, 0)))
