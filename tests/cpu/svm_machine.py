"""A hypervisor for tests: L1 executes VMRUN and halts behind it, L2 is any `Case` in any mode.

run("cpuid", SvmExit.CPUID).exit_code == SvmExit.CPUID
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from anykvm.cpu.engine import Exit
from anykvm.cpu.state import Seg
from anykvm.cpu.vmcb import SvmExit, Vmcb, VmcbControl, VmcbSave

from .assembler import assemble
from .harness import Machine, machine
from .layout import GPRS, SCRATCH, STACK, Case

VMRUN, HLT = bytes.fromhex("0f01d8"), b"\xf4"
VMCB, MSRPM, IOPM = SCRATCH + 0x4000, SCRATCH + 0x5000, SCRATCH + 0x7000  # 1, 2 and 3 pages
HSAVE = SCRATCH + 0xA000
EFER_SVME = 1 << 12
SEGMENTS = (("es", Seg.ES), ("cs", Seg.CS), ("ss", Seg.SS), ("ds", Seg.DS))
Change = Callable[[Vmcb], None]


@dataclass
class Outcome:
    """What L1 finds after VMRUN, and the machine as it is then."""

    vmcb: Vmcb
    reason: Exit
    machine: Machine
    at: int  # L2's code
    gpr: dict[str, int] = field(default_factory=dict)

    @property
    def control(self) -> VmcbControl:
        return self.vmcb.control

    @property
    def save(self) -> VmcbSave:
        return self.vmcb.save

    @property
    def exit_code(self) -> int:
        return self.vmcb.control.exit_code

    @property
    def info(self) -> tuple[int, int]:
        return self.control.exit_info_1, self.control.exit_info_2


def image_of(m: Machine) -> VmcbSave:
    """The save area of the state that the machine is in."""
    s, save = m.state, VmcbSave()
    for name, seg in SEGMENTS:
        getattr(save, name).store(s.seg[seg])
    save.gdtr.base, save.gdtr.limit = s.gdt_base, s.gdt_limit
    save.idtr.base, save.idtr.limit = s.idt_base, s.idt_limit
    for name in ("cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "rip"):
        setattr(save, name, getattr(s, name))
    save.efer, save.cpl, save.rflags = s.efer | EFER_SVME, m.cpu.cpl, m.cpu.rflags
    save.rax, save.rsp = s.gpr[0], s.gpr[4]
    return save


def intercept(control: VmcbControl, exits: Iterable[int]) -> None:
    for exit_ in exits:
        control.intercepts[exit_ >> 5] |= 1 << (exit_ & 31)


def prepare(
    l2: str | Case,
    exits: Iterable[int] = (),
    *,
    mode: int | str = 64,
    user: bool = False,
    change: Change = lambda vmcb: None,
) -> tuple[Machine, int]:
    """L1 stands at VMRUN; gives the machine and the address of L2's code."""
    m = machine()
    m.cpu.reset()
    m.cpu.drop_io()  # of a case that was not completed
    m.cpu.flush_tlb()
    bits = {64: 64, "compat": 32, 32: 32, 16: 16}[mode]
    case = l2 if isinstance(l2, Case) else Case(assemble(l2, bits) if l2 else b"")
    at = m.load(case, mode, user=user)
    gpr = list(m.state.gpr)
    vmcb = Vmcb(save=image_of(m))
    vmcb.control.asid = 1
    vmcb.control.msrpm_base_pa, vmcb.control.iopm_base_pa = MSRPM, IOPM
    intercept(vmcb.control, (SvmExit.VMRUN, SvmExit.HLT, *exits))
    change(vmcb)
    m.write(VMCB, bytes(vmcb))
    m.write(MSRPM, bytes(5 * 4096))
    m.load(Case(VMRUN + HLT))
    m.state.gpr[:] = gpr
    m.state.gpr[0], m.state.gpr[4] = VMCB, STACK
    m.state.efer |= EFER_SVME
    m.cpu.svm.hsave_pa = HSAVE
    m.cpu.mode_changed()
    return m, at


def leave(m: Machine) -> Exit:
    """Runs until something leaves that is no request."""
    while (reason := m.cpu.run()) is Exit.REQUEST:
        pass
    return reason


def proceed(m: Machine, at: int) -> Outcome:
    """Runs until L1 halts, or L2 leaves for the caller."""
    reason = leave(m)
    vmcb = Vmcb.from_buffer_copy(m.read(VMCB, ctypes.sizeof(Vmcb)))
    return Outcome(vmcb, reason, m, at, dict(zip(GPRS, m.state.gpr, strict=True)))


def run(l2: str | Case, *exits: int, **options: object) -> Outcome:
    """L2 until its #VMEXIT; HLT is always intercepted."""
    return proceed(*prepare(l2, exits, **options))  # type: ignore[arg-type]
