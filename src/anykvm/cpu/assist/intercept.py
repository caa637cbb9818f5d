"""Which of L2's instructions lead to #VMEXIT (AMD APM vol. 2, 15.9 to 15.11; the order against
exceptions is that of `x86_intercept_map` in arch/x86/kvm/svm/svm.c).

Each row checks what comes before the intercept and gives the exit that the instruction may lead to.
Where that has details of its own (a bit of a permission map, EXITINFO1) the row is a function that
raises VmExit itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from anykvm.cpu.assist.core import Assist, register_name
from anykvm.cpu.assist.io import check_port
from anykvm.cpu.assist.svm import check_address, check_permission
from anykvm.cpu.control import CR0_MP, CR0_PE, CR0_TS, CR4_PCE, CR4_TSD, CR4_UMIP
from anykvm.cpu.decode import STRING_16, STRING_32
from anykvm.cpu.faults import GuestFault, VmExit
from anykvm.cpu.guest import UD
from anykvm.cpu.vmcb import SvmExit

RCX, RDX = 1, 2
CR0_TS_MP = CR0_TS | CR0_MP
MASK32 = 2**32 - 1
IN, STRING, REPEATED, SIZE_SHIFT, ADDRESS_SHIFT, PORT_SHIFT = 1, 4, 8, 4, 7, 16
MSR_RANGES = ((0, 0), (0xC000_0000, 0x800), (0xC001_0000, 0x1000))  # first MSR, place in the map
MSR_RANGE = 0x2000
Check = Callable[[Assist], None]


class Row(NamedTuple):
    """An exit, and what is checked before it."""

    exit: SvmExit
    before: Check | None = None


def _leave(a: Assist, code: int, info_1: int = 0, info_2: int = 0) -> None:
    """#VMEXIT if L1 wants this one."""
    if a.cpu.svm.intercepts(code):
        raise VmExit(code, info_1, info_2, next_rip=a.next_rip or 0)


def check_trap(a: Assist, vector: int) -> None:
    """INT3, INTO and INT1 are intercepted as their exceptions."""
    _leave(a, SvmExit.EXCP_BASE + vector)


# What comes before the intercept.


def _cpl0(a: Assist) -> None:
    a.require_cpl0()


def _protected_cpl0(a: Assist) -> None:
    a.require_protected()
    a.require_cpl0()


def _user_mode(a: Assist) -> None:
    if a.s.cr4 & CR4_UMIP:
        a.require_cpl0()


def _protected_user_mode(a: Assist) -> None:
    a.require_protected()
    _user_mode(a)


def _monitor(a: Assist) -> None:
    if a.cpu.cpl:
        raise GuestFault(UD)


def _time_stamp(a: Assist) -> None:
    if a.s.cr4 & CR4_TSD:
        a.require_cpl0()


def _counter(a: Assist) -> None:
    if not a.s.cr4 & CR4_PCE:
        a.require_cpl0()


def _vmcb(a: Assist) -> None:
    check_permission(a)
    check_address(a)


ROWS: dict[str, Row] = {
    "cpuid": Row(SvmExit.CPUID),
    "rsm": Row(SvmExit.RSM),
    "pause": Row(SvmExit.PAUSE),
    "pushf": Row(SvmExit.PUSHF),
    "popf": Row(SvmExit.POPF),
    "int": Row(SvmExit.SWINT),
    "iret": Row(SvmExit.IRET),
    "int1": Row(SvmExit.ICEBP),
    "xsetbv": Row(SvmExit.XSETBV),
    "vmmcall": Row(SvmExit.VMMCALL),
    "hlt": Row(SvmExit.HLT, _cpl0),
    "invd": Row(SvmExit.INVD, _cpl0),
    "wbinvd": Row(SvmExit.WBINVD, _cpl0),
    "invlpg": Row(SvmExit.INVLPG, _cpl0),
    "rdpmc": Row(SvmExit.RDPMC, _counter),
    "rdtsc": Row(SvmExit.RDTSC, _time_stamp),
    "rdtscp": Row(SvmExit.RDTSCP, _time_stamp),
    "monitor": Row(SvmExit.MONITOR, _monitor),
    "mwait": Row(SvmExit.MWAIT, _monitor),
    "sgdt": Row(SvmExit.GDTR_READ, _user_mode),
    "sidt": Row(SvmExit.IDTR_READ, _user_mode),
    "sldt": Row(SvmExit.LDTR_READ, _protected_user_mode),
    "str": Row(SvmExit.TR_READ, _protected_user_mode),
    "lgdt": Row(SvmExit.GDTR_WRITE, _cpl0),
    "lidt": Row(SvmExit.IDTR_WRITE, _cpl0),
    "lldt": Row(SvmExit.LDTR_WRITE, _protected_cpl0),
    "ltr": Row(SvmExit.TR_WRITE, _protected_cpl0),
    "smsw": Row(SvmExit.READ_CR0, _user_mode),
    "clts": Row(SvmExit.WRITE_CR0, _cpl0),
    "vmrun": Row(SvmExit.VMRUN, _vmcb),
    "vmload": Row(SvmExit.VMLOAD, _vmcb),
    "vmsave": Row(SvmExit.VMSAVE, _vmcb),
    "stgi": Row(SvmExit.STGI, check_permission),
    "clgi": Row(SvmExit.CLGI, check_permission),
    "invlpga": Row(SvmExit.INVLPGA, check_permission),
}

