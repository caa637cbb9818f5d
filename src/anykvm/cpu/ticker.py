"""The ticker: a native thread that brings every running vCPU back to Python now and then.

A vCPU in native code does not see what only Python can look for, such as a pending signal. So every
few milliseconds each registered `State` gets `tick` and `exit_request` set, by code that needs no
GIL: a thread in Python would make the vCPUs wait for it each time. One thread a process; it lives
while vCPUs are registered.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading

from anykvm.cpu.ir import PTR, Function, Value
from anykvm.cpu.jit import callable_at, process_jit
from anykvm.cpu.state import State, offset_of

TICK_NS = 5_000_000  # how late a running vCPU may notice a signal
CAPACITY = 1 << 16
SYS_FUTEX, FUTEX_WAIT, FUTEX_WAKE = 202, 128, 129  # both private to the process


_libc = ctypes.CDLL(None)


class Board(ctypes.Structure):
    """What the thread reads. `sweeping`: it is writing to the slots' vCPUs at this moment."""

    _fields_ = [
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
        ("stop", ctypes.c_uint64),  # a futex, too
        ("sweeping", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
        ("slots", ctypes.c_uint64 * CAPACITY),
    ]
    seconds: int
    nanoseconds: int
    stop: int
    sweeping: int
    count: int


def _offset(name: str) -> int:
    offset: int = getattr(Board, name).offset
    return offset


def _at(board: Value, name: str) -> Value:
    return board.f.emit(f"getelementptr i8, ptr {board.text}, i64 {_offset(name)}", PTR)


def _sleep(f: Function, board: Value) -> None:
    """Until the time has passed, or `stop` is set."""
    registers = "={rax},{rax},{rdi},{rsi},{rdx},{r10},~{rcx},~{r11},~{memory}"
    stop = _at(board, "stop").text
    arguments = f"i64 {SYS_FUTEX}, ptr {stop}, i64 {FUTEX_WAIT}, i64 0, ptr {board.text}"
    f.emit(f'call i64 asm sideeffect "syscall", "{registers}"({arguments})', "i64")


def _sweep(f: Function, board: Value) -> None:
    """`tick` before `exit_request`: who sees the second finds the first."""
    index = f.var(0)
    with f.Loop() as loop:
        n = index.get()
        loop.break_if(n.uge(_at(board, "count").load("i64", volatile=True)))
        index.set(n + 1)
        slots = _at(board, "slots")
        slot = f.emit(f"getelementptr i64, ptr {slots.text}, i64 {n.text}", PTR)
        cpu = slot.load("i64", volatile=True)
        with f.If(cpu.ne(0)):
            for name in ("tick", "exit_request"):
                field = f.emit(f"inttoptr i64 {(cpu + offset_of(name)).text} to ptr", PTR)
                field.store(f.const(1, 32), volatile=True)


def ticker() -> Function:
    """ticker(board): sleeps and sweeps until `stop`."""
    f = Function("ticker", "void", [("board", PTR)])
    (board,) = f.args
    with f.Loop() as loop:
        _sleep(f, board)
        loop.break_if(_at(board, "stop").load("i64", volatile=True).ne(0))
        f.emit(f"atomicrmw xchg ptr {_at(board, 'sweeping').text}, i64 1 seq_cst", "i64")
        _sweep(f, board)
        f.line(f"store atomic i64 0, ptr {_at(board, 'sweeping').text} seq_cst, align 8")
    f.ret()
    return f


class Ticker:
    """The registered vCPUs of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._board = Board(0, TICK_NS)
        self._thread: threading.Thread | None = None
        self._slots: dict[int, int] = {}  # slot by address of the State
        self._free: list[int] = []

    def register(self, state: State) -> None:
        """From now on `state.tick` is set every TICK_NS."""
        address = ctypes.addressof(state)
        with self._lock:
            slot = self._free.pop() if self._free else self._board.count
            if slot >= CAPACITY:
                raise RuntimeError(f"more than {CAPACITY} vCPUs in one process")
            self._slots[address] = slot
            self._board.slots[slot] = address
            self._board.count = max(self._board.count, slot + 1)
            if self._thread is None:
                self._start()

    def unregister(self, state: State) -> None:
        """On return nobody writes to `state`. Not an error where it is not registered."""
        with self._lock:
            slot = self._slots.pop(ctypes.addressof(state), None)
            if slot is None:
                return
            self._board.slots[slot] = 0
            self._free.append(slot)
            if self._slots:
                while self._board.sweeping:
                    pass
            else:
                self._stop()

    def _start(self) -> None:
        (address,) = process_jit().addresses(["ticker"], lambda _: [ticker()])
        run = callable_at(address, None, ctypes.c_void_p, releases_gil=True)
        self._board.stop = 0
        self._thread = threading.Thread(
            target=run, args=(ctypes.addressof(self._board),), name="kvm-tick", daemon=True
        )
        self._thread.start()

    def shut_down(self) -> None:
        """The process ends, and with it the memory of the vCPUs that are left."""
        with self._lock:
            if self._thread is not None:
                self._stop()

    def after_fork(self) -> None:
        """The child has the parent's vCPUs but not its thread; none of them can run there."""
        self.__init__()  # type: ignore[misc]

    def _stop(self) -> None:
        self._board.stop = 1
        stop = ctypes.addressof(self._board) + _offset("stop")
        _libc.syscall(SYS_FUTEX, ctypes.c_void_p(stop), FUTEX_WAKE, 1)
        assert self._thread is not None
        self._thread.join()
        self._thread = None


TICKER = Ticker()
atexit.register(TICKER.shut_down)
os.register_at_fork(after_in_child=TICKER.after_fork)
