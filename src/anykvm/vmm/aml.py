"""ACPI Machine Language, the few terms that a PC without PCI needs (ACPI 6.5, chapter 20).

Each function returns the bytes of one term; composing calls mirrors composing ASL.
"""

from __future__ import annotations

ZERO, ONE = b"\x00", b"\x01"
BYTE_PREFIX, WORD_PREFIX, DWORD_PREFIX, QWORD_PREFIX, STRING_PREFIX = 0x0A, 0x0B, 0x0C, 0x0E, 0x0D
NAME_OP, SCOPE_OP, BUFFER_OP, PACKAGE_OP = 0x08, 0x10, 0x11, 0x12
EXT_PREFIX, DEVICE_OP = 0x5B, 0x82
ROOT_CHAR, DUAL_NAME, MULTI_NAME = 0x5C, 0x2E, 0x2F

CONSTANTS = ((1, BYTE_PREFIX), (2, WORD_PREFIX), (4, DWORD_PREFIX), (8, QWORD_PREFIX))

# Small resource items: type in bits 6:3, length in bits 2:0.
IRQ_NO_FLAGS, IRQ_FLAGS, IO_PORT, END_TAG = 0x22, 0x23, 0x47, 0x79
IO_DECODE_16 = 0x01


def package_length(size: int) -> bytes:
    """PkgLength of a package with `size` bytes after it; the length counts its own bytes."""
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 0x0F,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(
        f"an AML package of {size} bytes is longer than the 2^28 that its length can say"
    )


def name_string(path: str) -> bytes:
    """`\\_SB_.COM1`: segments are padded to four characters with underscores."""
    root = b""
    if path.startswith("\\"):
        root, path = bytes((ROOT_CHAR,)), path[1:]
    segments = [segment.ljust(4, "_").encode("ascii") for segment in path.split(".") if segment]
    if any(len(segment) != 4 for segment in segments):
        raise ValueError(f"{path}: an ACPI name segment has at most four characters")
    prefixes = {0: ZERO, 1: b"", 2: bytes((DUAL_NAME,))}
    prefix = prefixes.get(len(segments), bytes((MULTI_NAME, len(segments))))
    return root + prefix + b"".join(segments)


def integer(value: int) -> bytes:
    """The shortest encoding of a constant."""
    if value in (0, 1):
        return bytes((value,))
    for width, prefix in CONSTANTS:
        if value < 1 << 8 * width:
            return bytes((prefix,)) + value.to_bytes(width, "little")
    raise ValueError(f"{value:#x} does not fit an AML integer of 64 bits")


def string(text: str) -> bytes:
    return bytes((STRING_PREFIX,)) + text.encode("ascii") + b"\x00"


def eisa_id(text: str) -> bytes:
    """A compressed EISA id such as PNP0501: three letters of five bits, four hex digits."""
    letters = 0
    for letter in text[:3]:
        letters = letters << 5 | ord(letter) - 0x40
    packed = letters << 16 | int(text[3:], 16)
    return bytes((DWORD_PREFIX,)) + packed.to_bytes(4, "big")


def name(path: str, value: bytes) -> bytes:
    return bytes((NAME_OP,)) + name_string(path) + value


def package(*elements: bytes) -> bytes:
    body = bytes((len(elements),)) + b"".join(elements)
    return bytes((PACKAGE_OP,)) + package_length(len(body)) + body


def buffer(data: bytes) -> bytes:
    body = integer(len(data)) + data
    return bytes((BUFFER_OP,)) + package_length(len(body)) + body


def scope(path: str, *terms: bytes) -> bytes:
    body = name_string(path) + b"".join(terms)
    return bytes((SCOPE_OP,)) + package_length(len(body)) + body


def device(path: str, *terms: bytes) -> bytes:
    body = name_string(path) + b"".join(terms)
    return bytes((EXT_PREFIX, DEVICE_OP)) + package_length(len(body)) + body


def io_port(base: int, size: int) -> bytes:
    """IO (Decode16, base, base, 1, size)."""
    edge = base.to_bytes(2, "little")
    return bytes((IO_PORT, IO_DECODE_16)) + edge + edge + bytes((1, size))


def irq(number: int) -> bytes:
    """IRQNoFlags () {number}: edge-triggered, active high."""
    return bytes((IRQ_NO_FLAGS,)) + (1 << number).to_bytes(2, "little")


def resource_template(*items: bytes) -> bytes:
    """A buffer of resource items. A zero checksum in the end tag counts as right."""
    return buffer(b"".join(items) + bytes((END_TAG, 0)))
