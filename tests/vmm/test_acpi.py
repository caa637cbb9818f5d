"""ACPI tables and AML, read back from their bytes."""

from __future__ import annotations

import struct

import pytest

from anykvm.vmm import aml
from anykvm.vmm.acpi import AcpiTables, build_acpi


def at(tables: AcpiTables, address: int, size: int) -> bytes:
    start = address - tables.base
    return tables.image[start : start + size]


def table_at(tables: AcpiTables, address: int) -> tuple[bytes, bytes]:
    """Signature and whole table, its checksum verified."""
    (length,) = struct.unpack("<I", at(tables, address + 4, 4))
    data = at(tables, address, length)
    assert len(data) == length
    assert sum(data) & 0xFF == 0
    return data[:4], data


def listed(tables: AcpiTables) -> dict[bytes, bytes]:
    """The tables that the XSDT lists."""
    (xsdt,) = struct.unpack("<Q", at(tables, tables.rsdp + 24, 8))
    signature, data = table_at(tables, xsdt)
    assert signature == b"XSDT"
    return dict(table_at(tables, address) for (address,) in struct.iter_unpack("<Q", data[36:]))


def test_rsdp_has_both_checksums_and_points_to_both_lists() -> None:
    tables = build_acpi([0])
    rsdp = at(tables, tables.rsdp, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) & 0xFF == sum(rsdp) & 0xFF == 0
    assert tables.rsdp == 0xE0000
    rsdt, length, xsdt = struct.unpack_from("<IIQ", rsdp, 16)
    assert length == 36
    short = struct.unpack("<2I", table_at(tables, rsdt)[1][36:])
    assert short == struct.unpack("<2Q", table_at(tables, xsdt)[1][36:])


def test_fadt_describes_the_fixed_hardware() -> None:
    tables = build_acpi([0, 1])
    fadt = listed(tables)[b"FACP"]
    fields = {
        "length": (4, "I", 276),
        "sci": (46, "H", 9),
        "smi_cmd": (48, "I", 0),
        "pm1a_evt": (56, "I", 0x600),
        "pm1a_cnt": (64, "I", 0x604),
        "pm_tmr": (76, "I", 0x608),
        "lengths": (88, "I", 0x0400_0204),
        "century": (108, "B", 0x32),
        "boot_arch": (109, "H", 0x05),
        "flags": (112, "I", 0x525),
        "reset_port": (120, "Q", 0xCF9),
        "reset_value": (128, "B", 6),
        "x_pm_tmr": (212, "Q", 0x608),
    }
    found = {
        name: struct.unpack_from("<" + code, fadt, at)[0] for name, (at, code, _) in fields.items()
    }
    assert found == {name: value for name, (_, _, value) in fields.items()}
    facs, dsdt = struct.unpack_from("<II", fadt, 36)
    assert facs % 64 == 0
    assert at(tables, facs, 4) == b"FACS"
    assert table_at(tables, dsdt)[0] == b"DSDT"
    assert struct.unpack_from("<Q", fadt, 140)[0] == dsdt


def madt_entries(apic_ids: list[int]) -> list[bytes]:
    body = listed(build_acpi(apic_ids))[b"APIC"][36:]
    assert struct.unpack_from("<II", body) == (0xFEE00000, 1)
    entries, body = [], body[8:]
    while body:
        entries.append(body[: body[1]])
        body = body[body[1] :]
    return entries


def test_madt_of_two_processors() -> None:
    assert madt_entries([0, 1]) == [
        struct.pack("<BBBBI", 0, 8, 0, 0, 1),
        struct.pack("<BBBBI", 0, 8, 1, 1, 1),
        struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 0, 2, 0),
        struct.pack("<BBBBIH", 2, 10, 0, 9, 9, 0xD),
        struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1),
    ]


def test_madt_uses_x2apic_entries_from_id_255() -> None:
    entries = madt_entries(list(range(300)))
    assert [entry[0] for entry in entries[:300]] == [0] * 255 + [9] * 45
    assert struct.unpack("<BBHIII", entries[255]) == (9, 16, 0, 255, 1, 255)
    assert entries[-1] == struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1)


def test_tables_are_aligned_and_do_not_overlap() -> None:
    tables = build_acpi(list(range(64)))
    starts = [tables.image.index(name) for name in (b"FACS", b"DSDT", b"FACP", b"APIC", b"XSDT")]
    assert all(start % 64 == 0 for start in starts)
    assert len(set(starts)) == 5


def test_too_many_processors_are_refused() -> None:
    with pytest.raises(ValueError, match="4000 processors"):
        build_acpi(list(range(4000)))


def test_dsdt_names_s5_processors_serial_and_clock() -> None:
    tables = build_acpi([0, 1, 2])
    dsdt = tables.image[tables.image.index(b"DSDT") :]
    assert b"\x08\\_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00" in dsdt
    assert [dsdt.count(b"C%03X" % uid) for uid in range(4)] == [1, 1, 1, 0]
    assert dsdt.count(b"ACPI0007\x00") == 3
    assert b"COM1\x08_HID\x0c\x41\xd0\x05\x01" in dsdt
    assert b"\x47\x01\xf8\x03\xf8\x03\x01\x08\x22\x10\x00\x79\x00" in dsdt
    assert b"RTC_\x08_HID\x0c\x41\xd0\x0b\x00" in dsdt


@pytest.mark.parametrize(
    ("size", "encoded"),
    [
        (0, b"\x01"),
        (62, b"\x3f"),
        (63, b"\x41\x04"),
        (4093, b"\x4f\xff"),
        (4094, b"\x81\x00\x01"),
        (1 << 20, b"\xc4\x00\x00\x01"),
    ],
)
def test_package_length(size: int, encoded: bytes) -> None:
    assert aml.package_length(size) == encoded


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, b"\x00"),
        (1, b"\x01"),
        (2, b"\x0a\x02"),
        (0x1234, b"\x0b\x34\x12"),
        (0x12345678, b"\x0c\x78\x56\x34\x12"),
        (1 << 32, b"\x0e\0\0\0\0\x01\0\0\0"),
    ],
)
def test_integers(value: int, encoded: bytes) -> None:
    assert aml.integer(value) == encoded


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("COM1", b"COM1"),
        ("_S5", b"_S5_"),
        ("\\_SB", b"\\_SB_"),
        ("_SB.PCI0", b"\x2e_SB_PCI0"),
        ("\\A.B.C", b"\\\x2f\x03A___B___C___"),
        ("\\", b"\\\x00"),
    ],
)
def test_names(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize(
    "encode",
    [
        lambda: aml.name_string("TOOLONG"),
        lambda: aml.integer(1 << 64),
        lambda: aml.package_length(1 << 28),
    ],
)
def test_what_aml_cannot_say_is_refused(encode: object) -> None:
    assert callable(encode)
    with pytest.raises(ValueError, match=r"name segment|does not fit|longer than"):
        encode()


def test_terms_nest() -> None:
    inner = aml.device("DEV0", aml.name("_UID", aml.ZERO))
    assert inner == b"\x5b\x82\x0bDEV0\x08_UID\x00"
    assert aml.scope("\\_SB", inner) == b"\x10\x13\\_SB_" + inner
    assert aml.buffer(b"ab") == b"\x11\x05\x0a\x02ab"
    assert aml.string("x") == b"\x0dx\x00"
