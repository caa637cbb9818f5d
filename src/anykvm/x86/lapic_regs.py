"""Local APIC definitions: registers, their access rules, the interrupt message, the seams.

Intel SDM volume 3, chapter "Advanced Programmable Interrupt Controller"; names are those of
arch/x86/include/asm/apicdef.h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

APIC_DEFAULT_PHYS_BASE = 0xFEE00000
LAPIC_MMIO_LENGTH = 0x1000
APIC_VERSION = 0x14

MSR_IA32_APICBASE = 0x1B
MSR_IA32_APICBASE_BSP = 1 << 8
X2APIC_ENABLE = 1 << 10
MSR_IA32_APICBASE_ENABLE = 1 << 11
MSR_IA32_TSC_DEADLINE = 0x6E0
APIC_BASE_MSR = 0x800
APIC_LAST_MSR = 0x8FF

APIC_ID = 0x20
APIC_LVR = 0x30
APIC_TASKPRI = 0x80
APIC_ARBPRI = 0x90
APIC_PROCPRI = 0xA0
APIC_EOI = 0xB0
APIC_LDR = 0xD0
APIC_DFR = 0xE0
APIC_SPIV = 0xF0
APIC_ISR = 0x100
APIC_TMR = 0x180
APIC_IRR = 0x200
APIC_ESR = 0x280
APIC_LVTCMCI = 0x2F0
APIC_ICR = 0x300
APIC_ICR2 = 0x310
APIC_LVTT = 0x320
APIC_LVTTHMR = 0x330
APIC_LVTPC = 0x340
APIC_LVT0 = 0x350
APIC_LVT1 = 0x360
APIC_LVTERR = 0x370
APIC_TMICT = 0x380
APIC_TMCCT = 0x390
APIC_TDCR = 0x3E0
APIC_SELF_IPI = 0x3F0

APIC_SPIV_APIC_ENABLED = 1 << 8
APIC_SPIV_DIRECTED_EOI = 1 << 12
APIC_LVR_DIRECTED_EOI = 1 << 24
APIC_DFR_FLAT = 0xFFFFFFFF
APIC_DFR_CLUSTER = 0x0FFFFFFF
APIC_VECTOR_MASK = 0xFF
APIC_LVT_MASKED = 1 << 16
APIC_LVT_LEVEL_TRIGGER = 1 << 15
APIC_SEND_PENDING = 1 << 12
APIC_INPUT_POLARITY = 1 << 13
APIC_LVT_REMOTE_IRR = 1 << 14
APIC_MODE_MASK = 0x700
APIC_ICR_BUSY = 1 << 12
APIC_INT_ASSERT = 1 << 14
APIC_INT_LEVELTRIG = 1 << 15
APIC_ESR_SENDILL = 1 << 5
APIC_ESR_RECVILL = 1 << 6
APIC_ESR_ILLREGA = 1 << 7

APIC_DM_FIXED, APIC_DM_LOWEST, APIC_DM_SMI, APIC_DM_REMRD = range(4)
APIC_DM_NMI, APIC_DM_INIT, APIC_DM_STARTUP, APIC_DM_EXTINT = range(4, 8)
APIC_DEST_PHYSICAL, APIC_DEST_LOGICAL = range(2)
APIC_DEST_NOSHORT, APIC_DEST_SELF, APIC_DEST_ALLINC, APIC_DEST_ALLBUT = range(4)
IOAPIC_EDGE_TRIG, IOAPIC_LEVEL_TRIG = range(2)
APIC_BROADCAST = 0xFF
X2APIC_BROADCAST = 0xFFFFFFFF

KVM_APIC_INIT = 0
KVM_APIC_SIPI = 1


class ApicFault(Exception):
    """An MSR access that the processor answers with #GP(0)."""


class LapicIrq(NamedTuple):
    """An interrupt message (`struct kvm_lapic_irq`) with plain field values, unshifted.

    `shorthand` is an APIC_DEST_*SHORT value; `msi_redir_hint` is bit 3 of an MSI address.
    """

    vector: int
    delivery_mode: int = APIC_DM_FIXED
    dest_mode: int = APIC_DEST_PHYSICAL
    level: int = 1
    trig_mode: int = IOAPIC_EDGE_TRIG
    shorthand: int = APIC_DEST_NOSHORT
    dest_id: int = 0
    msi_redir_hint: bool = False


class LapicMode(IntEnum):
    """The state that bits 11 and 10 of IA32_APIC_BASE select; their values are those bits."""

    DISABLED = 0
    INVALID = X2APIC_ENABLE
    XAPIC = MSR_IA32_APICBASE_ENABLE
    X2APIC = MSR_IA32_APICBASE_ENABLE | X2APIC_ENABLE


MODE_BITS = int(LapicMode.X2APIC)


def _nothing() -> None:
    """The default of optional outputs."""


def _always() -> bool:
    """The default of `in_run`."""
    return True


def _no_smi() -> bool:
    """The default SMI output: a processor without system management mode."""
    return False


