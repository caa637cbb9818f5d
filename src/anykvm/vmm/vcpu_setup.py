"""The state of a vCPU before it runs: CPUID with its place in the topology, MSRs, local APIC
inputs.

The topology is one package of single-threaded cores whose APIC ids are the vCPU numbers (SDM
volume 3, chapter 9.9; AMD's APM volume 3, appendix E).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anykvm.api import Vcpu
from anykvm.uapi import kvm as abi

ECX1_TSC_DEADLINE, ECX1_HYPERVISOR = 1 << 24, 1 << 31
EDX1_HTT = 1 << 28
LEVEL_THREAD, LEVEL_CORE = 1, 2
CACHE_TYPE_MASK = 0x1F
SHARED_CACHE_LEVEL = 3
EXTENDED_TOPOLOGY, EXTENDED_TOPOLOGY_V2 = 0xB, 0x1F

MSR_IA32_TSC = 0x10
MSR_IA32_SYSENTER_CS, MSR_IA32_SYSENTER_ESP, MSR_IA32_SYSENTER_EIP = 0x174, 0x175, 0x176
MSR_IA32_MISC_ENABLE = 0x1A0
MSR_MTRR_DEF_TYPE = 0x2FF
MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SYSCALL_MASK = (
    0xC000_0081,
    0xC000_0082,
    0xC000_0083,
    0xC000_0084,
)
MSR_KERNEL_GS_BASE = 0xC000_0102
MISC_ENABLE_FAST_STRING = 1 << 0
MTRR_ENABLE, MTRR_WRITE_BACK = 1 << 11, 6

BOOT_MSRS = {
    MSR_IA32_SYSENTER_CS: 0,
    MSR_IA32_SYSENTER_ESP: 0,
    MSR_IA32_SYSENTER_EIP: 0,
    MSR_STAR: 0,
    MSR_CSTAR: 0,
    MSR_KERNEL_GS_BASE: 0,
    MSR_SYSCALL_MASK: 0,
    MSR_LSTAR: 0,
    MSR_IA32_TSC: 0,
    MSR_IA32_MISC_ENABLE: MISC_ENABLE_FAST_STRING,
    MSR_MTRR_DEF_TYPE: MTRR_ENABLE | MTRR_WRITE_BACK,
}

APIC_LVT0, APIC_LVT1 = 0x350, 0x360
LVT_MODE_SHIFT, LVT_MODE_MASK = 8, 7
MODE_NMI, MODE_EXTINT = 4, 7


@dataclass(frozen=True, slots=True)
class Place:
    """One vCPU among `cpus`; its APIC id is its index."""

    index: int
    cpus: int
    tsc_deadline: bool

    @property
    def core_bits(self) -> int:
        """How many bits of the APIC id tell the cores apart."""
        return (self.cpus - 1).bit_length()


Entry = abi.kvm_cpuid_entry2


def _replace(value: int, low: int, bits: int, field: int) -> int:
    mask = (1 << bits) - 1
    return value & ~(mask << low) | min(field, mask) << low


def _features(entry: Entry, place: Place) -> None:
    entry.ebx = _replace(entry.ebx, 24, 8, place.index & 0xFF)
    entry.ebx = _replace(entry.ebx, 16, 8, place.cpus)
    entry.ecx |= ECX1_HYPERVISOR | (ECX1_TSC_DEADLINE if place.tsc_deadline else 0)
    entry.edx = entry.edx & ~EDX1_HTT | (EDX1_HTT if place.cpus > 1 else 0)


def _cache(entry: Entry, place: Place) -> None:
    if not entry.eax & CACHE_TYPE_MASK:
        return
    shared = place.cpus - 1 if entry.eax >> 5 & 7 >= SHARED_CACHE_LEVEL else 0
    entry.eax = _replace(entry.eax, 14, 12, shared)
    if entry.function == 4:
        entry.eax = _replace(entry.eax, 26, 6, place.cpus - 1)


def _no_performance_counters(entry: Entry, place: Place) -> None:
    entry.eax = entry.ebx = entry.ecx = entry.edx = 0


def _core_count(entry: Entry, place: Place) -> None:
    entry.ecx = _replace(_replace(entry.ecx, 0, 8, place.cpus - 1), 12, 4, place.core_bits)


def _amd_topology(entry: Entry, place: Place) -> None:
    entry.eax, entry.ebx, entry.ecx = place.index, place.index & 0xFF, 0


LEAVES: dict[int, Callable[[Entry, Place], None]] = {
    0x1: _features,
    0x4: _cache,
    0xA: _no_performance_counters,
    0x8000_0008: _core_count,
    0x8000_001D: _cache,
    0x8000_001E: _amd_topology,
}


def extended_topology(place: Place) -> list[Entry]:
    """Leaf 0xb: a level of threads, of which a core has one, and a level of cores."""
    levels = ((0, 1, LEVEL_THREAD), (place.core_bits, place.cpus, LEVEL_CORE), (0, 0, 0))
    return [
        Entry(
            function=EXTENDED_TOPOLOGY,
            index=index,
            flags=abi.KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax=shift,
            ebx=count,
            ecx=index | level << 8,
            edx=place.index,
        )
        for index, (shift, count, level) in enumerate(levels)
    ]


def cpuid_for(supported: Sequence[Entry], place: Place) -> list[Entry]:
    """What KVM supports, with the vCPU's own ids in it."""
    topology = (EXTENDED_TOPOLOGY, EXTENDED_TOPOLOGY_V2)
    entries = [Entry.from_buffer_copy(entry) for entry in supported]
    kept = [entry for entry in entries if entry.function not in topology]
    for entry in kept:
        fix = LEAVES.get(entry.function)
        if fix is not None:
            fix(entry, place)
    if any(entry.function == EXTENDED_TOPOLOGY for entry in entries):
        kept += extended_topology(place)
    return kept


def wire_lapic(vcpu: Vcpu) -> None:
    """LINT0 takes the 8259 (ExtINT), LINT1 the NMI, as firmware leaves them."""
    lapic = vcpu.get_lapic()
    registers = bytearray(lapic.regs)
    for offset, mode in ((APIC_LVT0, MODE_EXTINT), (APIC_LVT1, MODE_NMI)):
        (lvt,) = struct.unpack_from("<I", registers, offset)
        lvt = lvt & ~(LVT_MODE_MASK << LVT_MODE_SHIFT) | mode << LVT_MODE_SHIFT
        struct.pack_into("<I", registers, offset, lvt)
    lapic.regs[:] = list(registers)
    vcpu.set_lapic(lapic)


def set_up_vcpu(vcpu: Vcpu, supported: Sequence[Entry], place: Place) -> None:
    """All that a vCPU needs whatever it boots. Raises OSError when KVM refuses an MSR."""
    vcpu.set_cpuid2(cpuid_for(supported, place))
    done = vcpu.set_msrs(BOOT_MSRS)
    if done != len(BOOT_MSRS):
        refused = list(BOOT_MSRS)[done]
        raise OSError(f"CPU {place.index}: KVM_SET_MSRS refused MSR {refused:#x}")
    wire_lapic(vcpu)
