"""x87, SSE and extended state in the ABI's formats: KVM_GET/SET_FPU, XSAVE, XSAVE2, XCRS (SDM vol.
1, 10.5 and 13.4).

FXSAVE's image counts x87 registers from the top of the stack and has one tag bit a register; the
processor has them in physical order with two tag bits.
"""

from __future__ import annotations

import struct
from ctypes import memmove
from errno import EINVAL

from anykvm.cpu.state import State
from anykvm.kvm.errors import fail
from anykvm.kvm.ioctl import In, Out
from anykvm.uapi import kvm as uapi
from anykvm.x86.cpuid import FEATURES
from anykvm.x86.kvm_host import VcpuX86
from anykvm.x86.reset import FCW_INIT, MXCSR_INIT
from anykvm.x86.tables import vcpu_ioctls

FSW_FLAGS, FSW_SUMMARY = 0x3F, 0x8080  # the six exceptions; ES and B
FXSAVE_HEADER = struct.Struct("<HHBxHQQII")
FXSAVE_SIZE, XMM_OFFSET = 512, 160
XSAVE_HEADER_OFFSET, YMM_OFFSET = 512, 576
MXCSR_MASK = 0xFFFF
XFEATURE_FP, XFEATURE_SSE, XFEATURE_YMM = 1, 2, 4
EMPTY, VALID, ZERO, SPECIAL = 3, 0, 1, 2
HAS_AVX = any(f.name == "avx" and f.on for f in FEATURES)
XCR0_SUPPORTED = XFEATURE_FP | XFEATURE_SSE | (XFEATURE_YMM if HAS_AVX else 0)
XSAVE_SIZE = 4096


def _top(state: State) -> int:
    return state.fpu_sw >> 11 & 7


def abridged_tag(state: State) -> int:
    """FXSAVE's tag byte: a bit for each physical register that is not empty."""
    return sum(1 << i for i in range(8) if state.fpu_tag >> 2 * i & 3 != EMPTY)


def _classify(register: bytes) -> int:
    mantissa, exponent = struct.unpack_from("<QH", register)
    if exponent & 0x7FFF == 0:
        return SPECIAL if mantissa else ZERO
    normal = mantissa >> 63 and exponent & 0x7FFF != 0x7FFF
    return VALID if normal else SPECIAL


def full_tag(state: State, abridged: int) -> int:
    """The tag word, from what the registers hold."""
    tags = (_classify(bytes(state.st[i])) if abridged >> i & 1 else EMPTY for i in range(8))
    return sum(tag << 2 * i for i, tag in enumerate(tags))


def _get_stack(state: State) -> list[bytes]:
    return [bytes(state.st[_top(state) + i & 7][:10]).ljust(16, b"\0") for i in range(8)]


def _summarized(fsw: int, fcw: int) -> int:
    """A status word whose ES and B say whether its flags are unmasked, as the unit keeps them."""
    pending = fsw & ~fcw & FSW_FLAGS
    return fsw & ~FSW_SUMMARY | (FSW_SUMMARY if pending else 0)


def _set_x87(state: State, control: tuple[int, ...], stack: list[bytes]) -> None:
    """`control` is FCW, FSW, abridged tag, opcode, instruction and data pointer."""
    fcw, fsw, abridged, state.fpu_op, state.fpu_ip, state.fpu_dp = control
    state.fpu_cw, state.fpu_sw = fcw, _summarized(fsw, fcw)
    for i, register in enumerate(stack):
        memmove(state.st[_top(state) + i & 7], register[:10].ljust(16, b"\0"), 16)
    state.fpu_tag = full_tag(state, abridged)


def _set_mxcsr(vcpu: VcpuX86, value: int) -> None:
    vcpu.state.mxcsr = value & MXCSR_MASK
    vcpu.cpu.mode_changed()


def fxsave(state: State) -> bytes:
    """The 512 bytes of FXSAVE64."""
    image = FXSAVE_HEADER.pack(
        state.fpu_cw,
        state.fpu_sw,
        abridged_tag(state),
        state.fpu_op,
        state.fpu_ip,
        state.fpu_dp,
        state.mxcsr,
        MXCSR_MASK,
    )
    image += b"".join(_get_stack(state))
    image += b"".join(bytes(state.xmm[i][:16]) for i in range(16))
    return image.ljust(FXSAVE_SIZE, b"\0")


def xsave(state: State) -> bytes:
    """The standard format, every supported component in use."""
    header = struct.pack("<Q", XCR0_SUPPORTED).ljust(64, b"\0")
    upper = b"".join(bytes(state.xmm[i][16:32]) for i in range(16)) if HAS_AVX else b""
    return (fxsave(state) + header + upper).ljust(XSAVE_SIZE, b"\0")


def _pieces(raw: bytes, offset: int, count: int) -> list[bytes]:
    return [raw[offset + 16 * i : offset + 16 * (i + 1)] for i in range(count)]


