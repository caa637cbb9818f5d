"""A reader for the part of C that the kernel's uapi headers are written in.

Understands `#define`, `#ifdef`/`#ifndef`/`#else`/`#endif`, struct, union and enum declarations with
nested and anonymous members, bit-fields, arrays, flexible arrays and `__DECLARE_FLEX_ARRAY`, and
integer constant expressions with C's unsigned wrap-around. Everything else is an error that names
the place, so that a header with something new is noticed and not half read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

TOKEN = re.compile(r"\s*([A-Za-z_]\w*|0[xX][0-9a-fA-F]+[uUlL]*|\d+[uUlL]*|<<|>>|[^\s\w])")
COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.S)
DIRECTIVE = re.compile(r"\s*#\s*(\w+)\s*(.*)", re.S)
DEFINE = re.compile(r"(\w+)(\(([\w\s,]*)\))?\s*(.*)", re.S)

BASE_TYPES = {
    "__u8": "u8", "__s8": "s8", "__u16": "u16", "__s16": "s16", "__u32": "u32", "__s32": "s32",
    "__u64": "u64", "__s64": "s64", "char": "u8", "int": "s32", "unsigned int": "u32",
    "unsigned long": "u64", "unsigned char": "u8", "long": "s64",
}  # fmt: skip


class HeaderError(Exception):
    """The header contains something this reader does not know."""


@dataclass(frozen=True)
class Macro:
    """One `#define`; `depth` is the number of braces that were open around it."""

    name: str
    params: tuple[str, ...] | None
    body: str
    depth: int


@dataclass
class Record:
    """A struct or union; `tag` is None for one declared inside another without a name."""

    kind: str
    tag: str | None
    members: list[Member] = field(default_factory=list)


@dataclass(frozen=True)
class Member:
    """`name` is None for an anonymous member; `dims` are unevaluated, "" for a flexible array."""

    name: str | None
    type: str | Record
    dims: tuple[str, ...] = ()
    bits: int | None = None


@dataclass
class Header:
    """What was read, in the order of the source."""

    macros: dict[str, Macro] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)
    enums: list[tuple[str | None, list[tuple[str, str | None]]]] = field(default_factory=list)

    def read(self, text: str) -> None:
        """Add one header's text to what is known."""
        tokens = tokenize("\n".join(self._preprocess(text)))
        Declarations(tokens, self).parse()

    def _preprocess(self, text: str) -> Iterator[str]:
        text = COMMENT.sub(" ", text).replace("\\\n", " ")
        depth = 0
        taken = [True]
        for line in text.split("\n"):
            match = DIRECTIVE.match(line)
            if match is not None:
                self._directive(match[1], match[2].strip(), taken, depth)
            elif all(taken):
                depth += line.count("{") - line.count("}")
                yield line

    def _directive(self, word: str, rest: str, taken: list[bool], depth: int) -> None:
        if word in ("ifdef", "ifndef"):
            taken.append((rest in self.macros) == (word == "ifdef"))
        elif word == "else":
            taken[-1] = not taken[-1]
        elif word == "endif":
            taken.pop()
        elif word == "define" and all(taken):
            self._define(rest, depth)
        elif word not in ("define", "include"):
            raise HeaderError(f"unknown directive #{word} {rest}")

    def _define(self, rest: str, depth: int) -> None:
        match = DEFINE.match(rest)
        if match is None:
            raise HeaderError(f"cannot read #define {rest}")
        name, parenthesised, params, body = match.groups()
        names = tuple(p.strip() for p in params.split(",")) if parenthesised else None
        self.macros[name] = Macro(name, names, body.strip(), depth)


def tokenize(text: str) -> list[str]:
    """C tokens of `text`, without white space."""
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = TOKEN.match(text, position)
        if match is None:
            raise HeaderError(f"cannot read {text[position : position + 40]!r}")
        tokens.append(match[1])
        position = match.end()
    return tokens


