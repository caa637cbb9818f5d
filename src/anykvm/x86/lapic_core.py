"""What a local APIC does: accepting, prioritising and sending interrupts, LVT entries, the timer.

Intel SDM volume 3, "Advanced Programmable Interrupt Controller (APIC)"; what the ways of accepting
an interrupt return is that of arch/x86/kvm/lapic.c. `lapic.py` adds how guest and userspace reach
the registers.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.x86 import lapic_regs as reg
from anykvm.x86.lapic_regs import (
    MODE_BITS,
    LapicIrq,
    LapicMode,
    LapicOptions,
    LapicOutputs,
    LapicTime,
)
from anykvm.x86.lapic_timer import LapicTimer


class LapicCore:
    """State and behaviour. `irr`, `isr` and `tmr` are 256-bit integers, bit n for vector n."""

    def __init__(
        self, apic_id: int, outputs: LapicOutputs, time: LapicTime, options: LapicOptions
    ) -> None:
        self.apic_id = apic_id
        self.options = options
        self.lvt_regs = (*reg.LVT_REGS, reg.APIC_LVTCMCI) if options.cmci else reg.LVT_REGS
        self.regs = [0] * 64
        self.apic_base = 0
        self.auto_eoi = 0  # vectors that end when they are taken: Hyper-V's
        self.timer = LapicTimer(time)
        self._clock = time.clock
        self._out = outputs
        self._accept: tuple[Callable[[int, int, int], int], ...] = (
            self._accept_fixed,
            self._accept_lowest,
            self._accept_smi,
            self._accept_remrd,
            self._accept_nmi,
            self._accept_init,
            self._accept_startup,
            self._accept_extint,
        )
        self._power_on()

    def reset(self, init: bool) -> None:
        """Power-on reset, or an INIT: that keeps the mode, the ID and pending INIT and SIPI."""
        if init:
            self._reset_registers()
        else:
            self._power_on()
        self._out.timer_changed()
        self._out.map_changed()

    def _power_on(self) -> None:
        self.pending_events = 0
        self.sipi_vector = 0
        self.apic_base = 0
        bsp = reg.MSR_IA32_APICBASE_BSP if self.options.bsp else 0
        self._switch_base(reg.APIC_DEFAULT_PHYS_BASE | LapicMode.XAPIC | bsp)
        self._reset_registers()

    def _reset_registers(self) -> None:
        apic_id = self.regs[reg.APIC_ID >> 4]
        self.irr = self.isr = self.tmr = 0
        self.esr_pending = 0
        self.arb_prio = 0
        self.pv_unhalted = False
        self.regs = [0] * 64
        self.regs[reg.APIC_ID >> 4] = apic_id
        self.regs[reg.APIC_LVR >> 4] = self._version()
        self.regs[reg.APIC_DFR >> 4] = reg.APIC_DFR_FLAT
        self.regs[reg.APIC_SPIV >> 4] = reg.APIC_VECTOR_MASK
        for lvt in self.lvt_regs:
            self.regs[lvt >> 4] = reg.APIC_LVT_MASKED
        if self.options.bsp and self.options.lint0_reenabled:
            self.regs[reg.APIC_LVT0 >> 4] = reg.APIC_DM_EXTINT << 8
        if self.x2apic_mode:
            self.regs[reg.APIC_LDR >> 4] = reg.x2apic_ldr(self.apic_id)
        self.timer.reset()

    @property
    def mode(self) -> LapicMode:
        """Disabled, xAPIC or x2APIC."""
        return LapicMode(self.apic_base & MODE_BITS)

    @property
    def hw_enabled(self) -> bool:
        """The global enable of IA32_APIC_BASE."""
        return bool(self.apic_base & reg.MSR_IA32_APICBASE_ENABLE)

    @property
    def x2apic_mode(self) -> bool:
        """Whether registers are MSRs and IDs have 32 bits."""
        return self.apic_base & MODE_BITS == MODE_BITS

    @property
    def sw_enabled(self) -> bool:
        """The software enable of the spurious-interrupt register."""
        return bool(self.regs[reg.APIC_SPIV >> 4] & reg.APIC_SPIV_APIC_ENABLED)

    @property
    def xapic_id(self) -> int:
        """The 8-bit ID of xAPIC mode."""
        return self.regs[reg.APIC_ID >> 4] >> 24

    @property
    def tpr(self) -> int:
        """Task priority, 0 to 255."""
        return self.regs[reg.APIC_TASKPRI >> 4]

    @tpr.setter
    def tpr(self, value: int) -> None:
        self.regs[reg.APIC_TASKPRI >> 4] = value & 0xFF
        if self.irr:
            self._out.kick()

    @property
    def cr8(self) -> int:
        """The task-priority class as CR8 shows it, 0 to 15."""
        return self.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        self.tpr = (value & 0xF) << 4

    @property
    def ppr(self) -> int:
        """Processor priority: the task's, or the class in service if that is higher."""
        in_service = max(self.isr.bit_length() - 1, 0) & 0xF0
        tpr = self.regs[reg.APIC_TASKPRI >> 4]
        return tpr if tpr & 0xF0 >= in_service else in_service

    def has_interrupt(self) -> int | None:
        """The vector that would be delivered now: the highest requested, if above the PPR."""
        if not self.irr or not self.hw_enabled:
            return None
        vector = self.irr.bit_length() - 1
        return vector if vector & 0xF0 > self.ppr & 0xF0 else None

    def ack_interrupt(self) -> int:
        """Take the deliverable vector from IRR into ISR.

        Without one, because it was withdrawn in between, this is the spurious vector, which needs
        no EOI.
        """
        vector = self.has_interrupt()
        if vector is None:
            return self.regs[reg.APIC_SPIV >> 4] & reg.APIC_VECTOR_MASK
        self.irr ^= 1 << vector
        self.isr |= (1 << vector) & ~self.auto_eoi
        return vector

    def eoi(self) -> None:
        """End the highest interrupt in service and broadcast it, unless that is suppressed."""
        if not self.isr:
            return
        vector = self.isr.bit_length() - 1
        self.isr ^= 1 << vector
        trig_mode = self.tmr >> vector & 1
        suppressed = self.regs[reg.APIC_SPIV >> 4] & reg.APIC_SPIV_DIRECTED_EOI
        if not (trig_mode and suppressed):
            self._out.eoi(vector, trig_mode)
        if self.irr:
            self._out.kick()

    def accept_irq(
        self,
        delivery_mode: int,
        vector: int,
        level: int = 1,
        trig_mode: int = reg.IOAPIC_EDGE_TRIG,
    ) -> int:
        """A message for this APIC: 1 if it was taken, 0 if ignored.

        NMI, INIT, SIPI and SMI pass a software-disabled APIC; ExtINT reaches the processor through
        `accept_pic_intr` and is ignored here.
        """
        return self._accept[delivery_mode](vector, level, trig_mode)

    def accept_pic_intr(self) -> bool:
        """Whether this processor takes the 8259s' INTR: by LINT0, or with its APIC disabled."""
        lvt0 = self.regs[reg.APIC_LVT0 >> 4]
        return not self.hw_enabled or (
            not lvt0 & reg.APIC_LVT_MASKED and lvt0 >> 8 & 7 == reg.APIC_DM_EXTINT
        )

    @property
    def lvt0_in_nmi_mode(self) -> bool:
        """Whether LINT0 is an NMI watchdog's: then the PIT's ticks belong to `local_deliver`."""
        return (
            self.regs[reg.APIC_LVT0 >> 4] & (reg.APIC_MODE_MASK | reg.APIC_LVT_MASKED)
            == reg.APIC_DM_NMI << 8
        )

    def local_deliver(self, lvt: int) -> int:
        """Signal the local source of LVT entry `lvt` (APIC_LVT0 and so on); as `accept_irq`."""
        entry = self.regs[lvt >> 4]
        if not self.hw_enabled or entry & reg.APIC_LVT_MASKED:
            return 0
        taken = self.accept_irq(
            entry >> 8 & 7,
            entry & reg.APIC_VECTOR_MASK,
            1,
            int(bool(entry & reg.APIC_LVT_LEVEL_TRIGGER)),
        )
        if taken and lvt == reg.APIC_LVTPC:
            self.regs[lvt >> 4] = entry | reg.APIC_LVT_MASKED
        return taken

    def take_init(self) -> bool:
        """Consume a pending INIT; the vCPU then resets itself and this APIC with `reset(True)`."""
        pending = bool(self.pending_events & 1 << reg.KVM_APIC_INIT)
        self.pending_events &= ~(1 << reg.KVM_APIC_INIT)
        return pending

    def take_sipi(self) -> int | None:
        """Consume a pending SIPI: its vector. It counts only if the vCPU waits for one."""
        if not self.pending_events & 1 << reg.KVM_APIC_SIPI:
            return None
        self.pending_events &= ~(1 << reg.KVM_APIC_SIPI)
        return self.sipi_vector

    def match_dest(
        self,
        dest: int,
        dest_mode: int,
        shorthand: int = reg.APIC_DEST_NOSHORT,
        source: LapicCore | None = None,
    ) -> bool:
        """Whether a message is for this APIC; `source` is the sender of an IPI, else None."""
        if shorthand != reg.APIC_DEST_NOSHORT:
            return shorthand == reg.APIC_DEST_ALLINC or (
                (self is source) == (shorthand == reg.APIC_DEST_SELF)
            )
        if self._is_broadcast(dest, ipi=source is not None):
            return True
        if dest_mode == reg.APIC_DEST_PHYSICAL:
            # An ID above 255 can only mean the x2APIC ID, whatever mode its owner is in.
            x2apic = self.x2apic_mode or dest > 0xFF
            return dest == (self.apic_id if x2apic else self.xapic_id)
        return self._match_logical(dest)

    def next_deadline_ns(self) -> int | None:
        """When the timer runs out, on the injected clock, or None. May be centuries away."""
        return self.timer.deadline

    def expire(self, now: int) -> bool:
        """True if the timer ran out by `now` and the processor runs: its interrupt is delivered."""
        if not self._out.in_run() or not self.timer.expire(now):
            return False
        self.local_deliver(reg.APIC_LVTT)
        return True

    def tsc_changed(self) -> None:
        """The guest's TSC or its frequency was set: move a pending TSC deadline."""
        self.timer.arm_tscdeadline()
        self._timer_armed()

    def _timer_armed(self) -> None:
        deadline = self.timer.deadline
        if deadline is not None:
            now = self._clock()
            if deadline <= now:
                self.expire(now)
        self._out.timer_changed()

    def _version(self) -> int:
        directed = reg.APIC_LVR_DIRECTED_EOI if self.options.directed_eoi else 0
        return reg.APIC_VERSION | (len(self.lvt_regs) - 1) << 16 | directed

    def _switch_base(self, value: int) -> None:
        """Switch modes, which gives the ID (and LDR) registers that mode's values."""
        changed = self.apic_base ^ value
        self.apic_base = value
        if changed & MODE_BITS and self.hw_enabled:
            if self.x2apic_mode:
                self.regs[reg.APIC_ID >> 4] = self.apic_id
                self.regs[reg.APIC_LDR >> 4] = reg.x2apic_ldr(self.apic_id)
            else:
                self.regs[reg.APIC_ID >> 4] = (self.apic_id & 0xFF) << 24

    def _is_broadcast(self, dest: int, ipi: bool) -> bool:
        if not self.x2apic_mode:
            return dest == reg.APIC_BROADCAST
        quirk = self.options.x2apic_broadcast_quirk and not ipi and dest == reg.APIC_BROADCAST
        return quirk or dest == reg.X2APIC_BROADCAST

    def _match_logical(self, dest: int) -> bool:
        ldr = self.regs[reg.APIC_LDR >> 4]
        if self.x2apic_mode:
            return ldr >> 16 == dest >> 16 and bool(ldr & dest & 0xFFFF)
        logical_id = ldr >> 24
        dfr = self.regs[reg.APIC_DFR >> 4]
        if dfr == reg.APIC_DFR_FLAT:
            return bool(logical_id & dest)
        if dfr == reg.APIC_DFR_CLUSTER:
            return logical_id >> 4 == dest >> 4 and bool(logical_id & dest & 0xF)
        return False

    def _send_ipi(self, icr_low: int, dest: int) -> None:
        irq = LapicIrq(
            vector=icr_low & reg.APIC_VECTOR_MASK,
            delivery_mode=icr_low >> 8 & 7,
            dest_mode=icr_low >> 11 & 1,
            level=icr_low >> 14 & 1,
            trig_mode=icr_low >> 15 & 1,
            shorthand=icr_low >> 18 & 3,
            dest_id=dest,
        )
        if irq.vector < 16 and irq.delivery_mode in (reg.APIC_DM_FIXED, reg.APIC_DM_LOWEST):
            self._error(reg.APIC_ESR_SENDILL)
        elif irq.shorthand == reg.APIC_DEST_SELF:
            self.accept_irq(irq.delivery_mode, irq.vector, irq.level, irq.trig_mode)
        else:
            self._out.deliver(irq)

    def _error(self, bit: int) -> None:
        """Record an error; the first since the ESR was last written interrupts."""
        armed = not self.esr_pending
        self.esr_pending |= bit
        if armed:
            self.local_deliver(reg.APIC_LVTERR)

    def _accept_fixed(self, vector: int, level: int, trig_mode: int) -> int:
        if (trig_mode and not level) or not self.hw_enabled or not self.sw_enabled:
            return 0
        if vector < 16:
            self._error(reg.APIC_ESR_RECVILL)
            return 0
        bit = 1 << vector
        self.tmr = self.tmr | bit if trig_mode else self.tmr & ~bit
        self.irr |= bit
        self._out.kick()
        return 1

    def _accept_lowest(self, vector: int, level: int, trig_mode: int) -> int:
        self.arb_prio += 1
        return self._accept_fixed(vector, level, trig_mode)

    def _accept_smi(self, _vector: int, _level: int, _trig_mode: int) -> int:
        if not self._out.smi():
            return 0
        self._out.kick()
        return 1

    def _accept_remrd(self, _vector: int, _level: int, _trig_mode: int) -> int:
        # The mode is unused by hardware; KVM's paravirtual kick travels in it.
        self.pv_unhalted = True
        self._out.kick()
        return 1

    def _accept_nmi(self, _vector: int, _level: int, _trig_mode: int) -> int:
        self._out.nmi()
        self._out.kick()
        return 1

    def _accept_init(self, _vector: int, level: int, trig_mode: int) -> int:
        if trig_mode and not level:
            return 0
        # An INIT overrides a SIPI that came before it.
        self.pending_events = 1 << reg.KVM_APIC_INIT
        self._out.kick()
        return 1

    def _accept_startup(self, vector: int, _level: int, _trig_mode: int) -> int:
        self.sipi_vector = vector
        self.pending_events |= 1 << reg.KVM_APIC_SIPI
        self._out.kick()
        return 1

    def _accept_extint(self, _vector: int, _level: int, _trig_mode: int) -> int:
        return 0
