"""Virtual-8086 mode with and without its extensions, and protected-mode virtual interrupts."""

from __future__ import annotations

import pytest

from anykvm.uapi import kvm as uapi

from .real_guest import CODE, RealGuest, real_guest

TSS, TSS_LIMIT, MAP_BASE = 0x2000, 0x2FF, 0x88
REDIRECTION = TSS + MAP_BASE - 32
CR4_VME, CR4_PVI = 1, 2
IF, IOPL_3, VM, VIF, VIP = 1 << 9, 3 << 12, 1 << 17, 1 << 19, 1 << 20
OUT_END = b"\xe6\x80"
FLAGS_TO_AX, AX_TO_FLAGS = b"\x9c\x58", b"\x50\x9d"
CLI, STI, INT_21, IRET, HLT = b"\xfa", b"\xfb", b"\xcd\x21", b"\xcf", b"\xf4"


def run(guest: RealGuest, code: bytes, rflags: int = 0, cr4: int = CR4_VME) -> int:
    """Runs code in virtual-8086 mode up to its end or a shutdown; the exit's reason."""
    vcpu = guest.vcpu(code + OUT_END)
    sregs = vcpu.get_sregs()
    sregs.cr0 |= 1
    sregs.cr4 |= cr4
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.base, segment.selector, segment.limit = 0, 0, 0xFFFF
        segment.type, segment.s, segment.dpl, segment.present, segment.unusable = 3, 1, 3, 1, 0
    sregs.tr.base, sregs.tr.limit, sregs.tr.type = TSS, TSS_LIMIT, 11
    sregs.tr.present, sregs.tr.s, sregs.tr.unusable = 1, 0, 0
    sregs.idt.limit = 0
    vcpu.set_sregs(sregs)
    guest.memory.write(TSS + 102, MAP_BASE.to_bytes(2, "little"))
    vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=2 | VM | rflags, rsp=0x7000))
    return vcpu.run()


def test_sti_and_cli_are_about_vif():
    with real_guest() as guest:
        assert run(guest, STI + FLAGS_TO_AX + CLI) == uapi.KVM_EXIT_IO
        regs = guest.vcpus[0].get_regs()
        assert regs.rax & (IF | IOPL_3) == IF | IOPL_3
        assert not regs.rflags & (VIF | IF)


def test_popf_changes_vif_and_neither_if_nor_iopl():
    with real_guest() as guest:
        code = b"\xb8" + (IF | 0x8D5).to_bytes(2, "little") + AX_TO_FLAGS
        assert run(guest, code) == uapi.KVM_EXIT_IO
        regs = guest.vcpus[0].get_regs()
        assert regs.rflags == VM | VIF | 0x8D5 | 2
        assert regs.rsp == 0x7000


@pytest.mark.parametrize(
    ("code", "rflags", "cr4"),
    [
        *((code, 0, 0) for code in (CLI, STI, b"\x9c", b"\x9d", IRET, INT_21)),
        (STI, VIP, CR4_VME),
        (b"\x66\x9c", 0, CR4_VME),
        (b"\x66\x9d", 0, CR4_VME),
        (b"\x66\xcf", 0, CR4_VME),
        (b"\x68\x00\x01\x9d", 0, CR4_VME),  # push 0x100; popf: TF
    ],
)
def test_what_the_monitor_is_for(code, rflags, cr4):
    """#GP, which shuts down for want of an IDT."""
    with real_guest() as guest:
        assert run(guest, code, rflags, cr4) == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.parametrize("code", [CLI, FLAGS_TO_AX, STI + CLI])
def test_with_iopl_3_the_real_flag_is_meant(code):
    with real_guest() as guest:
        assert run(guest, code, IOPL_3, 0) == uapi.KVM_EXIT_IO
        assert not guest.vcpus[0].get_regs().rflags & (VIF | IF)


@pytest.mark.parametrize(("iopl", "enabled"), [(0, VIF), (IOPL_3, IF)])
def test_an_interrupt_of_the_programs_own(iopl, enabled):
    """INT through the table at 0, and back with IRET."""
    with real_guest() as guest:
        handler = 0x3000
        guest.memory.write(4 * 0x21, handler.to_bytes(2, "little") + bytes(2))
        guest.memory.write(handler, FLAGS_TO_AX + IRET)
        assert run(guest, INT_21, iopl | enabled) == uapi.KVM_EXIT_IO
        regs = guest.vcpus[0].get_regs()
        assert not regs.rax & IF
        assert regs.rax & IOPL_3 == IOPL_3
        assert regs.rflags & enabled
        assert regs.rsp == 0x7000
        pushed = int.from_bytes(guest.memory.read(0x7000 - 2, 2), "little")
        assert pushed & (IF | IOPL_3) == IF | IOPL_3


def test_an_interrupt_that_the_bitmap_gives_to_the_monitor():
    with real_guest() as guest:
        guest.memory.write(REDIRECTION + 0x21 // 8, bytes((1 << 0x21 % 8,)))
        assert run(guest, INT_21) == uapi.KVM_EXIT_SHUTDOWN


def protected(guest: RealGuest, code: bytes, cr4: int, rflags: int = 0) -> int:
    """The same in 16-bit protected mode, CPL 3, IOPL 0."""
    reason = run(guest, HLT, cr4=cr4)
    assert reason == uapi.KVM_EXIT_SHUTDOWN
    vcpu = guest.vcpus[0]
    guest.memory.write(CODE, code + OUT_END)
    sregs = vcpu.get_sregs()
    sregs.cs.type = 11
    sregs.cs.selector = sregs.ss.selector = 3
    vcpu.set_sregs(sregs)
    vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=2 | rflags, rsp=0x7000))
    return vcpu.run()


@pytest.mark.parametrize(
    ("code", "cr4", "rflags", "reason", "left"),
    [
        (STI, CR4_PVI, 0, uapi.KVM_EXIT_IO, VIF),
        (CLI, CR4_PVI, VIF, uapi.KVM_EXIT_IO, 0),
        (STI, CR4_PVI, VIP, uapi.KVM_EXIT_SHUTDOWN, None),
        (STI, CR4_VME, 0, uapi.KVM_EXIT_SHUTDOWN, None),
        (CLI, 0, 0, uapi.KVM_EXIT_SHUTDOWN, None),
    ],
)
def test_protected_mode_virtual_interrupts(code, cr4, rflags, reason, left):
    with real_guest() as guest:
        assert protected(guest, code, cr4, rflags) == reason
        if left is not None:
            assert guest.vcpus[0].get_regs().rflags & (VIF | VIP | IF) == left