def xrstor(vcpu: VcpuX86, raw: bytes) -> None:
    """Load the standard format: a component that is not in use is initialised; EINVAL."""
    state = vcpu.state
    *control, mxcsr, _ = FXSAVE_HEADER.unpack_from(raw)
    (used,) = struct.unpack_from("<Q", raw, XSAVE_HEADER_OFFSET)
    if used & ~XCR0_SUPPORTED or mxcsr & ~MXCSR_MASK:
        raise fail(EINVAL, f"XSAVE area: components {used:#x}, MXCSR {mxcsr:#x}")
    zero = [bytes(16)]
    fp = bool(used & XFEATURE_FP)
    _set_x87(
        state,
        tuple(control) if fp else (FCW_INIT, 0, 0, 0, 0, 0),
        _pieces(raw, FXSAVE_HEADER.size, 8) if fp else zero * 8,
    )
    low = _pieces(raw, XMM_OFFSET, 16) if used & XFEATURE_SSE else zero * 16
    high = _pieces(raw, YMM_OFFSET, 16) if used & XFEATURE_YMM else zero * 16
    for i in range(16):
        memmove(state.xmm[i], low[i] + high[i], 32)
    _set_mxcsr(vcpu, mxcsr if used & (XFEATURE_SSE | XFEATURE_YMM) else MXCSR_INIT)


@vcpu_ioctls.row("KVM_GET_FPU", Out(uapi.kvm_fpu))
def kvm_arch_vcpu_ioctl_get_fpu(vcpu: VcpuX86, fpu: uapi.kvm_fpu) -> None:
    """All but `mxcsr`, which Linux leaves at 0 and only KVM_GET_XSAVE has."""
    state = vcpu.state
    for i, register in enumerate(_get_stack(state)):
        memmove(fpu.fpr[i], register, 16)
    for i in range(16):
        memmove(fpu.xmm[i], state.xmm[i], 16)
    fpu.fcw, fpu.fsw, fpu.ftwx = state.fpu_cw, state.fpu_sw, abridged_tag(state)
    fpu.last_opcode, fpu.last_ip, fpu.last_dp = state.fpu_op, state.fpu_ip, state.fpu_dp


@vcpu_ioctls.row("KVM_SET_FPU", In(uapi.kvm_fpu))
def kvm_arch_vcpu_ioctl_set_fpu(vcpu: VcpuX86, fpu: uapi.kvm_fpu) -> None:
    """All but `mxcsr`, which Linux ignores here."""
    control = (fpu.fcw, fpu.fsw, fpu.ftwx, fpu.last_opcode, fpu.last_ip, fpu.last_dp)
    _set_x87(vcpu.state, control, [bytes(register) for register in fpu.fpr])
    for i in range(16):
        memmove(vcpu.state.xmm[i], fpu.xmm[i], 16)


@vcpu_ioctls.row("KVM_GET_XSAVE", Out(uapi.kvm_xsave), uapi.KVM_CAP_XSAVE)
def kvm_vcpu_ioctl_x86_get_xsave(vcpu: VcpuX86, area: uapi.kvm_xsave) -> None:
    """x87, SSE and extended state in the standard format of XSAVE."""
    memmove(area.region, xsave(vcpu.state), XSAVE_SIZE)


@vcpu_ioctls.row("KVM_GET_XSAVE2", Out(uapi.kvm_xsave), uapi.KVM_CAP_XSAVE2)
def kvm_vcpu_ioctl_x86_get_xsave2(vcpu: VcpuX86, area: uapi.kvm_xsave) -> None:
    """As KVM_GET_XSAVE: no component reaches beyond 4096 bytes."""
    memmove(area.region, xsave(vcpu.state), XSAVE_SIZE)


@vcpu_ioctls.row(
    "KVM_SET_XSAVE",
    In(uapi.kvm_xsave),
    uapi.KVM_CAP_XSAVE,
    errors={EINVAL: "components that the guest cannot have, or reserved bits of MXCSR"},
)
def kvm_vcpu_ioctl_x86_set_xsave(vcpu: VcpuX86, area: uapi.kvm_xsave) -> None:
    """Load it; components that its header does not have are initialised."""
    xrstor(vcpu, bytes(area.region))


@vcpu_ioctls.row("KVM_GET_XCRS", Out(uapi.kvm_xcrs), uapi.KVM_CAP_XCRS)
def kvm_vcpu_ioctl_x86_get_xcrs(vcpu: VcpuX86, xcrs: uapi.kvm_xcrs) -> None:
    """XCR0."""
    xcrs.nr_xcrs = 1
    xcrs.xcrs[0].xcr, xcrs.xcrs[0].value = 0, vcpu.state.xcr0


@vcpu_ioctls.row(
    "KVM_SET_XCRS",
    In(uapi.kvm_xcrs),
    uapi.KVM_CAP_XCRS,
    errors={EINVAL: "flags, too many registers, or a value that XCR0 cannot have"},
)
def kvm_vcpu_ioctl_x86_set_xcrs(vcpu: VcpuX86, xcrs: uapi.kvm_xcrs) -> None:
    """Load XCR0; entries for other registers are passed over."""
    if xcrs.nr_xcrs > uapi.KVM_MAX_XCRS or xcrs.flags:
        raise fail(EINVAL, f"KVM_SET_XCRS: {xcrs.nr_xcrs} registers, flags {xcrs.flags:#x}")
    for i in range(xcrs.nr_xcrs):
        value = xcrs.xcrs[i].value
        if xcrs.xcrs[i].xcr:
            continue  # the kernel knows XCR0 alone, and looks for it
        ymm_alone = value & XFEATURE_YMM and not value & XFEATURE_SSE
        if not value & XFEATURE_FP or value & ~XCR0_SUPPORTED or ymm_alone:
            raise fail(EINVAL, f"KVM_SET_XCRS: XCR0 cannot be {value:#x}")
        vcpu.state.xcr0 = value
        vcpu.cpu.mode_changed()
