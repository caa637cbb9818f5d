"""A KVM client that knows nothing of anykvm: system calls on /dev/kvm, by libc, and struct layouts
written out. Run as a program: `client.py SCENARIO ARGS`; what it prints is JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from errno import EINTR

KVM_GET_API_VERSION, KVM_CREATE_VM, KVM_CHECK_EXTENSION = 0xAE00, 0xAE01, 0xAE03
KVM_GET_SUPPORTED_CPUID = 0xC008AE05
KVM_GET_VCPU_MMAP_SIZE, KVM_CREATE_VCPU, KVM_CREATE_IRQCHIP = 0xAE04, 0xAE41, 0xAE60
KVM_SET_USER_MEMORY_REGION, KVM_RUN = 0x4020AE46, 0xAE80
KVM_GET_REGS, KVM_SET_REGS = 0x8090AE81, 0x4090AE82
KVM_GET_SREGS, KVM_SET_SREGS = 0x8138AE83, 0x4138AE84
KVM_SET_SIGNAL_MASK, KVM_IOEVENTFD, KVM_IRQFD = 0x4004AE8B, 0x4040AE79, 0x4020AE76
KVM_EXIT_IO, KVM_EXIT_HLT, KVM_EXIT_INTR = 2, 5, 10
KVM_CAP_IRQFD, KVM_CAP_IMMEDIATE_EXIT = 32, 136
SA_RESTART = 0x10000000
IMMEDIATE_EXIT, EXIT_REASON, UNION = 1, 8, 32

CODE = 0x1000
PORT = 0x10
COUNT_OUT = bytes.fromhex("ba1000 ee fec0 ebfb")  # mov dx,16; 1: out dx,al; inc al; jmp 1b
SPIN = bytes.fromhex("ebfe")
HALT = bytes.fromhex("f4")

libc = ctypes.CDLL(None, use_errno=True)


def ioctl(fd: int, command: int, argument: int = 0) -> int:
    result = libc.ioctl(fd, ctypes.c_ulong(command), ctypes.c_ulong(argument))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def pointer(raw: bytes | bytearray) -> ctypes.Array:
    return ctypes.create_string_buffer(bytes(raw), len(raw))


def call(fd: int, command: int, raw: bytes | bytearray) -> bytes:
    """An ioctl whose argument points to a struct: the struct afterwards."""
    buffer = pointer(raw)
    ioctl(fd, command, ctypes.addressof(buffer))
    return buffer.raw


def errno_of(function, *args) -> int:
    try:
        function(*args)
    except OSError as error:
        return error.errno or 0
    return 0


def address_of(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class Machine:
    """A VM with one vCPU in real mode and memory at 0."""

    def __init__(self, code: bytes, memory: mmap.mmap | None = None, al: int = 0) -> None:
        self.kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        self.vm = ioctl(self.kvm, KVM_CREATE_VM)
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = memory or mmap.mmap(-1, 1 << 20, flags=private)
        self.memory[CODE : CODE + len(code)] = code
        self.set_slot(0, 0, len(self.memory), address_of(self.memory))
        self.vcpu = ioctl(self.vm, KVM_CREATE_VCPU, 0)
        self.run = mmap.mmap(self.vcpu, ioctl(self.kvm, KVM_GET_VCPU_MMAP_SIZE))
        self.set_up(al)

    def set_slot(self, slot: int, gpa: int, size: int, address: int, flags: int = 0) -> None:
        call(
            self.vm,
            KVM_SET_USER_MEMORY_REGION,
            struct.pack("=IIQQQ", slot, flags, gpa, size, address),
        )

    def set_up(self, al: int = 0, rip: int = CODE) -> None:
        sregs = bytearray(call(self.vcpu, KVM_GET_SREGS, bytes(312)))
        sregs[0:8] = bytes(8)  # cs.base
        sregs[12:14] = bytes(2)  # cs.selector
        call(self.vcpu, KVM_SET_SREGS, sregs)
        call(self.vcpu, KVM_SET_REGS, struct.pack("18Q", al, *[0] * 15, rip, 2))

    @property
    def exit_reason(self) -> int:
        return struct.unpack_from("I", self.run, EXIT_REASON)[0]

    def enter(self) -> int:
        """KVM_RUN: 0 or an errno."""
        return errno_of(ioctl, self.vcpu, KVM_RUN)

    def out_byte(self) -> int:
        """The byte of a KVM_EXIT_IO."""
        direction, size, port, count, offset = struct.unpack_from("=BBHIQ", self.run, UNION)
        assert (direction, size, port, count) == (1, 1, PORT, 1)
        return self.run[offset]

    def close(self) -> None:
        self.run.close()
        for fd in (self.vcpu, self.vm, self.kvm):
            os.close(fd)


def basic(exits: str) -> object:
    machine = Machine(COUNT_OUT)
    seen = []
    for _ in range(int(exits)):
        assert machine.enter() == 0
        assert machine.exit_reason == KVM_EXIT_IO
        seen.append(machine.out_byte())
    names = [os.readlink(f"/proc/self/fd/{fd}") for fd in (machine.kvm, machine.vm, machine.vcpu)]
    return {
        "version": ioctl(machine.kvm, KVM_GET_API_VERSION),
        "irqfd": ioctl(machine.kvm, KVM_CHECK_EXTENSION, KVM_CAP_IRQFD),
        "seen": seen,
        "names": names,
        "unknown": errno_of(ioctl, machine.vm, 0xAEFF),
        "bad_pointer": errno_of(ioctl, machine.vcpu, KVM_SET_REGS, 0x10),
        "bad_fd": errno_of(ioctl, 999, KVM_RUN),
        "not_kvm": errno_of(ioctl, 1, KVM_CREATE_VM),
    }


def lacking() -> object:
    """What a KVM offers and refuses that was told to be less than it is."""
    machine = Machine(COUNT_OUT)
    raw = call(machine.kvm, KVM_GET_SUPPORTED_CPUID, struct.pack("=II", 256, 0) + bytes(256 * 40))
    count = struct.unpack_from("I", raw)[0]
    entries = [struct.unpack_from("=7I12x", raw, 8 + 40 * n) for n in range(count)]
    runs = [(machine.enter(), machine.exit_reason) for _ in range(4)]
    return {
        "sse2": next(e[6] >> 26 & 1 for e in entries if e[0] == 1),
        "sse4_1": next(e[5] >> 19 & 1 for e in entries if e[0] == 1),
        "xsave": [next(e[5] >> 26 & 1 for e in entries if e[0] == 1)]
        + [e[3] for e in entries if e[0] == 0xD],
        "second vcpu": errno_of(ioctl, machine.vm, KVM_CREATE_VCPU, 1),
        "third vcpu": errno_of(ioctl, machine.vm, KVM_CREATE_VCPU, 2),
        "runs": runs,
        "value": machine.out_byte(),
    }


def descriptors() -> object:
    """dup, second mappings, SCM_RIGHTS, fork, exec, a relative path."""
    machine = Machine(COUNT_OUT)
    copy = os.dup(machine.vcpu)
    second = mmap.mmap(copy, 4096)
    os.close(machine.vcpu)
    machine.vcpu = copy
    assert machine.enter() == 0
    same_page = second[EXIT_REASON : EXIT_REASON + 4] == struct.pack("I", KVM_EXIT_IO)
    ours, theirs = socket.socketpair()
    socket.send_fds(ours, [b"x"], [machine.kvm])
    passed = socket.recv_fds(theirs, 1, 1)[1][0]
    os.close(machine.kvm)
    pid = os.fork()
    if pid == 0:
        foreign = errno_of(ioctl, machine.vm, KVM_CREATE_VCPU, 1)
        os._exit(foreign if ioctl(passed, KVM_GET_API_VERSION) == 12 else 255)
    in_child = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.chdir("/dev")
    relative = os.open("kvm", os.O_RDONLY)
    helper = subprocess.run(["/bin/echo", "helper"], capture_output=True, text=True, check=True)
    return {
        "same_page": same_page,
        "passed": ioctl(passed, KVM_GET_API_VERSION),
        "foreign_errno": in_child,
        "relative": ioctl(relative, KVM_GET_API_VERSION),
        "helper": helper.stdout,
    }


def replaced() -> object:
    """One call, word for word, on a number that is a VM, then another VM, no file of anybody's, the
    system's, and a VM again.
    """
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    number, other = ioctl(kvm, KVM_CREATE_VM), ioctl(kvm, KVM_CREATE_VM)
    null = os.open("/dev/null", os.O_RDWR)

    def create() -> int:
        """A first vCPU: EEXIST in a VM that has it."""
        return errno_of(ioctl, number, KVM_CREATE_VCPU, 0)

    found = [create(), create()]
    os.dup2(other, number)
    found += [create(), create()]
    os.close(number)
    found += [create()]
    os.dup2(null, number)
    found += [create()]
    os.dup2(other, number)
    return [*found, create()]


def versions(number: str) -> object:
    """What a number that is a descriptor's as well, of ours or theirs, comes back as."""
    fds = [os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC) for _ in range(int(number))]
    return sorted({libc.ioctl(fd, KVM_GET_API_VERSION, 0) for fd in fds})


