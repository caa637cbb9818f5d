"""VMRUN and #VMEXIT: what they load and save, and what they refuse (AMD APM vol. 2, 15.5 and
15.6).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anykvm.cpu.engine import Exit
from anykvm.cpu.vmcb import EXIT_INVALID, SvmExit, Vmcb, VmcbSave

from .assembler import assemble
from .harness import GDT, SYSTEM, machine
from .layout import STACK, Case
from .svm_machine import EFER_SVME, HSAVE, VMCB, intercept, leave, prepare, proceed, run

X = SvmExit
IF = 1 << 9
VMMCALL, VMLOAD, VMSAVE = (
    bytes.fromhex("0f01d9"),
    bytes.fromhex("0f01da"),
    bytes.fromhex("0f01db"),
)
STGI, CLGI, SKINIT, INVLPGA = (bytes([0x0F, 1, n]) for n in (0xDC, 0xDD, 0xDE, 0xDF))
VMRUN = bytes.fromhex("0f01d8")
Change = Callable[[Vmcb], None]

# What is loaded and saved.


def test_every_register_goes_in_and_comes_out() -> None:
    """As L2 finds it, in general registers, and unchanged in the VMCB."""

    def change(vmcb: Vmcb) -> None:
        save = vmcb.save
        save.rax, save.cr2, save.rflags = 0x1122334455667788, 0x99AABBCC, 0x246
        save.dr6, save.dr7 = 0xFFFF4FF1, 0x400
        save.gdtr.limit, save.idtr.limit = 0x1234, 0xABC
        save.rsp = STACK - 0x40

    text = "mov rbx, cr2; mov rcx, dr6; mov rdx, cr3; mov rsi, cr4; mov rdi, cr0; sgdt [rsp - 16]"
    outcome = run(text + "; mov r8w, [rsp - 16]; mov r9, rsp", change=change)
    save, gpr = outcome.save, outcome.gpr
    assert (save.rax, gpr["rbx"], gpr["rcx"]) == (0x1122334455667788, 0x99AABBCC, 0xFFFF4FF1)
    assert (gpr["rdx"], gpr["rsi"], gpr["rdi"]) == (save.cr3, save.cr4, save.cr0)
    assert (gpr["r8"], gpr["r9"]) == (0x1234, STACK - 0x40)
    before = Vmcb()
    before.save = save
    change(before)
    assert bytes(before.save) == bytes(save)


def test_what_l2_changes_is_saved() -> None:
    outcome = run("mov rsp, 0x12345; mov eax, 77; mov rbx, 0x55; mov cr2, rbx; std; stc")
    save = outcome.save
    assert (save.rsp, save.rax, save.cr2, save.rflags & 0x401) == (0x12345, 77, 0x55, 0x401)


@pytest.mark.parametrize(("mode", "cpl"), [(64, 0), ("compat", 0), (32, 0), (16, 0), (64, 3)])
def test_l2_runs_in_any_mode(mode: int | str, cpl: int) -> None:
    """Segments come back with their attributes, the privilege level in a field of its own."""
    outcome = run("mov eax, 0x1234", X.EXCP_BASE + 13, mode=mode, user=cpl == 3)
    assert outcome.exit_code == (X.EXCP_BASE + 13 if cpl else X.HLT)
    assert (outcome.save.rax & 0xFFFF, outcome.save.cpl) == (0x1234, cpl)
    loaded = Vmcb()
    prepare("mov eax, 0x1234", mode=mode, user=cpl == 3, change=lambda v: _copy(v, loaded))
    for name in ("es", "cs", "ss", "ds"):
        assert bytes(getattr(outcome.save, name)) == bytes(getattr(loaded.save, name)), name


def _copy(source: Vmcb, target: Vmcb) -> None:
    target.save = source.save


def test_l1_goes_on_where_it_was() -> None:
    """Its own registers but for what VMRUN leaves alone; breakpoints are off, GIF is clear."""
    outcome = run("mov rbp, 0x77; xor eax, eax; cpuid", X.CPUID)
    s, svm = outcome.machine.state, outcome.machine.cpu.svm
    assert outcome.reason is Exit.HLT
    assert (s.gpr[0], s.gpr[4], s.gpr[5], s.dr7) == (VMCB, STACK, 0x77, 0x400)
    assert (svm.gif, svm.guest_mode, s.intercepts[:]) == (False, False, [0] * 6)
    assert s.gdt_base == SYSTEM + GDT


def test_vmload_and_vmsave_carry_the_rest() -> None:
    rng = random.Random(7)
    m, _ = prepare("")
    image, s = Vmcb(), m.state
    names = ("star", "lstar", "cstar", "sfmask", "kernel_gs_base")
    names += ("sysenter_cs", "sysenter_esp", "sysenter_eip")
    for name in names:
        setattr(image.save, name, rng.getrandbits(32))
    for name in ("fs", "gs", "tr", "ldtr"):
        seg = getattr(image.save, name)
        seg.selector, seg.attrib, seg.limit, seg.base = 0x33, 0x893, 0xFFFF, rng.getrandbits(40)
    m.write(VMCB, bytes(image))
    m.load(Case(VMLOAD + assemble("add rax, 0x1000") + VMSAVE))
    s.gpr[0], s.efer = VMCB, s.efer | EFER_SVME
    assert leave(m) is Exit.HLT
    assert (s.star, s.fmask, s.seg[4].base) == (
        image.save.star,
        image.save.sfmask,
        image.save.fs.base,
    )
    saved = Vmcb.from_buffer_copy(m.read(VMCB + 0x1000, 4096))
    assert bytes(saved.save) == bytes(image.save)


def test_the_time_stamp_counter_is_offset() -> None:
    def change(vmcb: Vmcb) -> None:
        vmcb.control.tsc_offset = 1 << 60

    m, at = prepare("rdtsc; shl rdx, 32; or rax, rdx", change=change)
    before = m.state.tsc_offset
    outcome = proceed(m, at)
    assert outcome.save.rax >> 60 == 1
    assert m.state.tsc_offset == before


# What is refused.


def _control(name: str, value: int) -> Change:
    return lambda vmcb: setattr(vmcb.control, name, value)


def _save(name: str, value: int) -> Change:
    return lambda vmcb: setattr(vmcb.save, name, value)


def _injected(value: int) -> Change:
    return _control("event_inj", 1 << 31 | value)


def _no_vmrun(vmcb: Vmcb) -> None:
    vmcb.control.intercepts[4] = 0


def _long_and_big(vmcb: Vmcb) -> None:
    vmcb.save.cs.attrib |= 1 << 10


INVALID = {
    "VMRUN is not intercepted": _no_vmrun,
    "ASID 0": _control("asid", 0),
    "TLB control": _control("tlb_ctl", 2),
    "MSR map": _control("msrpm_base_pa", 1 << 46),
    "MSR map's end": _control("msrpm_base_pa", (1 << 46) - 4096),
    "I/O map": _control("iopm_base_pa", (1 << 46) - 8192),
    "EFER.SVME": _save("efer", 0xD01),
    "EFER": _save("efer", 0x1D01 | 1 << 20),
    "CR0 above": _save("cr0", 1 << 32 | 0x80010033),
    "CR0.NW": _save("cr0", 0xA0010033),
    "CR0.PE": _save("cr0", 0x80010032),
    "CR4": _save("cr4", 1 << 40),
    "CR4.PAE": _save("cr4", 0x600),
    "CR3": _save("cr3", 1 << 50),
    "DR6": _save("dr6", 1 << 32),
    "DR7": _save("dr7", 1 << 32),
    "CS.L and CS.D": _long_and_big,
    "event type 1": _injected(1 << 8 | 3),
    "event type 7": _injected(7 << 8 | 3),
    "exception 32": _injected(3 << 8 | 32),
    "exception 2": _injected(3 << 8 | 2),
    "#BR in 64-bit mode": _injected(3 << 8 | 5),
}


@pytest.mark.parametrize("name", INVALID)
def test_a_state_that_cannot_be(name: str) -> None:
    """VMEXIT_INVALID with L1 as it was."""
    outcome = run("mov ebx, 1", change=INVALID[name])
    assert (outcome.reason, outcome.exit_code) == (Exit.HLT, EXIT_INVALID)
    assert outcome.gpr["rbx"] == 0
    assert not outcome.machine.cpu.svm.guest_mode


FAULTS = [
    (VMRUN, {}, 6),
    (STGI, {}, 6),
    (VMLOAD, {}, 6),
    (SKINIT, {"svme": True}, 6),
    (VMRUN, {"svme": True, "rax": VMCB + 8}, 13),
    (VMRUN, {"svme": True, "rax": 1 << 46}, 13),
    (VMRUN, {"svme": True, "rax": 0x9000_0000}, 13),  # no memory
    (VMRUN, {"svme": True, "rax": VMCB, "hsave": 0}, 13),
    (VMSAVE, {"svme": True, "rax": 1}, 13),
    (VMLOAD, {"svme": True, "rax": 0x9000_0000}, 13),
    (VMRUN, {"svme": True, "rax": VMCB, "user": True}, 13),
    (CLGI, {"svme": True, "user": True}, 13),
    (INVLPGA, {"svme": True, "user": True}, 13),
    (VMRUN, {"svme": True, "mode": 16}, 6),
]


@pytest.mark.parametrize(("code", "how", "vector"), FAULTS)
def test_who_may_not(code: bytes, how: dict[str, int], vector: int) -> None:
    m = machine()
    m.cpu.reset()
    m.cpu.svm.hsave_pa = how.get("hsave", HSAVE)

    def enable(state: object) -> None:
        m.state.efer |= EFER_SVME if how.get("svme") else 0

    case = Case(code, {"rax": how.get("rax", VMCB)})
    mode, user = how.get("mode", 64), bool(how.get("user"))
    result = m.execute(case, mode, user=user, setup=enable, exits=lambda m, reason: None)
    assert result.vector == vector


# Anything at all.


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_vmcb_ends_in_an_exit(data: st.DataObject) -> None:
    """Random fields never do more than end in #VMEXIT, a fault, or an exit of the processor's."""
    changes = data.draw(
        st.lists(st.tuples(st.integers(0, 0x698), st.binary(min_size=1, max_size=8)), max_size=12)
    )
    everything = data.draw(st.booleans())

    def change(vmcb: Vmcb) -> None:
        image = bytearray(bytes(vmcb))
        for at, patch in changes:
            image[at : at + len(patch)] = patch
        vmcb.control = type(vmcb.control).from_buffer_copy(image)
        vmcb.save = VmcbSave.from_buffer_copy(image, 0x400)
        if everything:
            intercept(vmcb.control, range(192))

    m, _ = prepare("add eax, ebx; push rax; pop rcx", change=change)
    for _ in range(20):
        if (reason := m.cpu.run()) is not Exit.REQUEST:
            break
    assert reason in Exit
    m.cpu.reset()
