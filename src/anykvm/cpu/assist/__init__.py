"""Microcode in Python: instructions that run rarely, and the unusual cases of some that run often
(SDM vol. 2).

The translator gives an instruction without a handler an `assist` record. It comes here with RIP at
the instruction; a function here changes the state and says where to go on by setting RIP, or leaves
it to be advanced. Raising GuestFault delivers an exception with nothing changed that the manual
does not want changed; raising Leave hands the instruction to the caller of `Cpu.run`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, NoReturn

from iced_x86 import Decoder, EncodingKind, Formatter, FormatterSyntax, Instruction

from anykvm.cpu.assist import far, intercept, io, svm, system, vme, xcr
from anykvm.cpu.assist.core import ASSISTS, Assist
from anykvm.cpu.faults import GuestFault, Leave
from anykvm.cpu.guest import UD
from anykvm.cpu.state import Exit, Mode, Seg
from anykvm.cpu.unit import CODE_MODE

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

__all__ = ["execute", "far", "fetch", "io", "svm", "system", "vme", "xcr"]

_formatter = Formatter(FormatterSyntax.NASM)


def linear_rip(cpu: Cpu) -> int:
    s = cpu.state
    if s.mode & Mode.CODE64:
        return s.rip
    return (s.rip + s.seg[Seg.CS].base) & 0xFFFF_FFFF


def fetch(cpu: Cpu) -> bytes:
    """Up to 15 bytes of code at RIP."""
    s, linear = cpu.state, linear_rip(cpu)
    room = 4096 - (linear & 0xFFF)
    with cpu.engine.gate.passed():  # no slot is half changed
        host = cpu.fetch_page(linear)
        if host is None:
            raise cpu.nested_fault() if s.exit_kind == Exit.NESTED_FAULT else cpu.noted_fault()
        data = cpu.host_bytes(host + (linear & 0xFFF), min(15, room))
        if room < 15 and (second := cpu.fetch_page(linear + room)) is not None:
            data += cpu.host_bytes(second, 15 - room)
    return data


def execute(cpu: Cpu) -> None:
    """Executes the instruction at RIP, which native code has left for."""
    s = cpu.state
    data = fetch(cpu)
    templates = cpu.engine.translator.decoder(s.mode & CODE_MODE)
    i = Instruction()
    found = templates.decode(Decoder(templates.bits, data, ip=s.rip), i, data, 0)
    if found is None or not cpu.engine.translator.is_of(s.exit_record, found[0]):
        # Another vCPU has changed the code since (text_poke does): what is there now may be none
        # of ours.
        _look_again(cpu)
        return
    s.replay_next = 0
    a = Assist(cpu, i)
    if cpu.svm.guest_mode:
        intercept.check(a)
    body = ASSISTS.get(a.name)
    if body is None:
        refuse(cpu, data, i)
    body(a)
    if a.next_rip is not None:
        s.rip = a.next_rip
    cpu.count_exited()
    if a.holds_interrupts:
        s.shadow, s.shadow_rip, s.shadow_count = 2, s.rip, s.insn_count
    s.replay_count = 0


def _look_again(cpu: Cpu) -> None:
    host = cpu.fetch_page(linear_rip(cpu))
    if host is not None:
        cpu.engine.code_changed(host)


def refuse(cpu: Cpu, data: bytes, i: Instruction) -> NoReturn:
    """No code for this instruction: ends the run with its bytes and its name.

    Encodings that came with features which CPUID does not offer are undefined instead.
    """
    if i.encoding != EncodingKind.LEGACY:
        raise GuestFault(UD)
    s = cpu.state
    ctypes.memmove(s.insn_bytes, data.ljust(16, b"\0"), 16)
    s.insn_len = i.len
    cpu.emulation_text = f"{_formatter.format(i)} ({data[: i.len].hex(' ')}) is not implemented"
    raise Leave(Exit.EMULATION)
