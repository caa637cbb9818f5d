"""All the state of a VM that KVM gives out: what to read, and in which order it can be written.

api.rst of the kernel says what each ioctl holds, Documentation/virt/kvm/devices/vcpu.rst how a TSC
is moved; the order is QEMU's, with the local APIC before the MSRs, whose TSC deadline it has to be
in the mode for. The VM must be stopped: every vCPU out of KVM_RUN and its last exit completed
(`finish_exits`). What KVM gives no way to ask for is the VMM's to repeat before `restore`: slots,
routes, eventfds, enabled capabilities, filters.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from anykvm.api.descriptor import Descriptor
from anykvm.api.flexible import CPUID2, MSRS
from anykvm.api.system import Kvm
from anykvm.api.vcpu import Vcpu
from anykvm.api.vm import Vm
from anykvm.uapi import kvm as abi

S = TypeVar("S", bound=ctypes.Structure)

MSR_IA32_TSC, MSR_IA32_MCG_CAP, MSR_IA32_DEBUGCTL = 0x10, 0x179, 0x1D9
MSR_IA32_MC0_CTL, MCE_BANK_MSRS, MCE_BANKS = 0x400, 4, 0xFF
MSR_MTRR_DEF_TYPE, MTRR_FIXED, MTRR_VARIABLE = 0x2FF, (0x250, 0x258, 0x259), range(0x200, 0x210)
MSR_IA32_TSC_DEADLINE = 0x6E0
# State that older kernels keep and do not list.
UNLISTED_MSRS = (
    MSR_IA32_DEBUGCTL,
    MSR_MTRR_DEF_TYPE,
    *MTRR_FIXED,
    *range(0x268, 0x270),
    *MTRR_VARIABLE,
)
MASK64 = (1 << 64) - 1
MSRS_AT_ONCE = 200  # of 256 that KVM takes
XSAVE_SIZE = 4096
TSC_TOLERANCE_PPM = 250  # KVM's: a rate nearer than this is the host's own
IRQCHIPS = {
    "pic_master": abi.KVM_IRQCHIP_PIC_MASTER,
    "pic_slave": abi.KVM_IRQCHIP_PIC_SLAVE,
    "ioapic": abi.KVM_IRQCHIP_IOAPIC,
}

Parts = dict[str, bytes]


class StateError(Exception):
    """The state cannot be read or written; the message says which part, and why."""


@dataclass(frozen=True, slots=True)
class VcpuState:
    """One vCPU: each part is the argument of its ioctl as bytes. `tsc` is what the guest's TSC read
    when the VM's clock was taken, None where KVM does not tell.
    """

    parts: Parts
    tsc: int | None = None

    def part(self, name: str, kind: type[S]) -> S:
        """A part as its struct."""
        return kind.from_buffer_copy(self.parts[name])

    @property
    def msrs(self) -> dict[int, int]:
        """Values by index."""
        return _unpack_msrs(self.parts["msrs"])


@dataclass(frozen=True, slots=True)
class VmState:
    """A VM without its memory; `parts` are the VM's own, `vcpus` in the order of their ids."""

    parts: Parts
    vcpus: list[VcpuState] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Context:
    """What deciding how to read a vCPU needs: capabilities and the MSRs there are."""

    msr_indices: tuple[int, ...]
    xsave_size: int
    sregs2: bool
    irqchip: bool
    nested_size: int  # of the largest nested state, 0 without nested virtualization

    @classmethod
    def of(cls, kvm: Kvm, vm: Vm, irqchip: bool) -> Context:
        listed = kvm.msr_index_list()
        size = vm.check_extension(abi.KVM_CAP_XSAVE2)
        if not size and kvm.check_extension(abi.KVM_CAP_XSAVE):
            size = XSAVE_SIZE
        sregs2 = kvm.check_extension(abi.KVM_CAP_SREGS2) > 0
        indices = dict.fromkeys((*listed, *UNLISTED_MSRS))
        nested = vm.check_extension(abi.KVM_CAP_NESTED_STATE)
        return cls(tuple(indices), size, sregs2, irqchip, nested)


@dataclass(frozen=True, slots=True)
class Part:
    """How one part of a vCPU is read and written. Rows are in the order of writing."""

    name: str
    get: Callable[[Vcpu, Context], bytes]
    put: Callable[[Vcpu, bytes], object]
    there: Callable[[Context], bool] = lambda context: True


def _read(owner: Descriptor, cmd: int, size: int) -> bytes:
    area = (ctypes.c_ubyte * size)()
    owner.ioctl(cmd, area)
    return bytes(area)


