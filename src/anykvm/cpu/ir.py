"""A value algebra that writes LLVM IR as text.

Python runs once, when a piece of native code is generated; what it computes with are `Value`s, and
each operation on one appends an instruction to the function being built. Integers are unsigned
unless a method says otherwise (`sar`, `slt`, `sext`). Structured control flow is `with
f.If(cond):`, `with f.Else():` and `with f.Loop() as loop:`; a mutable local is a `Var`. Everything
here knows LLVM and nothing of x86.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

PTR = "ptr"
LIKELY = '!0 = !{!"branch_weights", i32 2000, i32 1}\n'  # for `!prof !0`: the first target


def int_type(bits: int) -> str:
    return f"i{bits}"


class Value:
    """An SSA value or a constant: its text in the IR, its LLVM type, its function."""

    __slots__ = ("constant", "f", "text", "type")

    def __init__(self, f: Function, text: str, type_: str, constant: int | None = None) -> None:
        self.f, self.text, self.type, self.constant = f, text, type_, constant

    def __repr__(self) -> str:
        return f"{self.type} {self.text}"

    def __bool__(self) -> bool:
        raise TypeError("a Value is not known when code is generated: use f.If(...) or select")

    @property
    def bits(self) -> int:
        if not self.type.startswith("i"):
            raise TypeError(f"expected an integer, got {self!r}")
        return int(self.type[1:])

    def _same(self, other: Value | int) -> Value:
        """`other` as a value of this type."""
        if isinstance(other, Value):
            if other.type != self.type:
                raise TypeError(f"operands differ: {self!r} and {other!r}")
            return other
        if self.type.startswith("<"):
            return self.f.splat(self.type, other)
        return self.f.const(other, self.bits)

    def _binary(self, op: str, other: Value | int) -> Value:
        other = self._same(other)
        return self.f.emit(f"{op} {self.type} {self.text}, {other.text}", self.type)

    # Arithmetic and logic
    def __add__(self, other: Value | int) -> Value:
        return self if other == 0 else self._binary("add", other)

    __radd__ = __add__

    def __sub__(self, other: Value | int) -> Value:
        return self if other == 0 else self._binary("sub", other)

    def __rsub__(self, other: int) -> Value:
        return self._same(other)._binary("sub", self)

    def __mul__(self, other: Value | int) -> Value:
        return self._binary("mul", other)

    def __and__(self, other: Value | int) -> Value:
        return self._binary("and", other)

    __rand__ = __and__

    def __or__(self, other: Value | int) -> Value:
        return self if other == 0 else self._binary("or", other)

    __ror__ = __or__

    def __xor__(self, other: Value | int) -> Value:
        return self._binary("xor", other)

    __rxor__ = __xor__

    def __lshift__(self, other: Value | int) -> Value:
        return self if other == 0 else self._binary("shl", other)

    def __rshift__(self, other: Value | int) -> Value:
        return self if other == 0 else self._binary("lshr", other)

    def sar(self, other: Value | int) -> Value:
        return self._binary("ashr", other)

    def __invert__(self) -> Value:
        return self._binary("xor", -1)

    def __neg__(self) -> Value:
        return self._same(0)._binary("sub", self)

    def udiv(self, other: Value | int) -> Value:
        return self._binary("udiv", other)

    def urem(self, other: Value | int) -> Value:
        return self._binary("urem", other)

    # Comparisons give i1 (or a vector of i1)
    def cmp(self, predicate: str, other: Value | int) -> Value:
        if self.type == PTR and other == 0:
            return self.f.emit(f"icmp {predicate} ptr {self.text}, null", "i1")
        other = self._same(other)
        result = "i1"
        if self.type.startswith("<"):
            result = self.type.split(" x ")[0] + " x i1>"
        return self.f.emit(f"icmp {predicate} {self.type} {self.text}, {other.text}", result)

    def eq(self, other: Value | int) -> Value:
        return self.cmp("eq", other)

    def eq_ptr(self, other: Value) -> Value:
        return self.f.emit(f"icmp eq ptr {self.text}, {other.text}", "i1")

    def ne(self, other: Value | int) -> Value:
        return self.cmp("ne", other)

    def ult(self, other: Value | int) -> Value:
        return self.cmp("ult", other)

    def ule(self, other: Value | int) -> Value:
        return self.cmp("ule", other)

    def ugt(self, other: Value | int) -> Value:
        return self.cmp("ugt", other)

    def uge(self, other: Value | int) -> Value:
        return self.cmp("uge", other)

    def slt(self, other: Value | int) -> Value:
        return self.cmp("slt", other)

    def sgt(self, other: Value | int) -> Value:
        return self.cmp("sgt", other)

    def sge(self, other: Value | int) -> Value:
        return self.cmp("sge", other)

    # Conversions
    def cast(self, op: str, type_: str) -> Value:
        """One LLVM cast instruction: `v.cast("fptosi", "i32")`."""
        return self.f.emit(f"{op} {self.type} {self.text} to {type_}", type_)

    def zext(self, bits: int) -> Value:
        return self if bits == self.bits else self.cast("zext", int_type(bits))

    def sext(self, bits: int) -> Value:
        return self if bits == self.bits else self.cast("sext", int_type(bits))

    def trunc(self, bits: int) -> Value:
        return self if bits == self.bits else self.cast("trunc", int_type(bits))

    def resize(self, bits: int) -> Value:
        """Zero-extended or truncated to `bits`."""
        return self.zext(bits) if bits > self.bits else self.trunc(bits)

    def bitcast(self, type_: str) -> Value:
        return self if type_ == self.type else self.cast("bitcast", type_)

    def to_ptr(self) -> Value:
        return self.cast("inttoptr", PTR)

    def to_int(self) -> Value:
        return self.cast("ptrtoint", "i64")

    def select(self, then: Value | int, other: Value | int) -> Value:
        """`then` where this i1 is true, else `other`; one of the two must be a Value."""
        if not isinstance(then, Value):
            assert isinstance(other, Value)
            then = other._same(then)
        other = then._same(other)
        return self.f.emit(
            f"select {self.type} {self.text}, {then.type} {then.text}, {other.type} {other.text}",
            then.type,
        )

    def bit(self, n: int) -> Value:
        """Bit `n` as an i1."""
        return (self >> n).trunc(1)

    # Memory
    def offset(self, by: Value | int) -> Value:
        """This pointer plus `by` bytes."""
        if isinstance(by, int):
            if by == 0:
                return self
            by = self.f.const(by, 64)
        return self.f.emit(f"getelementptr i8, ptr {self.text}, {by.type} {by.text}", PTR)

    def load(self, type_: str, *, volatile: bool = False, align: int = 1) -> Value:
        v = "volatile " if volatile else ""
        return self.f.emit(f"load {v}{type_}, ptr {self.text}, align {align}", type_)

    def store(self, value: Value, *, volatile: bool = False, align: int = 1) -> None:
        v = "volatile " if volatile else ""
        self.f.line(f"store {v}{value.type} {value.text}, ptr {self.text}, align {align}")

    def call(self, result: str, *args: Value) -> Value:
        """Calls this function pointer with the C calling convention."""
        return self.f.call(self.text, result, *args)


class Var:
    """A mutable local of a function (LLVM promotes it to registers)."""

    __slots__ = ("f", "ptr", "type")

    def __init__(self, f: Function, ptr: str, type_: str) -> None:
        self.f, self.ptr, self.type = f, ptr, type_

    def get(self) -> Value:
        return self.f.emit(f"load {self.type}, ptr {self.ptr}", self.type)

    def set(self, value: Value | int) -> None:
        if not isinstance(value, Value):
            value = self.f.const(value, int(self.type[1:]))
        if value.type != self.type:
            raise TypeError(f"variable of type {self.type} set to {value!r}")
        self.f.line(f"store {value.type} {value.text}, ptr {self.ptr}")


class LoopScope:
    """The two ways out of one turn of a `Loop`."""

    def __init__(self, f: Function, top: str, end: str) -> None:
        self.f, self.top, self.end = f, top, end

    def break_if(self, cond: Value) -> None:
        inside = self.f.label("stay")
        self.f.branch(cond, self.end, inside)
        self.f.start(inside)

    def break_(self) -> None:
        self.f.jump(self.end)

    def continue_(self) -> None:
        self.f.jump(self.top)


class Function:
    """One LLVM function under construction. `args` are its parameters as Values, in order."""

    def __init__(
        self, name: str, result: str, params: Sequence[tuple[str, str]], convention: str = ""
    ) -> None:
        self.name, self.result, self.convention = name, result, convention
        self.params = list(params)
        self.args = [Value(self, f"%{n}", t) for n, t in params]
        self._lines: list[str] = []
        self._allocas: list[str] = []
        self._count = 0
        self._dead = False
        self._else: str | None = None

    # Text
    def line(self, text: str) -> None:
        if not self._dead:
            self._lines.append(f"  {text}")

    def fresh(self, stem: str = "") -> str:
        self._count += 1
        return f"%{stem}{self._count}" if stem else f"%v{self._count}"

    def label(self, stem: str) -> str:
        self._count += 1
        return f"{stem}{self._count}"

    def emit(self, text: str, type_: str) -> Value:
        name = self.fresh()
        self.line(f"{name} = {text}")
        return Value(self, name, type_)

    def start(self, label: str) -> None:
        """Begins the basic block `label`."""
        self._lines.append(f"{label}:")
        self._dead = False

    def terminate(self, text: str) -> None:
        self.line(text)
        self._dead = True

    @property
    def terminated(self) -> bool:
        return self._dead

    def jump(self, label: str) -> None:
        self.terminate(f"br label %{label}")

    def branch(self, cond: Value, then: str, other: str, *, likely: bool = False) -> None:
        weights = ", !prof !0" if likely else ""
        self.terminate(f"br i1 {cond.text}, label %{then}, label %{other}{weights}")

    def render(self) -> str:
        params = ", ".join(f"{t} %{n}" for n, t in self.params)
        body = "\n".join(["entry:", *self._allocas, *self._lines])
        if not self._dead:
            body += "\n  ret void" if self.result == "void" else "\n  unreachable"
        head = f"define {self.convention} {self.result} @{self.name}({params}) nounwind"
        return f"{head} {{\n{body}\n}}\n"

    # Values
    def const(self, value: int, bits: int) -> Value:
        value &= (1 << bits) - 1
        return Value(self, str(value), int_type(bits), value)

    def true(self) -> Value:
        return self.const(1, 1)

    def false(self) -> Value:
        return self.const(0, 1)

    def null(self) -> Value:
        return Value(self, "null", PTR)

    def zero(self, type_: str) -> Value:
        """The zero of any type."""
        return Value(self, "zeroinitializer" if type_[0] == "<" else "0", type_)

    def splat(self, vector: str, value: int) -> Value:
        count, element = vector[1:-1].split(" x ")
        value &= (1 << int(element[1:])) - 1
        items = ", ".join([f"{element} {value}"] * int(count))
        return Value(self, f"<{items}>", vector)

    def var(self, init: Value | int, bits: int = 64) -> Var:
        """A mutable local, set to `init` here."""
        type_ = init.type if isinstance(init, Value) else int_type(bits)
        var = self.local(type_)
        var.set(init)
        return var

    def local(self, type_: str) -> Var:
        """A mutable local of `type_`, not set yet."""
        ptr = self.fresh("x")
        self._allocas.append(f"  {ptr} = alloca {type_}")
        return Var(self, ptr, type_)

    def call(self, callee: str, result: str, *args: Value) -> Value:
        """Calls `callee` (@name or a pointer) with the C calling convention."""
        arguments = ", ".join(f"{a.type} {a.text}" for a in args)
        if result == "void":
            self.line(f"call void {callee}({arguments})")
            return Value(self, "undef", "void")
        return self.emit(f"call {result} {callee}({arguments})", result)

    def intrinsic(self, name: str, result: str, *args: Value) -> Value:
        """Calls an LLVM intrinsic such as `llvm.ctpop.i64`."""
        return self.call(f"@{name}", result, *args)

    def ret(self, value: Value | None = None) -> None:
        self.terminate("ret void" if value is None else f"ret {value.type} {value.text}")

    # Control flow
    @contextmanager
    def If(self, cond: Value, *, likely: bool = False) -> Iterator[None]:
        then, end = self.label("then"), self.label("endif")
        self.branch(cond, then, end, likely=likely)
        self.start(then)
        yield
        self.jump(end)
        self.start(end)
        self._else = end

    @contextmanager
    def Else(self) -> Iterator[None]:
        """The other branch of the `If` that ended right before."""
        end = self._else
        if end is None or self._lines[-1] != f"{end}:":
            raise SyntaxError("Else must follow its If directly")
        # What was the end of the If becomes the start of this branch; the If's own end goes past
        # it.
        after = self.label("endelse")
        if self._lines[-2] == f"  br label %{end}":
            self._lines[-2] = f"  br label %{after}"
        yield
        self.jump(after)
        self.start(after)
        self._else = None

    @contextmanager
    def Loop(self) -> Iterator[LoopScope]:
        """Turns until something breaks out."""
        top, end = self.label("loop"), self.label("endloop")
        self.jump(top)
        self.start(top)
        yield LoopScope(self, top, end)
        self.jump(top)
        self.start(end)


class Module:
    """Functions and declarations that are compiled together."""

    def __init__(self) -> None:
        self.functions: list[Function] = []
        self.declarations: set[str] = set()

    def add(self, function: Function) -> Self:
        self.functions.append(function)
        return self

    def render(self) -> str:
        parts = [*sorted(self.declarations), *(f.render() for f in self.functions)]
        return "\n".join([*parts, LIKELY])
