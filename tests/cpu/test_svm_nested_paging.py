"""Nested paging: each of L2's physical addresses goes through L1's tables, and what those do not
have is L1's to supply (AMD APM vol. 2, 15.25).

The first GiB is L2's as it is the machine's; what is above is what L1's tables say.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

import pytest

from anykvm.cpu.engine import Exit
from anykvm.cpu.vmcb import EXIT_INVALID, EventType, SvmExit, Vmcb

from .harness import CODE, NX, PS, Machine
from .layout import SCRATCH, Case
from .svm_machine import Outcome, prepare, proceed

X = SvmExit
P, W, U, A, D = 1, 2, 4, 0x20, 0x40
ALL = P | W | U
PML4, PDPT, DIRECTORY, TABLE = (SCRATCH + n for n in (0xB000, 0xC000, 0xD000, 0xE000))
WINDOW = 0x4000_0000  # where L1's table of 4 KiB pages shows in L2
GIB, MIB2 = 1 << 30, 1 << 21
PAGE, OTHER = SCRATCH + 0x1000, SCRATCH + 0x2000
OF_PAGE, IN_TABLE = 1 << 32, 1 << 33
EFER_NXE, CR0_PG = 1 << 11, 1 << 31
PAT = 0x0007_0406_0007_0406


def _words(m: Machine, at: int, words: Mapping[int, int]) -> None:
    for index, word in words.items():
        m.write(at + 8 * index, struct.pack("<Q", word))


def _tables(m: Machine, window: Mapping[int, int]) -> None:
    """The first GiB as it is, in large pages, and `window` by its pages."""
    for page in (PML4, PDPT, DIRECTORY, TABLE):
        m.write(page, bytes(4096))
    _words(m, PML4, {0: PDPT | ALL})
    _words(m, PDPT, {0: ALL | PS, 1: DIRECTORY | ALL})
    _words(m, DIRECTORY, {0: TABLE | ALL})
    _words(m, TABLE, window)


def _enable(vmcb: Vmcb) -> None:
    vmcb.control.nested_ctl, vmcb.control.nested_cr3, vmcb.save.g_pat = 1, PML4, PAT


def start(
    text: str | Case,
    window: Mapping[int, int],
    *exits: int,
    mode: int | str = 32,
    paged: bool = False,
) -> tuple[Machine, int]:
    """L2 at VMRUN, 32-bit code without paging of its own unless told otherwise."""
    del paged
    m, at = prepare(text, exits, mode=mode, change=_enable)
    m.state.efer |= EFER_NXE
    _tables(m, window)
    return m, at


def run(text: str | Case, window: Mapping[int, int], *exits: int, mode: int | str = 32) -> Outcome:
    return proceed(*start(text, window, *exits, mode=mode))


def test_addresses_are_those_that_l1_says() -> None:
    m, at = start("mov eax, [0x40000010]; mov [0x40001020], eax", {0: PAGE | ALL, 1: OTHER | ALL})
    m.write(PAGE + 0x10, b"\x11\x22\x33\x44")
    outcome = proceed(m, at)
    assert outcome.exit_code == X.HLT
    assert m.read(OTHER + 0x20, 4) == b"\x11\x22\x33\x44"
    assert outcome.save.rax == 0x44332211


def test_accessed_and_dirty_bits() -> None:
    m, at = start("mov eax, [0x40000000]; mov [0x40001000], eax", {0: PAGE | ALL, 1: OTHER | ALL})
    proceed(m, at)
    first, second = struct.unpack("<QQ", m.read(TABLE, 16))
    assert (first & (A | D), second & (A | D)) == (A, A | D)
    assert m.read(PDPT + 8, 1)[0] & A


def test_a_page_is_written_first_after_it_was_read() -> None:
    """The entry made by the read does not let the write pass by the dirty bit."""
    m, at = start("mov eax, [0x40000000]; mov [0x40000000], eax", {0: PAGE | ALL})
    proceed(m, at)
    assert m.read(TABLE, 1)[0] & D


RESERVED = 1 << 51
FAULTS = [
    ("mov eax, [0x40000123]", 0, U, 0x4000_0123),
    ("mov [0x40000123], eax", 0, U | W, 0x4000_0123),
    ("mov [0x40000123], eax", PAGE | P | U, P | U | W, 0x4000_0123),
    ("mov eax, [0x40000123]", PAGE | P | W, P | U, 0x4000_0123),
    ("mov eax, [0x40000123]", PAGE | ALL | RESERVED, P | U | 8, 0x4000_0123),
    ("mov eax, 0x40000120; jmp eax", PAGE | ALL | NX, P | U | 16, 0x4000_0120),
    ("lock add dword ptr [0x40000120], 1", PAGE | P | U, P | U | W, 0x4000_0120),
]


@pytest.mark.parametrize(("text", "entry", "error", "address"), FAULTS)
def test_a_nested_page_fault(text: str, entry: int, error: int, address: int) -> None:
    """EXITINFO1 is the error code, always of a user's access, EXITINFO2 L2's physical address."""
    outcome = run(text, {0: entry})
    assert outcome.exit_code == X.NPF
    assert outcome.info == (error | OF_PAGE, address)
    assert outcome.save.cr2 == 0


def test_l2_goes_on_where_l1_has_mended_the_page() -> None:
    m, at = start("mov ebx, 5; mov [0x40000000], ebx; inc ebx", {0: 0})
    outcome = proceed(m, at)
    assert outcome.exit_code == X.NPF
    _words(m, TABLE, {0: PAGE | ALL})
    m.state.rip, m.state.gpr[0] = m.state.rip - 4, outcome.machine.state.gpr[0]  # VMRUN again
    m.cpu.mode_changed()
    again = proceed(m, at)
    assert (again.exit_code, again.gpr["rbx"]) == (X.HLT, 6)
    assert m.read(PAGE, 4) == b"\x05\0\0\0"


# L2 with paging.

L2_PML4 = 0x4000_2000  # in the window
L2_PDPT = 0x4000_3000


def _paged(text: str, mode: int | str, pml4: int, window: dict[int, int]) -> Outcome:
    """Long mode, with L2's own tables in the window: pages of 1 GiB, the first as it is."""

    def change(vmcb: Vmcb) -> None:
        _enable(vmcb)
        vmcb.save.cr3 = L2_PML4

    m, at = prepare(text, (), mode=mode, change=change)
    m.state.efer |= EFER_NXE
    _tables(m, {2: PAGE | ALL, 3: OTHER | ALL, **window})
    m.write(PAGE, bytes(4096))
    m.write(OTHER, bytes(4096))
    _words(m, PAGE, {0: pml4, 256: pml4})
    _words(m, OTHER, {0: PS | ALL, 1: GIB | PS | ALL})
    return proceed(m, at)


