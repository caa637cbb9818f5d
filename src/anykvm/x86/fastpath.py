"""KVM_RUN's short way, in native code: what userspace did for an access of the guest goes in, the
guest runs, its next access goes out.

What Linux calls an exit fastpath, and what a VMM's devices live on. `VcpuFastpath.enter` takes the
place of vcpu_run.py's way in where nothing at all is to be done but that, and of its way out where
the guest has left for a single access, to a port or to memory that no slot covers, which no device
in here answers. Whatever else there is, it leaves to that, having done nothing (REFUSED) or with
the exit still to be dealt with (LEFT).
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
from anykvm.cpu.state import REPLAY, STAY, Exit, Flag, Mode, Replay
from anykvm.fs.trace import enabled
from anykvm.kvm.iodev import SUMMARY, KvmBus
from anykvm.kvm.kvm_main import VcpuMode
from anykvm.uapi import kvm as uapi
from anykvm.x86.events import ready_for_interrupt_injection
from anykvm.x86.stats import PUBLISHED, KvmVcpuStat

if TYPE_CHECKING:
    from anykvm.x86.kvm_host import VcpuX86

PIO_DATA = uapi.KVM_PIO_PAGE_OFFSET * 4096
QUIRKY_PORT = 0x7E  # see exits.py
MASK32 = (1 << 32) - 1
PAGE_FRAME = 0xF_FFFF_FFFF_F000


class Way(IntEnum):
    """How far the short way went."""

    REFUSED = 0
    LEFT = 1
    DONE = 2


# To look at a member of an enumeration takes Python 3.11 ten times as long.
REFUSED, LEFT, DONE = Way
OUTSIDE, INSIDE = VcpuMode.OUTSIDE_GUEST_MODE, VcpuMode.IN_GUEST_MODE


class Pending(IntEnum):
    """The access that userspace was left with."""

    NOTHING = 0
    OUT = 1
    IN = 2
    MMIO = 3


class Injectable(IntEnum):
    """Whether KVM_INTERRUPT would be delivered at once."""

    NO = 0
    YES = 1  # it is never asked for
    AS_IT_STANDS = 2  # by the processor's state alone


class Lane(ctypes.Structure):
    """What the native code knows of a vCPU besides its `State`: where things are; what KVM_RUN
    tells of an APIC in here; and the access that is pending, with RIP then, RIP behind it, and how
    many instructions count with it.
    """

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            *("processor", "run", "stat", "ports", "pages"),
            *("user_tpr", "cr8", "injectable"),
            *("pending", "size", "rip", "next_rip", "retired"),
        )
    ]
    cr8: int
    pending: int
    size: int
    rip: int
    next_rip: int
    retired: int


def _offset(struct: type[ctypes.Structure], name: str) -> int:
    offset: int = getattr(struct, name).offset
    return offset


class _Generator:
    """Writes the native code: the State's fields through `f`, those of others by their structs."""

    def __init__(self, name: str) -> None:
        self.f = Routine(name, "i64", ("lane", PTR))
        self.run = self.lane("run").to_ptr()
        self.stat = self.lane("stat").to_ptr()

    def lane(self, name: str) -> Value:
        return self._lane_field(name).load("i64", align=8)

    def set_lane(self, name: str, value: Value | int) -> None:
        if not isinstance(value, Value):
            value = self.f.const(value, 64)
        self._lane_field(name).store(value, align=8)

    def _lane_field(self, name: str) -> Value:
        return self.f["lane"].offset(_offset(Lane, name))

    def shared(self, name: str, struct: type[ctypes.Structure] | None = None) -> Value:
        """A pointer into kvm_run, of which userspace may write each byte at any moment; with
        `struct` to a field of what its union holds.
        """
        if struct is None:
            return self.run.offset(_offset(uapi.kvm_run, name))
        return self.run.offset(_offset(uapi.kvm_run, "hw") + _offset(struct, name))

    def tell(self, struct: type[ctypes.Structure] | None, **values: Value) -> None:
        for name, value in values.items():
            self.shared(name, struct).store(value, volatile=True)

    def refuse_if(self, condition: Value) -> None:
        with self.f.If(condition):
            self.f.ret(self.f.const(Way.REFUSED, 64))

    def generate(self) -> Routine:
        f = self.f
        self._check()
        pending = self.lane("pending")
        with f.If(pending.eq(int(Pending.MMIO))):
            self._complete_mmio()
        with f.Else(), f.If(pending.ne(int(Pending.NOTHING))):
            self._complete_port(pending.eq(int(Pending.IN)))
        f.set("stay", f.get("stay") + STAY)
        f.set("jump_key", f.get("jump_key") + (1 << 32))
        self.tell(None, flags=f.const(0, 16), exit_reason=f.const(uapi.KVM_EXIT_INTR, 32))
        self.lane("processor").to_ptr().call("void", f.cpu)
        with f.If(f.get("exit_kind").eq(int(Exit.IO))):
            self._exit_io()
        with f.If(f.get("exit_kind").eq(int(Exit.MMIO))):
            self._exit_mmio()
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
        waits = f.get("irq_pending").ne(0) & (f.get("flags") & int(Flag.IF)).ne(0)
        self.refuse_if(waits | f.get("tick").ne(0))
        narrow = (f.get("mode") & int(Mode.CODE64)).eq(0)
        self.refuse_if(narrow & f.get("rip").ugt(MASK32))
        inside = f.get("rip").eq(f.get("replay_rip")) & f.get("insn_count").eq(f.get("replay_insn"))
        inside &= f.get("replay_count").ne(0)
        pending = self.lane("pending")
        self.refuse_if(inside & pending.ne(int(Pending.MMIO)))
        self.refuse_if(pending.ne(0) & f.get("rip").ne(self.lane("rip")))
        self.refuse_if(f.get("replay_count").uge(REPLAY))

    def _mask(self, size: Value) -> Value:
        """Of the bytes of an access, in 64 bits."""
        return (self.f.const(1, 64) << (size << 3)) - 1

    def _complete_port(self, incoming: Value) -> None:
        """The access's data into RAX, and on to the next instruction."""
        f, size = self.f, self.lane("size")
        with f.If(incoming):
            data = self.run.offset(PIO_DATA).load("i32", volatile=True).zext(64)
            mask = self._mask(size)
            kept = size.eq(4).select(f.const(0, 64), f.get("gpr[0]") & ~mask)
            f.set("gpr[0]", kept | data & mask)
        f.set("rip", self.lane("next_rip"))
        f.set("insn_count", f.get("insn_count") + self.lane("retired"))
        f.set("replay_count", 0)

    def _complete_mmio(self) -> None:
        """The instruction is executed again, and takes the data."""
        f, count = self.f, self.f.get("replay_count")
        at = f.field("replay").offset(count.zext(64) * ctypes.sizeof(Replay))
        data = self.shared("data", uapi.kvm_run_mmio).load("i64", volatile=True)
        at.offset(_offset(Replay, "data")).store(data, align=8)
        f.set("replay_count", count + 1)

    def _leave_if(self, condition: Value) -> None:
        with self.f.If(condition):
            self.f.ret(self.f.const(Way.LEFT, 64))

    def _summarised(self, bus: str, at: Value) -> Value:
        """Whether a device of ours may be there, see KvmIoBus."""
        bit = at & (SUMMARY - 1)
        return ((self.lane(bus) + (bit >> 3)).to_ptr().load("i8") >> (bit & 7).trunc(8)).trunc(1)

    def _exit_io(self) -> None:
        f = self.f
        port, size = f.get("io_port").zext(64), f.get("io_size").zext(64)
        self._leave_if(self._summarised("ports", port) | port.eq(QUIRKY_PORT))
        incoming = f.get("io_in").ne(0)
        with f.If(incoming ^ 1):
            at, mask = self.run.offset(PIO_DATA), self._mask(size)
            before = at.load("i32").zext(64) & ~mask
            at.store((before | f.get("gpr[0]") & mask).trunc(32), volatile=True)
        come, go = f.const(uapi.KVM_EXIT_IO_IN, 8), f.const(uapi.KVM_EXIT_IO_OUT, 8)
        self.tell(
            uapi.kvm_run_io,
            direction=incoming.select(come, go),
            size=size.trunc(8),
            port=port.trunc(16),
            count=f.const(1, 32),
            data_offset=f.const(PIO_DATA, 64),
        )
        kinds = f.const(Pending.IN, 64), f.const(Pending.OUT, 64)
        self.set_lane("pending", incoming.select(*kinds))
        self._note_end()
        self._done(uapi.KVM_EXIT_IO, size, "io_exits")

    def _exit_mmio(self) -> None:
        f, gpa, size = self.f, self.f.get("mmio_gpa"), self.f.get("mmio_size").zext(64)
        own_apic = (gpa ^ f.get("apic_base")) & PAGE_FRAME
        self._leave_if(own_apic.eq(0) & self.lane("user_tpr").eq(0))
        self._leave_if(self._summarised("pages", gpa >> 12))
        write = f.get("mmio_write").ne(0)
        whole = size.eq(8).select(f.const(-1, 64), self._mask(size))
        data = write.select(f.get("mmio_data") & whole, f.const(0, 64))
        self.tell(
            uapi.kvm_run_mmio,
            phys_addr=gpa,
            data=data,
            len=size.trunc(32),
            is_write=write.zext(8),
        )
        self.set_lane("pending", int(Pending.MMIO))
        self._done(uapi.KVM_EXIT_MMIO, size, "mmio_exits")

    def _note_end(self) -> None:
        """Where the instruction ends that left."""
        f = self.f
        index = (f.get("exit_record") - f.get("records")) >> 2  # 8 bytes for each record's 32
        rips = (f.get("records_rip") + index).to_ptr()
        length = (rips.offset(8).load("i64") - rips.load("i64")) & 0xFFFF
        flat = (f.get("mode") & int(Mode.CODE64)).ne(0)
        behind = f.get("rip") + length
        self.set_lane("next_rip", flat.select(behind, behind & MASK32))

    def _done(self, reason: int, size: Value, exits: str) -> None:
        f = self.f
        self.set_lane("rip", f.get("rip"))
        self.set_lane("size", size)
        own = self.lane("user_tpr").ne(0)
        self.tell(
            None,
            if_flag=((f.get("flags") >> 9) & 1).trunc(8),
            cr8=own.select(f.get("cr8").zext(64), self.lane("cr8")),
            apic_base=f.get("apic_base"),
            ready_for_interrupt_injection=self._ready().trunc(8),
            exit_reason=f.const(reason, 32),
        )
        for at in (_offset(KvmVcpuStat, "exits"), _offset(KvmVcpuStat, exits)):
            self._add_one(at)
        self._add_one(_offset(KvmVcpuStat, "userspace_exits") + 8 * reason)
        for counter, field in PUBLISHED.items():
            self.stat.offset(_offset(KvmVcpuStat, counter)).store(f.get(field).zext(64), align=8)
        f.ret(f.const(Way.DONE, 64))

    def _ready(self) -> Value:
        """`ready_for_interrupt_injection`, but that a local APIC may have to be asked as well."""
        f, known = self.f, self.lane("injectable")
        clear = (f.get("flags") & int(Flag.IF)).ne(0) & f.get("irq_pending").eq(0)
        shadowed = f.get("shadow").ne(0) & f.get("rip").eq(f.get("shadow_rip"))
        shadowed &= f.get("insn_count").eq(f.get("shadow_count"))
        inside = f.get("replay_count").ne(0) & f.get("rip").eq(f.get("replay_rip"))
        inside &= f.get("insn_count").eq(f.get("replay_insn"))
        own = clear & (shadowed ^ 1) & (inside ^ 1)
        return known.eq(Injectable.AS_IT_STANDS).select(own.zext(64), known)

    def _add_one(self, at: int) -> None:
        count = self.stat.offset(at)
        count.store(count.load("i64", align=8) + 1, align=8)


