"""Events of L2's: those that VMRUN injects, virtual and physical interrupts, and GIF (AMD APM
vol. 2, 15.17, 15.20 and 15.21).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from anykvm.cpu.engine import Exit
from anykvm.cpu.vmcb import EventType, IntCtl, SvmExit, Vmcb

from .assembler import assemble
from .harness import HANDLERS, SYSTEM, machine
from .layout import Case
from .svm_machine import EFER_SVME, intercept, leave, prepare, proceed, run

X = SvmExit
IF = 1 << 9
STGI, CLGI = bytes.fromhex("0f01dc"), bytes.fromhex("0f01dd")
Change = Callable[[Vmcb], None]

# Events that VMRUN injects.

HANDLER = HANDLERS - SYSTEM  # of vector 0; each has 16 bytes


def _vector(rip: int) -> int:
    return (rip - SYSTEM - HANDLERS) // 16


@pytest.mark.parametrize(
    ("kind", "vector", "error", "pushed"),
    [
        (EventType.INTR, 0x31, None, 0),
        (EventType.NMI, 2, None, 0),
        (EventType.EXCEPTION, 6, None, 0),
        (EventType.EXCEPTION, 13, 0x1230, 0),
        (EventType.EXCEPTION, 3, None, 7),
        (EventType.SOFT, 0x55, None, 7),
    ],
)
def test_an_event_is_injected(kind: EventType, vector: int, error: int | None, pushed: int) -> None:
    """Past every intercept; a software interrupt's return address is nRIP."""

    def change(vmcb: Vmcb) -> None:
        has_error = 0 if error is None else 1 << 11
        number = 0xEE if kind is EventType.NMI else vector
        vmcb.control.event_inj = 1 << 31 | has_error | kind << 8 | number
        vmcb.control.event_inj_err = error or 0
        vmcb.control.next_rip = vmcb.save.rip + 7
        intercept(vmcb.control, (*range(0x40, 0x60), X.INTR, X.NMI, X.SWINT))

    outcome = run("nop", change=change)
    assert (outcome.exit_code, _vector(outcome.save.rip)) == (X.HLT, vector)
    frame = [
        int.from_bytes(outcome.machine.read(outcome.save.rsp + 8 * n, 8), "little") for n in (0, 1)
    ]
    assert frame[0 if error is None else 1] == outcome.at + pushed
    assert error is None or frame[0] == error
    assert outcome.control.event_inj >> 31 == 0
    assert outcome.machine.state.nmi_blocked == 0


def test_an_exception_on_the_way_is_intercepted() -> None:
    """EXITINTINFO tells what was being delivered; error codes are without EXT."""

    def change(vmcb: Vmcb) -> None:
        vmcb.save.idtr.limit = 0
        vmcb.control.event_inj, vmcb.control.event_inj_err = 0x80000B0C, 0x777

    outcome = run("nop", X.EXCP_BASE + 13, change=change)
    assert (outcome.exit_code, outcome.info) == (X.EXCP_BASE + 13, (12 * 8 | 2, 0))
    assert (outcome.control.exit_int_info, outcome.control.exit_int_info_err) == (0x80000B0C, 0x777)
    assert run("nop", X.EXCP_BASE + 8, change=change).exit_code == X.EXCP_BASE + 8
    assert run("nop", X.SHUTDOWN, change=change).exit_code == X.SHUTDOWN
    assert run("nop", change=change).reason is Exit.SHUTDOWN


# Interrupts.


def _window(text: str, exits: tuple[int, ...], *, l1_flags: int, change: Change) -> Exit:
    """Where a pending physical interrupt stops L2."""
    m, _ = prepare(text, exits, change=change)
    m.cpu.rflags, m.cpu.svm.gif = l1_flags, False
    m.cpu.pending_interrupt(True)
    reason = leave(m)
    m.cpu.pending_interrupt(False)
    return reason


def _masking(on: bool, flags: int) -> Change:
    def change(vmcb: Vmcb) -> None:
        vmcb.control.int_ctl = int(IntCtl.V_INTR_MASKING) if on else 0
        vmcb.save.rflags = flags | 2

    return change


