"""What the guest stopped for, a handler per exit: 1 to enter it again, 0 to return to userspace.

The exits of `anykvm.cpu` against KVM_EXIT_*; arch/x86/kvm/x86.c, `vmx/vmx.c`'s table of handlers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

from anykvm.cpu.state import Exit
from anykvm.fs.trace import enabled, trace
from anykvm.kvm.iodev import KvmBus
from anykvm.uapi import kvm as uapi
from anykvm.x86.kvm_host import MpState, Request, VcpuX86
from anykvm.x86.lapic_regs import APIC_TASKPRI
from anykvm.x86.msrs import MSRS, X2APIC_MSRS, kvm_get_msr, kvm_set_msr
from anykvm.x86.regs import get_cr8, set_cr8
from anykvm.x86.vapic import report_tpr_access

log = logging.getLogger("anykvm.x86")
RAX, RCX, RDX, RBX = range(4)
GP_VECTOR = 13
MASK32 = (1 << 32) - 1
PIO_DATA_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * 4096
LAPIC_PAGE = 0x1000
MAX_INSTRUCTION = 15


def handle_request(vcpu: VcpuX86) -> int:
    """A kick or a tick: whatever it was for is a request, a signal, or an NMI that had to wait."""
    vcpu.look_for_signals = True
    if vcpu.nmi_pending:
        vcpu.requests.add(Request.EVENT)
    return 1


def handle_interrupt_window(vcpu: VcpuX86) -> int:
    vcpu.requests.add(Request.EVENT)
    return 1


def handle_halt(vcpu: VcpuX86) -> int:
    """HLT sleeps here if the local APIC is here, else with the VMM."""
    if vcpu.apic is not None:
        vcpu.mp_state = MpState.HALTED
        return 1
    vcpu.run.exit_reason = uapi.KVM_EXIT_HLT
    return 0


# Port I/O.


def handle_io(vcpu: VcpuX86) -> int:
    state = vcpu.state
    port, size, count = state.io_port, state.io_size, state.io_count
    if state.io_in:
        return _handle_in(vcpu, port, size, count)
    return _handle_out(vcpu, port, size, vcpu.cpu.io_data[: size * count])


def _handle_in(vcpu: VcpuX86, port: int, size: int, count: int) -> int:
    """Items come from an in-kernel device for as long as one answers, the rest from userspace."""
    bus, data = vcpu.kvm.buses[KvmBus.PIO_BUS], b""
    for done in range(count):
        item = bus.read(vcpu, port, size)
        if item is None:
            _exit_io(vcpu, uapi.KVM_EXIT_IO_IN, port, size, count - done)
            vcpu.complete_userspace_io = partial(_complete_in, vcpu, data, size * (count - done))
            return 0
        data += item
    trace("kvm_pio", write=False, port=port, size=size, count=count, data=data)
    vcpu.cpu.complete_in(data)
    return 1


def _complete_in(vcpu: VcpuX86, before: bytes, length: int) -> int:
    vcpu.cpu.complete_in(before + bytes(vcpu.pio_data[:length]))
    return 1


def _handle_out(vcpu: VcpuX86, port: int, size: int, data: bytes) -> int:
    if enabled():
        trace("kvm_pio", write=True, port=port, size=size, data=data)
    bus = vcpu.kvm.buses[KvmBus.PIO_BUS]
    for done in range(0, len(data), size):
        if not bus.write(vcpu, port, data[done : done + size]):
            left = len(data) - done
            vcpu.pio_data[:left] = data[done:]
            _exit_io(vcpu, uapi.KVM_EXIT_IO_OUT, port, size, left // size)
            vcpu.complete_userspace_io = vcpu.complete_out
            return 0
    vcpu.cpu.complete_out()
    return 1


def _complete(finish: Callable[[], None]) -> int:
    finish()
    return 1


def _exit_io(vcpu: VcpuX86, direction: int, port: int, size: int, count: int) -> None:
    vcpu.run.exit_reason = uapi.KVM_EXIT_IO
    io = vcpu.run_io
    io.direction, io.size, io.port, io.count = direction, size, port, count
    io.data_offset = PIO_DATA_OFFSET


# Memory that no slot backs.


def handle_mmio(vcpu: VcpuX86) -> int:
    state = vcpu.state
    gpa, size = state.mmio_gpa, state.mmio_size
    if state.mmio_write:
        data = (state.mmio_data & (1 << 8 * size) - 1).to_bytes(size, "little")
        return _mmio_write(vcpu, gpa, data)
    return _mmio_read(vcpu, gpa, size)


def _lapic_offset(vcpu: VcpuX86, gpa: int) -> int | None:
    """The register of the local APIC's page that an address means, if it is one."""
    apic = vcpu.apic
    if apic is None or not 0 <= gpa - (apic.apic_base & ~0xFFF) < LAPIC_PAGE:
        return None
    return gpa & 0xFFF if apic.mmio_enabled else None


