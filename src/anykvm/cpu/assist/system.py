"""Control registers, descriptor-table registers and other system instructions in Python (SDM vol.
3, chapters 2 to 5).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anykvm.cpu import segments
from anykvm.cpu.assist.core import MASK64, Assist, microcode, register_name
from anykvm.cpu.control import (
    CR0_CD,
    CR0_ET,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR0_VALID,
    CR4_DE,
    CR4_PAE,
    CR4_PSE,
    CR4_UMIP,
    CR4_VALID,
    EFER_LMA,
    EFER_LME,
)
from anykvm.cpu.debug import DR6_BD, DR7_GD
from anykvm.cpu.faults import GuestFault, Leave
from anykvm.cpu.guest import GP, NP, UD
from anykvm.cpu.memory import PHYSICAL_BITS
from anykvm.cpu.state import Exit, Flag, Mode, Seg

if TYPE_CHECKING:
    from anykvm.cpu.processor import Cpu

DR6_FIXED = 0xFFFF_0FF0


def mov_special(a: Assist) -> None:
    """MOV to and from control and debug registers."""
    names = [register_name(a.i, n) for n in range(2)]
    a.require_cpl0()
    if names[0].startswith("CR"):
        write_cr(a, int(names[0][2:]), a.reg(1))
    elif names[0].startswith("DR"):
        _write_dr(a, int(names[0][2:]), a.reg(1))
    elif names[1] == "CR8":
        _read_cr8(a)
    elif names[1].startswith("CR"):
        a.set_reg(0, getattr(a.s, names[1].lower()))
    else:
        a.set_reg(0, _read_dr(a, int(names[1][2:])))


def _read_cr8(a: Assist) -> None:
    """The caller sets `State.cr8`; stepping over the instruction moves it to the register."""
    if a.cpu.svm.virtual_tpr():
        a.set_reg(0, a.cpu.svm.v_tpr)
        return
    a.cpu.on_advance = lambda: a.set_reg(0, a.s.cr8)
    raise Leave(Exit.CR8_READ)


def write_cr(a: Assist, n: int, value: int) -> None:
    if n == 8:
        if value >> 4:
            raise GuestFault(GP, 0)
        a.cpu.svm.v_tpr = value
        if a.cpu.svm.virtual_tpr():
            return
        a.s.cr8 = value
        raise Leave(Exit.CR8_WRITE)
    {0: _write_cr0, 2: _write_cr2, 3: _write_cr3, 4: _write_cr4}[n](a, value)
    a.cpu.mode_changed()


def _write_cr2(a: Assist, value: int) -> None:
    a.s.cr2 = value


def _write_cr0(a: Assist, value: int) -> None:
    """Enabling paging with EFER.LME enters IA-32e mode; disabling it leaves."""
    s = a.s
    if value >> 32:
        raise GuestFault(GP, 0)
    paging, protected = value & CR0_PG, value & CR0_PE
    if (paging and not protected) or (value & CR0_NW and not value & CR0_CD):
        raise GuestFault(GP, 0)
    value = value & CR0_VALID | CR0_ET
    was = s.cr0 & CR0_PG
    if paging and not was:
        if s.efer & EFER_LME:
            if not s.cr4 & CR4_PAE or s.seg[Seg.CS].attr & segments.LONG:
                raise GuestFault(GP, 0)
            s.efer |= EFER_LMA
        elif s.cr4 & CR4_PAE:
            load_pdptes(a.cpu, s.cr3)
    if was and not paging:
        if s.mode & Mode.CODE64:
            raise GuestFault(GP, 0)
        s.efer &= ~EFER_LMA
    s.cr0 = value
    a.cpu.flush_tlb()


def load_pdptes(cpu: Cpu, cr3: int) -> None:
    """PAE paging keeps its four page-directory pointers in the processor (SDM vol. 3, 4.4.1)."""
    entries = []
    table = cpu.read_guest_physical(cr3 & 0xFFFF_FFE0, 32)
    if table is None:
        raise GuestFault(GP, 0)
    for n in range(4):
        entry = int.from_bytes(table[8 * n : 8 * n + 8], "little")
        if entry & 1 and entry & (0x1E6 | (MASK64 >> PHYSICAL_BITS << PHYSICAL_BITS)):
            raise GuestFault(GP, 0)
        entries.append(entry)
    for n, entry in enumerate(entries):
        cpu.state.pdpte[n] = entry


def _pae_without_long(a: Assist) -> bool:
    s = a.s
    return bool(s.cr0 & CR0_PG and s.cr4 & CR4_PAE and not s.efer & EFER_LMA)


def _write_cr3(a: Assist, value: int) -> None:
    if a.s.mode & Mode.LONG and value >> PHYSICAL_BITS:
        raise GuestFault(GP, 0)
    if _pae_without_long(a):
        load_pdptes(a.cpu, value)
    a.s.cr3 = value
    a.cpu.flush_tlb()


def _write_cr4(a: Assist, value: int) -> None:
    s = a.s
    if value & ~CR4_VALID or (s.mode & Mode.LONG and not value & CR4_PAE):
        raise GuestFault(GP, 0)
    old, s.cr4 = s.cr4, value
    if (old ^ value) & (CR4_PAE | CR4_PSE) and _pae_without_long(a):
        try:
            load_pdptes(a.cpu, s.cr3)
        except GuestFault:
            s.cr4 = old
            raise
    a.cpu.flush_tlb()


def _debug_number(a: Assist, n: int) -> int:
    if n in (4, 5):
        if a.s.cr4 & CR4_DE:
            raise GuestFault(UD)
        n += 2
    debug = a.cpu.debug
    if debug.dr7 & DR7_GD:
        debug.report(DR6_BD, resume=True)
    return n


def _read_dr(a: Assist, n: int) -> int:
    n = _debug_number(a, n)
    s = a.s
    return int({6: s.dr6, 7: s.dr7}.get(n, s.dr[n & 3]))


def _write_dr(a: Assist, n: int, value: int) -> None:
    n = _debug_number(a, n)
    s = a.s
    if n >= 4 and value >> 32:
        raise GuestFault(GP, 0)
    if n < 4:
        s.dr[n] = value
    elif n == 6:
        s.dr6 = value & 0xE00F | DR6_FIXED
    else:
        s.dr7 = value & 0xFFFF_2BFF | 0x400
    a.cpu.debug.changed()


@microcode("clts")
def clts(a: Assist) -> None:
    a.require_cpl0()
    a.s.cr0 &= ~CR0_TS
    a.cpu.mode_changed()


@microcode("lmsw")
def lmsw(a: Assist) -> None:
    """Sets the low four bits of CR0; PE cannot be cleared."""
    a.require_cpl0()
    value = a.value(0, 2) & 15
    write_cr(a, 0, a.s.cr0 & ~14 | value | a.s.cr0 & CR0_PE)


def _require_umip(a: Assist) -> None:
    if a.s.cr4 & CR4_UMIP and a.cpu.cpl:
        raise GuestFault(GP, 0)


@microcode("smsw")
def smsw(a: Assist) -> None:
    _require_umip(a)
    a.store(0, a.s.cr0, 2)


@microcode("lgdt", "lidt")
def load_table(a: Assist) -> None:
    """The base has 24 bits with a 16-bit operand, 64 in 64-bit mode."""
    a.require_cpl0()
    size = 8 if a.code64 else 4
    data = a.cpu.read(a.address(2 + size), 2 + size)
    limit, base = int.from_bytes(data[:2], "little"), int.from_bytes(data[2:], "little")
    if a.code.endswith("16"):
        base &= 0xFF_FFFF
    if a.code64 and base >> 47 not in (0, (1 << 17) - 1):
        raise GuestFault(GP, 0)
    if a.name == "lgdt":
        a.s.gdt_base, a.s.gdt_limit = base, limit
    else:
        a.s.idt_base, a.s.idt_limit = base, limit


@microcode("sgdt", "sidt")
def store_table(a: Assist) -> None:
    _require_umip(a)
    s = a.s
    base, limit = (s.gdt_base, s.gdt_limit) if a.name == "sgdt" else (s.idt_base, s.idt_limit)
    size = 8 if a.code64 else 4
    data = limit.to_bytes(2, "little") + (base & (1 << 8 * size) - 1).to_bytes(size, "little")
    a.cpu.write(a.address(len(data), write=True), data)


@microcode("sldt", "str")
def store_selector(a: Assist) -> None:
    a.require_protected()
    _require_umip(a)
    a.store(0, a.s.seg[Seg.LDTR if a.name == "sldt" else Seg.TR].selector, 2)


@microcode("lldt")
def lldt(a: Assist) -> None:
    a.require_protected()
    a.require_cpl0()
    selector = a.value(0, 2) & 0xFFFF
    if not selector & 0xFFFC:
        segments.set_null(a.cpu, Seg.LDTR, selector)
        return
    found = _system_segment(a, selector, {segments.LDT})
    segments.set_segment(a.cpu, Seg.LDTR, selector, found)


def _system_segment(a: Assist, selector: int, kinds: set[int]) -> segments.Descriptor:
    if selector & 4:
        raise GuestFault(GP, selector & 0xFFFC)
    found = segments.read_system(a.cpu, selector)
    if not found.system or found.type not in kinds:
        raise GuestFault(GP, selector & 0xFFFC)
    if not found.present:
        raise GuestFault(NP, selector & 0xFFFC)
    return found


@microcode("ltr")
def ltr(a: Assist) -> None:
    """The TSS becomes busy, in the table too."""
    a.require_protected()
    a.require_cpl0()
    selector = a.value(0, 2) & 0xFFFF
    if not selector & 0xFFFC:
        raise GuestFault(GP, 0)
    kinds = {segments.TSS_AVAILABLE} if a.s.mode & Mode.LONG else {segments.TSS_AVAILABLE, 1}
    found = _system_segment(a, selector, kinds)
    access = (found.raw >> 40 & 0xFF) | 2
    a.cpu.write(segments.address_of(a.cpu, selector) + 5, bytes([access]), supervisor=True)
    segments.set_segment(a.cpu, Seg.TR, selector, found._replace(attr=found.attr | 2))


# Types that LAR and LSL accept among system segments
LAR_TYPES = {1, 2, 3, 4, 5, 9, 11, 12}
LSL_TYPES = {1, 2, 3, 9, 11}
LAR_TYPES_LONG, LSL_TYPES_LONG = {2, 9, 11, 12}, {2, 9, 11}


def _visible(a: Assist, selector: int, kinds: set[int]) -> segments.Descriptor | None:
    """The descriptor if CPL and RPL may look at it."""
    if not selector & 0xFFFC:
        return None
    try:
        found = segments.read_descriptor(a.cpu, selector)
    except GuestFault as problem:
        if problem.vector == GP:
            return None
        raise
    if found.system and found.type not in kinds:
        return None
    if not found.conforming and found.dpl < max(a.cpu.cpl, selector & 3):
        return None
    return found


def _set_zf(a: Assist, zf: bool) -> None:
    flags = a.cpu.rflags
    a.cpu.rflags = flags | int(Flag.ZF) if zf else flags & ~int(Flag.ZF)


@microcode("lar", "lsl")
def look_at_segment(a: Assist) -> None:
    a.require_protected()
    wide = bool(a.s.mode & Mode.LONG)
    kinds = {
        ("lar", False): LAR_TYPES,
        ("lar", True): LAR_TYPES_LONG,
        ("lsl", False): LSL_TYPES,
        ("lsl", True): LSL_TYPES_LONG,
    }[a.name, wide]
    found = _visible(a, a.value(1, 2) & 0xFFFF, kinds)
    if found is not None:
        value = found.limit if a.name == "lsl" else found.raw >> 32 & 0x00FF_FF00
        a.set_reg(0, value)
    _set_zf(a, found is not None)


@microcode("verr", "verw")
def verify(a: Assist) -> None:
    a.require_protected()
    found = _visible(a, a.value(0, 2) & 0xFFFF, set())
    if found is None or found.system:
        _set_zf(a, False)
    elif a.name == "verr":
        _set_zf(a, not found.code or bool(found.type & segments.RW))
    else:
        _set_zf(a, not found.code and bool(found.type & segments.RW))


@microcode("arpl")
def arpl(a: Assist) -> None:
    a.require_protected()
    dst, src = a.value(0, 2), a.value(1)
    raised = dst & 3 < src & 3
    if raised:
        a.store(0, dst & ~3 | src & 3, 2)
    _set_zf(a, raised)


@microcode("wbinvd", "invd")
def cache_control(a: Assist) -> None:
    """There is no cache to write back."""
    a.require_cpl0()


@microcode("rdpmc")
def rdpmc(a: Assist) -> None:
    """No performance counters."""
    raise GuestFault(GP, 0)


NOT_OFFERED = """
    adcx adox aesdec aesdeclast aesenc aesenclast aesimc aeskeygenassist clflushopt clwb getsec
    invpcid movdir64b movdiri pclmulqdq rdpid rdpkru rdrand rdseed serialize
    sha1msg1 sha1msg2 sha1nexte sha1rnds4 sha256msg1 sha256msg2 sha256rnds2 vmclear vmlaunch
    vmptrld vmptrst vmread vmresume vmwrite vmxoff vmxon wrpkru xabort xbegin xend xtest
"""


@microcode(*NOT_OFFERED.split())
def not_in_model(a: Assist) -> None:
    """Features that CPUID does not offer."""
    raise GuestFault(UD)


@microcode("rdmsr", "wrmsr")
def model_specific(a: Assist) -> None:
    """Where L1 has not asked for this one; all others are native."""
    a.require_cpl0()
    raise Leave(Exit.RDMSR if a.name == "rdmsr" else Exit.WRMSR)


@microcode("clflush", "cldemote")
def clflush(a: Assist) -> None:
    """A load's checks and nothing else."""
    a.cpu.read(a.address(1), 1)


@microcode("salc")
def salc(a: Assist) -> None:
    carry = 0xFF if a.cpu.rflags & Flag.CF else 0
    a.s.gpr[0] = a.s.gpr[0] & ~0xFF | carry