@dataclass(frozen=True, slots=True)
class LapicTime:
    """What an APIC reads time from: a clock in nanoseconds, the guest's TSC, its frequency."""

    clock: Callable[[], int]
    read_tsc: Callable[[], int]
    tsc_khz: Callable[[], int]


@dataclass(slots=True)
class LapicOptions:
    """How an APIC is built.

    `bsp`: the boot processor's flag is set at reset. `cmci`: there is that LVT entry.
    `directed_eoi`: EOI-broadcast suppression is advertised. `lint0_reenabled`:
    KVM_X86_QUIRK_LINT0_REENABLED. `x2apic_broadcast_quirk`: KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK
    was not asked for.
    """

    bsp: bool = False
    cmci: bool = False
    directed_eoi: bool = False
    lint0_reenabled: bool = True
    x2apic_broadcast_quirk: bool = True


@dataclass(frozen=True, slots=True)
class LapicOutputs:
    """Where a local APIC's effects go.

    `deliver(message)` routes an IPI to the APICs that `match_dest`, this one being the source.
    `kick()`: something that may interrupt or wake the processor became pending.
    `nmi()` and `smi()` raise those; `smi` says whether the processor took it.
    `eoi(vector, trig_mode)` reports every EOI that is to be broadcast.
    `timer_changed()`: `next_deadline_ns` changed. `map_changed()`: what `match_dest` says changed.
    `in_run()`: whether the processor runs; while it does not, a timer that has run out waits.
    """

    deliver: Callable[[LapicIrq], int]
    kick: Callable[[], None]
    nmi: Callable[[], None]
    eoi: Callable[[int, int], None]
    smi: Callable[[], bool] = _no_smi
    timer_changed: Callable[[], None] = _nothing
    map_changed: Callable[[], None] = _nothing
    in_run: Callable[[], bool] = _always


@dataclass(frozen=True, slots=True)
class ApicReg:
    """How a register is reached in each mode ("r", "w", "rw" or "") and its writable bits.

    Other bits of a write are ignored in xAPIC mode and fault in x2APIC mode.
    """

    xapic: str
    x2apic: str
    writable: int = 0


LVT_MASK = APIC_LVT_MASKED | APIC_SEND_PENDING | APIC_VECTOR_MASK
LINT_MASK = (
    LVT_MASK | APIC_MODE_MASK | APIC_INPUT_POLARITY | APIC_LVT_REMOTE_IRR | APIC_LVT_LEVEL_TRIGGER
)
X2APIC_ICR_LOW = 0x000CDFFF
ALL_BITS = 0xFFFFFFFF

APIC_REGS: dict[int, ApicReg] = {
    APIC_ID: ApicReg("rw", "r", 0xFF000000),
    APIC_LVR: ApicReg("r", "r"),
    APIC_TASKPRI: ApicReg("rw", "rw", 0xFF),
    APIC_ARBPRI: ApicReg("r", ""),
    APIC_PROCPRI: ApicReg("r", "r"),
    APIC_EOI: ApicReg("w", "w", 0),
    APIC_LDR: ApicReg("rw", "r", 0xFF000000),
    APIC_DFR: ApicReg("rw", "", 0xF0000000),
    APIC_SPIV: ApicReg("rw", "rw", 0x3FF),
    APIC_ESR: ApicReg("rw", "rw", 0),
    APIC_ICR: ApicReg("rw", "rw", ALL_BITS),
    APIC_ICR2: ApicReg("rw", "", 0xFF000000),
    APIC_LVTT: ApicReg("rw", "rw", LVT_MASK | 1 << 17),
    APIC_LVTTHMR: ApicReg("rw", "rw", LVT_MASK | APIC_MODE_MASK),
    APIC_LVTPC: ApicReg("rw", "rw", LVT_MASK | APIC_MODE_MASK),
    APIC_LVT0: ApicReg("rw", "rw", LINT_MASK),
    APIC_LVT1: ApicReg("rw", "rw", LINT_MASK),
    APIC_LVTERR: ApicReg("rw", "rw", LVT_MASK),
    APIC_TMICT: ApicReg("rw", "rw", ALL_BITS),
    APIC_TMCCT: ApicReg("r", "r"),
    APIC_TDCR: ApicReg("rw", "rw", 0xB),
    APIC_SELF_IPI: ApicReg("", "w", APIC_VECTOR_MASK),
    **{
        base + 16 * i: ApicReg("r", "r")
        for base in (APIC_ISR, APIC_TMR, APIC_IRR)
        for i in range(8)
    },
}
LVT_REGS = (APIC_LVTT, APIC_LVTTHMR, APIC_LVTPC, APIC_LVT0, APIC_LVT1, APIC_LVTERR)
CMCI_REG = ApicReg("rw", "rw", LVT_MASK | APIC_MODE_MASK)


def x2apic_ldr(x2apic_id: int) -> int:
    """The fixed logical ID in x2APIC mode: cluster in the upper half, one bit in the lower."""
    return (x2apic_id >> 4) << 16 | 1 << (x2apic_id & 0xF)