def _write(owner: Descriptor, cmd: int, data: bytes) -> None:
    owner.ioctl(cmd, (ctypes.c_ubyte * len(data)).from_buffer_copy(data))


def _struct(
    name: str,
    get: int,
    put: int,
    kind: type[ctypes.Structure],
    there: Callable[[Context], bool] = lambda context: True,
) -> Part:
    """A part that two ioctls carry in a struct."""
    size = ctypes.sizeof(kind)
    return Part(
        name,
        lambda vcpu, context: _read(vcpu, get, size),
        lambda vcpu, data: _write(vcpu, put, data),
        there,
    )


def _get_xsave(vcpu: Vcpu, context: Context) -> bytes:
    get = abi.KVM_GET_XSAVE if context.xsave_size == XSAVE_SIZE else abi.KVM_GET_XSAVE2
    return _read(vcpu, get, context.xsave_size)


def _get_nested(vcpu: Vcpu, context: Context) -> bytes:
    """As long as its header says."""
    area = (ctypes.c_ubyte * context.nested_size)()
    header = abi.kvm_nested_state.from_buffer(area)
    header.size = context.nested_size
    vcpu.ioctl(abi.KVM_GET_NESTED_STATE, area)
    return bytes(area)[: header.size]


def _get_cpuid(vcpu: Vcpu, context: Context) -> bytes:
    return bytes(CPUID2.pack(vcpu.get_cpuid2()))


def _get_tsc_khz(vcpu: Vcpu, context: Context) -> bytes:
    return vcpu.get_tsc_khz().to_bytes(4, "little")


def _set_tsc_khz(vcpu: Vcpu, data: bytes) -> None:
    """A rate that the TSC has anyway needs no KVM_CAP_TSC_CONTROL."""
    wanted = int.from_bytes(data, "little")
    if not same_rate(wanted, vcpu.get_tsc_khz()):
        vcpu.set_tsc_khz(wanted)


def same_rate(wanted_khz: int, khz: int) -> bool:
    """Whether KVM takes both for the host's own rate, and scales neither."""
    return abs(wanted_khz - khz) * 1_000_000 <= khz * TSC_TOLERANCE_PPM


def _readable_msrs(vcpu: Vcpu, indices: Sequence[int]) -> dict[int, int]:
    """KVM_GET_MSRS ends at the first that this vCPU does not have: goes on behind it."""
    found: dict[int, int] = {}
    while indices:
        some = vcpu.get_msrs(indices[:MSRS_AT_ONCE])
        found |= some
        skipped = len(some) < min(len(indices), MSRS_AT_ONCE)
        indices = indices[len(some) + skipped :]
    return found


def _get_msrs(vcpu: Vcpu, context: Context) -> bytes:
    banks = vcpu.get_msrs((MSR_IA32_MCG_CAP,)).get(MSR_IA32_MCG_CAP, 0) & MCE_BANKS
    machine_checks = range(MSR_IA32_MC0_CTL, MSR_IA32_MC0_CTL + MCE_BANK_MSRS * banks)
    values = _readable_msrs(vcpu, (*context.msr_indices, *machine_checks))
    entries = [abi.kvm_msr_entry(index=i, data=value) for i, value in values.items()]
    return bytes(MSRS.pack(entries))


def _unpack_msrs(data: bytes) -> dict[int, int]:
    raw = (ctypes.c_ubyte * len(data)).from_buffer_copy(data)
    return {entry.index: entry.data for entry in MSRS.unpack(raw)}


def _set_msrs(vcpu: Vcpu, data: bytes) -> None:
    """Those that are not what they should be already: some cannot be written at all. Time is
    `_restore_time`'s.
    """
    wanted = _unpack_msrs(data)
    for index in (MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE):
        wanted.pop(index, None)
    here = _readable_msrs(vcpu, tuple(wanted))
    changed = {i: value for i, value in wanted.items() if here.get(i) != value}
    indices = list(changed)
    for start in range(0, len(indices), MSRS_AT_ONCE):
        some = indices[start : start + MSRS_AT_ONCE]
        _write_msrs(vcpu, {index: changed[index] for index in some})


def _write_msrs(vcpu: Vcpu, values: dict[int, int]) -> None:
    done = vcpu.set_msrs(values)
    if done != len(values):
        index, value = list(values.items())[done]
        raise StateError(f"KVM_SET_MSRS refused {value:#x} for MSR {index:#x}")


