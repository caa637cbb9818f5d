"""ioctl tables: a row per ioctl beside its handler, and the one driver that copies arguments in and
out.

A row names the number, what the argument is and which way it moves, and the conditions under which
the ioctl is legal. What no table of a chain knows is ENOTTY (Documentation/virt/kvm/api.rst,
section 4).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from errno import E2BIG, EINVAL, ENOTTY
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from anykvm.fs.task import current
from anykvm.fs.trace import call, enabled
from anykvm.fs.uaccess import UserMemory
from anykvm.kvm.errors import fail
from anykvm.uapi.kvm import IOCTLS

if TYPE_CHECKING:
    from _ctypes import _CData

T = TypeVar("T")
A = TypeVar("A")
C = TypeVar("C", bound="_CData")
H = TypeVar("H", bound=ctypes.Structure)
E = TypeVar("E")


class Arg(Protocol[A]):
    """What an ioctl's third argument is: how the handler's argument comes from it and returns to
    it.
    """

    def copy_in(self, mm: UserMemory, address: int) -> A: ...

    def copy_out(self, mm: UserMemory, address: int, value: A) -> None: ...


class Value:
    """The argument is the value itself; `unused=True` insists on zero, as newer ioctls do."""

    def __init__(self, unused: bool = False) -> None:
        self.unused = unused

    def copy_in(self, mm: UserMemory, address: int) -> int:
        if self.unused and address:
            raise fail(EINVAL, f"takes no argument, got {address:#x}")
        return address

    def copy_out(self, mm: UserMemory, address: int, value: int) -> None:
        pass


class In(Generic[C]):
    """A pointer to a struct that the ioctl reads."""

    def __init__(self, kind: type[C]) -> None:
        self.kind = kind
        self.size = ctypes.sizeof(kind)

    def copy_in(self, mm: UserMemory, address: int) -> C:
        value = self.kind()
        mm.read_into(address, value)
        return value

    def copy_out(self, mm: UserMemory, address: int, value: C) -> None:
        pass


class Out(In[C]):
    """A pointer to a struct that the ioctl writes; the handler gets it zeroed."""

    def copy_in(self, mm: UserMemory, address: int) -> C:
        return self.kind()

    def copy_out(self, mm: UserMemory, address: int, value: C) -> None:
        mm.write(address, bytes(value))


class InOut(In[C]):
    """A pointer to a struct that the ioctl reads and, when it succeeds, writes back."""

    def copy_out(self, mm: UserMemory, address: int, value: C) -> None:
        mm.write(address, bytes(value))


@dataclass(slots=True)
class Tail(Generic[H, E]):
    """A header and the entries of its flexible array."""

    header: H
    entries: Sequence[E]


def _joined(entries: Sequence[Any]) -> bytes:
    return b"".join(bytes(entry) for entry in entries)


class InTail(Generic[H, E]):
    """A header with a count, followed by that many entries; more than `limit` is `too_many`."""

    def __init__(
        self, header: type[H], entry: type[E], count: str, limit: int, too_many: int = E2BIG
    ) -> None:
        self.header, self.count = header, count
        self.entry: Any = entry  # a ctypes type, which its stubs cannot multiply
        self.limit, self.too_many = limit, too_many
        self.offset = ctypes.sizeof(header)

    def copy_header(self, mm: UserMemory, address: int) -> tuple[H, int]:
        header = self.header.from_buffer_copy(mm.read(address, self.offset))
        return header, int(getattr(header, self.count))

    def copy_in(self, mm: UserMemory, address: int) -> Tail[H, E]:
        header, count = self.copy_header(mm, address)
        if count > self.limit:
            raise fail(self.too_many, f"{self.count} is {count}, at most {self.limit} are allowed")
        array = self.entry * count
        raw = mm.read(address + self.offset, ctypes.sizeof(array)) if count else b""
        return Tail(header, list(array.from_buffer_copy(raw)) if count else [])

    def copy_out(self, mm: UserMemory, address: int, value: Tail[H, E]) -> None:
        pass


class InOutTail(InTail[H, E]):
    """As `InTail`, and the entries are written back."""

    def copy_out(self, mm: UserMemory, address: int, value: Tail[H, E]) -> None:
        if value.entries:
            mm.write(address + self.offset, _joined(value.entries))


class OutTail(InTail[H, E]):
    """The caller says how many entries fit; the handler sets `entries`, and too few places are
    E2BIG.

    With `tell_count` the count needed is written back even then (KVM_GET_MSR_INDEX_LIST), so that a
    caller can ask with room for none; without, only success is reported (KVM_GET_SUPPORTED_CPUID).
    """

    def __init__(
        self, header: type[H], entry: type[E], count: str, limit: int, tell_count: bool
    ) -> None:
        super().__init__(header, entry, count, limit)
        self.tell_count = tell_count

    def copy_in(self, mm: UserMemory, address: int) -> Tail[H, E]:
        header, _ = self.copy_header(mm, address)
        return Tail(header, [])

    def copy_out(self, mm: UserMemory, address: int, value: Tail[H, E]) -> None:
        room, needed = int(getattr(value.header, self.count)), len(value.entries)
        setattr(value.header, self.count, needed)
        if room >= needed or self.tell_count:
            mm.write(address, bytes(value.header))
        if room < needed:
            raise fail(E2BIG, f"{needed} entries do not fit the {room} that {self.count} allows")
        if needed:
            mm.write(address + self.offset, _joined(value.entries))


@dataclass(frozen=True, slots=True)
class Need(Generic[T]):
    """A condition of a row: where it does not hold, the ioctl fails with `errno` before it reads
    anything.
    """

    holds: Callable[[T], bool]
    errno: int
    text: str


@dataclass(frozen=True, slots=True)
class IoctlRow(Generic[T]):
    """One ioctl. `capability` is the KVM_CAP_* that announces it, None where it has always been
    there.
    """

    name: str
    number: int
    arg: Arg[Any]
    handler: Callable[[T, Any], int | None]
    capability: int | None = None
    needs: tuple[Need[T], ...] = ()

    def call(self, target: T, mm: UserMemory, address: int) -> int:
        for need in self.needs:
            if not need.holds(target):
                raise fail(need.errno, f"{self.name}: {need.text}")
        value = self.arg.copy_in(mm, address)
        result = self.handler(target, value)
        self.arg.copy_out(mm, address, value)
        return result or 0


@dataclass(slots=True)
class IoctlTable(Generic[T]):
    """The ioctls of one kind of descriptor. `absent` are those that Linux has and this does not."""

    what: str
    rows: dict[int, IoctlRow[T]] = field(default_factory=dict)
    absent: dict[int, tuple[str, int]] = field(default_factory=dict)

    def row(
        self,
        name: str,
        arg: Arg[A],
        capability: int | None = None,
        needs: tuple[Need[T], ...] = (),
    ) -> Callable[[Callable[[T, A], int | None]], Callable[[T, A], int | None]]:
        """Enter the decorated handler under the ioctl's name in linux/kvm.h."""

        def enter(handler: Callable[[T, A], int | None]) -> Callable[[T, A], int | None]:
            number = IOCTLS[name].number
            assert number not in self.rows, f"{name} has two rows in {self.what}"
            self.rows[number] = IoctlRow(name, number, arg, handler, capability, needs)
            return handler

        return enter

    def mark_absent(self, errno: int, *names: str) -> None:
        """Rows for what is not built in, with the errno that Linux then gives."""
        for name in names:
            self.absent[IOCTLS[name].number] = (name, errno)

    def __iter__(self) -> Iterator[IoctlRow[T]]:
        return iter(self.rows.values())


def _find(tables: Sequence[IoctlTable[Any]], number: int) -> IoctlRow[Any]:
    for table in tables:
        row = table.rows.get(number)
        if row is not None:
            return row
    for table in tables:
        if number in table.absent:
            name, errno = table.absent[number]
            raise fail(errno, f"{name} is not built in")
    raise fail(ENOTTY, f"ioctl {number:#x} is unknown to {tables[0].what}")


def drive(tables: Sequence[IoctlTable[Any]], target: object, number: int, address: int) -> int:
    """Run ioctl `number` on `target` by the first table that has it; ENOTTY where none does."""
    row = _find(tables, number)
    if not enabled():
        return row.call(target, current().mm, address)
    with call(tables[0].what, cmd=row.name) as this:
        this.result = result = row.call(target, current().mm, address)
        return result
