"""CPUID: the processor that KVM_GET_SUPPORTED_CPUID offers, and what the guest's CPUID returns.

Feature bits stand in one table, and each that is on is implemented. The model is that of an
in-order core, which is what a software processor is: it speculates nothing, so guests leave out the
mitigations that speculation needs. SDM vol. 2, CPUID; arch/x86/kvm/cpuid.c;
Documentation/virt/kvm/x86/cpuid.rst.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from fractions import Fraction
from typing import NamedTuple

from anykvm.uapi.kvm import KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2
from anykvm.x86.sched_info import sched_info_on
from anykvm.x86.tsc import host_tsc_khz

KVM_MAX_CPUID_ENTRIES = 256
VENDOR = "GenuineIntel"
BRAND = "anykvm software processor"
FAMILY, MODEL, STEPPING = 6, 0x1C, 10
PHYS_BITS, VIRT_BITS = 46, 48
CACHE_LINE = 64
CRYSTAL_KHZ = 1_000_000
MASK32 = (1 << 32) - 1

XCR0_X87_SSE, XSAVE_AREA = 3, 512 + 64
XSAVEOPT, XSAVEC, XGETBV1, XSAVES = 1, 2, 4, 8  # CPUID.0DH.1:EAX

KVM_SIGNATURE = 0x40000000
KVM_FEATURES = 0x40000001
EXTENDED = 0x80000000
MAX_BASIC, MAX_EXTENDED = 0x16, 0x8000000A
SVM_REVISION, SVM_ASIDS = 1, 8


class Reg(IntEnum):
    EAX, EBX, ECX, EDX = range(4)


class Feature(NamedTuple):
    """A bit of a leaf. `on`: the processor, or x86's own code, implements it."""

    name: str
    function: int
    reg: Reg
    bit: int
    on: bool