class Cursor:
    """A position in a list of tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        index = self.at + ahead
        return self.tokens[index] if index < len(self.tokens) else ""

    def next(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def expect(self, token: str) -> None:
        got = self.next()
        if got != token:
            context = " ".join(self.tokens[max(0, self.at - 8) : self.at + 4])
            raise HeaderError(f"expected {token!r}, found {got!r} in: {context}")

    def until(self, *ends: str) -> str:
        start = self.at
        while self.peek() not in ends:
            if not self.next():
                raise HeaderError(f"expected one of {ends} before the end of the header")
        return " ".join(self.tokens[start : self.at])


class Declarations(Cursor):
    """File-level declarations: struct, union, enum."""

    def __init__(self, tokens: list[str], header: Header) -> None:
        super().__init__(tokens)
        self.header = header

    def parse(self) -> None:
        while self.peek():
            if self.accept("enum"):
                self._enum()
            else:
                self._record_declaration()
            self.expect(";")

    def _enum(self) -> None:
        tag = None if self.peek() == "{" else self.next()
        self.expect("{")
        values: list[tuple[str, str | None]] = []
        while not self.accept("}"):
            name = self.next()
            values.append((name, self.until(",", "}") if self.accept("=") else None))
            self.accept(",")
        self.header.enums.append((tag, values))

    def _record_declaration(self) -> None:
        record = self._record()
        if not isinstance(record, Record) or record.tag is None:
            raise HeaderError(f"expected a struct or union declaration before {self.peek()!r}")
        self.header.records[record.tag] = record

    def _record(self) -> Record | str:
        """A definition gives a Record; a mere reference gives the tag."""
        kind = self.next()
        if kind not in ("struct", "union"):
            raise HeaderError(f"expected struct or union, found {kind!r}")
        tag = None if self.peek() == "{" else self.next()
        if not self.accept("{"):
            return str(tag)
        record = Record(kind, tag)
        while not self.accept("}"):
            record.members += self._members()
        return record

    def _members(self) -> list[Member]:
        if self.accept("__DECLARE_FLEX_ARRAY"):
            self.expect("(")
            base = self._type()
            self.expect(",")
            member = Member(self.next(), base, ("",))
            self.expect(")")
            self.expect(";")
            return [member]
        base = self._type()
        if self.accept(";"):
            return [Member(None, base)]
        members = [self._declarator(base)]
        while self.accept(","):
            members.append(self._declarator(base))
        self.expect(";")
        return members

    def _type(self) -> str | Record:
        if self.peek() in ("struct", "union"):
            return self._record()
        if self.peek() == "void":
            self.next()
            return "void"
        two = f"{self.peek()} {self.peek(1)}"
        name = two if two in BASE_TYPES else self.peek()
        if name not in BASE_TYPES:
            raise HeaderError(f"unknown type {name!r}")
        self.at += len(name.split())
        return BASE_TYPES[name]

    def _declarator(self, base: str | Record) -> Member:
        pointer = self.accept("*")
        name = self.next()
        dims = []
        while self.accept("["):
            dims.append(self.until("]"))
            self.expect("]")
        bits = int(self.next()) if self.accept(":") else None
        return Member(name, "u64" if pointer else base, tuple(dims), bits)


@dataclass(frozen=True)
class Value:
    """An integer with C's type where it matters: the width of an unsigned type, else None."""

    number: int
    unsigned_bits: int | None = None


def wrap(number: int, *operands: Value) -> Value:
    """The value of an arithmetic result, reduced where an operand is unsigned."""
    bits = max((v.unsigned_bits or 0 for v in operands), default=0)
    return Value(number % (1 << bits), bits) if bits else Value(number)


OPERATORS: list[dict[str, Callable[[int, int], int]]] = [
    {"|": lambda a, b: a | b},
    {"&": lambda a, b: a & b},
    {"<<": lambda a, b: a << b, ">>": lambda a, b: a >> b},
    {"+": lambda a, b: a + b, "-": lambda a, b: a - b},
    {"*": lambda a, b: a * b, "/": lambda a, b: a // b},
]


class Expression(Cursor):
    """A constant expression; `name` gives an identifier's value, `sizeof` that of a struct."""

    def __init__(self, text: str, name: Callable[[str], int], sizeof: Callable[[str], int]) -> None:
        super().__init__(tokenize(text))
        self.name = name
        self.sizeof = sizeof

    def value(self) -> int:
        result = self._binary(0)
        if self.peek():
            raise HeaderError(f"unexpected {self.peek()!r} in {' '.join(self.tokens)}")
        return result.number

    def _binary(self, level: int) -> Value:
        if level == len(OPERATORS):
            return self._unary()
        left = self._binary(level + 1)
        while self.peek() in OPERATORS[level]:
            operator = OPERATORS[level][self.next()]
            right = self._binary(level + 1)
            left = wrap(operator(left.number, right.number), left, right)
        return left

    def _unary(self) -> Value:
        if self.accept("-"):
            operand = self._unary()
            return wrap(-operand.number, operand)
        if self.accept("~"):
            operand = self._unary()
            return wrap(~operand.number, operand)
        if self.peek() == "(" and self.peek(1) in BASE_TYPES:
            return self._cast()
        return self._primary()

    def _cast(self) -> Value:
        self.expect("(")
        base = BASE_TYPES[self.next()]
        self.expect(")")
        bits = int(base[1:])
        number = self._unary().number % (1 << bits)
        if base[0] == "u":
            return Value(number, bits)
        return Value(number - (1 << bits) if number >> (bits - 1) else number)

    def _primary(self) -> Value:
        if self.accept("("):
            inner = self._binary(0)
            self.expect(")")
            return inner
        token = self.next()
        if token == "sizeof":
            self.expect("(")
            self.expect("struct")
            tag = self.next()
            self.expect(")")
            return Value(self.sizeof(tag), 64)
        if token == "_BITUL":
            return Value(1 << self._primary().number, 64)
        if token[:1].isdigit():
            return self._literal(token)
        return Value(self.name(token))

    @staticmethod
    def _literal(token: str) -> Value:
        digits = token.rstrip("uUlL")
        suffix = token[len(digits) :].lower()
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        number = int(digits, 8) if octal else int(digits, 0)
        if "u" not in suffix:
            return Value(number)
        return Value(number, 64 if "l" in suffix or number >> 32 else 32)
