"""Secure virtual machine: the switch between a hypervisor in the guest (L1) and its guest (L2), and
what of L1's VMCB is in force while L2 runs (AMD APM vol. 2, chapter 15).

L1's state waits in `host`, not in the page that VM_HSAVE_PA names: the manual leaves its use to the
processor. Nothing stays in the TLB over a switch, so address space numbers mean nothing here.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from anykvm.cpu import events
from anykvm.cpu.assist.system import load_pdptes
from anykvm.cpu.control import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR0_VALID,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)
from anykvm.cpu.faults import GuestFault, Shutdown, VmExit
from anykvm.cpu.guest import BP, DB, GP, NMI, OF
from anykvm.cpu.memory import PHYSICAL_BITS
from anykvm.cpu.state import Flag, Seg
from anykvm.cpu.svm_checks import (
    invalid_control,
    invalid_injection,
    invalid_paging,
    invalid_pat,
    invalid_save,
)
from anykvm.cpu.svm_permissions import Permissions
from anykvm.cpu.vmcb import (
    EVENT_HAS_ERROR,
    EVENT_TYPE_SHIFT,
    EVENT_VALID,
    EVENT_VECTOR,
    EXIT_INVALID,
    INTERRUPT_SHADOW,
    NP_ENABLE,
    VMCB_SIZE,
    EventType,
    IntCtl,
    SvmExit,
    Vmcb,
    VmcbControl,
    VmcbSave,
)

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

MASK64 = 2**64 - 1
RAX, RSP = 0, 4
DR6_FIXED, DR6_VALID, DR7_FIXED, DR7_VALID = 0xFFFF_0FF0, 0xE00F, 0x400, 0xFFFF_2BFF
PHYSICAL, VIRTUAL = 1, 2  # State.irq_pending: from outside, and V_IRQ
# What VMRUN and #VMEXIT exchange, and what VMLOAD and VMSAVE do: VMCB against `State`.
SWITCHED_SEGMENTS = (("es", Seg.ES), ("cs", Seg.CS), ("ss", Seg.SS), ("ds", Seg.DS))
LOADED_SEGMENTS = (("fs", Seg.FS), ("gs", Seg.GS), ("tr", Seg.TR), ("ldtr", Seg.LDTR))
LOADED_FIELDS = {
    "kernel_gs_base": "kernel_gs_base",
    "star": "star",
    "lstar": "lstar",
    "cstar": "cstar",
    "sfmask": "fmask",
    "sysenter_cs": "sysenter_cs",
    "sysenter_esp": "sysenter_esp",
    "sysenter_eip": "sysenter_eip",
}


class SvmUnit:
    """One vCPU's part of it."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.hsave_pa = self.vm_cr = 0  # MSRs
        self.gif = True
        self.held = False  # something waits for GIF besides an interrupt
        self.guest_mode = False
        self.vmcb_pa = 0
        self.control = VmcbControl()  # of L2, as VMRUN has read it and its run has changed it
        self.host = VmcbSave()  # L1's registers at VMRUN
        self.permissions = Permissions(cpu, self.control)

    def reset(self) -> None:
        """Power-on, INIT, and EFER.SVME cleared."""
        self.set_gif(True)
        self.leave()

    def leave(self) -> None:
        """No guest mode any more, without #VMEXIT: the registers stay as they are."""
        if self.guest_mode:
            self._end()
            self.cpu.mode_changed()

    @property
    def idle(self) -> bool:
        """Interrupts and intercepts are those of a processor without SVM."""
        return self.gif and not self.guest_mode

    def set_gif(self, gif: bool) -> None:
        """Where it becomes 1, what waited for it is looked at before the next instruction."""
        self.gif = gif
        if gif and self.held:
            self.held = False
            self.cpu.request_exit()

    # Intercepts
    def intercepts(self, exit_: int) -> bool:
        """Whether L1 wants this exit of L2 (an exit code that is also a bit's number)."""
        word = self.cpu.state.intercepts[exit_ >> 5]
        return self.guest_mode and bool(word >> (exit_ & 31) & 1)

    def check_fault(self, fault: GuestFault, during: tuple[int, int] = (0, 0)) -> None:
        """An exception of L2's is about to be delivered, `during` the delivery of another event."""
        if not self.intercepts(SvmExit.EXCP_BASE + fault.vector):
            return
        if fault.vector == DB and (bits := getattr(fault, "dr6", None)) is not None:
            self.cpu.state.dr6 = self.cpu.state.dr6 & ~0xF | bits
        code = SvmExit.EXCP_BASE + fault.vector
        raise VmExit(code, fault.error or 0, fault.cr2 or 0, during=during)

    def check_task_switch(self, selector: int, reason: int = 0, next_rip: int = 0) -> None:
        """A task switch, which this processor does not make: L1 may."""
        if self.intercepts(SvmExit.TASK_SWITCH):
            raise VmExit(SvmExit.TASK_SWITCH, selector, reason, next_rip=next_rip)

    def triple_fault(self, during: tuple[int, int] = (0, 0)) -> NoReturn:
        if self.intercepts(SvmExit.SHUTDOWN):
            raise VmExit(SvmExit.SHUTDOWN, during=during)
        raise Shutdown

    # Interrupts
    def interrupt_flag(self) -> bool:
        """Whether GIF and IF let a physical interrupt through; with V_INTR_MASKING IF is L1's."""
        masked = self.guest_mode and self.control.int_ctl & IntCtl.V_INTR_MASKING
        flags = self.host.rflags if masked else self.cpu.state.flags
        return self.gif and bool(flags & Flag.IF)

    def can_take_interrupt(self) -> bool:
        """A physical one; an interrupt shadow holds off its delivery, but no #VMEXIT."""
        shadow = self.cpu.in_shadow() and not self.intercepts(SvmExit.INTR)
        return self.interrupt_flag() and not shadow

    def awaited(self) -> int:
        """Which kinds of interrupt are pending and held off by no more than a shadow."""
        s = self.cpu.state
        found = PHYSICAL if s.irq_pending & PHYSICAL and self.interrupt_flag() else 0
        return found | (VIRTUAL if s.irq_pending & VIRTUAL and self.virtual_flag() else 0)

    def virtual_flag(self) -> bool:
        """Whether IF and V_TPR let the virtual interrupt through."""
        ctl = self.control.int_ctl
        priority = (ctl & IntCtl.V_INTR_PRIO) >> 16
        allowed = ctl & IntCtl.V_IGN_TPR or priority > ctl & 15
        pending = self.guest_mode and self.gif and ctl & IntCtl.V_IRQ
        return bool(pending and allowed and self.cpu.state.flags & Flag.IF)

    def take_virtual_interrupt(self) -> None:
        """V_IRQ, which L2 is ready for: #VMEXIT, or its delivery."""
        if self.intercepts(SvmExit.VINTR):
            raise VmExit(SvmExit.VINTR)
        self.control.int_ctl &= ~int(IntCtl.V_IRQ)
        self._virtual_pending()
        self.cpu.inject_interrupt(self.control.int_vector & 0xFF)

    def _virtual_pending(self) -> None:
        s = self.cpu.state
        pending = VIRTUAL if self.guest_mode and self.control.int_ctl & IntCtl.V_IRQ else 0
        s.irq_pending = s.irq_pending & PHYSICAL | pending

    def virtual_tpr(self) -> bool:
        """Whether CR8 is V_TPR."""
        return self.guest_mode and bool(self.control.int_ctl & IntCtl.V_INTR_MASKING)

    @property
    def v_tpr(self) -> int:
        return self.control.int_ctl & 15

    @v_tpr.setter
    def v_tpr(self, value: int) -> None:
        self.control.int_ctl = self.control.int_ctl & ~int(IntCtl.V_TPR) | value

    # Memory
    def _page(self, pa: int) -> Vmcb:
        """The VMCB at a physical address; #GP(0) where that is none or no memory."""
        data = None
        if not pa % VMCB_SIZE and not pa >> PHYSICAL_BITS:
            data = self.cpu.read_physical(pa, VMCB_SIZE)
        if data is None:
            raise GuestFault(GP, 0)
        return Vmcb.from_buffer_copy(data)

    def _write(self, pa: int, vmcb: Vmcb) -> None:
        """L1's VMCB was memory when it was read; where it is no more, L2 cannot end."""
        if not self.cpu.write_physical(pa, bytes(vmcb)):
            raise Shutdown

    # The switch
    def vmrun(self, pa: int, next_rip: int) -> bool:
        """VMRUN, whose successor stands at `next_rip`; whether L2 begins in an interrupt shadow."""
        vmcb = self._page(pa)
        if not self.hsave_pa:  # KVM takes it for not set up
            raise GuestFault(GP, 0)
        s = self.cpu.state
        s.rip, s.shadow = next_rip, 0
        self._store(self.host)
        if self.is_invalid(vmcb):
            self._refuse(pa, vmcb)
            return False
        self.enter(pa, vmcb.control)
        self._load(vmcb.save, vmcb.save.cpl)
        if s.nested_paging:
            self.host.g_pat, s.pat = s.pat, vmcb.save.g_pat
        if not self._load_pdptes():
            self._end()
            self._load_host()
            self._refuse(pa, vmcb)
            return False
        s.count_nested_run += 1
        self._inject(vmcb)
        return bool(self.control.int_state & INTERRUPT_SHADOW)

    def is_invalid(self, vmcb: Vmcb) -> bool:
        """`nested_vmcb_check_controls` and `nested_vmcb_check_save`."""
        wrong = invalid_control(vmcb.control) or invalid_paging(vmcb.control, self.host)
        return wrong or invalid_pat(vmcb) or invalid_injection(vmcb) or invalid_save(vmcb.save)

    def _refuse(self, pa: int, vmcb: Vmcb) -> None:
        """VMEXIT_INVALID: L1 goes on as after any other #VMEXIT."""
        control = vmcb.control
        control.exit_code, control.exit_info_1, control.exit_info_2 = EXIT_INVALID, 0, 0
        control.exit_int_info = control.exit_int_info_err = 0
        self.set_gif(False)
        self._write(pa, vmcb)

    def enter(self, pa: int, control: VmcbControl) -> None:
        """From now on L2 runs, under this control area; its registers are the caller's to load."""
        s = self.cpu.state
        self.guest_mode, self.vmcb_pa = True, pa
        ctypes.pointer(self.control)[0] = control
        s.intercepts[:] = list(control.intercepts)
        s.tsc_offset = s.tsc_offset + control.tsc_offset & MASK64
        s.nested_paging = control.nested_ctl & NP_ENABLE
        s.nested_cr3, s.nested_nx = control.nested_cr3, int(bool(self.host.efer & EFER_NXE))
        self.permissions.begin()
        self._virtual_pending()
        self.set_gif(True)

    def _end(self) -> None:
        s = self.cpu.state
        s.tsc_offset, s.nested_paging = self.l1_tsc_offset, 0
        self.guest_mode, self.vmcb_pa = False, 0
        s.intercepts[:] = [0] * len(s.intercepts)
        self._virtual_pending()

    @property
    def l1_tsc_offset(self) -> int:
        """TSC_OFFSET of L1: without what it adds for L2."""
        added = self.control.tsc_offset if self.guest_mode else 0
        return self.cpu.state.tsc_offset - added & MASK64

    def vmexit(self, exit_: VmExit) -> None:
        """#VMEXIT: L2's state into the VMCB, L1's out of `host`."""
        cpu, pa = self.cpu, self.vmcb_pa
        data = cpu.read_physical(pa, VMCB_SIZE)
        if data is None:
            raise Shutdown
        vmcb = Vmcb.from_buffer_copy(data)
        self._store(vmcb.save)
        if cpu.state.nested_paging:
            vmcb.save.g_pat, cpu.state.pat = cpu.state.pat, self.host.g_pat
        control = vmcb.control
        control.int_state = INTERRUPT_SHADOW if cpu.in_shadow() else 0
        control.exit_code = exit_.code
        control.exit_info_1, control.exit_info_2 = exit_.info_1, exit_.info_2
        control.exit_int_info, control.exit_int_info_err = exit_.during
        control.next_rip, control.int_ctl = exit_.next_rip, self.control.int_ctl
        control.event_inj &= ~EVENT_VALID
        self._write(pa, vmcb)
        self._end()
        self.gif = False
        self._load_host()
        if not self._load_pdptes():
            raise Shutdown

    def _store(self, save: VmcbSave) -> None:
        """The registers that VMRUN and #VMEXIT exchange."""
        cpu, s = self.cpu, self.cpu.state
        for name, seg in SWITCHED_SEGMENTS:
            getattr(save, name).store(s.seg[seg])
        save.gdtr.base, save.gdtr.limit = s.gdt_base, s.gdt_limit
        save.idtr.base, save.idtr.limit = s.idt_base, s.idt_limit
        for name in ("efer", "cr0", "cr2", "cr3", "cr4", "dr6", "dr7", "rip"):
            setattr(save, name, getattr(s, name))
        save.rflags, save.cpl = cpu.rflags, cpu.cpl
        save.rsp, save.rax = s.gpr[RSP], s.gpr[RAX]

    def _load(self, save: VmcbSave, cpl: int) -> None:
        cpu, s = self.cpu, self.cpu.state
        for name, seg in SWITCHED_SEGMENTS:
            getattr(save, name).load(s.seg[seg])
        s.gdt_base, s.gdt_limit = save.gdtr.base, save.gdtr.limit & 0xFFFF
        s.idt_base, s.idt_limit = save.idtr.base, save.idtr.limit & 0xFFFF
        s.cr0, s.cr2, s.cr3, s.cr4 = save.cr0 & CR0_VALID | CR0_ET, save.cr2, save.cr3, save.cr4
        long = save.efer & EFER_LME and s.cr0 & CR0_PG
        s.efer = save.efer & ~EFER_LMA | (EFER_LMA if long else 0)
        s.dr6, s.dr7 = save.dr6 & DR6_VALID | DR6_FIXED, save.dr7 & DR7_VALID | DR7_FIXED
        s.rip, s.gpr[RSP], s.gpr[RAX] = save.rip, save.rsp, save.rax
        stack = s.seg[Seg.SS]
        stack.attr = stack.attr & ~0x60 | cpl << 5  # the privilege level is kept there
        cpu.rflags = save.rflags | 2
        s.shadow, s.replay_count = 0, 0
        cpu.debug.drop_trap()
        cpu.debug.changed()
        cpu.mode_changed()
        cpu.flush_tlb()

    def _load_host(self) -> None:
        """L1's registers; breakpoints are off, and L1 is no longer in virtual-8086 mode."""
        host = self.host
        host.cr0 |= CR0_PE
        host.dr6, host.dr7 = self.cpu.state.dr6, DR7_FIXED
        host.cr2 = self.cpu.state.cr2
        host.rflags &= ~int(Flag.VM)
        self._load(host, 0)

    def _load_pdptes(self) -> bool:
        """PAE paging outside of long mode has its top level in registers."""
        s = self.cpu.state
        if not (s.cr0 & CR0_PG and s.cr4 & CR4_PAE) or s.efer & EFER_LMA:
            return True
        try:
            load_pdptes(self.cpu, s.cr3)
        except GuestFault:
            return False
        return True

    def _inject(self, vmcb: Vmcb) -> None:
        """EVENTINJ: delivered before the first instruction, whatever is intercepted."""
        injected = vmcb.control.event_inj
        if not injected & EVENT_VALID:
            return
        vector, kind = injected & EVENT_VECTOR, EventType(injected >> EVENT_TYPE_SHIFT & 7)
        error = vmcb.control.event_inj_err if injected & EVENT_HAS_ERROR else None
        trap = kind is EventType.SOFT or (kind is EventType.EXCEPTION and vector in (BP, OF))
        if kind is EventType.NMI:
            vector = NMI
        self.cpu.deliver_next(
            partial(
                events.deliver,
                self.cpu,
                vector,
                error,
                fault=kind is EventType.EXCEPTION and not trap and vector != DB,
                software=trap,
                rip=vmcb.control.next_rip if trap else None,
                kind=kind,
            )
        )

    def exit(self, code: int, info_1: int = 0, info_2: int = 0) -> None:
        """#VMEXIT between two runs, for an event from outside."""
        self.cpu.leave_guest(VmExit(code, info_1, info_2))

    # VMLOAD and VMSAVE
    def vmload(self, pa: int) -> None:
        save, s = self._page(pa).save, self.cpu.state
        for name, seg in LOADED_SEGMENTS:
            getattr(save, name).load(s.seg[seg])
        for name, field in LOADED_FIELDS.items():
            setattr(s, field, getattr(save, name))

    def vmsave(self, pa: int) -> None:
        vmcb, s = self._page(pa), self.cpu.state
        for name, seg in LOADED_SEGMENTS:
            getattr(vmcb.save, name).store(s.seg[seg])
        for name, field in LOADED_FIELDS.items():
            setattr(vmcb.save, name, getattr(s, field))
        if not self.cpu.write_physical(pa, bytes(vmcb)):
            raise GuestFault(GP, 0)