TEXT = "mov eax, [0x40004000]"


def test_both_walks_together() -> None:
    outcome = _paged(TEXT, 64, L2_PDPT | ALL, {4: CODE & ~0xFFF | ALL})
    assert outcome.exit_code == X.HLT
    assert outcome.save.rax == int.from_bytes(outcome.machine.read(CODE, 4), "little")


def test_a_guest_table_that_l1_does_not_show() -> None:
    """Tables are looked up for writing."""
    missing = _paged(TEXT, 64, L2_PDPT | ALL, {3: 0})
    assert (missing.exit_code, missing.info[0]) == (X.NPF, IN_TABLE | U | W)
    assert missing.info[1] & ~0xFFF == L2_PDPT
    readonly = _paged(TEXT, 64, L2_PDPT | ALL, {2: PAGE | P | U})
    assert readonly.info[0] == IN_TABLE | P | U | W
    assert readonly.info[1] & ~0xFFF == L2_PML4


def test_a_fault_of_the_guests_own_tables_is_its_own() -> None:
    """Found before L1's are asked for the page; the handler is not mapped either."""
    outcome = _paged("mov eax, [0xC0000000]", 64, L2_PDPT | ALL, {})
    assert outcome.exit_code in (X.HLT, X.NPF) or outcome.reason is Exit.SHUTDOWN
    assert outcome.exit_code != X.NPF or outcome.info[0] & OF_PAGE == 0


def test_a_fault_while_an_event_is_delivered() -> None:
    """EXITINTINFO has the event, and nothing of it has happened."""

    def change(vmcb: Vmcb) -> None:
        _enable(vmcb)
        vmcb.control.event_inj = 1 << 31 | EventType.INTR << 8 | 0x40
        vmcb.save.rsp = WINDOW + 0x100

    m, at = prepare("nop", (), mode=32, change=change)
    _tables(m, {})
    outcome = proceed(m, at)
    assert outcome.exit_code == X.NPF
    assert outcome.control.exit_int_info == 1 << 31 | 0x40
    assert (outcome.save.rsp, outcome.save.rip) == (WINDOW + 0x100, at)


def test_a_device_behind_nested_paging() -> None:
    """What L1 maps to no memory is the VMM's."""
    m, at = start("mov eax, [0x40000008]", {0: 0xD000_0000 | ALL})
    assert proceed(m, at).reason is Exit.MMIO
    assert m.state.mmio_gpa == 0xD000_0008
    m.cpu.complete_mmio_read(b"\1\2\3\4")
    assert proceed(m, at).save.rax == 0x04030201


def test_page_directory_pointers_are_read_through_it() -> None:
    """PAE paging loads them at VMRUN, by L2's physical address."""

    def change(vmcb: Vmcb) -> None:
        _enable(vmcb)
        vmcb.save.cr3, vmcb.save.cr4 = L2_PML4, 0x620
        vmcb.save.cr0 |= CR0_PG

    m, at = prepare("mov eax, 7", (), mode=32, change=change)
    _tables(m, {2: PAGE | ALL, 3: OTHER | ALL})
    m.write(PAGE, struct.pack("<4Q", L2_PDPT | P, 0, 0, 0))
    m.write(OTHER, struct.pack("<512Q", *(n * MIB2 | PS | ALL for n in range(512))))
    outcome = proceed(m, at)
    assert (outcome.exit_code, outcome.save.rax) == (X.HLT, 7)


def test_l2_has_a_pat_of_its_own() -> None:
    m, at = start("nop", {})
    m.state.pat = 0x0606_0606_0606_0606
    assert proceed(m, at).save.g_pat == PAT
    assert m.state.pat == 0x0606_0606_0606_0606


@pytest.mark.parametrize("wrong", ["cr3", "pat", "l1"])
def test_what_nested_paging_needs(wrong: str) -> None:
    """nCR3 within memory's reach, a PAT, and an L1 in long mode."""

    def change(vmcb: Vmcb) -> None:
        _enable(vmcb)
        if wrong == "cr3":
            vmcb.control.nested_cr3 = 1 << 46
        if wrong == "pat":
            vmcb.save.g_pat = 2

    m, at = prepare("nop", (), change=change)
    if wrong == "l1":
        code = bytes.fromhex("0f01d8f4")
        rax = m.state.gpr[0]
        m.load(Case(code), 32)
        m.state.gpr[0], m.state.efer = rax, 1 << 12
        m.cpu.mode_changed()
    assert proceed(m, at).exit_code == EXIT_INVALID
