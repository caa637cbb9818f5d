"""82093AA I/O APIC with 24 pins, as KVM models it: version 0x11.

Follows the 82093AA datasheet and arch/x86/kvm/ioapic.c. The EOI register of later chips is
implemented too, since nothing else lives at its offset.

Pure state: callers serialise every call. `deliver` and the notifiers run inside the call that
causes them; `ack` and `resample` may call `set_irq` again.
"""

from __future__ import annotations

from collections.abc import Callable

from anykvm.uapi.kvm import KVM_IOAPIC_NUM_PINS, kvm_ioapic_state
from anykvm.x86.i8259 import irq_line_state
from anykvm.x86.lapic_regs import (
    APIC_DEST_LOGICAL,
    APIC_DEST_PHYSICAL,
    IOAPIC_EDGE_TRIG,
    IOAPIC_LEVEL_TRIG,
    LapicIrq,
)

IOAPIC_DEFAULT_BASE_ADDRESS = 0xFEC00000
IOAPIC_MEM_LENGTH = 0x100
IOAPIC_VERSION_ID = 0x11

IOAPIC_REG_SELECT = 0x00
IOAPIC_REG_WINDOW = 0x10
IOAPIC_REG_EOI = 0x40

IOAPIC_REG_APIC_ID = 0x00
IOAPIC_REG_VERSION = 0x01
IOAPIC_REG_ARB_ID = 0x02
IOAPIC_REG_REDIRTBL = 0x10

RTE_VECTOR = 0xFF
RTE_DELIVERY_MODE_SHIFT = 8
RTE_LOGICAL = 1 << 11
RTE_DELIVERY_STATUS = 1 << 12
RTE_REMOTE_IRR = 1 << 14
RTE_LEVEL = 1 << 15
RTE_MASK = 1 << 16
RTE_DEST_SHIFT = 56
RTE_READ_ONLY = RTE_REMOTE_IRR | RTE_DELIVERY_STATUS
LOW_HALF = 0xFFFFFFFF
HIGH_HALF = LOW_HALF << 32


def rte_message(bits: int) -> LapicIrq:
    """The interrupt message that a redirection entry sends."""
    return LapicIrq(
        vector=bits & RTE_VECTOR,
        delivery_mode=bits >> RTE_DELIVERY_MODE_SHIFT & 7,
        dest_mode=APIC_DEST_LOGICAL if bits & RTE_LOGICAL else APIC_DEST_PHYSICAL,
        trig_mode=IOAPIC_LEVEL_TRIG if bits & RTE_LEVEL else IOAPIC_EDGE_TRIG,
        dest_id=bits >> RTE_DEST_SHIFT & 0xFF,
    )


def _ignore_pin(_pin: int) -> None:
    """The default acknowledge notifier."""


def _ignore_mask(_pin: int, _masked: bool) -> None:
    """The default mask notifier."""


def _no_resampler(_pin: int) -> bool:
    """The default resampler: none is registered."""
    return False