VCPU_PARTS = (
    Part("cpuid", _get_cpuid, lambda vcpu, data: _write(vcpu, abi.KVM_SET_CPUID2, data)),
    Part("tsc_khz", _get_tsc_khz, _set_tsc_khz),
    _struct("sregs2", abi.KVM_GET_SREGS2, abi.KVM_SET_SREGS2, abi.kvm_sregs2, lambda c: c.sregs2),
    _struct("sregs", abi.KVM_GET_SREGS, abi.KVM_SET_SREGS, abi.kvm_sregs, lambda c: not c.sregs2),
    _struct("regs", abi.KVM_GET_REGS, abi.KVM_SET_REGS, abi.kvm_regs),
    Part(
        "xsave",
        _get_xsave,
        lambda vcpu, data: _write(vcpu, abi.KVM_SET_XSAVE, data),
        lambda c: c.xsave_size > 0,
    ),
    _struct("fpu", abi.KVM_GET_FPU, abi.KVM_SET_FPU, abi.kvm_fpu, lambda c: not c.xsave_size),
    _struct("xcrs", abi.KVM_GET_XCRS, abi.KVM_SET_XCRS, abi.kvm_xcrs, lambda c: c.xsave_size > 0),
    _struct("debugregs", abi.KVM_GET_DEBUGREGS, abi.KVM_SET_DEBUGREGS, abi.kvm_debugregs),
    _struct(
        "lapic", abi.KVM_GET_LAPIC, abi.KVM_SET_LAPIC, abi.kvm_lapic_state, lambda c: c.irqchip
    ),
    Part("msrs", _get_msrs, _set_msrs),
    _struct("events", abi.KVM_GET_VCPU_EVENTS, abi.KVM_SET_VCPU_EVENTS, abi.kvm_vcpu_events),
    Part(  # the registers above are then those of the guest's guest
        "nested",
        _get_nested,
        lambda vcpu, data: _write(vcpu, abi.KVM_SET_NESTED_STATE, data),
        lambda c: c.nested_size > 0,
    ),
    _struct("mp_state", abi.KVM_GET_MP_STATE, abi.KVM_SET_MP_STATE, abi.kvm_mp_state),
)
# An INIT or a SIPI that has arrived is acted on when MP_STATE is asked for, and changes registers.
READ_FIRST = "mp_state"


def finish_exits(vcpu: Vcpu, handle: Callable[[int], object]) -> None:
    """Let the vCPU complete the instruction of its last exit, on the thread that runs it.

    `handle` is given the reason of each further exit that the instruction takes.
    """
    vcpu.kvm_run.immediate_exit = 1
    try:
        while (reason := vcpu.run()) != abi.KVM_EXIT_INTR:
            handle(reason)
    finally:
        vcpu.kvm_run.immediate_exit = 0


def save_vcpu(vcpu: Vcpu, context: Context) -> Parts:
    """Every part of one vCPU."""
    rows = sorted(VCPU_PARTS, key=lambda row: row.name != READ_FIRST)
    return {row.name: row.get(vcpu, context) for row in rows if row.there(context)}


def restore_vcpu(vcpu: Vcpu, state: VcpuState, now: VmTime) -> None:
    """Write what `save_vcpu` read into a vCPU that has not run yet. Raises StateError."""
    khz = vcpu.get_tsc_khz()
    for row in VCPU_PARTS:
        if row.name in state.parts:
            with _naming(row.name):
                row.put(vcpu, state.parts[row.name])
        if row.name == "msrs":
            with _naming("TSC"):
                _restore_time(vcpu, state, now, khz)


