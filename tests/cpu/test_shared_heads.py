"""Units that overlap: what one VM translated from elsewhere, another takes from the cache whole."""

from __future__ import annotations

from typing import Any

from anykvm import fs
from anykvm.api import GuestMemory, Kvm, Vcpu
from anykvm.cpu.blocks import ENTRY_WORDS, MAX_BLOCKS
from anykvm.cpu.dispatch import block_slot
from anykvm.uapi import kvm as uapi

from .assembler import assemble

CODE = 0x1000
PROGRAM = "dec cx;jz 2f;inc ax;2: hlt;nop;nop;nop;nop"
BEHIND_THE_BRANCH = CODE + 3


class Guest:
    """A vCPU in real mode."""

    def __init__(self, kvm: Kvm) -> None:
        self.vm = kvm.create_vm()
        self.memory = GuestMemory(0x10000)
        self.memory.write(CODE, assemble(PROGRAM, 16))
        self.vm.add_memory(0, self.memory)
        self.vcpu: Vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)

    def run(self, rip: int) -> int:
        """From `rip` to HLT with CX 5 and AX 0: AX."""
        self.vcpu.set_regs(uapi.kvm_regs(rip=rip, rflags=2, rcx=5))
        assert self.vcpu.run() == uapi.KVM_EXIT_HLT
        return self.vcpu.get_regs().rax

    def translator(self) -> Any:
        file = fs.fget(self.vcpu.fd)
        assert file is not None
        fs.fput(file)
        return file.private_data.kvm.engine.translator

    def close(self) -> None:
        self.vcpu.close()
        self.vm.close()


def entries(translator: Any, key: tuple[int, int, int]) -> int:
    """How many of the table's entries a look-up of a block would take."""
    words, found = translator.blocks.words, 0
    slot = block_slot(key[0], key[1], MAX_BLOCKS - 1)
    while words[slot * ENTRY_WORDS + 3]:
        found += tuple(words[slot * ENTRY_WORDS : slot * ENTRY_WORDS + 3]) == key
        slot = (slot + 1) % MAX_BLOCKS
    return found


def test_a_head_of_two_units_is_entered_once_and_goes_when_its_code_does() -> None:
    with Kvm(backend="soft") as kvm:
        first = Guest(kvm)
        assert first.run(CODE) == 1
        first.close()
        guest = Guest(kvm)
        assert guest.run(BEHIND_THE_BRANCH) == 1  # a unit of its own
        assert guest.run(CODE) == 1  # the first VM's, which has the other's head in it
        translator = guest.translator()
        assert len(translator.blocks.records) >= 2
        assert all(entries(translator, key) == 1 for key in translator.blocks.records)
        guest.memory.write(BEHIND_THE_BRANCH, assemble("dec ax", 16))
        assert guest.run(BEHIND_THE_BRANCH) == 0xFFFF
        assert guest.run(CODE) == 0xFFFF
        guest.close()