class Ioapic:
    """The controller.

    `deliver(message)` routes an interrupt and returns how many local APICs took it, or <0 for
    none. `ack(pin)` reports the EOI of a pin's vector. `mask_changed(pin, masked)` reports mask
    bits. `resample(pin)` asks the irqfd resamplers to look at a level line again and says whether
    there was one.
    """

    def __init__(
        self,
        deliver: Callable[[LapicIrq], int],
        ack: Callable[[int], None] = _ignore_pin,
        mask_changed: Callable[[int, bool], None] = _ignore_mask,
        resample: Callable[[int], bool] = _no_resampler,
    ) -> None:
        self._deliver = deliver
        self._ack = ack
        self._mask_changed = mask_changed
        self._resample = resample
        self._lines = [0] * KVM_IOAPIC_NUM_PINS
        self.reset()

    def reset(self) -> None:
        """Power-on state: every pin masked."""
        self.base_address = IOAPIC_DEFAULT_BASE_ADDRESS
        self.ioregsel = 0
        self.id = 0
        self.irr = 0
        # Edges already sent stay in irr for coalescing, but are no longer pending.
        self._irr_delivered = 0
        self.redirtbl = [RTE_MASK] * KVM_IOAPIC_NUM_PINS
        self._decode_all()

    def read(self, offset: int, length: int = 4) -> int:
        """Read `length` bytes at `offset` from the base address."""
        result = 0
        if offset == IOAPIC_REG_SELECT:
            result = self.ioregsel
        elif offset == IOAPIC_REG_WINDOW:
            result = self._read_indirect()
        return result & ((1 << 8 * length) - 1)

    def write(self, offset: int, value: int, length: int = 4) -> None:
        """Write `length` bytes at `offset` from the base address; only 32 bits count."""
        value &= (1 << 8 * min(length, 4)) - 1
        if offset == IOAPIC_REG_SELECT:
            self.ioregsel = value & 0xFF
        elif offset == IOAPIC_REG_WINDOW:
            self._write_indirect(value)
        elif offset == IOAPIC_REG_EOI:
            self.eoi(value & RTE_VECTOR, IOAPIC_LEVEL_TRIG)

    def set_irq(self, pin: int, level: bool, source_id: int = 0) -> int:
        """Drive a pin: >0 delivered, 0 coalesced with a pending edge, <0 masked or no target.

        Lowering a line returns 1, as KVM does.
        """
        bit = 1 << pin
        if not irq_line_state(self._lines, pin, source_id, level):
            self.irr &= ~bit
            return 1
        pending = self.irr & bit
        self.irr |= bit
        if not self.redirtbl[pin] & RTE_LEVEL:
            self._irr_delivered &= ~bit
            if pending:
                return 0
        return self._service(pin)

    def eoi(self, vector: int, trig_mode: int) -> None:
        """A local APIC's EOI: notify, then re-send the level pins of `vector` still asserted."""
        for pin in self._pins.get(vector, ()):
            # Remote IRR is still set here, so a notifier that raises the line only marks irr.
            self._ack(pin)
            if trig_mode != IOAPIC_LEVEL_TRIG or not self.redirtbl[pin] & RTE_LEVEL:
                continue
            self.redirtbl[pin] &= ~RTE_REMOTE_IRR
            if self.irr >> pin & 1:
                self._service(pin)

    def pins_of(self, vector: int) -> list[int]:
        """The pins whose entries send this vector."""
        return self._pins.get(vector, [])

    def level_triggered(self, pin: int) -> bool:
        return bool(self.redirtbl[pin] & RTE_LEVEL)

    def get_state(self) -> kvm_ioapic_state:
        """Snapshot for KVM_GET_IRQCHIP; `irr` holds what is asserted and not yet sent."""
        state = kvm_ioapic_state(
            base_address=self.base_address,
            ioregsel=self.ioregsel,
            id=self.id,
            irr=self.irr & ~self._irr_delivered,
        )
        for entry, bits in zip(state.redirtbl, self.redirtbl, strict=True):
            entry.bits = bits
        return state

    def set_state(self, state: kvm_ioapic_state) -> None:
        """KVM_SET_IRQCHIP: replace the registers and send what `irr` says is pending."""
        self.base_address = state.base_address
        self.ioregsel = state.ioregsel & 0xFF
        self.id = state.id & 0xF
        self.redirtbl = [entry.bits for entry in state.redirtbl]
        self.irr = state.irr & ((1 << KVM_IOAPIC_NUM_PINS) - 1)
        self._irr_delivered = 0
        self._decode_all()
        for pin in range(KVM_IOAPIC_NUM_PINS):
            if self.irr >> pin & 1:
                self._service(pin)

    def _read_indirect(self) -> int:
        if self.ioregsel == IOAPIC_REG_VERSION:
            return (KVM_IOAPIC_NUM_PINS - 1) << 16 | IOAPIC_VERSION_ID
        if self.ioregsel in (IOAPIC_REG_APIC_ID, IOAPIC_REG_ARB_ID):
            return self.id << 24
        pin = (self.ioregsel - IOAPIC_REG_REDIRTBL) >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return LOW_HALF
        bits = self.redirtbl[pin]
        return bits >> 32 if self.ioregsel & 1 else bits & LOW_HALF

    def _write_indirect(self, value: int) -> None:
        if self.ioregsel == IOAPIC_REG_APIC_ID:
            self.id = value >> 24 & 0xF
            return
        pin = (self.ioregsel - IOAPIC_REG_REDIRTBL) >> 1
        if not 0 <= pin < KVM_IOAPIC_NUM_PINS:
            return
        old = self.redirtbl[pin]
        if self.ioregsel & 1:
            bits = old & LOW_HALF | value << 32
        else:
            bits = old & (HIGH_HALF | RTE_READ_ONLY) | value & ~RTE_READ_ONLY
        if not bits & RTE_LEVEL:
            # Switching an entry to edge is how software without an EOI register ends its interrupt.
            bits &= ~RTE_REMOTE_IRR
        self.redirtbl[pin] = bits
        self._decode(pin)
        if (old ^ bits) & RTE_MASK:
            self._mask_changed(pin, bool(bits & RTE_MASK))
        self._service_unmasked_level(pin)

    def _service_unmasked_level(self, pin: int) -> None:
        """After a write to an entry: a level still asserted is sent now."""
        blocked = self.redirtbl[pin] & (RTE_MASK | RTE_REMOTE_IRR)
        if blocked or not self.redirtbl[pin] & RTE_LEVEL or not self.irr >> pin & 1:
            return
        # The line may have dropped while masked; a resampler raises it again if it did not.
        if self._resample(pin):
            self.irr &= ~(1 << pin)
        else:
            self._service(pin)

    def _service(self, pin: int) -> int:
        bits = self.redirtbl[pin]
        level = bits & RTE_LEVEL
        if bits & RTE_MASK or (level and bits & RTE_REMOTE_IRR):
            return -1
        if not level:
            self._irr_delivered |= 1 << pin
        ret = self._deliver(self._messages[pin])
        if ret and level:
            self.redirtbl[pin] |= RTE_REMOTE_IRR
        return ret

    def _decode_all(self) -> None:
        self._messages = [rte_message(bits) for bits in self.redirtbl]
        self._index_vectors()

    def _decode(self, pin: int) -> None:
        self._messages[pin] = rte_message(self.redirtbl[pin])
        self._index_vectors()

    def _index_vectors(self) -> None:
        self._pins: dict[int, list[int]] = {}
        for pin, message in enumerate(self._messages):
            self._pins.setdefault(message.vector, []).append(pin)