def _watch_tpr(vcpu: VcpuX86, offset: int, write: bool) -> None:
    if offset == APIC_TASKPRI:
        report_tpr_access(vcpu, write)


def _mmio_read(vcpu: VcpuX86, gpa: int, size: int) -> int:
    offset, apic = _lapic_offset(vcpu, gpa), vcpu.apic
    data: bytes | None
    if offset is not None and apic is not None:
        with vcpu.kvm.irqchip.lock:
            data = apic.mmio_read(offset, size).to_bytes(size, "little")
        _watch_tpr(vcpu, offset, write=False)
    else:
        data = vcpu.kvm.buses[KvmBus.MMIO_BUS].read(vcpu, gpa, size)
    if data is None:
        _exit_mmio(vcpu, gpa, size, None)
        vcpu.complete_userspace_io = partial(_complete_mmio_read, vcpu, size)
        return 0
    trace("kvm_mmio", write=False, gpa=gpa, data=data)
    vcpu.cpu.complete_mmio_read(data)
    return 1


def _complete_mmio_read(vcpu: VcpuX86, size: int) -> int:
    vcpu.cpu.complete_mmio_read(bytes(vcpu.run.mmio.data[:size]))
    return 1


def _mmio_write(vcpu: VcpuX86, gpa: int, data: bytes) -> int:
    trace("kvm_mmio", write=True, gpa=gpa, data=data)
    offset, apic = _lapic_offset(vcpu, gpa), vcpu.apic
    if offset is not None and apic is not None:
        with vcpu.kvm.irqchip.lock:
            apic.mmio_write(offset, int.from_bytes(data, "little"), len(data))
            vcpu.state.cr8 = apic.cr8
        _watch_tpr(vcpu, offset, write=True)
    elif not vcpu.kvm.buses[KvmBus.MMIO_BUS].write(vcpu, gpa, data):
        _exit_mmio(vcpu, gpa, len(data), data)
        vcpu.complete_userspace_io = partial(_complete, vcpu.cpu.complete_mmio_write)
        return 0
    vcpu.cpu.complete_mmio_write()
    return 1


def _exit_mmio(vcpu: VcpuX86, gpa: int, size: int, data: bytes | None) -> None:
    vcpu.run.exit_reason = uapi.KVM_EXIT_MMIO
    mmio = vcpu.run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, data is not None
    mmio.data[:] = list((data or b"").ljust(8, b"\0"))


# Instructions.


def handle_cpuid(vcpu: VcpuX86) -> int:
    function, index = vcpu.state.gpr[RAX] & MASK32, vcpu.state.gpr[RCX] & MASK32
    regs = vcpu.cpuid.lookup(function, index)
    trace("kvm_cpuid", function=function, index=index, regs=regs)
    vcpu.cpu.complete_cpuid(*regs)
    return 1


def _inject_gp(vcpu: VcpuX86) -> int:
    vcpu.cpu.inject_exception(GP_VECTOR, 0)
    return 1


def _msr_exit(vcpu: VcpuX86, index: int, reason: int, value: int | None) -> bool:
    """Hand an access that failed to userspace, if it asked (KVM_CAP_X86_USER_SPACE_MSR)."""
    if not vcpu.kvm.user_space_msr_mask & reason:
        return False
    write = value is not None
    vcpu.run.exit_reason = uapi.KVM_EXIT_X86_WRMSR if write else uapi.KVM_EXIT_X86_RDMSR
    msr = vcpu.run.msr
    msr.error, msr.reason, msr.index, msr.data = 0, reason, index, value or 0
    vcpu.complete_userspace_io = partial(_complete_msr, vcpu, write)
    return True


def _complete_msr(vcpu: VcpuX86, write: bool) -> int:
    if vcpu.run.msr.error:
        return _inject_gp(vcpu)
    vcpu.cpu.complete_msr(None if write else vcpu.run.msr.data)
    return 1


