"""The client's filter: a program for seccomp, in classic BPF (seccomp(2), linux/bpf_common.h).

It sends to us KVM's ioctls, what opens files, mappings that might be of a dirty ring and are not as
that allows, and handlers for the signals that VMMs kick vCPUs by. It lets everything else run: the
decision takes a few instructions in the kernel. Where /dev/kvm does not exist, or not for this
user, calls that ask whether it does are sent, too.
"""

from __future__ import annotations

import os
import signal
from struct import Struct

from anykvm.proxy import abi
from anykvm.uapi.kvm import KVM_DIRTY_LOG_PAGE_OFFSET

LD_W_ABS, ALU_AND, JMP_JEQ, JMP_JGE, JMP_JSET, RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
NR, ARCH, ARGS = 0, 4, 16  # offsets in struct seccomp_data
KVMIO = 0xAE00
AT_EMPTY_PATH = 0x1000
O_PATH = os.O_PATH
PROT_EXEC, MAP_TYPE, MAP_PRIVATE, MAP_ANONYMOUS = 4, 0xF, 2, 0x20
# Where in a vCPU's file the dirty ring may lie, the largest included
RING_FIRST = KVM_DIRTY_LOG_PAGE_OFFSET * 4096
RING_END = RING_FIRST + (1 << 20)
KICKS = (signal.SIGUSR1, signal.SIGUSR2)  # and the real-time signals that libc leaves to programs
NEVER_A_DEVICE = os.O_CREAT | os.O_DIRECTORY | O_PATH

SOCK_FILTER = Struct("=HBBI")
Instruction = tuple[int, int, int, int]
NOTIFY: Instruction = (RET, 0, 0, abi.SECCOMP_RET_USER_NOTIF)
ALLOW: Instruction = (RET, 0, 0, abi.SECCOMP_RET_ALLOW)

# Calls with flags say by them that no device is meant: (call, index of the flags, bits).
OPENS = ((abi.SYS_OPEN, 1, NEVER_A_DEVICE), (abi.SYS_OPENAT, 2, NEVER_A_DEVICE))
LOOKS = (
    (abi.SYS_NEWFSTATAT, 3, AT_EMPTY_PATH),
    (abi.SYS_STATX, 2, AT_EMPTY_PATH),
)
PLAIN_LOOKS = (
    abi.SYS_STAT,
    abi.SYS_LSTAT,
    abi.SYS_ACCESS,
    abi.SYS_FACCESSAT,
    abi.SYS_FACCESSAT2,
    abi.SYS_READLINK,
    abi.SYS_READLINKAT,
)


def _load(offset: int) -> Instruction:
    return (LD_W_ABS, 0, 0, offset)


def _argument(index: int) -> Instruction:
    """The lower half of an argument."""
    return _load(ARGS + 8 * index)


def _upper(index: int) -> Instruction:
    return _load(ARGS + 8 * index + 4)


def _on_call(number: int, then: list[Instruction]) -> list[Instruction]:
    """`then` for this call, which ends in a return; else what follows."""
    return [(JMP_JEQ, 0, len(then), number), *then]


def _unless_flags(number: int, index: int, bits: int) -> list[Instruction]:
    return _on_call(number, [_argument(index), (JMP_JSET, 0, 1, bits), ALLOW, NOTIFY])


def _kvm_ioctls() -> list[Instruction]:
    body = [_argument(1), (ALU_AND, 0, 0, 0xFF00), (JMP_JEQ, 0, 1, KVMIO), NOTIFY, ALLOW]
    return _on_call(abi.SYS_IOCTL, body)


def _ring_maps() -> list[Instruction]:
    """Private or executable mappings from within the range of the rings."""
    body = [
        *(_upper(5), (JMP_JEQ, 1, 0, 0), ALLOW),
        *(_argument(5), (JMP_JGE, 1, 0, RING_FIRST), ALLOW, (JMP_JGE, 0, 1, RING_END), ALLOW),
        *(_argument(2), (JMP_JSET, 0, 1, PROT_EXEC), NOTIFY),
        *(_argument(3), (JMP_JSET, 0, 1, MAP_ANONYMOUS), ALLOW),
        *((ALU_AND, 0, 0, MAP_TYPE), (JMP_JEQ, 0, 1, MAP_PRIVATE), NOTIFY, ALLOW),
    ]
    return _on_call(abi.SYS_MMAP, body)


def _kick_handlers() -> list[Instruction]:
    """sigaction with a handler, for a signal that may be a kick."""
    tests = [(JMP_JEQ, 0, 1, int(number)) for number in KICKS]
    body = [
        *(_argument(1), (JMP_JEQ, 0, 3, 0), _upper(1), (JMP_JEQ, 0, 1, 0), ALLOW),
        *(_argument(0), *(step for test in tests for step in (test, NOTIFY))),
        *((JMP_JGE, 1, 0, signal.SIGRTMIN), ALLOW, NOTIFY),
    ]
    return _on_call(abi.SYS_RT_SIGACTION, body)


def program(looks: bool) -> bytes:
    """The filter; with `looks` it sends stat, access and their like as well.

    Calls of 32-bit programs are let through: they meet the host as it is.
    """
    code = [_load(ARCH), (JMP_JEQ, 1, 0, abi.AUDIT_ARCH_X86_64), ALLOW, _load(NR), *_kvm_ioctls()]
    for row in (*OPENS, *(LOOKS if looks else ())):
        code += _unless_flags(*row)
    code += _ring_maps() + _kick_handlers()
    for number in (abi.SYS_OPENAT2, *(PLAIN_LOOKS if looks else ())):
        code += _on_call(number, [NOTIFY])
    return b"".join(SOCK_FILTER.pack(*instruction) for instruction in [*code, ALLOW])