def kicks(restart: str, number: str) -> object:
    """Kicks of a spinning vCPU by immediate_exit and a signal: each must end its KVM_RUN."""
    machine = Machine(SPIN)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, restart == "0")
    kicked, errors, late = threading.Semaphore(0), [], []

    def vcpu() -> None:
        for _ in range(int(number)):
            while not machine.run[IMMEDIATE_EXIT]:
                error = machine.enter()
                # 0: the very first was interrupted before anybody had received it.
                if error != EINTR or machine.exit_reason not in (KVM_EXIT_INTR, 0):
                    errors.append((error, machine.exit_reason))
            machine.run[IMMEDIATE_EXIT] = 0
            kicked.release()

    thread = threading.Thread(target=vcpu)
    thread.start()
    for turn in range(int(number)):
        time.sleep(turn % 4 * 0.0007)
        machine.run[IMMEDIATE_EXIT] = 1
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
        if not kicked.acquire(timeout=5):
            late.append(turn)
            break
    thread.join(1)
    return {"errors": errors, "late": late}


def signals_alone(restart: str, number: str) -> object:
    """Kicks by a signal and nothing else, as kvmtool's."""
    machine = Machine(SPIN)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, restart == "0")
    ended = 0
    for _ in range(int(number)):
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGUSR1))
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        timer.start()  # its thread blocks the signal, so it is ours
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        ended += machine.enter() == EINTR
        timer.join()
    return {"ended": ended}


