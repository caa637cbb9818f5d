"""Jumps, calls and returns within a segment (SDM vol. 1, 6.4 and 7.3.8), and what ends a block
without being an instruction.

The record's aux field holds the record to go to once the translator linked it. Jumps that may close
a loop (backward or indirect) look at `exit_request`; so a vCPU that must leave does within one turn
of any loop.
"""

from __future__ import annotations

from anykvm.cpu.forms import Insn, row
from anykvm.cpu.guest import BR, GP, NM, R_AUX
from anykvm.cpu.insn.integer import CONDITIONS, RCX, read_gpr, write_gpr
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.state import Exit


def _target_rip(i: Insn, target: Value) -> Value:
    """RIP of the record that a linked jump goes to."""
    h = i.h
    index = (target.to_int() - h.get("records")) >> 2
    return (h.get("records_rip") + index).to_ptr().load("i64")


def take(i: Insn, icount: Value) -> None:
    """Follows the link in aux."""
    h = i.h
    target = h.record(R_AUX, PTR)
    if "back" in i.attrs:
        request = h.field("exit_request").load("i32", volatile=True, align=4)
        with h.If(request.ne(0)):
            h.set("rip", _target_rip(i, target))
            h.set("exit_kind", int(Exit.REQUEST))
            h.set("insn_count", icount)
            h.ret()
    h.go(target, icount)


@row("jmp", writes=(), ends=True)
def jmp(i: Insn) -> None:
    """To a link without operands, else to the address in the operand."""
    if not i.ops:
        take(i, i.h.icount + i.h.count())
        return
    i.h.go_to_rip(_code_address(i, i.ops[0].read()))


def _code_address(i: Insn, value: Value) -> Value:
    """A near target as wide as the operand size; one that is not canonical faults at the branch."""
    if value.bits == 64:
        top = value.sar(47)
        i.h.raise_if(top.ne(0) & top.ne(-1), GP, 0)
    return value.zext(64)


@row(*(f"j{c}" for c in CONDITIONS), writes=())
def jcc(i: Insn, name: str) -> None:
    h = i.h
    taken = h.flags.condition(CONDITIONS.index(name[1:]))
    icount = h.icount + h.count()
    with h.If(taken):
        take(i, icount)
    h.go(h.pc.offset(32), icount)


@row("jcxz", "jecxz", "jrcxz", writes=())
def jump_if_zero(i: Insn, name: str) -> None:
    h = i.h
    bits = {"jcxz": 16, "jecxz": 32, "jrcxz": 64}[name]
    icount = h.icount + h.count()
    with h.If(read_gpr(i, RCX, bits).eq(0)):
        take(i, icount)
    h.go(h.pc.offset(32), icount)


@row("loop", "loope", "loopne", writes=())
def loop(i: Insn, name: str) -> None:
    h = i.h
    count = read_gpr(i, RCX, i.address_size) - 1
    write_gpr(i, RCX, count)
    again = count.ne(0)
    if name != "loop":
        zf = h.flags.zf()
        again = again & (zf if name == "loope" else zf ^ 1)
    icount = h.icount + h.count()
    with h.If(again):
        take(i, icount)
    h.go(h.pc.offset(32), icount)


def _operand_size(i: Insn) -> int:
    return i.operand_size or 64


@row("call", writes=(), ends=True)
def call(i: Insn) -> None:
    h, n = i.h, _operand_size(i)
    target = _code_address(i, i.ops[0].read()) if i.ops else None
    h.push(h.next_rip().trunc(n))
    if target is None:
        take(i, h.icount + h.count())
    else:
        h.go_to_rip(target)


@row("ret", writes=(), ends=True)
def ret(i: Insn) -> None:
    """With an immediate that many more bytes leave the stack."""
    h, n = i.h, _operand_size(i)
    target = _code_address(i, h.peek(n))
    by: Value | int = n // 8
    if i.ops:
        by = (h.immediate(64) & 0xFFFF) + n // 8
    h.drop(by)
    h.go_to_rip(target)


@row("bound", writes=())
def bound(i: Insn) -> None:
    h, n = i.h, i.ops[0].bits
    both = i.ops[1].read()
    index = i.ops[0].read()
    low, high = both.trunc(n), (both >> n).trunc(n)
    h.raise_if(index.slt(low) | index.sgt(high), BR)


@row("into", writes=())
def into(i: Insn) -> None:
    """The trap itself is microcode."""
    with i.h.If(i.h.flags.of()):
        i.h.leave(Exit.ASSIST)


# What the translator puts between instructions


@row("link", writes=(), ends=True)
def link(i: Insn) -> None:
    """On to a block that is already there."""
    take(i, i.h.icount + i.h.count())


@row("missing", writes=(), ends=True)
def missing(i: Insn) -> None:
    """The target of a link that was never followed: aux is the linking record, this record's RIP
    the target.
    """
    h = i.h
    h.set("link_from", h.aux())
    h.set("rip", h.rip())
    h.set("exit_kind", int(Exit.TRANSLATE))
    h.set("insn_count", h.icount)
    h.ret()


@row("seek", writes=(), ends=True)
def seek(i: Insn) -> None:
    """On to this record's RIP by a look-up: page ends, dropped blocks, mode changes."""
    i.h.go_to_rip(i.h.rip())


@row("dropped", writes=(), ends=True)
def dropped(i: Insn) -> None:
    """The head of a block whose code changed: looks again, past the jump cache."""
    h = i.h
    h.set("rip", h.rip())
    h.tail(h.entry("refind"), h.pc)


@row("poll", writes=())
def poll(i: Insn) -> None:
    """Leaves if something waits; stands where an interrupt shadow ends."""
    h = i.h
    request = h.field("exit_request").load("i32", volatile=True, align=4)
    with h.If(request.ne(0)):
        h.leave(Exit.REQUEST)


@row("too_long", writes=(), ends=True)
def too_long(i: Insn) -> None:
    """An instruction of more than 15 bytes."""
    i.h.raise_(GP, 0)


@row("device_not_available", writes=(), ends=True)
def device_not_available(i: Insn) -> None:
    """An x87, MMX or SSE instruction while CR0 says that the unit is not there."""
    i.h.raise_(NM)


@row("assist", writes=(), ends=True)
def assist(i: Insn) -> None:
    """An instruction whose microcode is in Python."""
    i.h.leave(Exit.ASSIST)
