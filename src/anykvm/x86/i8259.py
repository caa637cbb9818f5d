"""8259A programmable interrupt controllers: the PC's cascaded pair with its ELCR.

Follows the 8259A datasheet (ICW1-4, OCW1-3, polling, spurious IR7) and arch/x86/kvm/i8259.c for
what the datasheet leaves to the board: the slave hangs on IR2, ICW3 and LTIM are ignored, the edge
or level of each line comes from the ELCR.

Pure state: callers serialise every call. Callbacks run inside the call that causes them and may
call `set_irq` again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anykvm.uapi.kvm import kvm_pic_state

PIC_MASTER_CMD = 0x20
PIC_MASTER_IMR = 0x21
PIC_SLAVE_CMD = 0xA0
PIC_SLAVE_IMR = 0xA1
PIC_ELCR1 = 0x4D0
PIC_ELCR2 = 0x4D1
PIC_PORTS = (
    PIC_MASTER_CMD,
    PIC_MASTER_IMR,
    PIC_SLAVE_CMD,
    PIC_SLAVE_IMR,
    PIC_ELCR1,
    PIC_ELCR2,
)
PIC_NUM_PINS = 16
CASCADE = 2
ELCR_MASKS = (0xF8, 0xDE)
NO_PRIORITY = 8


def _ignore_pin(_pin: int) -> None:
    """The default acknowledge notifier."""


def _ignore_mask(_pin: int, _masked: bool) -> None:
    """The default mask notifier."""


def _ignore_output(_level: bool) -> None:
    """The default INTR line."""


def irq_line_state(lines: list[int], irq: int, source_id: int, level: bool) -> bool:
    """Record one source's level of a shared line; return the wired-or of all sources."""
    if level:
        lines[irq] |= 1 << source_id
    else:
        lines[irq] &= ~(1 << source_id)
    return lines[irq] != 0


@dataclass(slots=True)
class Pic8259:
    """One chip. Its fields are those of `kvm_pic_state`, in order."""

    last_irr: int = 0
    irr: int = 0
    imr: int = 0
    isr: int = 0
    priority_add: int = 0
    irq_base: int = 0
    read_reg_select: int = 0
    poll: int = 0
    special_mask: int = 0
    init_state: int = 0
    auto_eoi: int = 0
    rotate_on_auto_eoi: int = 0
    special_fully_nested_mode: int = 0
    init4: int = 0
    elcr: int = 0
    elcr_mask: int = 0

    def priority(self, requests: int) -> int:
        """Rank of the highest-priority line in `requests`: 0 the highest, 8 for none."""
        if not requests:
            return NO_PRIORITY
        rotated = (requests >> self.priority_add) | (requests << (8 - self.priority_add))
        return ((rotated & -rotated).bit_length() - 1) & 7

    def set_line(self, irq: int, level: bool) -> int:
        """Drive one input: 1 if it became requested, 0 if it already was, -1 if masked."""
        bit = 1 << irq
        ret = 1
        if not level:
            self.last_irr &= ~bit
            if self.elcr & bit:
                self.irr &= ~bit
        else:
            if self.elcr & bit or not self.last_irr & bit:
                ret = int(not self.irr & bit)
                self.irr |= bit
            self.last_irr |= bit
        return -1 if self.imr & bit else ret

    def get_irq(self, cascade: int) -> int | None:
        """The line that would be acknowledged now; `cascade` is the mask of slave inputs."""
        priority = self.priority(self.irr & ~self.imr)
        if priority == NO_PRIORITY:
            return None
        in_service = self.isr
        if self.special_mask:
            in_service &= ~self.imr
        if self.special_fully_nested_mode:
            in_service &= ~cascade
        if priority < self.priority(in_service):
            return (priority + self.priority_add) & 7
        return None


STATE_FIELDS = tuple(Pic8259.__dataclass_fields__)


