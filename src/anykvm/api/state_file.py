"""A saved state as bytes: named sections one after the other, behind a magic number and a version.

    "anykvm state\\0" version:u32 count:u32, then for each section
    length of its name:u32, length of its data:u64, name (UTF-8), data

All numbers are little endian. Guest memory is a section of runs of pages that are not all zero.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import BinaryIO

from anykvm.api.memory import GuestMemory
from anykvm.api.state import StateError, VcpuState, VmState

MAGIC, VERSION = b"anykvm state\0", 1
HEADER = struct.Struct("<II")
SECTION = struct.Struct("<IQ")
RUN = struct.Struct("<QQ")  # guest-physical address, length
TSC = struct.Struct("<?Q")
PAGE = 4096
CHUNK = 1 << 16  # looked at at once
MAX_NAME = 1 << 10

Sections = Mapping[str, bytes]


def write_sections(file: BinaryIO, sections: Sections) -> None:
    """Write a whole state."""
    file.write(MAGIC + HEADER.pack(VERSION, len(sections)))
    for name, data in sections.items():
        raw = name.encode()
        file.write(SECTION.pack(len(raw), len(data)) + raw)
        file.write(data)


def read_sections(file: BinaryIO) -> dict[str, bytes]:
    """Read what `write_sections` wrote. Raises StateError for anything else."""
    if _exactly(file, len(MAGIC)) != MAGIC:
        raise StateError("this is not a saved state: expected it to begin with 'anykvm state'")
    version, count = HEADER.unpack(_exactly(file, HEADER.size))
    if version != VERSION:
        raise StateError(f"the state is of version {version}, this program reads {VERSION}")
    found = {}
    for _ in range(count):
        name_length, length = SECTION.unpack(_exactly(file, SECTION.size))
        if name_length > MAX_NAME:
            raise StateError(f"the state is damaged: a section's name has {name_length} bytes")
        name = _exactly(file, name_length).decode(errors="replace")
        found[name] = _exactly(file, length)
    return found


def _exactly(file: BinaryIO, length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise StateError(f"the state ends early: expected {length} more bytes, found {len(data)}")
    return data


def vm_sections(state: VmState) -> dict[str, bytes]:
    """A VM's state as sections `vm/PART` and `vcpu/N/PART`."""
    sections = {f"vm/{name}": data for name, data in state.parts.items()}
    for number, vcpu in enumerate(state.vcpus):
        sections |= {f"vcpu/{number}/{name}": data for name, data in vcpu.parts.items()}
        sections[f"vcpu/{number}/tsc"] = TSC.pack(vcpu.tsc is not None, vcpu.tsc or 0)
    return sections


def vm_state(sections: Sections) -> VmState:
    """The state that `vm_sections` took apart. Raises StateError."""
    parts = dict(_under("vm/", sections))
    vcpus: list[VcpuState] = []
    while found := dict(_under(f"vcpu/{len(vcpus)}/", sections)):
        known, tsc = TSC.unpack(found.pop("tsc", bytes(TSC.size)))
        vcpus.append(VcpuState(found, tsc if known else None))
    if "clock" not in parts or not vcpus:
        raise StateError("the state has no clock or no vCPU")
    return VmState(parts, vcpus)


def _under(prefix: str, sections: Sections) -> Iterator[tuple[str, bytes]]:
    for name, data in sections.items():
        if name.startswith(prefix):
            yield name.removeprefix(prefix), data


# Guest memory.


def _runs(memory: GuestMemory) -> Iterator[tuple[int, int]]:
    """Runs of pages that are not all zero: (address, length)."""
    begin = None
    for address in range(memory.addr, memory.addr + memory.size, CHUNK):
        length = min(CHUNK, memory.addr + memory.size - address)
        used = any(memory.slice(address, length).tobytes().strip(b"\0"))
        if used and begin is None:
            begin = address
        elif not used and begin is not None:
            yield begin, address - begin
            begin = None
    if begin is not None:
        yield begin, memory.addr + memory.size - begin


def memory_section(parts: Sequence[GuestMemory]) -> bytes:
    """All memory but what is zero."""
    runs = ((part, run) for part in parts for run in _runs(part))
    return b"".join(RUN.pack(*run) + part.read(*run) for part, run in runs)


def load_memory(parts: Sequence[GuestMemory], section: bytes) -> None:
    """Fill memory that is still zero. Raises StateError where the section does not fit it."""
    data, at = memoryview(section), 0
    while at < len(data):
        try:
            address, length = RUN.unpack_from(data, at)
            at += RUN.size
            (part,) = (part for part in parts if address in part)
            part.write(address, data[at : at + length])
        except (ValueError, IndexError, struct.error) as error:
            raise StateError(f"the state's memory does not fit the machine's: {error}") from error
        at += length
