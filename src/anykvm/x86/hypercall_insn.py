"""The two instructions that call the hypervisor, of which a processor has one (SDM vol. 3, VMCALL;
APM vol. 3, VMMCALL).
"""

from __future__ import annotations

import struct

from anykvm.x86.kvm_host import VcpuX86

VMCALL, VMMCALL = b"\x0f\x01\xc1", b"\x0f\x01\xd9"
AMD_VENDORS = (b"AuthenticAMD", b"HygonGenuine")


def native_hypercall(vcpu: VcpuX86) -> bytes:
    """That of the vendor which the guest's CPUID names; of L2, the one that its L1 intercepts."""
    if vcpu.cpu.svm.guest_mode:
        return VMMCALL
    _, b, c, d = vcpu.cpuid.regs(0)
    return VMMCALL if struct.pack("<III", b, d, c) in AMD_VENDORS else VMCALL
