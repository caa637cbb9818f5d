"""ioctl tables: a row per ioctl beside its handler, and the one driver that copies arguments in and
out.

A row names the number, what the argument is and which way it moves, and the conditions under which
the ioctl is legal (Documentation/virt/kvm/api.rst, section 4). What no table of a chain knows gets
the errno of its last table: on x86 ENOTTY for VMs, EINVAL for /dev/kvm and vCPUs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from errno import E2BIG, EFAULT, EINVAL, ENOTTY
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from anykvm.fs.task import current
from anykvm.fs.trace import call, enabled
from anykvm.fs.uaccess import UserMemory
from anykvm.kvm.errors import fail
from anykvm.uapi.names import IOCTLS

if TYPE_CHECKING:
    from _ctypes import _CData

T = TypeVar("T")
A = TypeVar("A")
C = TypeVar("C", bound="_CData")
H = TypeVar("H", bound=ctypes.Structure)
E = TypeVar("E")


class Arg(Protocol[A]):
    """What an ioctl's third argument is: how the handler's argument comes from it and returns to
    it. `text` says it for the documentation, `errors` what the copying may give.
    """

    @property
    def text(self) -> str: ...

    @property
    def errors(self) -> Mapping[int, str]: ...

    def copy_in(self, mm: UserMemory, address: int) -> A: ...

    def copy_out(self, mm: UserMemory, address: int, value: A) -> None: ...


BAD_POINTER = "the argument does not point to memory that can be read or written as needed"


def _type_name(kind: type[Any]) -> str:
    """`struct kvm_regs`, or `u64` as the header writes it."""
    if issubclass(kind, ctypes.Structure):
        return f"struct {kind.__name__}"
    return f"u{8 * ctypes.sizeof(kind)}"


class Value:
    """The argument is the value itself; `unused=True` insists on zero, as newer ioctls do."""

    def __init__(self, unused: bool = False) -> None:
        self.unused = unused
        self.text = "none" if unused else "a value"
        self.errors = {EINVAL: "the argument is not 0"} if unused else {}

    def copy_in(self, mm: UserMemory, address: int) -> int:
        if self.unused and address:
            raise fail(EINVAL, f"takes no argument, got {address:#x}")
        return address

    def copy_out(self, mm: UserMemory, address: int, value: int) -> None:
        pass


class In(Generic[C]):
    """A pointer to a struct that the ioctl reads."""

    direction = "in"

    def __init__(self, kind: type[C]) -> None:
        self.kind = kind
        self.size = ctypes.sizeof(kind)
        self.text = f"{_type_name(kind)}, {self.direction}"
        self.errors = {EFAULT: BAD_POINTER}

    def copy_in(self, mm: UserMemory, address: int) -> C:
        value = self.kind()
        mm.read_into(address, value)
        return value

    def copy_out(self, mm: UserMemory, address: int, value: C) -> None:
        pass


class Out(In[C]):
    """A pointer to a struct that the ioctl writes; the handler gets it zeroed."""

    direction = "out"

    def copy_in(self, mm: UserMemory, address: int) -> C:
        return self.kind()

    def copy_out(self, mm: UserMemory, address: int, value: C) -> None:
        mm.write(address, bytes(value))


class InOut(In[C]):
    """A pointer to a struct that the ioctl reads and, when it succeeds, writes back."""

    direction = "in and out"

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

    direction = "in"

    def __init__(
        self, header: type[H], entry: type[E], count: str, limit: int, too_many: int = E2BIG
    ) -> None:
        self.header, self.count = header, count
        self.entry: Any = entry  # a ctypes type, which its stubs cannot multiply
        self.limit, self.too_many = limit, too_many
        self.offset = ctypes.sizeof(header)
        entries = f"{_type_name(entry)}[{count}]"
        self.text = f"{_type_name(header)} and behind it {entries}, {self.direction}"
        self.errors = {EFAULT: BAD_POINTER, too_many: f"{count} is above {limit}"}

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

    direction = "in and out"

    def copy_out(self, mm: UserMemory, address: int, value: Tail[H, E]) -> None:
        if value.entries:
            mm.write(address + self.offset, _joined(value.entries))


class OutTail(InTail[H, E]):
    """The caller says how many entries fit; the handler sets `entries`, and too few places are
    E2BIG.

    With `tell_count` the count needed is written back even then (KVM_GET_MSR_INDEX_LIST), so that a
    caller can ask with room for none; without, only success is reported (KVM_GET_SUPPORTED_CPUID).
    """

    direction = "out"

    def __init__(
        self, header: type[H], entry: type[E], count: str, limit: int, tell_count: bool
    ) -> None:
        super().__init__(header, entry, count, limit)
        self.tell_count = tell_count
        told = f", which then is in {count}" if tell_count else ""
        self.errors = {EFAULT: BAD_POINTER, E2BIG: f"{count} is below the number of entries{told}"}

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
    """A condition of a row: where it does not hold, the ioctl fails with `errno`, before it reads
    anything or, as some of Linux's do, once the argument is copied in (`after_copy`).
    """

    holds: Callable[[T], bool]
    errno: int
    text: str
    after_copy: bool = False


@dataclass(frozen=True, slots=True)
class IoctlRow(Generic[T]):
    """One ioctl. `capability` is the KVM_CAP_* that announces it, None where it has always been
    there. `returns` and `errors` (errno to what it means) say what the handler gives; errors of the
    argument and of the needs are not repeated there.
    """

    name: str
    number: int
    arg: Arg[Any]
    handler: Callable[[T, Any], int | None]
    capability: int | None = None
    needs: tuple[Need[T], ...] = ()
    returns: str = "0"
    errors: Mapping[int, str] = field(default_factory=dict)

    def all_errors(self) -> list[tuple[int, str]]:
        """Every errno it can give and what it means: of the argument, the needs, the handler."""
        needs = ((need.errno, need.text) for need in self.needs)
        return [*self.arg.errors.items(), *needs, *self.errors.items()]

    def check(self, target: T, after_copy: bool) -> None:
        for need in self.needs:
            if need.after_copy == after_copy and not need.holds(target):
                raise fail(need.errno, f"{self.name}: {need.text}")

    def call(self, target: T, mm: UserMemory, address: int) -> int:
        if self.needs:
            self.check(target, after_copy=False)
        value = self.arg.copy_in(mm, address)
        if self.needs:
            self.check(target, after_copy=True)
        result = self.handler(target, value)
        self.arg.copy_out(mm, address, value)
        return result or 0


class Absent(NamedTuple):
    """An ioctl of the header that is not here: the errno that Linux gives without it, and why."""

    name: str
    errno: int
    why: str


@dataclass(slots=True)
class IoctlTable(Generic[T]):
    """The ioctls of one kind of descriptor. `absent` are those that Linux has and this does not, by
    name; `unknown` is the errno of what is neither, from the last table of a chain.
    """

    what: str
    unknown: int = ENOTTY
    rows: dict[int, IoctlRow[T]] = field(default_factory=dict)
    absent: dict[str, Absent] = field(default_factory=dict)

    def row(
        self,
        name: str,
        arg: Arg[A],
        capability: int | None = None,
        needs: tuple[Need[T], ...] = (),
        returns: str = "0",
        errors: Mapping[int, str] | None = None,
    ) -> Callable[[Callable[[T, A], int | None]], Callable[[T, A], int | None]]:
        """Enter the decorated handler under the ioctl's name in linux/kvm.h."""

        def enter(handler: Callable[[T, A], int | None]) -> Callable[[T, A], int | None]:
            number = IOCTLS[name].number
            assert number not in self.rows, f"{name} has two rows in {self.what}"
            self.rows[number] = IoctlRow(
                name, number, arg, handler, capability, needs, returns, errors or {}
            )
            return handler

        return enter

    def mark_absent(self, errno: int, *names: str, why: str) -> None:
        """Rows for what is not built in, with the errno that Linux then gives."""
        self.absent |= {name: Absent(name, errno, why) for name in names}

    def find_absent(self, number: int) -> Absent | None:
        known = (IOCTLS[name] for name in self.absent if name in IOCTLS)
        return next((self.absent[row.name] for row in known if row.number == number), None)

    def __iter__(self) -> Iterator[IoctlRow[T]]:
        return iter(self.rows.values())


def _refused(tables: Sequence[IoctlTable[Any]], number: int) -> OSError:
    """What an ioctl gives that has no row."""
    for table in tables:
        absent = table.find_absent(number)
        if absent is not None:
            return fail(absent.errno, f"{absent.name} is not built in: {absent.why}")
    return fail(tables[-1].unknown, f"ioctl {number:#x} is unknown to {tables[0].what}")


def drive(tables: Sequence[IoctlTable[Any]], target: object, number: int, address: int) -> int:
    """Run ioctl `number` on `target` by the first table that has it; `unknown` where none does."""
    for table in tables:
        row = table.rows.get(number)
        if row is not None:
            break
    else:
        raise _refused(tables, number)
    if not enabled():
        return row.call(target, current().mm, address)
    with call(tables[0].what, cmd=row.name) as this:
        this.result = result = row.call(target, current().mm, address)
        return result
