"""Hypercalls to sets of processors: interrupts, and flushes of their TLBs. TLFS, 7.8 (virtual
processor sets), 9.4 and 10.5; `kvm_hv_send_ipi` and `kvm_hv_flush_tlb` of arch/x86/kvm/hyperv.c.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable, Sequence
from typing import Protocol

from anykvm.kvm.kvm_main import VcpuMode
from anykvm.x86 import hyperv_tlfs as hv
from anykvm.x86.hyperv_tlfs import Code, Status
from anykvm.x86.kvm_host import KvmX86, Request, VcpuX86

BANK = 64  # processors in a bank
# struct hv_send_ipi(_ex) and hv_tlb_flush(_ex), before the set's banks.
SEND_IPI, SEND_IPI_EX = struct.Struct("<IIQ"), struct.Struct("<IIQQ")
FLUSH, FLUSH_EX = struct.Struct("<QQQ"), struct.Struct("<QQQQ")
MASK32 = (1 << 32) - 1


class HcallInput(Protocol):
    """What is needed here of a hypercall's input value."""

    @property
    def code(self) -> int: ...
    @property
    def fast(self) -> bool: ...
    @property
    def var_cnt(self) -> int: ...
    @property
    def ingpa(self) -> int: ...
    @property
    def outgpa(self) -> int: ...


class InvalidInput(Exception):
    """HV_STATUS_INVALID_HYPERCALL_INPUT."""


def _read(kvm: KvmX86, gpa: int, size: int) -> bytes:
    """Guest memory, also across pages."""
    for at in (gpa, gpa + size - 1):
        if kvm.memslots.gpa_to_memslot(at) is None:
            raise InvalidInput
    data = b""
    while size:
        part = min(size, hv.PAGE_SIZE - gpa % hv.PAGE_SIZE)
        data += kvm.kvm_read_guest(gpa, part)
        gpa, size = gpa + part, size - part
    return data


def _banks(
    kvm: KvmX86, call: HcallInput, valid: int, offset: int, xmm: Sequence[int]
) -> dict[int, int]:
    """The set's banks by number: as many as `valid` has bits, in memory or, fast, in `xmm`."""
    if call.var_cnt != valid.bit_count() or call.var_cnt > hv.MAX_SPARSE_BANKS:
        raise InvalidInput
    if call.fast:
        if call.var_cnt > len(xmm):
            raise InvalidInput
        words = list(xmm[: call.var_cnt])
    else:
        data = _read(kvm, call.ingpa + offset, 8 * call.var_cnt) if call.var_cnt else b""
        words = list(struct.unpack(f"<{call.var_cnt}Q", data))
    numbers = [n for n in range(hv.MAX_SPARSE_BANKS) if valid >> n & 1]
    return dict(zip(numbers, words, strict=True))


def _members(kvm: KvmX86, banks: dict[int, int] | None) -> list[VcpuX86]:
    """The processors of a set; None is all."""
    vcpus = kvm.x86_vcpus()
    if banks is None:
        return vcpus
    return [v for v in vcpus if banks.get(v.hv.vp_index // BANK, 0) >> v.hv.vp_index % BANK & 1]


def _ipi_input(
    kvm: KvmX86, call: HcallInput, xmm: Sequence[int]
) -> tuple[int, dict[int, int] | None]:
    """(vector, banks)."""
    if call.code == Code.SEND_IPI:
        if not call.fast:
            vector, _, mask = SEND_IPI.unpack(_read(kvm, call.ingpa, SEND_IPI.size))
            return vector, {0: mask}
        if call.ingpa >> 32:
            raise InvalidInput
        return call.ingpa & MASK32, {0: call.outgpa}
    if call.fast:
        vector, form, valid = call.ingpa & MASK32, call.outgpa, xmm[0]
    else:
        vector, _, form, valid = SEND_IPI_EX.unpack(_read(kvm, call.ingpa, SEND_IPI_EX.size))
    if form == hv.SET_ALL and call.var_cnt == valid.bit_count():
        return vector, None
    return vector, _banks(kvm, call, valid, SEND_IPI_EX.size, xmm[1:])


def hv_send_ipi(vcpu: VcpuX86, call: HcallInput, xmm: Sequence[int]) -> Status:
    kvm = vcpu.kvm
    if vcpu.apic is None:
        return Status.INVALID_HYPERCALL_INPUT
    try:
        vector, banks = _ipi_input(kvm, call, xmm)
    except InvalidInput:
        return Status.INVALID_HYPERCALL_INPUT
    if call.code == Code.SEND_IPI_EX and banks == {}:
        return Status.SUCCESS
    if not hv.IPI_LOW_VECTOR <= vector <= hv.IPI_HIGH_VECTOR:
        return Status.INVALID_HYPERCALL_INPUT
    with kvm.irqchip.lock:
        for target in _members(kvm, banks):
            if target.apic is not None:
                target.apic.accept_irq(0, vector)
    return Status.SUCCESS


def _flush_input(kvm: KvmX86, call: HcallInput, xmm: Sequence[int]) -> dict[int, int] | None:
    if call.code in (Code.FLUSH_SPACE, Code.FLUSH_LIST):
        if call.fast:
            flags, mask = call.outgpa, xmm[0]
        else:
            _, flags, mask = FLUSH.unpack(_read(kvm, call.ingpa, FLUSH.size))
        # Windows Server 2012 has been seen to name no processor and mean all.
        return None if flags & hv.FLUSH_ALL_PROCESSORS or not mask else {0: mask}
    if call.fast:
        form, valid = xmm[0], xmm[1]
    else:
        _, _, form, valid = FLUSH_EX.unpack(_read(kvm, call.ingpa, FLUSH_EX.size))
    if form != hv.SET_SPARSE and call.var_cnt == valid.bit_count():
        return None
    return _banks(kvm, call, valid, FLUSH_EX.size, xmm[2:])


def hv_flush_tlb(vcpu: VcpuX86, call: HcallInput, xmm: Sequence[int]) -> Status:
    """All of the TLB, whatever addresses are listed."""
    try:
        banks = _flush_input(vcpu.kvm, call, xmm)
    except InvalidInput:
        return Status.INVALID_HYPERCALL_INPUT
    flush_remote(vcpu, _members(vcpu.kvm, banks))
    return Status.SUCCESS


def flush_remote(vcpu: VcpuX86, targets: Iterable[VcpuX86]) -> None:
    """`kvm_make_vcpus_request_mask` with KVM_REQUEST_WAIT: none of them is in the guest any more
    with what it had cached when this returns.
    """
    others = [target for target in targets if target is not vcpu]
    vcpu.cpu.flush_tlb()
    for target in others:
        target.make_request(Request.TLB_FLUSH_GUEST)
    for target in others:
        while target.mode == VcpuMode.IN_GUEST_MODE and Request.TLB_FLUSH_GUEST in target.requests:
            time.sleep(0)
