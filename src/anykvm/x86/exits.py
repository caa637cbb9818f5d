"""What the guest stopped for, a handler per exit: 1 to enter it again, 0 to return to userspace.

The exits of `anykvm.cpu` against KVM_EXIT_*; arch/x86/kvm/x86.c, `vmx/vmx.c`'s table of handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EFAULT
from functools import partial

from anykvm.cpu.state import Exit
from anykvm.fs.trace import enabled, trace
from anykvm.kvm.errors import fail
from anykvm.kvm.iodev import KvmBus
from anykvm.kvm.memslots import PAGE_SIZE
from anykvm.uapi import kvm as uapi
from anykvm.uapi import later
from anykvm.x86.emulate import (
    handle_bus_lock,
    handle_emulation,
    handle_monitor_mwait,
    handle_rsm,
)
from anykvm.x86.fastpath import Pending
from anykvm.x86.guest_debug import handle_debug, stepped_over_halt
from anykvm.x86.hypercall import handle_vmcall, handle_vmmcall
from anykvm.x86.kvm_host import MpState, Request, VcpuX86
from anykvm.x86.lapic_regs import APIC_TASKPRI
from anykvm.x86.mode import get_cpl
from anykvm.x86.msrs import MSRS, X2APIC_MSRS, kvm_get_msr, kvm_set_msr
from anykvm.x86.regs import get_cr8, set_cr8
from anykvm.x86.steal_time import steal_time_sched_in
from anykvm.x86.vapic import report_tpr_access
from anykvm.x86.xen import kvm_xen_write_hypercall_page

RAX, RCX, RDX, RBX = range(4)
GP_VECTOR = 13
MASK32 = (1 << 32) - 1
PIO_DATA_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * 4096
LAPIC_PAGE = 0x1000
QUIRKY_PORT = 0x7E
MSR_MISC_FEATURES_ENABLES, CPUID_FAULT = 0x140, 1


def handle_request(vcpu: VcpuX86) -> int:
    """A kick or a tick: whatever it was for is a request, a signal, or an NMI that had to wait."""
    vcpu.stat.irq_exits += 1
    vcpu.look_for_signals = True
    latched = vcpu.apic is not None and vcpu.apic.pending_events
    if vcpu.nmi_pending or vcpu.smm.pending or latched:
        vcpu.requests.add(Request.EVENT)
    steal_time_sched_in(vcpu)
    return 1


def handle_interrupt_window(vcpu: VcpuX86) -> int:
    vcpu.stat.irq_window_exits += 1
    vcpu.requests.add(Request.EVENT)
    return 1


def handle_halt(vcpu: VcpuX86) -> int:
    """HLT sleeps here if the local APIC is here, else with the VMM; with its exits disabled the
    processor itself sleeps, and nobody sees that.
    """
    stepped = stepped_over_halt(vcpu)
    if stepped and vcpu.cpu.debug.trap_pending():
        return 1  # a single step of the guest's own ends HLT at once
    if vcpu.kvm.disabled_exits & uapi.KVM_X86_DISABLE_EXITS_HLT:
        vcpu.halted_in_guest = True
        return stepped
    vcpu.stat.halt_exits += 1
    if vcpu.apic is not None:
        vcpu.mp_state = MpState.HALTED
        return stepped
    vcpu.run.exit_reason = uapi.KVM_EXIT_HLT
    return 0


# Port I/O.


def handle_io(vcpu: VcpuX86) -> int:
    vcpu.stat.io_exits += 1
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
            left = size * (count - done)
            complete = partial(_complete_in, vcpu, vcpu.state.rip, data, left)
            vcpu.complete_userspace_io = _shorter(vcpu, Pending.IN, complete)
            return 0
        data += item
    if enabled():
        trace("kvm_pio", write=False, port=port, size=size, count=count, data=data)
    vcpu.cpu.complete_in(data)
    return 1


def _shorter(vcpu: VcpuX86, pending: Pending, complete: Callable[[], int]) -> Callable[[], int]:
    """A way to complete a single access that the next KVM_RUN can take as its short way."""
    if vcpu.fastpath is None or vcpu.cpu.string_io():
        return complete
    return vcpu.fastpath.note(pending)


def _complete_in(vcpu: VcpuX86, rip: int, before: bytes, length: int) -> int:
    if _moved(vcpu, rip):
        return 1
    vcpu.cpu.complete_in(before + bytes(vcpu.pio_data[:length]))
    return 1


def _complete_out(vcpu: VcpuX86, rip: int) -> int:
    if not _moved(vcpu, rip):
        vcpu.cpu.complete_out()
    return 1


def _moved(vcpu: VcpuX86, rip: int) -> bool:
    """Userspace has moved RIP meanwhile, to reset the processor for instance: there is nothing to
    step over any more.
    """
    if vcpu.state.rip == rip:
        return False
    vcpu.cpu.drop_io()
    return True


def _handle_out(vcpu: VcpuX86, port: int, size: int, data: bytes) -> int:
    if enabled():
        trace("kvm_pio", write=True, port=port, size=size, data=data)
    bus = vcpu.kvm.buses[KvmBus.PIO_BUS]
    for done in range(0, len(data), size):
        if not bus.write(vcpu, port, data[done : done + size]):
            left = len(data) - done
            vcpu.pio_data[:left] = data[done:]
            _exit_io(vcpu, uapi.KVM_EXIT_IO_OUT, port, size, left // size)
            if _skips_first(vcpu, port, done):
                vcpu.cpu.complete_out()
            else:
                complete = partial(_complete_out, vcpu, vcpu.state.rip)
                vcpu.complete_userspace_io = _shorter(vcpu, Pending.OUT, complete)
            return 0
    vcpu.cpu.complete_out()
    return 1


def _skips_first(vcpu: VcpuX86, port: int, done: int) -> bool:
    """KVM_X86_QUIRK_OUT_7E_INC_RIP: the VMM finds RIP behind an OUT to this port, which old VMMs
    were told of reset vectors by.
    """
    single = not done and vcpu.state.io_count == 1
    quirk = uapi.KVM_X86_QUIRK_OUT_7E_INC_RIP
    return port == QUIRKY_PORT and single and vcpu.kvm.has_quirk(quirk)


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


def _in_lapic_hole(vcpu: VcpuX86, gpa: int) -> bool:
    """KVM_X86_QUIRK_LAPIC_MMIO_HOLE: the page of an APIC that is not reached there reads as ones
    and goes to nobody.
    """
    apic = vcpu.apic
    if apic is None or not 0 <= gpa - (apic.apic_base & ~0xFFF) < LAPIC_PAGE:
        return False
    hole = uapi.KVM_X86_QUIRK_LAPIC_MMIO_HOLE
    return not apic.mmio_enabled and vcpu.kvm.has_quirk(hole)


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
    elif _in_lapic_hole(vcpu, gpa):
        data = b"\xff" * size
    else:
        data = vcpu.kvm.buses[KvmBus.MMIO_BUS].read(vcpu, gpa, size)
    if data is None:
        _exit_mmio(vcpu, gpa, size, None)
        complete = partial(_complete_mmio_read, vcpu, size)
        vcpu.complete_userspace_io = _shorter(vcpu, Pending.MMIO, complete)
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
    elif not (_in_lapic_hole(vcpu, gpa) or vcpu.kvm.buses[KvmBus.MMIO_BUS].write(vcpu, gpa, data)):
        _exit_mmio(vcpu, gpa, len(data), data)
        complete = partial(_complete, vcpu.cpu.complete_mmio_write)
        vcpu.complete_userspace_io = _shorter(vcpu, Pending.MMIO, complete)
        return 0
    vcpu.cpu.complete_mmio_write()
    return 1


def _exit_mmio(vcpu: VcpuX86, gpa: int, size: int, data: bytes | None) -> None:
    vcpu.stat.mmio_exits += 1
    vcpu.run.exit_reason = uapi.KVM_EXIT_MMIO
    mmio = vcpu.run.mmio
    mmio.phys_addr, mmio.len, mmio.is_write = gpa, size, data is not None
    mmio.data[:] = list((data or b"").ljust(8, b"\0"))


def handle_memory_fault(vcpu: VcpuX86) -> int:
    """A slot without memory behind it on the host: EFAULT, at the instruction that wanted it."""
    gpa = vcpu.state.fault_gpa
    vcpu.run.exit_reason = later.KVM_EXIT_MEMORY_FAULT
    union: int = type(vcpu.run).hw.offset
    fault = later.kvm_run_memory_fault.from_buffer(vcpu.run, union)
    fault.flags, fault.gpa, fault.size = 0, gpa, PAGE_SIZE
    raise fail(EFAULT, f"there is no memory on the host for guest address {gpa:#x}")


def handle_dirty_ring_full(vcpu: VcpuX86) -> int:
    vcpu.run.exit_reason = uapi.KVM_EXIT_DIRTY_RING_FULL
    return 0


# Instructions.


def handle_cpuid(vcpu: VcpuX86) -> int:
    """#GP for programs of a kernel that has asked for it (CPUID faulting)."""
    if vcpu.msrs.get(MSR_MISC_FEATURES_ENABLES, 0) & CPUID_FAULT and get_cpl(vcpu):
        return _inject_gp(vcpu)
    function, index = vcpu.state.gpr[RAX] & MASK32, vcpu.state.gpr[RCX] & MASK32
    if function == 1:
        vcpu.update_cpuid_runtime()  # the guest may have written CR4
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