def nothing_lost(seconds: str) -> object:
    """Exits under a rain of signals: every value once, in order."""
    machine = Machine(COUNT_OUT)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0011, 0.0011)
    expected, interrupted, stale, wrong = 0, 0, 0, []
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end and not wrong:
        error = machine.enter()
        if error == EINTR:
            interrupted += 1
            stale += machine.exit_reason != KVM_EXIT_INTR
            continue
        value = machine.out_byte()
        if error or value != expected & 0xFF:
            wrong.append((error, expected & 0xFF, value))
        expected += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
    return {"exits": expected, "interrupted": interrupted, "stale": stale, "wrong": wrong}


def handler_flags() -> object:
    """SA_RESTART of handlers that were installed without: who kicks, who asked, who did not."""

    def restarts(number: int) -> bool:
        signal.signal(number, lambda *_: None)
        signal.siginterrupt(number, True)
        found = ctypes.create_string_buffer(512)
        assert libc.sigaction(number, None, found) == 0
        return bool(struct.unpack_from("=i", found, 136)[0] & SA_RESTART)

    before = restarts(signal.SIGUSR1)
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    opened = restarts(signal.SIGUSR1)
    ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT)
    numbers = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGRTMIN, signal.SIGRTMAX, signal.SIGALRM)
    return {"before": before, "opened": opened, "after": [restarts(n) for n in numbers]}


def calls_under_kicks(number: str) -> object:
    """Calls other than KVM_RUN while signals arrive: in the kernel none of them ends by one."""
    kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    ioctl(kvm, KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT)
    signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.siginterrupt(signal.SIGUSR1, True)
    over, results = threading.Event(), set()

    def caller() -> None:
        while not over.is_set():
            results.add(libc.ioctl(kvm, KVM_GET_API_VERSION, 0))

    thread = threading.Thread(target=caller)
    thread.start()
    for _ in range(int(number)):
        time.sleep(0.0005)
        signal.pthread_kill(thread.ident, signal.SIGUSR1)
    over.set()
    thread.join(5)
    return sorted(results)