@cache
def _native() -> Callable[..., int]:
    """fastpath(state, lane): a `Way`. Kept on disk under what it was compiled from."""
    digest = hashlib.sha256(_Generator("kvm_run_fastpath").generate().render().encode())
    name = f"kvm_run_fastpath_{digest.hexdigest()[:16]}"
    (address,) = process_jit().addresses([name], lambda _: [_Generator(name).generate()])
    pointer = ctypes.c_void_p
    return callable_at(address, ctypes.c_uint64, pointer, pointer, releases_gil=True)


def _address(summary: bytearray) -> int:
    """Of what is never resized."""
    return ctypes.addressof((ctypes.c_uint8 * len(summary)).from_buffer(summary))


class VcpuFastpath:
    """One vCPU's: `enter` belongs to its KVM_RUN."""

    def __init__(self, vcpu: VcpuX86) -> None:
        kvm, self._vcpu = vcpu.kvm, vcpu
        self._call = _native()
        injectable = Injectable.YES if kvm.pic_in_kernel() else Injectable.AS_IT_STANDS
        self._has_apic_to_ask = vcpu.apic is not None and not kvm.pic_in_kernel()
        self._lane = Lane(
            processor=vcpu.cpu.native_run,
            run=ctypes.addressof(vcpu.run),
            stat=ctypes.addressof(vcpu.stat),
            ports=_address(kvm.buses[KvmBus.PIO_BUS].summary),
            pages=_address(kvm.buses[KvmBus.MMIO_BUS].summary),
            user_tpr=vcpu.apic is None,
            injectable=injectable,
        )
        self._address = ctypes.addressof(self._lane)
        self.complete = self._complete  # the same object each time

    def note(self, pending: Pending) -> Callable[[], int]:
        """The guest has left for a single access that the State describes: completes it."""
        lane, cpu, state = self._lane, self._vcpu.cpu, self._vcpu.state
        lane.pending, lane.rip = pending, state.rip
        if pending is Pending.MMIO:
            lane.size = state.mmio_size
        else:
            lane.size, lane.next_rip, lane.retired = (
                state.io_size,
                cpu.rip_behind(),
                cpu.uncounted(),
            )
        return self.complete

    def _complete(self) -> int:
        """Not on the short way."""
        vcpu, lane = self._vcpu, self._lane
        if lane.pending == Pending.MMIO:
            vcpu.cpu.complete_mmio_read(bytes(vcpu.run.mmio.data[: lane.size]))
        elif vcpu.state.rip != lane.rip:
            # Userspace has moved it, to reset the processor for instance.
            vcpu.cpu.drop_io()
        elif lane.pending == Pending.IN:
            vcpu.cpu.complete_in(bytes(vcpu.pio_data[: lane.size]))
        else:
            vcpu.cpu.complete_out()
        return 1

    def enter(self) -> Way:
        """After LEFT the exit is still to be dealt with (`Cpu.resume`)."""
        vcpu = self._vcpu
        if (vcpu.touched or enabled()) and self._something_else():
            return REFUSED
        vcpu.in_run = True
        apic = vcpu.apic
        if apic is not None:
            deadline = apic.timer.deadline
            if deadline is not None and deadline <= time.monotonic_ns():
                return self._refuse()
            self._lane.cr8 = apic.cr8
        # From here a kick reaches the processor, so what came before it is seen here.
        vcpu.mode = INSIDE
        if vcpu.requests:
            return self._refuse()
        way = vcpu.cpu.enter(self._call, self._address)
        if way == DONE:
            vcpu.mode = OUTSIDE
            self._lane.retired = vcpu.cpu.uncounted()
            vcpu.complete_userspace_io = self.complete
            if self._has_apic_to_ask:
                vcpu.run.ready_for_interrupt_injection = ready_for_interrupt_injection(vcpu)
            return DONE
        if way == REFUSED:
            return self._refuse()
        vcpu.touched = True
        vcpu.complete_userspace_io = None
        return LEFT

    def _refuse(self) -> Way:
        self._vcpu.touched = True
        self._vcpu.mode = OUTSIDE
        return REFUSED

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
            self._lane.pending = Pending.NOTHING
        vcpu.touched, vcpu.has_run = False, True
        return False