# Those with details of their own.


def _changes_cr0(a: Assist, value: int) -> None:
    """CR0 is written: all of it may be intercepted, or only what is not TS and MP."""
    if (a.s.cr0 ^ value) & ~CR0_TS_MP & MASK32:
        _leave(a, SvmExit.CR0_SEL_WRITE)
    _leave(a, SvmExit.WRITE_CR0)


def _lmsw(a: Assist) -> None:
    a.require_cpl0()
    if a.cpu.svm.intercepts(SvmExit.CR0_SEL_WRITE) or a.cpu.svm.intercepts(SvmExit.WRITE_CR0):
        value = a.value(0, 2) & 15 | a.s.cr0 & CR0_PE
        _changes_cr0(a, a.s.cr0 & ~15 | value)


def _move(a: Assist) -> None:
    """MOV to and from control and debug registers."""
    if not (a.is_reg(0) and a.is_reg(1)):
        return
    target, source = register_name(a.i, 0), register_name(a.i, 1)
    if target == "CR0":
        a.require_cpl0()
        _changes_cr0(a, a.reg(1))
    for name, kind, code in (
        (target, "CR", SvmExit.WRITE_CR0),
        (source, "CR", SvmExit.READ_CR0),
        (target, "DR", SvmExit.WRITE_DR0),
        (source, "DR", SvmExit.READ_DR0),
    ):
        if name.startswith(kind):
            a.require_cpl0()
            _leave(a, code + int(name[2:]))


def _operand(a: Assist) -> tuple[int, int]:
    """Port and size of a port access."""
    if a.name[-1] in "bwd" and len(a.name) > 3:
        return a.s.gpr[RDX] & 0xFFFF, {"b": 1, "w": 2, "d": 4}[a.name[-1]]
    data, where = (0, 1) if a.name == "in" else (1, 0)
    return a.value(where) & 0xFFFF, {"AL": 1, "AX": 2}.get(register_name(a.i, data), 4)


def _address_size(a: Assist) -> int:
    """Bytes; that of a string's pointer, or the mode's."""
    kinds = {a.i.op_kind(n) for n in range(a.i.op_count)}
    if kinds & set(STRING_16):
        return 2
    if kinds & set(STRING_32):
        return 4
    return 8 if a.code64 else 4


def _port(a: Assist) -> None:
    port, size = _operand(a)
    check_port(a, port, size)
    svm = a.cpu.svm
    if not svm.intercepts(SvmExit.IOIO):
        return
    if svm.permissions.ports(port) & (1 << size) - 1:
        string = a.name not in ("in", "out")
        info = IN if a.name.startswith("in") else 0
        info |= STRING if string else 0
        info |= REPEATED if a.i.has_rep_prefix or a.i.has_repne_prefix else 0
        info |= size << SIZE_SHIFT | (_address_size(a) // 2) << ADDRESS_SHIFT | port << PORT_SHIFT
        _leave(a, SvmExit.IOIO, info, a.next_rip or 0)


def _model_specific(a: Assist) -> None:
    a.require_cpl0()
    svm, msr, write = a.cpu.svm, a.s.gpr[RCX] & MASK32, a.name == "wrmsr"
    if not svm.intercepts(SvmExit.MSR):
        return
    for first, place in MSR_RANGES:
        known, bit = 0 <= msr - first < MSR_RANGE, 8 * place + 2 * (msr - first) + write
        if known and not svm.permissions.msr(bit):
            return
    _leave(a, SvmExit.MSR, int(write))


def _skinit(a: Assist) -> None:
    """Not offered, so #UD comes first."""
    raise GuestFault(UD)


DETAILED: dict[str, Check] = {
    "mov": _move,
    "lmsw": _lmsw,
    "rdmsr": _model_specific,
    "wrmsr": _model_specific,
    "skinit": _skinit,
    **dict.fromkeys(("in", "out"), _port),
    **dict.fromkeys(("insb", "insw", "insd", "outsb", "outsw", "outsd"), _port),
}


def check(a: Assist) -> None:
    """Before an instruction of L2's is executed here: raises VmExit if L1 wants it, or the fault
    that comes before.
    """
    detailed = DETAILED.get(a.name)
    if detailed is not None:
        detailed(a)
    elif (row := ROWS.get(a.name)) is not None and a.cpu.svm.intercepts(row.exit):
        if row.before is not None:
            row.before(a)
        _leave(a, row.exit)
