"""Code that is patched while another vCPU's thread translates it, or has just left for it."""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, Vcpu, Vm
from anykvm.cpu import assist
from anykvm.cpu.translate import ONES, CodePage, Unit
from anykvm.uapi import kvm as uapi

from .assembler import assemble

READER, ENTRY, PATCHER, SCRATCH = 0x1000, 0x1800, 0x3000, 0x5000
# Until it is patched, or for a second.
LOOP = "1: mov al, 1; cmp al, 2; je 2f; dec ecx; jnz 1b; 2: hlt"
JUMP = b"\xe9" + struct.pack("<h", READER - ENTRY - 3)
PATCHED = READER + 1  # AL's value
PATCH = "mov byte ptr [bx], 2; hlt"


def processor(vcpu: Vcpu) -> Any:
    file = fs.fget(vcpu.fd)
    assert file is not None
    fs.fput(file)
    return file.private_data.cpu


def go(vcpu: Vcpu, **registers: int) -> int:
    """To HLT; AL."""
    vcpu.set_regs(uapi.kvm_regs(rflags=2, **registers))
    assert vcpu.run() == uapi.KVM_EXIT_HLT
    return vcpu.get_regs().rax & 0xFF


@pytest.fixture
def vm() -> Iterator[Vm]:
    with Kvm(backend="soft") as kvm, kvm.create_vm() as vm:
        memory = GuestMemory(0x10000)
        memory.write(READER, assemble(LOOP, 16))
        memory.write(ENTRY, JUMP)
        memory.write(PATCHER, assemble(PATCH, 16))
        vm.add_memory(0, memory)
        yield vm


def real_mode(vm: Vm, number: int) -> Vcpu:
    vcpu = vm.create_vcpu(number)
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    return vcpu


def test_a_store_between_reading_and_marking_is_not_lost(vm: Vm) -> None:
    reader, patcher = real_mode(vm, 0), real_mode(vm, 1)
    go(patcher, rip=PATCHER, rbx=SCRATCH)  # its own code is translated
    store = threading.Thread(target=lambda: go(patcher, rip=PATCHER, rbx=PATCHED))
    cpu = processor(reader)
    read = cpu.host_bytes

    def read_and_be_overtaken(address: int, size: int) -> bytes:
        code = read(address, size)
        if cpu.state.rip != READER:
            return bytes(code)
        cpu.host_bytes = read
        store.start()
        store.join(0.2)  # for ever, if it waits until the translation is there
        return bytes(code)

    cpu.host_bytes = read_and_be_overtaken
    # By way of other code in this page: on coming into a page its bytes are compared.
    assert go(reader, rip=ENTRY, rcx=100_000_000) == 2
    store.join()


def test_microcode_is_of_what_was_translated(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux patches a jump by way of INT3. Whoever has left for that one finds the jump in memory
    already, a near one, and there is microcode for far ones.
    """
    vcpu, memory = real_mode(vm, 0), vm.memory[0]
    memory.write(READER, b"\xcc\x03" + assemble("mov al, 1; hlt; mov al, 2; hlt", 16))
    fetch = assist.fetch

    def overtaken(cpu: Any) -> bytes:
        memory.write(READER, b"\xeb\x03")  # jmp, to the second MOV
        return fetch(cpu)

    monkeypatch.setattr(assist, "fetch", overtaken)
    assert go(vcpu, rip=READER) == 2


def test_what_other_units_cover_stays_marked_while_one_is_dropped() -> None:
    page = CodePage()
    for start, end in ((0, 8), (6, 20), (10, 30)):
        page.units.append(Unit(start, end, 0, 0, []))
        page.mark(start, end, bytes(end - start))
    assert [unit.start for unit in page.take_overlapping(0, 7)] == [0, 6]
    marks = bytes(page._memory[page.map_address - page.address :][:40])
    assert marks == bytes(10) + ONES[:20] + bytes(10)
