"""Exceptions leave nothing half done; pages, crossings, and code that changes itself."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from .assembler import assemble
from .differential import compare
from .harness import ALL, NX, SCRATCH_TABLE, A, D, P, U, W, machine
from .layout import SCRATCH, STACK, Case

PAGE = SCRATCH + 0x3000
NEXT = PAGE + 0x1000


@pytest.fixture(autouse=True)
def _restore_pages() -> Iterator[None]:
    yield
    for page in (PAGE, NEXT):
        machine().protect(page, ALL)


def _entry(page: int) -> int:
    return int.from_bytes(machine().read(SCRATCH_TABLE + (page >> 12 & 511) * 8, 8), "little")


@pytest.mark.parametrize("backward", [False, True])
def test_rep_movs_stops_where_it_faults_and_goes_on(backward: bool) -> None:
    m = machine()
    source = bytes(range(64))
    missing = PAGE if backward else NEXT
    first, last = SCRATCH + 0x100, NEXT - 32
    start = 63 if backward else 0
    case = Case(
        assemble("rep movsb"),
        {"rsi": first + start, "rdi": last + start, "rcx": 64},
        0x602 if backward else 0x202,
        memory={first: source, last: bytes(64)},
    )
    m.protect(missing, 0)
    result = m.execute(case)
    step = -32 if backward else 32
    assert (result.vector, result.error, result.gpr["rcx"]) == (14, 2, 32)
    assert result.gpr["rsi"] == first + start + step
    assert result.cr2 == result.gpr["rdi"] == last + start + step
    assert result.rip == m.place(case.code)
    half = source[32:] if backward else source[:32]
    assert half in result.memory[last]
    m.protect(missing, ALL)
    again = Case(case.code, result.gpr, case.rflags, memory={last: result.memory[last]})
    done = m.execute(again)
    assert (done.vector, done.gpr["rcx"]) == (None, 0)
    assert done.memory[last] == source


@pytest.mark.parametrize("text", ["push rax", "pushfq", "enter 16, 0", "call rbx"])
def test_a_push_that_faults_leaves_rsp(text: str) -> None:
    machine().protect(PAGE, 0)
    gpr = {"rsp": NEXT, "rbp": 5, "rbx": SCRATCH}
    result = machine().execute(Case(assemble(text), gpr), user=True)
    assert (result.vector, result.error, result.cr2) == (14, 6, NEXT - 8)
    assert {n: result.gpr[n] for n in gpr} == gpr


RMW = (
    "add [rsi], rax", "lock add [rsi], rax", "inc qword ptr [rsi]", "xchg [rsi], rax",
    "not qword ptr [rsi]",
    "lock cmpxchg [rsi], rbx", "cmpxchg [rsi], rbx", "xadd [rsi], rax", "bts [rsi], rcx",
    "shl qword ptr [rsi], 3",
    "cmpxchg8b [rsi]", "lock cmpxchg8b [rsi]", "mov [rsi], rax", "setc [rsi]",
    "pop qword ptr [rsi]",
    "stosq", "movsq",
)  # fmt: skip


@pytest.mark.parametrize("text", RMW)
@pytest.mark.parametrize("user", [True, False])
def test_a_read_only_page_faults_before_anything_changes(text: str, user: bool) -> None:
    """Also where the operand only reaches into it, and even if CMPXCHG would not change it."""
    m = machine()
    m.protect(NEXT, ALL & ~W)
    for at in (NEXT + 8, NEXT - 4):
        if text == "setc [rsi]" and at < NEXT:
            continue
        gpr = {"rsi": at, "rdi": at, "rax": 7, "rbx": 9, "rcx": 0, "rdx": 1, "rsp": STACK}
        if text == "movsq":
            gpr["rsi"] = SCRATCH
        case = Case(assemble(text), gpr, 0x2D7, memory={at: bytes(range(1, 9)), STACK: b"\5" * 8})
        result = m.execute(case, user=user)
        assert (result.vector, result.error) == (14, 3 | 4 * user)
        assert result.cr2 == max(at, NEXT)
        assert {n: result.gpr[n] for n in gpr} == gpr
        assert result.rflags & 0xFFF == 0x2D7
        assert result.memory == case.memory


@pytest.mark.parametrize(
    ("text", "left"),
    [("mov rax, [rsi]", A), ("mov [rsi], rax", A | D), ("add [rsi], rax", A | D), ("nop", 0)],
)
def test_accessed_and_dirty_bits(text: str, left: int) -> None:
    machine().protect(PAGE, P | W | U)
    result = machine().execute(Case(assemble(text), {"rsi": PAGE}), user=True)
    assert result.vector is None
    assert _entry(PAGE) & (A | D) == left


def test_a_first_write_after_a_read_sets_dirty() -> None:
    machine().protect(PAGE, P | W | U)
    code = assemble("mov rax, [rsi]; mov [rsi], rax")
    assert machine().execute(Case(code, {"rsi": PAGE}), user=True).vector is None
    assert _entry(PAGE) & (A | D) == A | D


@pytest.mark.parametrize(
    ("rights", "user", "error"),
    [(ALL | NX, True, 0x15), (ALL | NX, False, 0x11), (0, True, 0x14), (ALL & ~U, True, 0x15)],
)
def test_a_fetch_that_is_not_allowed(rights: int, user: bool, error: int) -> None:
    machine().protect(PAGE, rights)
    result = machine().execute(Case(assemble("jmp rax"), {"rax": PAGE + 5}), user=user)
    assert (result.vector, result.error) == (14, error)
    assert result.rip == result.cr2 == PAGE + 5


def test_an_instruction_across_pages_faults_at_its_second_page() -> None:
    m = machine()
    m.protect(NEXT, 0)
    m.write(NEXT - 3, assemble("mov eax, 0x12345678")[:3])
    result = m.execute(Case(assemble("jmp rax"), {"rax": NEXT - 3}), user=True)
    assert (result.vector, result.error, result.cr2, result.rip) == (14, 0x14, NEXT, NEXT - 3)


def test_an_instruction_across_pages_is_executed_and_noticed_when_it_changes() -> None:
    m = machine()
    body = assemble("mov eax, 0x12345678; int3")
    m.write(NEXT - 3, body)
    jump = Case(assemble("jmp rbx"), {"rbx": NEXT - 3})
    assert m.execute(jump).gpr["rax"] == 0x12345678
    change = Case(assemble("mov byte ptr [rcx], 0xee; jmp rbx"), {"rbx": NEXT - 3, "rcx": NEXT + 1})
    assert m.execute(change).gpr["rax"] == 0xEE345678


CHANGES = (
    "mov byte ptr [rip+1], 7; mov al, 5",
    "mov ecx, 5; 1: add eax, 1; inc byte ptr [rip-7]; loop 1b",
    "mov ecx, 9; 1: add rax, 3; xor byte ptr [rip-8], 8; dec ecx; jnz 1b",
    "mov word ptr [rip+2], 0x9090; nop; nop; ud2; inc rax",
    "mov rdi, rsi; mov al, 0xc3; stosb; call rsi; inc rbx",
    "lea rdi, [rip+16]; mov eax, 0x90909090; mov ecx, 3; cld; rep stosd; nop; ud2; ud2; ud2; ud2;"
    " ud2; inc rbx",
    "lock xor byte ptr [rip+1], 3; mov al, 5; mov byte ptr [rip+1], 9; mov bl, 5",
)  # fmt: skip


def test_code_that_changes_itself_as_on_the_host() -> None:
    """Each text once: it leaves its own code changed."""
    code_page = SCRATCH + 0x8000
    cases = [Case(assemble(t), {"rsi": code_page, "rdx": 2}) for t in CHANGES if "rsi" not in t]
    assert not compare(cases)
    m = machine()
    made = Case(assemble("mov [rsi], eax; call rsi; mov [rsi], ebx; call rsi"), {
        "rsi": code_page, "rax": int.from_bytes(assemble("inc edx; ret"), "little"),
        "rbx": int.from_bytes(assemble("dec edi; ret"), "little"),
    })  # fmt: skip
    result = m.execute(made)
    assert (result.vector, result.gpr["rdx"], result.gpr["rdi"]) == (None, 1, 0xFFFF_FFFF)


def test_a_store_beside_code_keeps_working() -> None:
    """Data in a page with code: each store is looked at, none is lost."""
    m, rng = machine(), random.Random(5)
    body = assemble("mov ecx, 100; 1: add [rsi], rcx; loop 1b; ret")
    at = SCRATCH + 0x9000
    m.write(at, body)
    for offset in rng.sample(range(len(body), 0xF00), 5):
        case = Case(
            assemble("call rbx"), {"rbx": at, "rsi": at + offset}, memory={at + offset: bytes(8)}
        )
        result = m.execute(case)
        assert int.from_bytes(result.memory[at + offset], "little") == 5050