FEATURES: tuple[Feature, ...] = (
    Feature("fpu", 1, Reg.EDX, 0, True),
    Feature("vme", 1, Reg.EDX, 1, True),
    Feature("de", 1, Reg.EDX, 2, True),
    Feature("pse", 1, Reg.EDX, 3, True),
    Feature("tsc", 1, Reg.EDX, 4, True),
    Feature("msr", 1, Reg.EDX, 5, True),
    Feature("pae", 1, Reg.EDX, 6, True),
    Feature("mce", 1, Reg.EDX, 7, True),
    Feature("cx8", 1, Reg.EDX, 8, True),
    Feature("apic", 1, Reg.EDX, 9, True),
    Feature("sep", 1, Reg.EDX, 11, True),
    Feature("mtrr", 1, Reg.EDX, 12, True),
    Feature("pge", 1, Reg.EDX, 13, True),
    Feature("mca", 1, Reg.EDX, 14, True),
    Feature("cmov", 1, Reg.EDX, 15, True),
    Feature("pat", 1, Reg.EDX, 16, True),
    Feature("pse36", 1, Reg.EDX, 17, True),
    Feature("clflush", 1, Reg.EDX, 19, True),
    Feature("mmx", 1, Reg.EDX, 23, True),
    Feature("fxsr", 1, Reg.EDX, 24, True),
    Feature("sse", 1, Reg.EDX, 25, True),
    Feature("sse2", 1, Reg.EDX, 26, True),
    Feature("sse3", 1, Reg.ECX, 0, True),
    Feature("pclmulqdq", 1, Reg.ECX, 1, False),
    Feature("monitor", 1, Reg.ECX, 3, False),
    Feature("ssse3", 1, Reg.ECX, 9, True),
    Feature("fma", 1, Reg.ECX, 12, False),
    Feature("cx16", 1, Reg.ECX, 13, True),
    Feature("pcid", 1, Reg.ECX, 17, False),
    Feature("sse4_1", 1, Reg.ECX, 19, True),
    Feature("sse4_2", 1, Reg.ECX, 20, True),
    Feature("x2apic", 1, Reg.ECX, 21, True),
    Feature("movbe", 1, Reg.ECX, 22, True),
    Feature("popcnt", 1, Reg.ECX, 23, True),
    Feature("tsc_deadline_timer", 1, Reg.ECX, 24, True),
    Feature("aes", 1, Reg.ECX, 25, False),
    Feature("xsave", 1, Reg.ECX, 26, True),
    Feature("avx", 1, Reg.ECX, 28, False),
    Feature("f16c", 1, Reg.ECX, 29, False),
    Feature("rdrand", 1, Reg.ECX, 30, False),
    Feature("hypervisor", 1, Reg.ECX, 31, True),
    Feature("arat", 6, Reg.EAX, 2, True),
    Feature("fsgsbase", 7, Reg.EBX, 0, True),
    Feature("tsc_adjust", 7, Reg.EBX, 1, True),
    Feature("bmi1", 7, Reg.EBX, 3, False),
    Feature("avx2", 7, Reg.EBX, 5, False),
    Feature("smep", 7, Reg.EBX, 7, True),
    Feature("bmi2", 7, Reg.EBX, 8, False),
    Feature("erms", 7, Reg.EBX, 9, True),
    Feature("invpcid", 7, Reg.EBX, 10, False),
    Feature("zero_fcs_fds", 7, Reg.EBX, 13, True),
    Feature("rdseed", 7, Reg.EBX, 18, False),
    Feature("adx", 7, Reg.EBX, 19, False),
    Feature("smap", 7, Reg.EBX, 20, False),
    Feature("clflushopt", 7, Reg.EBX, 23, False),
    Feature("sha_ni", 7, Reg.EBX, 29, False),
    Feature("umip", 7, Reg.ECX, 2, True),
    Feature("rdpid", 7, Reg.ECX, 22, False),
    Feature("fsrm", 7, Reg.EDX, 4, False),
    Feature("arch_capabilities", 7, Reg.EDX, 29, True),
    Feature("kvm_clocksource", KVM_FEATURES, Reg.EAX, 0, True),
    Feature("kvm_nop_io_delay", KVM_FEATURES, Reg.EAX, 1, True),
    Feature("kvm_clocksource2", KVM_FEATURES, Reg.EAX, 3, True),
    Feature("kvm_steal_time", KVM_FEATURES, Reg.EAX, 5, sched_info_on()),
    Feature("kvm_pv_eoi", KVM_FEATURES, Reg.EAX, 6, True),
    Feature("kvm_pv_unhalt", KVM_FEATURES, Reg.EAX, 7, True),
    Feature("kvm_pv_tlb_flush", KVM_FEATURES, Reg.EAX, 9, True),
    Feature("kvm_pv_send_ipi", KVM_FEATURES, Reg.EAX, 11, True),
    Feature("kvm_poll_control", KVM_FEATURES, Reg.EAX, 12, True),
    Feature("kvm_pv_sched_yield", KVM_FEATURES, Reg.EAX, 13, True),
    Feature("kvm_clocksource_stable", KVM_FEATURES, Reg.EAX, 24, True),
    Feature("lahf_lm", EXTENDED + 1, Reg.ECX, 0, True),
    Feature("svm", EXTENDED + 1, Reg.ECX, 2, True),
    Feature("abm", EXTENDED + 1, Reg.ECX, 5, True),
    Feature("3dnowprefetch", EXTENDED + 1, Reg.ECX, 8, True),
    Feature("syscall", EXTENDED + 1, Reg.EDX, 11, True),
    Feature("nx", EXTENDED + 1, Reg.EDX, 20, True),
    Feature("pdpe1gb", EXTENDED + 1, Reg.EDX, 26, True),
    Feature("rdtscp", EXTENDED + 1, Reg.EDX, 27, True),
    Feature("lm", EXTENDED + 1, Reg.EDX, 29, True),
    Feature("invariant_tsc", EXTENDED + 7, Reg.EDX, 8, True),
    Feature("npt", EXTENDED + 0xA, Reg.EDX, 0, True),
    Feature("nrip_save", EXTENDED + 0xA, Reg.EDX, 3, True),
    Feature("vmcb_clean", EXTENDED + 0xA, Reg.EDX, 5, True),  # a hint that is not needed
)
_BY_NAME = {feature.name: feature for feature in FEATURES}
assert len(_BY_NAME) == len(FEATURES)

Regs = tuple[int, int, int, int]


class Leaf(NamedTuple):
    """A leaf's fixed contents, to which the table's feature bits are added."""

    function: int
    regs: Regs = (0, 0, 0, 0)
    subleaf: int | None = None  # None: it does not matter


def _text(text: str, size: int) -> list[int]:
    raw = text.encode("ascii").ljust(size, b"\0")
    return [int.from_bytes(raw[i : i + 4], "little") for i in range(0, size, 4)]


def _signed(leaf: int, signature: str) -> Regs:
    """A leaf with a maximum and a signature in EBX, EDX, ECX order (Intel) as CPUID 0 has."""
    b, d, c = _text(signature, 12)
    return leaf, b, c, d