def signal_mask() -> object:
    """A signal that only KVM_RUN lets through ends it, and stays pending."""
    machine = Machine(SPIN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    allowed = (1 << 64) - 1 & ~(1 << signal.SIGUSR1 - 1)
    call(machine.vcpu, KVM_SET_SIGNAL_MASK, struct.pack("=IQ", 8, allowed))
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
    timer.start()
    error = machine.enter()
    timer.join()
    return {"errno": error, "pending": signal.SIGUSR1 in signal.sigpending()}


def eventfds() -> object:
    machine = Machine(COUNT_OUT)
    doorbell, line = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
    any_value = struct.pack("=QQIiI36x", 0, PORT, 1, doorbell, 2)
    call(machine.vm, KVM_IOEVENTFD, any_value)
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    error = machine.enter()
    irqchip = os.open("/dev/kvm", os.O_RDWR)
    other = ioctl(irqchip, KVM_CREATE_VM)
    ioctl(other, KVM_CREATE_IRQCHIP)
    call(other, KVM_IRQFD, struct.pack("=IIII16x", line, 5, 0, 0))
    taken = struct.pack("=IIII16x", line, 6, 0, 0)
    level, acknowledged = os.eventfd(0), os.eventfd(0)
    resample = struct.pack("=IIII16x", level, 9, 2, acknowledged)
    held = len(os.listdir("/proc/self/fd"))
    poll = select.poll()
    poll.register(machine.vm, select.POLLIN)
    return {
        "errno": error,
        "rung": os.eventfd_read(doorbell) > 0,
        "twice": errno_of(call, other, KVM_IRQFD, taken),
        "no_eventfd": errno_of(call, other, KVM_IRQFD, struct.pack("=IIII16x", other, 5, 0, 0)),
        "resample": errno_of(call, other, KVM_IRQFD, resample),
        "poll": len(poll.poll(0)),
        "more descriptors": len(os.listdir("/proc/self/fd")) - held,
    }


def guest_copies(machine: Machine, source: int, target: int) -> None:
    """Have the guest move a byte from one page to another: mov al,[s]; mov [t],al; hlt."""
    code = b"\xa0" + struct.pack("<H", source) + b"\xa2" + struct.pack("<H", target) + HALT
    machine.memory[CODE : CODE + len(code)] = code
    machine.set_up()
    assert machine.enter() == 0, "KVM_RUN failed"
    assert machine.exit_reason == KVM_EXIT_HLT, machine.exit_reason


def memory_kinds() -> object:
    """What a slot may be made of, and slots that are cut, joined and made again."""
    result = {}
    with tempfile.TemporaryFile() as file:
        file.write(b"\x5a" * 8192)
        file.flush()
        sources = {
            "private": mmap.mmap(-1, 8192, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
            "shared": mmap.mmap(-1, 8192),
            "file": mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_SHARED),
            "private file": mmap.mmap(file.fileno(), 8192, flags=mmap.MAP_PRIVATE),
            "memfd": mmap.mmap(memfd(8192), 8192),
        }
        for name, memory in sources.items():
            machine = Machine(HALT)
            memory[0] = 0x77
            machine.set_slot(1, 0x200000, 8192, address_of(memory))
            machine.set_slot(0, 0, 0, 0)
            machine.set_slot(0, 0, 0x4000, address_of(machine.memory))
            machine.set_slot(2, 0x4000, 8192, address_of(memory))
            guest_copies(machine, 0x4000, 0x5001)
            result[name] = memory[4097]
            machine.close()
        file.seek(4097)
        result["in the file"] = file.read(1)[0]
    return result


def memfd(size: int) -> int:
    fd = os.memfd_create("ram")
    os.ftruncate(fd, size)
    return fd


def executable(address: str) -> object:
    """Executable memory at an address whose lower half looks like a dirty ring's offset."""
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    fixed = 0x100000 | mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # MAP_FIXED_NOREPLACE
    found = libc.mmap(int(address, 16), 8192, 7, fixed, -1, 0)
    ctypes.memset(found, 0x77, 1)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    machine = Machine(HALT, mmap.mmap(-1, 0x4000, flags=private))
    machine.set_slot(1, 0x4000, 8192, found)
    guest_copies(machine, 0x4000, 0x5001)
    return {"at": hex(found), "byte": ctypes.string_at(found + 4097, 1)[0]}


def many_slots() -> object:
    """One memory cut into slots of a page each, some removed, then whole again; data survive."""
    machine = Machine(HALT)
    for page in range(256):
        machine.memory[page << 12] = page
    machine.memory[CODE : CODE + 1] = HALT
    machine.set_slot(0, 0, 0, 0)
    base = address_of(machine.memory)
    for page in range(16):
        machine.set_slot(page, page << 12, 4096, base + (page << 12))
    guest_copies(machine, 0x7000, 0x9001)
    for page in range(16):
        machine.set_slot(page, page << 12, 0, 0)
    machine.set_slot(0, 0, len(machine.memory), base)
    guest_copies(machine, 0x8000, 0xA001)
    marks = [machine.memory[page << 12] for page in range(2, 256)]
    return {
        "copied": [machine.memory[0x9001], machine.memory[0xA001]],
        "kept": marks == list(range(2, 256)),
    }


def supervisor_holds() -> list[str]:
    """The VMs and vCPUs that our parent has descriptors of."""
    folder = f"/proc/{os.getppid()}/fd"
    names = []
    for fd in os.listdir(folder):
        try:
            names.append(os.readlink(f"{folder}/{fd}"))
        except FileNotFoundError:
            continue
    return [name for name in names if "memfd:kvm" in name and "-stats" not in name]


def lifetime(number: str) -> object:
    """Machines made and closed: nothing of them stays."""
    threads = f"/proc/{os.getppid()}/task"
    Machine(HALT).close()
    time.sleep(0.2)
    before = len(os.listdir(threads))
    for _ in range(int(number)):
        Machine(HALT).close()
    end = time.monotonic() + 5
    while supervisor_holds() and time.monotonic() < end:
        time.sleep(0.01)
    kept = Machine(HALT)
    mapping = mmap.mmap(kept.vcpu, 4096)
    kept.close()
    while len(supervisor_holds()) > 1 and time.monotonic() < end:
        time.sleep(0.01)
    by_mapping = len(supervisor_holds())
    mapping.close()
    while supervisor_holds() and time.monotonic() < end:
        time.sleep(0.01)
    return {
        "left": supervisor_holds(),
        "by_mapping": by_mapping,
        "threads": len(os.listdir(threads)) - before,
    }


def daemon(path: str) -> object:
    """The main process ends; a grandchild in a session of its own goes on with a VM."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(0.3)
            machine = Machine(COUNT_OUT)
            error = machine.enter()
            with open(path + ".new", "w") as file:
                file.write(json.dumps({"errno": error, "reason": machine.exit_reason}))
            os.rename(path + ".new", path)
        os._exit(0)
    os.wait()
    return {}


def orphaned() -> object:
    """The supervisor is killed while a vCPU runs."""
    machine = Machine(SPIN)
    threading.Timer(0.1, os.kill, (os.getppid(), signal.SIGKILL)).start()
    return {"run": machine.enter(), "again": machine.enter()}


def nothing_left(number: str) -> object:
    """Clients are killed while their vCPUs run: how many more descriptors the supervisor has."""
    held = f"/proc/{os.getppid()}/fd"

    def kill_one() -> None:
        pid = os.fork()
        if not pid:
            Machine(SPIN).enter()
            os._exit(0)
        time.sleep(0.15)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    kill_one()
    time.sleep(1)  # until its VM has been taken down
    before, end = len(os.listdir(held)), time.monotonic() + 5
    for _ in range(int(number)):
        kill_one()
    while (left := len(os.listdir(held)) - before) > 1 and time.monotonic() < end:
        time.sleep(0.05)
    return left


def killed() -> object:
    machine = Machine(SPIN)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return {"run": machine.enter()}


def stopped() -> object:
    """The process stops while its vCPU runs in a thread of its own, and goes on."""
    machine = Machine(SPIN)
    vcpu = threading.Thread(target=machine.enter)
    vcpu.start()
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGSTOP)
    vcpu.join(10)
    return {"left": vcpu.is_alive()}


def looks() -> object:
    """What a program sees of the node without opening it."""
    found = os.stat("/dev/kvm")
    return {
        "mode": oct(found.st_mode),
        "device": [os.major(found.st_rdev), os.minor(found.st_rdev)],
        "access": [os.access("/dev/kvm", os.R_OK | os.W_OK), os.access("/dev/kvm", os.X_OK)],
        "readlink": errno_of(os.readlink, "/dev/kvm"),
        "another": os.path.exists("/dev/null"),
        "missing": os.path.exists("/dev/kvm2"),
        "command": subprocess.run(
            ["stat", "-c", "%F %t:%T", "/dev/kvm"], capture_output=True, text=True, check=True
        ).stdout,
    }


def cost(calls: str) -> object:
    machine = Machine(COUNT_OUT)
    machine.enter()

    def each(fd: int, command: int, argument: int) -> float:
        start = time.perf_counter()
        for _ in range(int(calls)):
            libc.ioctl(fd, command, argument)
        return (time.perf_counter() - start) / int(calls) * 1e6

    return {
        "ioctl": each(machine.kvm, KVM_CHECK_EXTENSION, 3),
        "exit": each(machine.vcpu, KVM_RUN, 0),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])), flush=True)