def _set_msr(vcpu: VcpuX86, index: int, value: int) -> bool:
    if index and index == vcpu.kvm.xen_hvm_config.msr:
        return kvm_xen_write_hypercall_page(vcpu, value)
    return kvm_set_msr(vcpu, index, value, host=False)


def handle_wrmsr(vcpu: VcpuX86) -> int:
    gpr = vcpu.state.gpr
    index, value = gpr[RCX] & MASK32, (gpr[RDX] & MASK32) << 32 | gpr[RAX] & MASK32
    refused = _msr_failure(vcpu, index, write=True)
    trace("kvm_msr_write", index=index, data=value)
    if refused is None and _set_msr(vcpu, index, value):
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


EXIT_HANDLERS: dict[Exit, Callable[[VcpuX86], int]] = {
    Exit.REQUEST: handle_request,
    Exit.IRQ_WINDOW: handle_interrupt_window,
    Exit.HLT: handle_halt,
    Exit.IO: handle_io,
    Exit.MMIO: handle_mmio,
    Exit.MEMORY_FAULT: handle_memory_fault,
    Exit.DIRTY_RING_FULL: handle_dirty_ring_full,
    Exit.CPUID: handle_cpuid,
    Exit.RDMSR: handle_rdmsr,
    Exit.WRMSR: handle_wrmsr,
    Exit.CR8_READ: handle_cr8_read,
    Exit.CR8_WRITE: handle_cr8_write,
    Exit.SHUTDOWN: handle_shutdown,
    Exit.EMULATION: handle_emulation,
    Exit.DEBUG: handle_debug,
    Exit.VMCALL: handle_vmcall,
    Exit.VMMCALL: handle_vmmcall,
    Exit.RSM: handle_rsm,
    Exit.MONITOR: handle_monitor_mwait,
    Exit.MWAIT: handle_monitor_mwait,
    Exit.BUS_LOCK: handle_bus_lock,
}