def _msr_failure(vcpu: VcpuX86, index: int, write: bool) -> int | None:
    """Why the guest may not even try: the VMM's filter."""
    allows = vcpu.kvm.msr_filter
    if index in X2APIC_MSRS or allows is None or allows(index, write):
        return None
    return uapi.KVM_MSR_EXIT_REASON_FILTER


def _known_msr(index: int) -> bool:
    return index in MSRS or index in X2APIC_MSRS


def handle_rdmsr(vcpu: VcpuX86) -> int:
    index = vcpu.state.gpr[RCX] & MASK32
    refused = _msr_failure(vcpu, index, write=False)
    value = kvm_get_msr(vcpu, index) if refused is None else None
    trace("kvm_msr_read", index=index, data=value)
    if value is not None:
        vcpu.cpu.complete_msr(value)
        return 1
    reason = refused or _unknown_or_invalid(index)
    return 0 if _msr_exit(vcpu, index, reason, None) else _inject_gp(vcpu)


def _unknown_or_invalid(index: int) -> int:
    known = _known_msr(index)
    return uapi.KVM_MSR_EXIT_REASON_INVAL if known else uapi.KVM_MSR_EXIT_REASON_UNKNOWN


def handle_wrmsr(vcpu: VcpuX86) -> int:
    gpr = vcpu.state.gpr
    index, value = gpr[RCX] & MASK32, (gpr[RDX] & MASK32) << 32 | gpr[RAX] & MASK32
    refused = _msr_failure(vcpu, index, write=True)
    trace("kvm_msr_write", index=index, data=value)
    if refused is None and kvm_set_msr(vcpu, index, value, host=False):
        vcpu.cpu.complete_msr(None)
        return 1
    reason = refused or _unknown_or_invalid(index)
    return 0 if _msr_exit(vcpu, index, reason, value) else _inject_gp(vcpu)


def handle_cr8_read(vcpu: VcpuX86) -> int:
    vcpu.state.cr8 = get_cr8(vcpu)
    vcpu.cpu.advance()
    return 1


def handle_cr8_write(vcpu: VcpuX86) -> int:
    """The task priority; a VMM with an APIC of its own is told when it falls."""
    value, before = vcpu.state.cr8, vcpu.run.cr8
    if not set_cr8(vcpu, value):
        return _inject_gp(vcpu)
    vcpu.cpu.advance()
    if vcpu.apic is None and value < before:
        vcpu.run.exit_reason = uapi.KVM_EXIT_SET_TPR
        return 0
    return 1


# What ends a run.


def handle_shutdown(vcpu: VcpuX86) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
    return 0


def handle_emulation(vcpu: VcpuX86) -> int:
    """An instruction that is not implemented: its bytes for the VMM, its name for people."""
    state = vcpu.state
    log.error("vCPU %d at %#x: %s", vcpu.vcpu_id, state.rip, vcpu.cpu.emulation_text)
    trace("kvm_emulate_insn", rip=state.rip, text=vcpu.cpu.emulation_text, failed=True)
    vcpu.run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    failure = vcpu.run.emulation_failure
    failure.suberror = uapi.KVM_INTERNAL_ERROR_EMULATION
    failure.ndata, failure.flags = 1, 0
    if state.insn_len:  # else there was nothing to fetch from
        failure.ndata = 3
        failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = min(state.insn_len, MAX_INSTRUCTION)
        failure.insn_bytes[:] = list(state.insn_bytes[:MAX_INSTRUCTION])
    return 0


def handle_debug(vcpu: VcpuX86) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_DEBUG
    arch = vcpu.run.debug.arch
    arch.pc, arch.dr6, arch.dr7 = vcpu.state.rip, vcpu.state.dr6, vcpu.state.dr7
    arch.exception = uapi.DB_VECTOR
    return 0


EXIT_HANDLERS: dict[Exit, Callable[[VcpuX86], int]] = {
    Exit.REQUEST: handle_request,
    Exit.IRQ_WINDOW: handle_interrupt_window,
    Exit.HLT: handle_halt,
    Exit.IO: handle_io,
    Exit.MMIO: handle_mmio,
    Exit.CPUID: handle_cpuid,
    Exit.RDMSR: handle_rdmsr,
    Exit.WRMSR: handle_wrmsr,
    Exit.CR8_READ: handle_cr8_read,
    Exit.CR8_WRITE: handle_cr8_write,
    Exit.SHUTDOWN: handle_shutdown,
    Exit.EMULATION: handle_emulation,
    Exit.DEBUG: handle_debug,
}
