"""What VMRUN refuses with VMEXIT_INVALID (AMD APM vol. 2, 15.5.1 and 15.20; KVM's
`nested_vmcb_check_controls` and `nested_vmcb_check_save`).
"""

from __future__ import annotations

from anykvm.cpu.control import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    CR4_VALID,
    EFER_LMA,
    EFER_LME,
    EFER_SVME,
    EFER_VALID,
)
from anykvm.cpu.guest import BR, NMI, OF
from anykvm.cpu.memory import PHYSICAL_BITS
from anykvm.cpu.vmcb import (
    EVENT_TYPE_SHIFT,
    EVENT_VALID,
    EVENT_VECTOR,
    IOPM_SIZE,
    MSRPM_SIZE,
    NP_ENABLE,
    EventType,
    SvmExit,
    Vmcb,
    VmcbControl,
    VmcbSave,
)

PAGE = 4096
ATTRIB_L, ATTRIB_D = 1 << 9, 1 << 10
TLB_CONTROLS = (0, 1)  # nothing, all; by address space number only where CPUID has FlushByAsid
EXCEPTIONS = 32
PAT_TYPES = frozenset((0, 1, 4, 5, 6, 7))


def _beyond_memory(pa: int, size: int) -> bool:
    """Whether a permission map reaches past the last physical address."""
    start = (pa + PAGE - 1) // PAGE * PAGE
    return bool((start + size - 1) >> PHYSICAL_BITS)


def invalid_control(control: VmcbControl) -> bool:
    """The control area."""
    vmrun = control.intercepts[SvmExit.VMRUN >> 5] >> (SvmExit.VMRUN & 31) & 1
    wrong = (
        not vmrun,
        control.asid == 0,
        control.nested_ctl & NP_ENABLE and control.nested_cr3 >> PHYSICAL_BITS,
        control.tlb_ctl not in TLB_CONTROLS,
        _beyond_memory(control.msrpm_base_pa, MSRPM_SIZE),
        _beyond_memory(control.iopm_base_pa, IOPM_SIZE),
    )
    return any(wrong)


def invalid_paging(control: VmcbControl, host: VmcbSave) -> bool:
    """Nested paging: L1's tables are those of long mode here."""
    return bool(control.nested_ctl & NP_ENABLE) and not host.efer & EFER_LMA


def invalid_pat(vmcb: Vmcb) -> bool:
    """With nested paging L2 has a PAT of its own."""
    types = vmcb.save.g_pat.to_bytes(8, "little")
    return bool(vmcb.control.nested_ctl & NP_ENABLE) and not PAT_TYPES.issuperset(types)


def invalid_injection(vmcb: Vmcb) -> bool:
    """An event that L2 cannot have."""
    injected = vmcb.control.event_inj
    if not injected & EVENT_VALID:
        return False
    kind, vector = injected >> EVENT_TYPE_SHIFT & 7, injected & EVENT_VECTOR
    if kind not in set(EventType):
        return True
    if kind != EventType.EXCEPTION:
        return False
    long = vmcb.save.cs.attrib & ATTRIB_L and vmcb.save.efer & EFER_LME
    return vector >= EXCEPTIONS or vector == NMI or bool(long and vector in (OF, BR))


def invalid_save(save: VmcbSave) -> bool:
    """The state save area; EFER.LMA is not looked at, for it follows from LME and CR0.PG."""
    long = save.efer & EFER_LME and save.cr0 & CR0_PG
    wrong = (
        not save.efer & EFER_SVME,
        save.efer & ~EFER_VALID,
        save.cr0 >> 32,
        save.cr0 & CR0_NW and not save.cr0 & CR0_CD,
        save.cr4 & ~CR4_VALID,
        save.dr6 >> 32 or save.dr7 >> 32,
        long and not (save.cr4 & CR4_PAE and save.cr0 & CR0_PE),
        long and save.cr3 >> PHYSICAL_BITS,
        long and save.cs.attrib & ATTRIB_L and save.cs.attrib & ATTRIB_D,
    )
    return any(wrong)
