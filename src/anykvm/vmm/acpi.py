"""ACPI tables of the machine (ACPI 6.5, chapter 5): RSDP, RSDT, XSDT, FADT, FACS, MADT, DSDT.

The fixed hardware model, not the hardware-reduced one: with the latter Linux gives up the 8259s
and the 8254, and with them the timer it starts on. The DSDT names what cannot be found by
probing; there is no PCI.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from anykvm.vmm import acpi_pm, aml
from anykvm.vmm.pci_config import RESET_CONTROL, RESET_VALUE
from anykvm.vmm.rtc import CENTURY, RTC_IRQ, RTC_PORT
from anykvm.vmm.serial import COM1_BASE, COM1_IRQ

OEM_ID, OEM_TABLE_ID, CREATOR_ID = b"ANYKVM", b"ANYKVMPC", b"AKVM"
TABLES_BASE = 0xE0000
TABLES_LIMIT = 0x100000
ALIGNMENT = 64
HEADER = struct.Struct("<4sIBB6s8sI4sI")

LAPIC_ADDRESS = 0xFEE0_0000
IOAPIC_ADDRESS = 0xFEC0_0000
PIT_GSI = 2
FIRST_X2APIC_ID = 255
# Three hexadecimal digits of a device's name.
MAX_PROCESSORS = 0x1000
ALL_PROCESSORS, ALL_PROCESSORS_X2 = 0xFF, 0xFFFF_FFFF

MADT_PCAT_COMPAT = 1
MADT_ENABLED = 1
# Polarity in bits 1:0 (1: active high), trigger in bits 3:2 (3: level).
INTI_CONFORMS, INTI_HIGH_LEVEL = 0x0, 0xD

FADT_WBINVD, FADT_PROC_C1, FADT_SLP_BUTTON, FADT_TMR_VAL_EXT, FADT_RESET_REG_SUP = (
    1 << 0,
    1 << 2,
    1 << 5,
    1 << 8,
    1 << 10,
)
FADT_FLAGS = FADT_WBINVD | FADT_PROC_C1 | FADT_SLP_BUTTON | FADT_TMR_VAL_EXT | FADT_RESET_REG_SUP
# The 8042 bit stays clear: nothing is plugged into it, and Linux need not wait for it.
IAPC_LEGACY_DEVICES, IAPC_NO_VGA = 1 << 0, 1 << 2
FADT_SIZE = 276
SPACE_IO = 1
# Latencies beyond these mean that the C2 and C3 states do not exist.
NO_C2, NO_C3 = 101, 1001

FADT_FIELDS: tuple[tuple[int, str, int], ...] = (
    (46, "H", acpi_pm.SCI_GSI),
    (56, "I", acpi_pm.PM1A_EVT),
    (64, "I", acpi_pm.PM1A_CNT),
    (76, "I", acpi_pm.PM_TMR),
    (88, "B", acpi_pm.PM1A_EVT_LEN),
    (89, "B", acpi_pm.PM1A_CNT_LEN),
    (91, "B", acpi_pm.PM_TMR_LEN),
    (96, "H", NO_C2),
    (98, "H", NO_C3),
    (108, "B", CENTURY),
    (109, "H", IAPC_LEGACY_DEVICES | IAPC_NO_VGA),
    (112, "I", FADT_FLAGS),
    (128, "B", RESET_VALUE),
    (131, "B", 5),
)
# Generic address structures: offset, bits, access size (as a power of two, from 1), port.
FADT_ADDRESSES = (
    (116, 8, 1, RESET_CONTROL),
    (148, 8 * acpi_pm.PM1A_EVT_LEN, 2, acpi_pm.PM1A_EVT),
    (172, 8 * acpi_pm.PM1A_CNT_LEN, 2, acpi_pm.PM1A_CNT),
    (208, 8 * acpi_pm.PM_TMR_LEN, 3, acpi_pm.PM_TMR),
)


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes all bytes add up to zero."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: the common header, with its checksum, and a body."""
    length = HEADER.size + len(body)
    fields = (signature, length, revision, 0, OEM_ID, OEM_TABLE_ID, 1, CREATOR_ID, 1)
    data = bytearray(HEADER.pack(*fields) + body)
    data[9] = checksum(data)
    return bytes(data)


def rsdp(rsdt: int, xsdt: int) -> bytes:
    data = bytearray(struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM_ID, 2, rsdt, 36, xsdt, 0))
    data[8] = checksum(data[:20])
    data[32] = checksum(data)
    return bytes(data)


def fadt(facs: int, dsdt: int) -> bytes:
    """Revision 6.5, the fixed hardware of `acpi_pm`, reset through port 0xcf9."""
    data = bytearray(FADT_SIZE)
    for offset, code, value in (*FADT_FIELDS, (36, "I", facs), (40, "I", dsdt), (140, "Q", dsdt)):
        struct.pack_into("<" + code, data, offset, value)
    for offset, bits, access, port in FADT_ADDRESSES:
        struct.pack_into("<BBBBQ", data, offset, SPACE_IO, bits, 0, access, port)
    return table(b"FACP", 6, bytes(data[HEADER.size :]))