@contextmanager
def _naming(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StateError(f"KVM refused the state's {name}: {error}") from error


# Time.


@dataclass(frozen=True, slots=True)
class VmTime:
    """The VM's clock after it was set, and how far it has run since the state was taken."""

    clock: abi.kvm_clock_data
    passed_ns: int

    @property
    def host_tsc(self) -> int | None:
        """The host's TSC at `clock`."""
        return self.clock.host_tsc if self.clock.flags & abi.KVM_CLOCK_HOST_TSC else None


def _tsc_offset(vcpu: Vcpu, value: ctypes.c_uint64) -> abi.kvm_device_attr:
    return abi.kvm_device_attr(
        group=abi.KVM_VCPU_TSC_CTRL, attr=abi.KVM_VCPU_TSC_OFFSET, addr=ctypes.addressof(value)
    )


def _guest_tsc(vcpu: Vcpu, now: VmTime) -> int | None:
    """What the vCPU's TSC read at `now`, where KVM tells."""
    offset = ctypes.c_uint64()
    known = vcpu.has_device_attr(abi.KVM_VCPU_TSC_CTRL, abi.KVM_VCPU_TSC_OFFSET)
    if now.host_tsc is None or not known:
        return None
    vcpu.get_device_attr(_tsc_offset(vcpu, offset))
    return now.host_tsc + offset.value & MASK64


def _unscaled_tsc(vcpu: Vcpu, parts: Parts, now: VmTime) -> int | None:
    """`_guest_tsc` where the TSC is the host's plus an offset: then it is near what was read."""
    tsc, khz = _guest_tsc(vcpu, now), vcpu.get_tsc_khz()
    read = _unpack_msrs(parts["msrs"])[MSR_IA32_TSC]
    return tsc if tsc is not None and 0 <= tsc - read < khz * 1000 else None


def _restore_time(vcpu: Vcpu, state: VcpuState, now: VmTime, khz: int) -> None:
    """The TSC, to the tick where it is the host's plus an offset, so that it has counted exactly
    what the clock has; then the deadline that is compared with it. `khz` is the host's rate.
    """
    msrs = state.msrs
    scaled = not same_rate(int.from_bytes(state.parts["tsc_khz"], "little"), khz)
    # Not enough alone: KVM takes a value that is near what the other vCPUs count for theirs.
    _write_msrs(vcpu, {MSR_IA32_TSC: msrs[MSR_IA32_TSC]})
    if state.tsc is not None and not scaled and _guest_tsc(vcpu, now) is not None:
        assert now.host_tsc is not None
        tsc = state.tsc + now.passed_ns * khz // 1_000_000
        offset = ctypes.c_uint64(tsc - now.host_tsc & MASK64)
        vcpu.set_device_attr(_tsc_offset(vcpu, offset))
    if MSR_IA32_TSC_DEADLINE in msrs:
        _write_msrs(vcpu, {MSR_IA32_TSC_DEADLINE: msrs[MSR_IA32_TSC_DEADLINE]})


# The VM.


def _get_chip(vm: Vm, chip_id: int) -> bytes:
    return bytes(vm.get_irqchip(chip_id))


def has_irqchip(vm: Vm) -> bool:
    """Whether the 8259s and the I/O APIC are KVM's."""
    try:
        vm.get_irqchip(abi.KVM_IRQCHIP_IOAPIC)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True


def has_lapic(vcpu: Vcpu) -> bool:
    """Whether the local APIC is KVM's, as it also is with a split irqchip."""
    try:
        vcpu.get_lapic()
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def has_pit(vm: Vm) -> bool:
    """Whether the timer is KVM's."""
    try:
        vm.get_pit2()
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return False
    return True


def save(kvm: Kvm, vm: Vm, vcpus: Sequence[Vcpu]) -> VmState:
    """Read everything. No vCPU may be running, and none may have an exit to complete."""
    parts: Parts = {}
    if has_irqchip(vm):
        parts = {name: _get_chip(vm, chip_id) for name, chip_id in IRQCHIPS.items()}
    if has_pit(vm):
        parts["pit2"] = bytes(vm.get_pit2())
    context = Context.of(kvm, vm, bool(vcpus) and has_lapic(vcpus[0]))
    saved = [save_vcpu(vcpu, context) for vcpu in vcpus]
    now = VmTime(vm.get_clock(), 0)
    parts["clock"] = bytes(now.clock)
    return VmState(
        parts, [VcpuState(p, _unscaled_tsc(v, p, now)) for v, p in zip(vcpus, saved, strict=True)]
    )


def restore(vm: Vm, vcpus: Sequence[Vcpu], state: VmState) -> None:
    """Write it into a new VM, which has its memory, irqchip, timer and vCPUs but has not run.

    The guest's clocks go on from where they stood. Raises StateError, after which the VM is of no
    use.
    """
    if len(vcpus) != len(state.vcpus):
        raise StateError(f"the state has {len(state.vcpus)} vCPUs, the VM has {len(vcpus)}")
    saved = abi.kvm_clock_data.from_buffer_copy(state.parts["clock"])
    with _naming("clock"):
        vm.set_clock(abi.kvm_clock_data(clock=saved.clock))
        clock = vm.get_clock()
    for vcpu, vcpu_state in zip(vcpus, state.vcpus, strict=True):
        restore_vcpu(vcpu, vcpu_state, VmTime(clock, clock.clock - saved.clock))
    # After the local APICs, which take what the chips still have to send.
    for name in IRQCHIPS:
        if name in state.parts:
            with _naming(name):
                vm.set_irqchip(abi.kvm_irqchip.from_buffer_copy(state.parts[name]))
    if "pit2" in state.parts:
        with _naming("pit2"):
            vm.set_pit2(abi.kvm_pit_state2.from_buffer_copy(state.parts["pit2"]))
