"""KVM_RUN's short way, in native code: the result of a port access goes in, the guest runs, its
next port access goes out.

What Linux calls an exit fastpath, and what a VMM's devices live on. `VcpuFastpath.enter` takes the
place of vcpu_run.py's way in where nothing at all is to be done but that, and of its way out where
the guest has left for a single port access that no device in here answers. Whatever else there is,
it leaves to that, having done nothing (REFUSED) or with the exit still to be dealt with (LEFT).
"""

from __future__ import annotations

import ctypes
import hashlib
import time
from collections.abc import Callable
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING

from anykvm.cpu.guest import Routine
from anykvm.cpu.ir import PTR, Value
from anykvm.cpu.jit import callable_at, process_jit
from anykvm.cpu.state import STAY, Exit, Flag, Mode
from anykvm.fs.trace import enabled
from anykvm.kvm.iodev import KvmBus
from anykvm.kvm.kvm_main import VcpuMode
from anykvm.uapi import kvm as uapi
from anykvm.x86.events import ready_for_interrupt_injection
from anykvm.x86.stats import PUBLISHED, KvmVcpuStat

if TYPE_CHECKING:
    from anykvm.x86.kvm_host import VcpuX86

PIO_DATA = uapi.KVM_PIO_PAGE_OFFSET * 4096
RUNNABLE = uapi.KVM_MP_STATE_RUNNABLE
QUIRKY_PORT = 0x7E  # see exits.py
MASK32 = (1 << 32) - 1


class Way(IntEnum):
    """How far the short way went."""

    REFUSED = 0
    LEFT = 1
    DONE = 2


class Lane(ctypes.Structure):
    """What the native code knows of a vCPU besides its `State`.

    `access` is the size of the port access to complete, or 0; `input` whether data comes in for it.
    """

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("processor", "run", "stat", "ports", "user_tpr", "cr8", "injectable"),
            *("access", "input", "rip", "next_rip", "retired"),
        )
    ]
    access: int
    input: int
    rip: int
    next_rip: int
    retired: int
    cr8: int
    user_tpr: int
    injectable: int


