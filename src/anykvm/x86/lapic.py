"""Local APIC: the xAPIC page, the x2APIC MSRs, IA32_APIC_BASE, IA32_TSC_DEADLINE and snapshots.

Intel SDM volume 3, "Advanced Programmable Interrupt Controller (APIC)" and its section on x2APIC;
snapshots and the ICR's tolerance of reserved bits follow arch/x86/kvm/lapic.c. What the APIC does
with its registers is in `lapic_core.py`, the counter in `lapic_timer.py`.

Pure state: callers serialise every call on one APIC, and with it whatever its outputs reach (an IPI
enters another APIC, an EOI the I/O APIC), so one re-entrant lock per VM is the simple way. Only
`mode`, `hw_enabled`, `sw_enabled`, `accept_pic_intr` and `next_deadline_ns` may be read without it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from dataclasses import replace

from anykvm.uapi.kvm import kvm_lapic_state
from anykvm.x86 import lapic_regs as reg
from anykvm.x86.lapic_core import LapicCore
from anykvm.x86.lapic_regs import (
    MODE_BITS,
    ApicFault,
    LapicIrq,
    LapicMode,
    LapicOptions,
    LapicOutputs,
    LapicTime,
)
from anykvm.x86.lapic_timer import APIC_LVT_TIMER_SHIFT, divide_count

__all__ = [
    "ApicFault",
    "Lapic",
    "LapicIrq",
    "LapicMode",
    "LapicOptions",
    "LapicOutputs",
    "LapicTime",
]

# 64 registers, one at every 16 bytes.
REGISTER_PAGE = struct.Struct("<" + "I12x" * 64)


def join_bitmap(words: list[int]) -> int:
    """Eight 32-bit registers as one 256-bit integer."""
    return sum(word << 32 * i for i, word in enumerate(words))


def split_bitmap(bitmap: int) -> list[int]:
    """A 256-bit integer as eight 32-bit registers."""
    return [bitmap >> 32 * i & 0xFFFFFFFF for i in range(8)]


class Lapic(LapicCore):
    """A local APIC as its processor and its VMM see it; `apic_id` is the vCPU's ID."""

    def __init__(
        self,
        apic_id: int,
        outputs: LapicOutputs,
        time: LapicTime,
        options: LapicOptions | None = None,
    ) -> None:
        super().__init__(apic_id, outputs, time, options or LapicOptions())
        self._readers: dict[int, Callable[[], int]] = {
            reg.APIC_PROCPRI: lambda: self.ppr,
            reg.APIC_TMCCT: self.timer.current_count,
        }
        self._writers: dict[int, Callable[[int], None]] = {
            reg.APIC_ID: self._write_id,
            reg.APIC_TASKPRI: self._write_tpr,
            reg.APIC_EOI: lambda _value: self.eoi(),
            reg.APIC_LDR: self._write_ldr,
            reg.APIC_DFR: self._write_dfr,
            reg.APIC_SPIV: self._write_spiv,
            reg.APIC_ESR: self._write_esr,
            reg.APIC_ICR: self._write_icr,
            reg.APIC_TMICT: self._write_tmict,
            reg.APIC_TDCR: self._write_tdcr,
            reg.APIC_SELF_IPI: self._write_self_ipi,
            **{lvt: self._lvt_writer(lvt) for lvt in self.lvt_regs},
        }
        self.set_cpuid(x2apic=False, tsc_deadline=False, maxphyaddr=36)

    def set_cpuid(self, *, x2apic: bool, tsc_deadline: bool, maxphyaddr: int) -> None:
        """What the guest's CPUID says; it decides the bits that may be written."""
        self._x2apic_in_cpuid = x2apic
        self._maxphyaddr = maxphyaddr
        access = dict(reg.APIC_REGS)
        if tsc_deadline:
            lvtt = access[reg.APIC_LVTT]
            access[reg.APIC_LVTT] = replace(lvtt, writable=lvtt.writable | 1 << 18)
        if self.options.directed_eoi:
            spiv = access[reg.APIC_SPIV]
            access[reg.APIC_SPIV] = replace(
                spiv, writable=spiv.writable | reg.APIC_SPIV_DIRECTED_EOI
            )
        if reg.APIC_LVTCMCI in self.lvt_regs:
            access[reg.APIC_LVTCMCI] = reg.CMCI_REG
        self._access = access

    def set_cmci(self, present: bool) -> None:
        """Whether there is an LVT entry for corrected machine checks
        (`kvm_apic_after_set_mcg_cap`).
        """
        if present == (reg.APIC_LVTCMCI in self.lvt_regs):
            return
        self.lvt_regs = (*reg.LVT_REGS, reg.APIC_LVTCMCI) if present else reg.LVT_REGS
        if present:
            self.regs[reg.APIC_LVTCMCI >> 4] = reg.APIC_LVT_MASKED
            self._access[reg.APIC_LVTCMCI] = reg.CMCI_REG
        else:
            self._access.pop(reg.APIC_LVTCMCI, None)
        self.regs[reg.APIC_LVR >> 4] = self._version()

    def set_base(self, value: int, host_initiated: bool = False) -> None:
        """Write IA32_APIC_BASE. Raises ApicFault on reserved bits and illegal transitions.

        The host may make any transition, but not leave an invalid state.
        """
        reserved = 0x2FF | -1 << self._maxphyaddr
        if not self._x2apic_in_cpuid:
            reserved |= reg.X2APIC_ENABLE
        old, new = self.mode, LapicMode(value & MODE_BITS)
        if value & reserved or new == LapicMode.INVALID:
            raise ApicFault(f"IA32_APIC_BASE {value:#x}: reserved bits or invalid mode")
        illegal = ((LapicMode.X2APIC, LapicMode.XAPIC), (LapicMode.DISABLED, LapicMode.X2APIC))
        if not host_initiated and (old, new) in illegal:
            raise ApicFault(f"IA32_APIC_BASE: {old.name} to {new.name} is not a legal transition")
        self._switch_base(value)
        self._out.map_changed()
        if not host_initiated and (old, new) == (LapicMode.DISABLED, LapicMode.XAPIC):
            self.reset(init=True)

    @property
    def base_address(self) -> int:
        """Where the xAPIC page is in guest-physical memory."""
        return self.apic_base & ~0xFFF

    @property
    def mmio_enabled(self) -> bool:
        """Whether the xAPIC page answers; in other modes the caller sees unclaimed memory."""
        return self.mode == LapicMode.XAPIC

    def mmio_read(self, offset: int, length: int = 4) -> int:
        """Read 1, 2 or 4 bytes at `offset` of the page, inside one register; else zero."""
        shift = offset & 0xF
        if shift + length > 4:
            return 0
        register = offset & 0xFF0
        access = self._access.get(register)
        if access is None or not access.xapic:
            self._error(reg.APIC_ESR_ILLREGA)
            return 0
        value = self._read(register) if "r" in access.xapic else 0
        return value >> 8 * shift & ((1 << 8 * length) - 1)

    def mmio_write(self, offset: int, value: int, length: int = 4) -> None:
        """Write a register of the page: aligned 32-bit writes only, others are ignored."""
        if length != 4 or offset & 0xF:
            return
        access = self._access.get(offset)
        if access is None or not access.xapic:
            self._error(reg.APIC_ESR_ILLREGA)
        elif "w" in access.xapic:
            self._write(offset, value & access.writable)

    def read_msr(self, msr: int) -> int:
        """Read an MSR from 0x800 to 0x8FF. Raises ApicFault."""
        offset, access = self._x2apic_register(msr)
        if "r" not in access.x2apic:
            raise ApicFault(f"x2APIC MSR {msr:#x} cannot be read")
        value = self._read(offset)
        if offset == reg.APIC_ICR:
            value |= self.regs[reg.APIC_ICR2 >> 4] << 32
        return value

    def write_msr(self, msr: int, value: int) -> None:
        """Write an MSR from 0x800 to 0x8FF. Raises ApicFault, also for reserved bits."""
        offset, access = self._x2apic_register(msr)
        if "w" not in access.x2apic:
            raise ApicFault(f"x2APIC MSR {msr:#x} cannot be written")
        if offset == reg.APIC_ICR:
            self._write_x2apic_icr(value)
        elif value & ~access.writable:
            raise ApicFault(f"x2APIC MSR {msr:#x}: reserved bits in {value:#x}")
        else:
            self._write(offset, value)

    def hv_read(self, offset: int) -> int:
        """A register by Hyper-V's MSRs, in any mode; the ICR as x2APIC has it."""
        value = self._read(offset)
        return value | self.regs[reg.APIC_ICR2 >> 4] << 32 if offset == reg.APIC_ICR else value

    def hv_write(self, offset: int, value: int) -> None:
        """Write EOI, TPR or ICR by Hyper-V's MSRs, in any mode."""
        if offset == reg.APIC_ICR:
            self.regs[reg.APIC_ICR2 >> 4] = value >> 32
            if self.x2apic_mode:
                self._write_x2apic_icr(value)
                return
        self._write(offset, value & 0xFFFFFFFF & self._access[offset].writable)

    def read_tscdeadline(self) -> int:
        """IA32_TSC_DEADLINE: zero once it passed, and in other timer modes."""
        self.expire(self._clock())
        return self.timer.tscdeadline if self.hw_enabled else 0

    def write_tscdeadline(self, value: int) -> None:
        """IA32_TSC_DEADLINE: arms the timer, at once if it passed; ignored in other modes."""
        if self.hw_enabled:
            self.timer.set_tscdeadline(value)
            self._timer_armed()

    def get_state(self, x2apic_format: bool = False) -> kvm_lapic_state:
        """Snapshot for KVM_GET_LAPIC. A timer that ran out is delivered first, or if the processor
        does not run still has a count to go.

        In x2APIC mode the ID register holds the 32-bit ID if `x2apic_format`
        (KVM_X2APIC_API_USE_32BIT_IDS), else its low byte in bits 31-24.
        """
        self.expire(self._clock())
        regs = self.regs.copy()
        for base, bitmap in ((reg.APIC_ISR, self.isr), (reg.APIC_TMR, self.tmr)):
            regs[base >> 4 : (base >> 4) + 8] = split_bitmap(bitmap)
        regs[reg.APIC_IRR >> 4 : (reg.APIC_IRR >> 4) + 8] = split_bitmap(self.irr)
        regs[reg.APIC_PROCPRI >> 4] = self.ppr
        regs[reg.APIC_TMCCT >> 4] = self.timer.saved_count()
        if self.x2apic_mode and not x2apic_format:
            regs[reg.APIC_ID >> 4] = self.apic_id << 24 & 0xFFFFFFFF
        return kvm_lapic_state.from_buffer_copy(REGISTER_PAGE.pack(*regs))

    def set_state(self, state: kvm_lapic_state, x2apic_format: bool = False) -> None:
        """KVM_SET_LAPIC. The mode stays that of IA32_APIC_BASE.

        Raises OSError EINVAL if `x2apic_format`, in x2APIC mode, and the ID is not this one's.
        """
        regs = list(REGISTER_PAGE.unpack(bytes(state)))
        if self.x2apic_mode:
            if x2apic_format and regs[reg.APIC_ID >> 4] != self.apic_id:
                raise OSError(
                    errno.EINVAL,
                    f"x2APIC ID is {self.apic_id}, the state says {regs[reg.APIC_ID >> 4]}",
                )
            regs[reg.APIC_ID >> 4] = self.apic_id
            regs[reg.APIC_LDR >> 4] = reg.x2apic_ldr(self.apic_id)
        regs[reg.APIC_LVR >> 4] = self._version()
        self.isr, self.tmr, self.irr = (
            join_bitmap(regs[base >> 4 : (base >> 4) + 8])
            for base in (reg.APIC_ISR, reg.APIC_TMR, reg.APIC_IRR)
        )
        self.regs = regs
        self.esr_pending = 0
        self.arb_prio = 0
        self.timer.set_mode(regs[reg.APIC_LVTT >> 4] >> APIC_LVT_TIMER_SHIFT & 3)
        self.timer.divide = divide_count(regs[reg.APIC_TDCR >> 4])
        self.timer.resume(regs[reg.APIC_TMICT >> 4], regs[reg.APIC_TMCCT >> 4])
        self._out.map_changed()
        self._timer_armed()
        self._out.kick()

    def _x2apic_register(self, msr: int) -> tuple[int, reg.ApicReg]:
        offset = (msr - reg.APIC_BASE_MSR) << 4
        access = self._access.get(offset)
        if access is None or not self.x2apic_mode:
            raise ApicFault(f"MSR {msr:#x} does not exist in {self.mode.name} mode")
        return offset, access

    def _read(self, offset: int) -> int:
        reader = self._readers.get(offset)
        if reader is not None:
            return reader()
        if reg.APIC_ISR <= offset < reg.APIC_ESR:
            bitmap = (self.isr, self.tmr, self.irr)[(offset - reg.APIC_ISR) >> 7]
            return bitmap >> 2 * (offset & 0x70) & 0xFFFFFFFF
        return self.regs[offset >> 4]

    def _write(self, offset: int, value: int) -> None:
        writer = self._writers.get(offset)
        if writer is not None:
            writer(value)
        else:
            self.regs[offset >> 4] = value

    def _write_id(self, value: int) -> None:
        self.regs[reg.APIC_ID >> 4] = value
        self._out.map_changed()

    def _write_tpr(self, value: int) -> None:
        self.tpr = value

    def _write_ldr(self, value: int) -> None:
        self.regs[reg.APIC_LDR >> 4] = value
        self._out.map_changed()

    def _write_dfr(self, value: int) -> None:
        self.regs[reg.APIC_DFR >> 4] = value | reg.APIC_DFR_CLUSTER
        self._out.map_changed()

    def _write_spiv(self, value: int) -> None:
        was_enabled = self.sw_enabled
        self.regs[reg.APIC_SPIV >> 4] = value
        if not self.sw_enabled:
            for lvt in self.lvt_regs:
                self.regs[lvt >> 4] |= reg.APIC_LVT_MASKED
        if self.sw_enabled != was_enabled:
            self._out.map_changed()

    def _write_esr(self, _value: int) -> None:
        # Any write shows the errors since the last one, and re-arms their interrupt.
        self.regs[reg.APIC_ESR >> 4] = self.esr_pending
        self.esr_pending = 0

    def _write_icr(self, value: int) -> None:
        self.regs[reg.APIC_ICR >> 4] = value & ~reg.APIC_ICR_BUSY
        self._send_ipi(value, self.regs[reg.APIC_ICR2 >> 4] >> 24)

    def _write_x2apic_icr(self, value: int) -> None:
        low, dest = value & 0xFFFFFFFF, value >> 32
        if low & ~reg.X2APIC_ICR_LOW:
            raise ApicFault(f"x2APIC ICR: reserved bits in {value:#x}")
        self.regs[reg.APIC_ICR >> 4] = low & ~reg.APIC_ICR_BUSY
        self.regs[reg.APIC_ICR2 >> 4] = dest
        self._send_ipi(low, dest)

    def _write_self_ipi(self, value: int) -> None:
        self._send_ipi(reg.APIC_DEST_SELF << 18 | value, 0)

    def _lvt_writer(self, lvt: int) -> Callable[[int], None]:
        def write(value: int) -> None:
            masked = 0 if self.sw_enabled else reg.APIC_LVT_MASKED
            self.regs[lvt >> 4] = value | masked
            if lvt == reg.APIC_LVTT:
                self._write_timer_mode(value)
            if lvt == reg.APIC_LVT0:
                self._out.kick()  # the 8259s' interrupt, or the VMM's wish for one, may wait for it

        return write

    def _write_timer_mode(self, value: int) -> None:
        self.timer.set_mode(value >> APIC_LVT_TIMER_SHIFT & 3)
        self.regs[reg.APIC_TMICT >> 4] = self.timer.initial_count
        self._out.timer_changed()

    def _write_tmict(self, value: int) -> None:
        self.timer.set_initial_count(value)
        self.regs[reg.APIC_TMICT >> 4] = self.timer.initial_count
        self._timer_armed()

    def _write_tdcr(self, value: int) -> None:
        self.regs[reg.APIC_TDCR >> 4] = value
        self.timer.set_divide(divide_count(value))
        self._timer_armed()
