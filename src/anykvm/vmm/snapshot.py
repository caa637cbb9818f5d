"""A machine's saved state: what KVM holds, the devices' registers, and the guest's memory.

`Machine.save` makes one and `Machine.restore` takes it. In memory it refers to the machine's own
pages; `write` and `read` put it into a file that another process can go on from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO, Protocol, runtime_checkable

from anykvm.api import GuestMemory
from anykvm.api.state import StateError, VmState
from anykvm.api.state_file import (
    load_memory,
    memory_section,
    read_sections,
    vm_sections,
    vm_state,
    write_sections,
)
from anykvm.vmm.memory_map import ram_ranges


@runtime_checkable
class Snapshotting(Protocol):
    """A device with registers to save. Times in a snapshot are relative to when it was taken."""

    state: Any

    def snapshot(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


def encode(state: Any) -> dict[str, Any]:
    """A device's state as what JSON can say; bytes become hexadecimal digits."""
    return {name: _plain(value) for name, value in asdict(state).items()}


def _plain(value: Any) -> Any:
    return {"hex": value.hex()} if isinstance(value, bytes | bytearray) else value


def decode(kind: type[Any], values: dict[str, Any]) -> Any:
    """The state that `encode` was given, of the dataclass `kind`."""
    return kind(**{name: _value(value) for name, value in values.items()})


def _value(value: Any) -> Any:
    if isinstance(value, dict):
        return bytearray.fromhex(value["hex"])
    if isinstance(value, list):
        return [tuple(item) if isinstance(item, list) else item for item in value]
    return value


@dataclass(frozen=True, slots=True)
class MachineState:
    """`memory` is the machine's own and not a copy: what is to outlive the machine's next run is
    what `write` wrote. `input` is what the console has not taken yet.
    """

    kvm: VmState
    devices: dict[str, dict[str, Any]]
    input: bytes
    memory: Sequence[GuestMemory]

    @property
    def memory_size(self) -> int:
        return sum(part.size for part in self.memory)

    @property
    def cpus(self) -> int:
        return len(self.kvm.vcpus)

    def write(self, file: BinaryIO) -> None:
        """Everything, in the format of `anykvm.api.state_file`."""
        machine = {"memory": self.memory_size, "devices": self.devices, "input": self.input.hex()}
        sections = vm_sections(self.kvm)
        sections["machine"] = json.dumps(machine).encode()
        sections["memory"] = memory_section(self.memory)
        write_sections(file, sections)

    @classmethod
    def read(cls, file: BinaryIO) -> MachineState:
        """What `write` wrote, with memory of its own. Raises StateError."""
        sections = read_sections(file)
        try:
            machine = json.loads(sections["machine"])
            memory = [GuestMemory(ram.size, ram.base) for ram in ram_ranges(machine["memory"])]
            load_memory(memory, sections["memory"])
            pending = bytes.fromhex(machine["input"])
            return cls(vm_state(sections), machine["devices"], pending, memory)
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(f"this is no machine's state: {error!r}") from error