class _Generator:
    """Writes the native code: the State's fields through `f`, those of others by their structs."""

    def __init__(self) -> None:
        self.f = Routine("kvm_run_fastpath", "i64", ("lane", PTR))
        self.run = self.lane("run").to_ptr()
        self.stat = self.lane("stat").to_ptr()

    def lane(self, name: str) -> Value:
        return self._lane_field(name).load("i64", align=8)

    def set_lane(self, name: str, value: Value) -> None:
        self._lane_field(name).store(value, align=8)

    def _lane_field(self, name: str) -> Value:
        offset: int = getattr(Lane, name).offset
        return self.f["lane"].offset(offset)

    def shared(self, name: str, member: str = "") -> Value:
        """A pointer into kvm_run, of which userspace may write each byte at any moment."""
        offset: int = getattr(uapi.kvm_run, name).offset
        if member:
            offset += getattr(uapi.kvm_run_io, member).offset
        return self.run.offset(offset)

    def refuse_if(self, condition: Value) -> None:
        with self.f.If(condition):
            self.f.ret(self.f.const(Way.REFUSED, 64))

    def count(self, name: str, index: int = 0) -> None:
        at = self.stat.offset(getattr(KvmVcpuStat, name).offset + 8 * index)
        at.store(at.load("i64", align=8) + 1, align=8)

    def generate(self) -> Routine:
        f = self.f
        self._check()
        with f.If(self.lane("access").ne(0)):
            self._complete()
        f.set("stay", f.get("stay") + STAY)
        f.set("jump_key", f.get("jump_key") + (1 << 32))
        self.shared("flags").store(f.const(0, 16), volatile=True)
        self.shared("exit_reason").store(f.const(uapi.KVM_EXIT_INTR, 32), volatile=True)
        self.lane("processor").to_ptr().call("void", f.cpu)
        port = f.get("io_port").zext(64) & 0xFFFF
        bit = (self.lane("ports") + (port >> 3)).to_ptr().load("i8").zext(64) >> (port & 7)
        plain = f.get("exit_kind").eq(int(Exit.IO)) & (bit & 1).eq(0) & port.ne(QUIRKY_PORT)
        with f.If(plain):
            self._exit_io(port)
            f.ret(f.const(Way.DONE, 64))
        f.ret(f.const(Way.LEFT, 64))
        return f

    def _check(self) -> None:
        """Nothing is asked for, and the registers are as they were when the guest left."""
        f = self.f
        # request_interrupt_window and immediate_exit.
        self.refuse_if(self.run.load("i16", volatile=True).ne(0))
        valid = self.shared("kvm_valid_regs").load("i64", volatile=True)
        self.refuse_if((valid | self.shared("kvm_dirty_regs").load("i64", volatile=True)).ne(0))
        tpr = self.shared("cr8").load("i64", volatile=True)
        self.refuse_if(self.lane("user_tpr").ne(0) & tpr.ne(f.get("cr8").zext(64)))
        self.refuse_if((f.get("mode") & int(Mode.STEP)).ne(0))
        in_instruction = f.get("rip").eq(f.get("replay_rip"))
        in_instruction &= f.get("insn_count").eq(f.get("replay_insn"))
        self.refuse_if(f.get("replay_count").ne(0) & in_instruction)
        waits = f.get("irq_pending").ne(0) & (f.get("flags") & int(Flag.IF)).ne(0)
        self.refuse_if(waits | f.get("tick").ne(0))
        narrow = (f.get("mode") & int(Mode.CODE64)).eq(0)
        self.refuse_if(narrow & f.get("rip").ugt(MASK32))
        self.refuse_if(self.lane("access").ne(0) & f.get("rip").ne(self.lane("rip")))

    def _mask(self, size: Value) -> Value:
        """Of the bytes of an access, in 64 bits."""
        return (self.f.const(1, 64) << (size << 3)) - 1

    def _complete(self) -> None:
        """The access's data into RAX, and on to the next instruction."""
        f, size = self.f, self.lane("access")
        with f.If(self.lane("input").ne(0)):
            data = self.run.offset(PIO_DATA).load("i32", volatile=True).zext(64)
            mask = self._mask(size)
            kept = size.eq(4).select(f.const(0, 64), f.get("gpr[0]") & ~mask)
            f.set("gpr[0]", kept | data & mask)
        f.set("rip", self.lane("next_rip"))
        f.set("insn_count", f.get("insn_count") + self.lane("retired"))
        f.set("replay_count", 0)

    def _exit_io(self, port: Value) -> None:
        f, io = self.f, "io"
        size = f.get("io_size").zext(64)
        incoming = f.get("io_in").ne(0)
        with f.If(incoming ^ 1):
            at, mask = self.run.offset(PIO_DATA), self._mask(size)
            before = at.load("i32").zext(64) & ~mask
            at.store((before | f.get("gpr[0]") & mask).trunc(32), volatile=True)
        direction = incoming.select(
            f.const(uapi.KVM_EXIT_IO_IN, 8), f.const(uapi.KVM_EXIT_IO_OUT, 8)
        )
        for member, value in (
            ("direction", direction),
            ("size", size.trunc(8)),
            ("port", port.trunc(16)),
            ("count", f.const(1, 32)),
            ("data_offset", f.const(PIO_DATA, 64)),
        ):
            self.shared(io, member).store(value, volatile=True)
        self._note_access(size, incoming)
        tpr = self.lane("user_tpr").ne(0).select(f.get("cr8").zext(64), self.lane("cr8"))
        for name, value in (
            ("if_flag", ((f.get("flags") >> 9) & 1).trunc(8)),
            ("cr8", tpr),
            ("apic_base", f.get("apic_base")),
            ("ready_for_interrupt_injection", self.lane("injectable").trunc(8)),
            ("exit_reason", f.const(uapi.KVM_EXIT_IO, 32)),
        ):
            self.shared(name).store(value, volatile=True)
        self._count()

    def _note_access(self, size: Value, incoming: Value) -> None:
        """For `_complete`: what, and where the instruction begins and ends."""
        f = self.f
        index = (f.get("exit_record") - f.get("records")) >> 2  # 8 bytes for each record's 32
        rips = (f.get("records_rip") + index).to_ptr()
        length = (rips.offset(8).load("i64") - rips.load("i64")) & 0xFFFF
        flat = (f.get("mode") & int(Mode.CODE64)).ne(0)
        behind = f.get("rip") + length
        self.set_lane("rip", f.get("rip"))
        self.set_lane("next_rip", flat.select(behind, behind & MASK32))
        self.set_lane("access", size)
        self.set_lane("input", incoming.zext(64))

    def _count(self) -> None:
        f = self.f
        self.count("exits")
        self.count("io_exits")
        self.count("userspace_exits", uapi.KVM_EXIT_IO)
        for counter, field in PUBLISHED.items():
            counted = f.get(field).zext(64)
            self.stat.offset(getattr(KvmVcpuStat, counter).offset).store(counted, align=8)


