"""The instructions of a hypervisor (AMD APM vol. 3, chapter 4, and vol. 2, chapter 15)."""

from __future__ import annotations

from anykvm.cpu.assist.core import Assist, microcode
from anykvm.cpu.control import EFER_SVME
from anykvm.cpu.faults import GuestFault
from anykvm.cpu.guest import GP, UD
from anykvm.cpu.memory import PHYSICAL_BITS

RAX = 0
SMM_SPACE = 1


def check_permission(a: Assist) -> None:
    """#UD unless SVM is enabled and this is protected mode, #GP unless CPL is 0."""
    if not a.s.efer & EFER_SVME:
        raise GuestFault(UD)
    a.require_protected()
    a.require_cpl0()


def check_address(a: Assist) -> int:
    """The physical address of a VMCB in rAX, as wide as the address size."""
    size = {"W": 16, "D": 32, "Q": 64}[a.code[-1]]
    pa = a.s.gpr[RAX] & (1 << size) - 1
    if pa & 0xFFF or pa >> PHYSICAL_BITS:
        raise GuestFault(GP, 0)
    return pa


@microcode("vmrun")
def vmrun(a: Assist) -> None:
    """Not in system management mode, as in KVM."""
    check_permission(a)
    pa = check_address(a)
    if a.cpu.space == SMM_SPACE:
        raise GuestFault(UD)
    assert a.next_rip is not None
    a.holds_interrupts = a.cpu.svm.vmrun(pa, a.next_rip)
    a.next_rip = None


@microcode("vmload")
def vmload(a: Assist) -> None:
    check_permission(a)
    a.cpu.svm.vmload(check_address(a))


@microcode("vmsave")
def vmsave(a: Assist) -> None:
    check_permission(a)
    a.cpu.svm.vmsave(check_address(a))


@microcode("stgi", "clgi")
def global_interrupt_flag(a: Assist) -> None:
    check_permission(a)
    a.cpu.svm.set_gif(a.name == "stgi")


@microcode("invlpga")
def invlpga(a: Assist) -> None:
    """Of any address space: none stays in the TLB over a switch."""
    check_permission(a)
    a.cpu.flush_tlb()


@microcode("skinit")
def skinit(a: Assist) -> None:
    """Not offered."""
    raise GuestFault(UD)