class Pic:
    """The pair.

    `output(level)` is INTR of the master; it is pulsed low when a request remains after INTA.
    `ack(pin)` reports pins 0-15 leaving service, `mask_changed(pin, masked)` OCW1 changes.
    `accepts_intr()` says whether some processor listens to INTR: only then do requests that a new
    ICW1 drops count as acknowledged.
    """

    def __init__(
        self,
        output: Callable[[bool], None] = _ignore_output,
        ack: Callable[[int], None] = _ignore_pin,
        mask_changed: Callable[[int, bool], None] = _ignore_mask,
        accepts_intr: Callable[[], bool] = lambda: True,
    ) -> None:
        self._output = output
        self._ack = ack
        self._mask_changed = mask_changed
        self._accepts_intr = accepts_intr
        self._lines = [0] * PIC_NUM_PINS
        self.pics = tuple(Pic8259(elcr_mask=mask) for mask in ELCR_MASKS)
        self.output = False

    @property
    def irr(self) -> int:
        """Requests of both chips, bit n for IRQ n."""
        return self.pics[0].irr | self.pics[1].irr << 8

    @property
    def isr(self) -> int:
        """Interrupts in service, bit n for IRQ n."""
        return self.pics[0].isr | self.pics[1].isr << 8

    @property
    def imr(self) -> int:
        """Masks, bit n for IRQ n."""
        return self.pics[0].imr | self.pics[1].imr << 8

    def set_irq(self, irq: int, level: bool, source_id: int = 0) -> int:
        """Drive IRQ 0-15: >0 delivered, 0 coalesced with one pending, <0 masked."""
        line = irq_line_state(self._lines, irq, source_id, level)
        ret = self.pics[irq >> 3].set_line(irq & 7, line)
        self._update()
        return ret

    def read_irq(self) -> int:
        """INTA: take the highest request into service and return its vector.

        Without a request this is the spurious IR7 of the chip that was asked.
        """
        master = self.pics[0]
        self._set_output(False)
        irq = self._get_irq(0)
        vector = master.irq_base + (7 if irq is None else irq)
        if irq is not None:
            self._intack(0, irq)
        if irq == CASCADE:
            slave_irq = self._get_irq(1)
            if slave_irq is not None:
                self._intack(1, slave_irq)
            vector = self.pics[1].irq_base + (7 if slave_irq is None else slave_irq)
        self._update()
        return vector

    def read(self, port: int) -> int:
        """Read one byte of a port of PIC_PORTS."""
        if port in (PIC_ELCR1, PIC_ELCR2):
            return self.pics[port & 1].elcr
        chip = port >> 7
        pic = self.pics[chip]
        if pic.poll:
            pic.poll = 0
            return self._poll_read(chip)
        if port & 1:
            return pic.imr
        return pic.isr if pic.read_reg_select else pic.irr

    def write(self, port: int, value: int) -> None:
        """Write one byte to a port of PIC_PORTS."""
        if port in (PIC_ELCR1, PIC_ELCR2):
            pic = self.pics[port & 1]
            pic.elcr = value & pic.elcr_mask
        elif port & 1:
            self._write_data(port >> 7, value)
        elif value & 0x10:
            self._icw1(port >> 7, value)
        elif value & 0x08:
            self._ocw3(self.pics[port >> 7], value)
        else:
            self._ocw2(port >> 7, value)

    def get_state(self, chip: int) -> kvm_pic_state:
        """Snapshot of chip 0 (master) or 1 (slave)."""
        pic = self.pics[chip]
        return kvm_pic_state(**{name: getattr(pic, name) for name in STATE_FIELDS})

    def set_state(self, chip: int, state: kvm_pic_state) -> None:
        """Replace one chip's registers and re-evaluate INTR."""
        pic = self.pics[chip]
        for name in STATE_FIELDS:
            setattr(pic, name, getattr(state, name))
        pic.priority_add &= 7
        self._update()

    def _get_irq(self, chip: int) -> int | None:
        return self.pics[chip].get_irq(0 if chip else 1 << CASCADE)

    def _set_output(self, level: bool) -> None:
        if level != self.output:
            self.output = level
            self._output(level)

    def _update(self) -> None:
        if self._get_irq(1) is not None:
            # An edge, so that the master latches it whatever the line did before.
            for level in (False, True, False):
                self.pics[0].set_line(CASCADE, level)
        self._set_output(self._get_irq(0) is not None)

    def _intack(self, chip: int, irq: int) -> None:
        pic = self.pics[chip]
        pic.isr |= 1 << irq
        if not pic.elcr & (1 << irq):
            pic.irr &= ~(1 << irq)
        if pic.auto_eoi:
            if pic.rotate_on_auto_eoi:
                pic.priority_add = (irq + 1) & 7
            self._clear_isr(chip, irq)

    def _clear_isr(self, chip: int, irq: int) -> None:
        self.pics[chip].isr &= ~(1 << irq)
        self._ack(irq + 8 * chip)

    def _poll_read(self, chip: int) -> int:
        irq = self._get_irq(chip)
        if irq is not None:
            self._intack(chip, irq)
            if chip:
                # The slave's request is answered without the master's INTA.
                self.pics[0].irr &= ~(1 << CASCADE)
        self._update()
        return 0x07 if irq is None else 0x80 | irq

    def _icw1(self, chip: int, value: int) -> None:
        pic = self.pics[chip]
        dropped = pic.irr & ~pic.elcr
        pic.init4 = value & 1
        pic.last_irr = 0
        pic.irr &= pic.elcr
        pic.imr = 0
        pic.priority_add = 0
        pic.special_mask = 0
        pic.read_reg_select = 0
        if not pic.init4:
            pic.special_fully_nested_mode = 0
            pic.auto_eoi = 0
        pic.init_state = 1
        self._update()
        if dropped and self._accepts_intr():
            for irq in range(8):
                if dropped >> irq & 1:
                    self._clear_isr(chip, irq)

    def _write_data(self, chip: int, value: int) -> None:
        pic = self.pics[chip]
        if pic.init_state == 1:
            pic.irq_base = value & 0xF8
            pic.init_state = 2
        elif pic.init_state == 2:
            pic.init_state = 3 if pic.init4 else 0
        elif pic.init_state == 3:
            pic.special_fully_nested_mode = value >> 4 & 1
            pic.auto_eoi = value >> 1 & 1
            pic.init_state = 0
        else:
            self._ocw1(chip, value)

    def _ocw1(self, chip: int, value: int) -> None:
        pic = self.pics[chip]
        changed = pic.imr ^ value
        pic.imr = value
        for irq in range(8):
            if changed >> irq & 1:
                self._mask_changed(irq + 8 * chip, bool(value >> irq & 1))
        self._update()

    def _ocw2(self, chip: int, value: int) -> None:
        """Bits 7-5: rotate, specific, EOI; bits 2-0: the line of a specific command."""
        pic = self.pics[chip]
        rotate, specific, eoi = value & 0x80, value & 0x40, value & 0x20
        if not eoi:
            if not specific:
                pic.rotate_on_auto_eoi = int(bool(rotate))
            elif rotate:
                pic.priority_add = (value + 1) & 7
        else:
            irq = value & 7 if specific else self._highest_in_service(pic)
            if irq is not None:
                if rotate:
                    pic.priority_add = (irq + 1) & 7
                self._clear_isr(chip, irq)
        self._update()

    def _highest_in_service(self, pic: Pic8259) -> int | None:
        # A non-specific EOI in special mask mode spares the masked lines (datasheet, OCW3).
        in_service = pic.isr & ~pic.imr if pic.special_mask else pic.isr
        priority = pic.priority(in_service)
        return None if priority == NO_PRIORITY else (priority + pic.priority_add) & 7

    def _ocw3(self, pic: Pic8259, value: int) -> None:
        if value & 0x04:
            pic.poll = 1
        if value & 0x02:
            pic.read_reg_select = value & 1
        if value & 0x40:
            pic.special_mask = value >> 5 & 1
            self._update()