@pytest.mark.parametrize(
    ("masking", "l1_flags", "l2_flags", "taken"),
    [
        (True, IF, 0, True),
        (True, 0, IF, False),
        (False, 0, IF, True),
        (False, IF, 0, False),
    ],
)
def test_whose_interrupt_flag_counts(
    masking: bool, l1_flags: int, l2_flags: int, taken: bool
) -> None:
    """L1's with V_INTR_MASKING, else L2's."""
    change = _masking(masking, l2_flags)
    before = _window("nop; nop", (X.INTR,), l1_flags=l1_flags | 2, change=change)
    assert before is (Exit.IRQ_WINDOW if taken else Exit.HLT)


def test_an_interrupt_ends_l2_at_once() -> None:
    m, at = prepare("1: jmp 1b", (X.INTR,), change=_masking(True, 0))
    m.cpu.rflags, m.cpu.svm.gif = IF | 2, False
    m.cpu.pending_interrupt(True)
    assert leave(m) is Exit.IRQ_WINDOW
    m.cpu.svm.exit(X.INTR)
    assert not m.cpu.can_take_interrupt()  # GIF
    outcome = proceed(m, at)
    m.cpu.pending_interrupt(False)
    assert (outcome.exit_code, outcome.save.rip) == (X.INTR, at)


def _virtual(priority: int = 1, tpr: int = 0, extra: int = 0, flags: int = IF | 2) -> Change:
    def change(vmcb: Vmcb) -> None:
        vmcb.control.int_ctl = int(IntCtl.V_IRQ) | priority << 16 | tpr | extra
        vmcb.control.int_vector, vmcb.save.rflags = 0x44, flags

    return change


def test_a_virtual_interrupt_is_delivered() -> None:
    outcome = run("nop", change=_virtual())
    assert _vector(outcome.save.rip) == 0x44
    assert not outcome.control.int_ctl & IntCtl.V_IRQ


def test_a_virtual_interrupt_waits() -> None:
    """For its priority, for IF, and for the end of STI's shadow."""
    waiting = run("nop", change=_virtual(priority=3, tpr=3))
    assert waiting.save.rip == waiting.at + 1
    ignoring = run("nop", change=_virtual(priority=3, tpr=3, extra=int(IntCtl.V_IGN_TPR)))
    assert _vector(ignoring.save.rip) == 0x44
    outcome = run("sti; inc ebx; inc ebx", change=_virtual(flags=2))
    assert (_vector(outcome.save.rip), outcome.gpr["rbx"]) == (0x44, 1)
    lowered = run(
        "xor eax, eax; mov cr8, rax; nop", change=_virtual(3, 3, int(IntCtl.V_INTR_MASKING))
    )
    assert (_vector(lowered.save.rip), lowered.control.int_ctl & 0xFF) == (0x44, 0)


def test_the_virtual_interrupt_window_is_intercepted() -> None:
    outcome = run("inc ebx; sti; inc ebx; inc ebx", X.VINTR, change=_virtual(flags=2))
    assert (outcome.exit_code, outcome.gpr["rbx"]) == (X.VINTR, 2)
    assert outcome.control.int_ctl & IntCtl.V_IRQ


def test_cr8_is_the_virtual_task_priority() -> None:
    outcome = run("mov ebx, 5; mov cr8, rbx; mov rax, cr8", change=_masking(True, 0))
    assert (outcome.save.rax, outcome.control.int_ctl & 0xFF) == (5, 5)


def test_an_interrupt_shadow_goes_over_the_switch() -> None:
    assert run("cli; sti; cpuid", X.CPUID).control.int_state & 1
    assert not run("cli; sti; nop; cpuid", X.CPUID).control.int_state & 1

    def shadowed(vmcb: Vmcb) -> None:
        _virtual()(vmcb)
        vmcb.control.int_state = 1

    assert run("inc ebx; nop", change=shadowed).gpr["rbx"] == 1


def test_gif_holds_interrupts() -> None:
    m = machine()
    m.cpu.reset()
    m.load(Case(CLGI + assemble("inc ebx") + STGI + assemble("inc ebx; nop"), {}, IF | 2))
    m.state.efer |= EFER_SVME
    m.cpu.pending_interrupt(False)
    m.cpu.svm.set_gif(False)
    m.cpu.pending_interrupt(True)
    assert leave(m) is Exit.IRQ_WINDOW
    m.cpu.pending_interrupt(False)
    assert m.state.gpr[3] == 1