def facs() -> bytes:
    """Firmware control structure: no header, no checksum; nothing here wakes."""
    return struct.pack("<4sIIIIIQB3xI24x", b"FACS", 64, 0, 0, 0, 0, 0, 2, 0)


def madt(apic_ids: list[int], ioapic_id: int) -> bytes:
    """Local APICs (as x2APICs from id 255 on), one I/O APIC, IRQ 0 on pin 2, a level SCI."""
    entries = [_processor(uid, apic_id) for uid, apic_id in enumerate(apic_ids)]
    entries.append(struct.pack("<BBBBII", 1, 12, ioapic_id, 0, IOAPIC_ADDRESS, 0))
    entries.append(struct.pack("<BBBBIH", 2, 10, 0, 0, PIT_GSI, INTI_CONFORMS))
    entries.append(
        struct.pack("<BBBBIH", 2, 10, 0, acpi_pm.SCI_GSI, acpi_pm.SCI_GSI, INTI_HIGH_LEVEL)
    )
    entries.append(struct.pack("<BBBHB", 4, 6, ALL_PROCESSORS, INTI_CONFORMS, 1))
    if max(apic_ids) >= FIRST_X2APIC_ID:
        entries.append(struct.pack("<BBHIB3x", 10, 12, INTI_CONFORMS, ALL_PROCESSORS_X2, 1))
    return table(
        b"APIC", 5, struct.pack("<II", LAPIC_ADDRESS, MADT_PCAT_COMPAT) + b"".join(entries)
    )


def _processor(uid: int, apic_id: int) -> bytes:
    if apic_id < FIRST_X2APIC_ID and uid < 256:
        return struct.pack("<BBBBI", 0, 8, uid, apic_id, MADT_ENABLED)
    return struct.pack("<BBHIII", 9, 16, 0, apic_id, MADT_ENABLED, uid)


def dsdt(cpus: int) -> bytes:
    s5 = aml.integer(acpi_pm.SLP_TYP_S5)
    processors = (
        aml.device(
            f"C{uid:03X}",
            aml.name("_HID", aml.string("ACPI0007")),
            aml.name("_UID", aml.integer(uid)),
        )
        for uid in range(cpus)
    )
    com1 = aml.device(
        "COM1",
        aml.name("_HID", aml.eisa_id("PNP0501")),
        aml.name("_UID", aml.ONE),
        aml.name("_CRS", aml.resource_template(aml.io_port(COM1_BASE, 8), aml.irq(COM1_IRQ))),
    )
    rtc = aml.device(
        "RTC",
        aml.name("_HID", aml.eisa_id("PNP0B00")),
        aml.name("_CRS", aml.resource_template(aml.io_port(RTC_PORT, 2), aml.irq(RTC_IRQ))),
    )
    body = aml.name("\\_S5", aml.package(s5, s5, aml.ZERO, aml.ZERO)) + aml.scope(
        "\\_SB", *processors, com1, rtc
    )
    return table(b"DSDT", 2, body)


@dataclass(frozen=True, slots=True)
class AcpiTables:
    """The tables as they lie in memory from `base` on; the RSDP is the first thing there."""

    base: int
    image: bytes

    @property
    def rsdp(self) -> int:
        return self.base


def build_acpi(
    apic_ids: list[int], base: int = TABLES_BASE, limit: int = TABLES_LIMIT
) -> AcpiTables:
    """All tables of a machine with these local APIC ids, linked to each other.

    Raises ValueError for too many processors, and when they do not fit below `limit`.
    """
    if len(apic_ids) > MAX_PROCESSORS:
        raise ValueError(f"{len(apic_ids)} processors: ACPI can name {MAX_PROCESSORS} here")
    image = bytearray(36)

    def place(data: bytes) -> int:
        image.extend(bytes(-len(image) % ALIGNMENT))
        image.extend(data)
        return base + len(image) - len(data)

    facs_at, dsdt_at = place(facs()), place(dsdt(len(apic_ids)))
    listed = [place(fadt(facs_at, dsdt_at)), place(madt(apic_ids, ioapic_id=0))]
    rsdt_at = place(table(b"RSDT", 1, struct.pack(f"<{len(listed)}I", *listed)))
    xsdt_at = place(table(b"XSDT", 1, struct.pack(f"<{len(listed)}Q", *listed)))
    image[:36] = rsdp(rsdt_at, xsdt_at)
    if base + len(image) > limit:
        raise ValueError(
            f"ACPI tables for {len(apic_ids)} processors take {len(image)} bytes, "
            f"{limit - base} are free at {base:#x}"
        )
    return AcpiTables(base, bytes(image))