@cache
def _native() -> Callable[..., int]:
    """fastpath(state, lane): a `Way`. Compiled once, and kept under what its code depends on."""
    text = _Generator().generate().render()
    name = f"kvm_run_fastpath_{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def make(_: list[str]) -> list[Routine]:
        routine = _Generator().generate()
        routine.name = name
        return [routine]

    (address,) = process_jit().addresses([name], make)
    return callable_at(
        address, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_void_p, releases_gil=True
    )


class VcpuFastpath:
    """One vCPU's: `enter` belongs to its KVM_RUN."""

    def __init__(self, vcpu: VcpuX86) -> None:
        kvm, self._vcpu = vcpu.kvm, vcpu
        self._call = _native()
        self._ports = kvm.buses[KvmBus.PIO_BUS].low_addresses
        self._ports_view = (ctypes.c_uint8 * len(self._ports)).from_buffer(self._ports)
        self._lane = Lane(
            processor=vcpu.cpu.native_run,
            run=ctypes.addressof(vcpu.run),
            stat=ctypes.addressof(vcpu.stat),
            ports=ctypes.addressof(self._ports_view),
            user_tpr=vcpu.apic is None,
            injectable=kvm.pic_in_kernel(),
        )
        self._address = ctypes.addressof(self._lane)
        self._injectable = kvm.pic_in_kernel()
        self.complete = self._complete  # the same object each time

    def access(self) -> Callable[[], int]:
        """The guest has left for the single port access that the State describes: completes it."""
        lane, state = self._lane, self._vcpu.state
        lane.rip, lane.access, lane.input = state.rip, state.io_size, state.io_in
        lane.next_rip, lane.retired = self._vcpu.cpu.rip_behind(), self._vcpu.cpu.uncounted()
        return self.complete

    def _complete(self) -> int:
        """Not on the short way."""
        vcpu, lane = self._vcpu, self._lane
        if vcpu.state.rip != lane.rip:
            # Userspace has moved it, to reset the processor for instance.
            vcpu.cpu.drop_io()
        elif lane.input:
            vcpu.cpu.complete_in(bytes(vcpu.pio_data[: lane.access]))
        else:
            vcpu.cpu.complete_out()
        return 1

    def enter(self) -> Way:
        """After LEFT the exit is still to be dealt with (`Cpu.resume`)."""
        vcpu = self._vcpu
        if (vcpu.touched or enabled()) and self._something_else():
            return Way.REFUSED
        vcpu.in_run = True
        apic = vcpu.apic
        if apic is not None:
            deadline = apic.timer.deadline
            if deadline is not None and deadline <= time.monotonic_ns():
                return self._refuse()
            self._lane.cr8 = apic.cr8
        # From here a kick reaches the processor, so what came before it is seen here.
        vcpu.mode = VcpuMode.IN_GUEST_MODE
        if vcpu.requests:
            return self._refuse()
        way = vcpu.cpu.enter(self._call, self._address)
        if way == Way.DONE:
            vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
            self._lane.retired = vcpu.cpu.uncounted()
            vcpu.complete_userspace_io = self.complete
            if not self._injectable:
                vcpu.run.ready_for_interrupt_injection = ready_for_interrupt_injection(vcpu)
            return Way.DONE
        if way == Way.REFUSED:
            return self._refuse()
        vcpu.touched = True
        vcpu.complete_userspace_io = None
        return Way.LEFT

    def _refuse(self) -> Way:
        self._vcpu.touched = True
        self._vcpu.mode = VcpuMode.OUTSIDE_GUEST_MODE
        return Way.REFUSED

    def _something_else(self) -> bool:
        """Whether anything is to be done besides; if not, that stays so until the next exit that
        is not taken here, or the next ioctl.
        """
        vcpu = self._vcpu
        complete = vcpu.complete_userspace_io
        if (
            (complete is not None and complete is not self.complete)
            or vcpu.mp_state
            or vcpu.halted_in_guest
            or vcpu.look_for_signals
            or vcpu.steal_record_due
            or vcpu.pv_eoi_pending
            or vcpu.vapic_addr
            or vcpu.smm.active
            or vcpu.dirty_ring is not None
            or vcpu.cpu.busy()
            or enabled()
        ):
            return True
        if complete is None:
            self._lane.access = 0
        vcpu.touched, vcpu.has_run = False, True
        return False