def _kvm_signature() -> Regs:
    b, c, d = _text("KVMKVMKVM", 12)
    return KVM_FEATURES, b, c, d


def _cache(kind: int, level: int, kib: int, ways: int) -> Regs:
    """A subleaf of leaf 4: `kind` 1 data, 2 code, 3 both."""
    sets = kib * 1024 // (ways * CACHE_LINE)
    return 1 << 8 | level << 5 | kind, (ways - 1) << 22 | CACHE_LINE - 1, sets - 1, 0


def _brand(part: int) -> Regs:
    a, b, c, d = _text(BRAND, 48)[4 * part : 4 * part + 4]
    return a, b, c, d


def tsc_leaf(tsc_khz: int) -> Regs:
    """TSC against a crystal of 1 GHz, the rate at which the local APIC's timer counts.

    Linux multiplies the crystal's kHz by EBX in 32 bits, so EBX is small; what the ratio is off
    by then, 120 millionths at most, is the crystal's.
    """
    inverse = Fraction(CRYSTAL_KHZ, tsc_khz).limit_denominator(MASK32 // CRYSTAL_KHZ)
    eax, ebx = inverse.as_integer_ratio()
    return eax, ebx, tsc_khz * 1000 * eax // ebx, 0


def leaves() -> tuple[Leaf, ...]:
    """All leaves without their feature bits."""
    mhz = round(host_tsc_khz() / 1000)
    signature = FAMILY << 8 | (MODEL >> 4) << 16 | (MODEL & 15) << 4 | STEPPING
    l2 = 1024
    return (
        Leaf(0, _signed(MAX_BASIC, VENDOR)),
        Leaf(1, (signature, CACHE_LINE // 8 << 8 | 1 << 16, 0, 0)),
        Leaf(2, (0xFF01, 0, 0, 0)),  # "see leaf 4"
        Leaf(4, _cache(1, 1, 32, 8), 0),
        Leaf(4, _cache(2, 1, 32, 8), 1),
        Leaf(4, _cache(3, 2, l2, 16), 2),
        Leaf(4, subleaf=3),
        Leaf(5),
        Leaf(6),
        Leaf(7, subleaf=0),
        Leaf(0xA),
        Leaf(0xB, subleaf=0),  # no topology but what the VMM enters
        Leaf(0xD, (XCR0_X87_SSE, XSAVE_AREA, XSAVE_AREA, 0), 0),
        Leaf(0xD, (XSAVEOPT | XSAVEC | XGETBV1 | XSAVES, XSAVE_AREA, 0, 0), 1),
        Leaf(0x15, tsc_leaf(host_tsc_khz())),
        Leaf(0x16, (mhz, mhz, 100, 0)),
        Leaf(KVM_SIGNATURE, _kvm_signature()),
        Leaf(KVM_FEATURES),
        Leaf(EXTENDED, (MAX_EXTENDED, 0, 0, 0)),
        Leaf(EXTENDED + 1, (signature, 0, 0, 0)),
        Leaf(EXTENDED + 2, _brand(0)),
        Leaf(EXTENDED + 3, _brand(1)),
        Leaf(EXTENDED + 4, _brand(2)),
        Leaf(EXTENDED + 5),
        Leaf(EXTENDED + 6, (0, 0, l2 << 16 | 8 << 12 | CACHE_LINE, 0)),
        Leaf(EXTENDED + 7),
        Leaf(EXTENDED + 8, (PHYS_BITS | VIRT_BITS << 8, 0, 0, 0)),
        Leaf(EXTENDED + 0xA, (SVM_REVISION, SVM_ASIDS, 0, 0)),
    )


def _entry(leaf: Leaf) -> kvm_cpuid_entry2:
    regs = list(leaf.regs)
    for feature in FEATURES:
        if feature.on and feature.function == leaf.function and not leaf.subleaf:
            regs[feature.reg] |= 1 << feature.bit
    flags = 0 if leaf.subleaf is None else KVM_CPUID_FLAG_SIGNIFCANT_INDEX
    eax, ebx, ecx, edx = regs
    return kvm_cpuid_entry2(
        function=leaf.function,
        index=leaf.subleaf or 0,
        flags=flags,
        eax=eax,
        ebx=ebx,
        ecx=ecx,
        edx=edx,
    )


def supported_cpuid() -> list[kvm_cpuid_entry2]:
    """KVM_GET_SUPPORTED_CPUID."""
    return [_entry(leaf) for leaf in leaves()]


def emulated_cpuid() -> list[kvm_cpuid_entry2]:
    """KVM_GET_EMULATED_CPUID: nothing is slower than the rest here, so it is leaf 0 alone."""
    return [kvm_cpuid_entry2(function=0)]


class GuestCpuid:
    """The leaves that KVM_SET_CPUID2 gave a vCPU; without any, the guest has no features."""

    def __init__(self, entries: Sequence[kvm_cpuid_entry2] = ()) -> None:
        self.entries = [kvm_cpuid_entry2.from_buffer_copy(e) for e in entries]
        self._exact: dict[tuple[int, int], kvm_cpuid_entry2] = {}
        self._any: dict[int, kvm_cpuid_entry2] = {}
        for entry in reversed(self.entries):  # of several, the first counts
            if entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX:
                self._exact[entry.function, entry.index] = entry
            else:
                self._any[entry.function] = entry

    def same_as(self, other: GuestCpuid) -> bool:
        """`kvm_cpuid_check_equal`."""
        return [_contents(e) for e in self.entries] == [_contents(e) for e in other.entries]

    def find(self, function: int, index: int = 0) -> kvm_cpuid_entry2 | None:
        """`kvm_find_cpuid_entry_index`."""
        return self._exact.get((function, index)) or self._any.get(function)

    def has(self, name: str) -> bool:
        """`guest_cpuid_has`: whether the guest was given a feature of the table."""
        feature = _BY_NAME[name]
        entry = self.find(feature.function)
        return entry is not None and bool(_regs(entry)[feature.reg] >> feature.bit & 1)

    def kvm_features(self) -> kvm_cpuid_entry2 | None:
        """`kvm_find_kvm_cpuid_features`: VMMs that offer Hyper-V move KVM's leaves up."""
        for base in range(KVM_SIGNATURE, KVM_SIGNATURE + 0x10000, 0x100):
            entry = self._any.get(base)
            if entry is not None and (entry.ebx, entry.ecx, entry.edx) == _kvm_signature()[1:]:
                return self.find(base + (KVM_FEATURES - KVM_SIGNATURE))
        return None

    def regs(self, function: int) -> Regs:
        """A leaf's registers as they were given, zeros where it was not."""
        entry = self.find(function)
        return _regs(entry) if entry is not None else (0, 0, 0, 0)

    def lookup(self, function: int, index: int) -> Regs:
        """What CPUID returns: as Intel's processors, the last basic leaf where there is none."""
        entry = self.find(function, index) or self._out_of_range(function, index)
        if entry is None:
            return (0, 0, 0, 0)
        eax, ebx, ecx, edx = _regs(entry)
        return eax, ebx, ecx, edx

    def _out_of_range(self, function: int, index: int) -> kvm_cpuid_entry2 | None:
        """None for a leaf within its class's limit, which is just not there."""
        limit = self.find(function & 0xFFFFFF00 if function >= 0x40000000 else 0)
        if function >= EXTENDED:
            limit = self.find(EXTENDED)
        basic = self.find(0)
        if basic is None or (limit is not None and function <= limit.eax):
            return None
        return self.find(basic.eax, index)

    def set_runtime(self, osxsave: bool, apic_enabled: bool, mwait: bool | None) -> None:
        """The bits that follow CR4.OSXSAVE, IA32_APIC_BASE and, if not None, IA32_MISC_ENABLE."""
        leaf = self.find(1)
        if leaf is None:
            return
        leaf.ecx = leaf.ecx & ~(1 << 27) | osxsave << 27 if self.has("xsave") else leaf.ecx
        leaf.edx = leaf.edx & ~(1 << 9) | apic_enabled << 9
        if mwait is not None:
            leaf.ecx = leaf.ecx & ~(1 << 3) | mwait << 3


def _regs(entry: kvm_cpuid_entry2) -> Regs:
    return entry.eax, entry.ebx, entry.ecx, entry.edx


def _contents(entry: kvm_cpuid_entry2) -> tuple[int, ...]:
    return entry.function, entry.index, entry.flags, *_regs(entry)


def feature_names(entries: Iterable[kvm_cpuid_entry2]) -> list[str]:
    """The features of the table that these leaves have, for people to read."""
    cpuid = GuestCpuid(list(entries))
    return [feature.name for feature in FEATURES if cpuid.has(feature.name)]
