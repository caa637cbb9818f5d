"""What a processor's registers are after power-on and after INIT (SDM vol. 3, table 10-1)."""

from __future__ import annotations

from ctypes import memset, sizeof

from anykvm.cpu.state import Seg, State
from anykvm.x86.kvm_host import Request, VcpuX86
from anykvm.x86.msrs import reset_msrs, reset_pv_msrs
from anykvm.x86.processor import Cpu
from anykvm.x86.smm import reset_smm

ATTR_CODE, ATTR_DATA = 0x9B, 0x93  # present, accessed; execute/read and read/write
ATTR_LDT, ATTR_TSS32_BUSY = 0x82, 0x8B
CR0_ET, CR0_NW, CR0_CD = 1 << 4, 1 << 29, 1 << 30
DR6_INIT, DR7_INIT = 0xFFFF0FF0, 0x400
PAT_INIT = 0x0007040600070406
MXCSR_INIT, FCW_INIT = 0x1F80, 0x37F
SIGNATURE_UNKNOWN = 0x600  # of a vCPU that was given no CPUID
RESET_SELECTOR, RESET_BASE, RESET_RIP = 0xF000, 0xFFFF0000, 0xFFF0


def _segment(state: State, seg: Seg, selector: int, base: int, attr: int) -> None:
    s = state.seg[seg]
    s.selector, s.base, s.limit, s.attr = selector, base, 0xFFFF, attr


def _reset_segments(state: State) -> None:
    for seg in (Seg.ES, Seg.SS, Seg.DS, Seg.FS, Seg.GS):
        _segment(state, seg, 0, 0, ATTR_DATA)
    _segment(state, Seg.CS, RESET_SELECTOR, RESET_BASE, ATTR_CODE)
    _segment(state, Seg.LDTR, 0, 0, ATTR_LDT)
    _segment(state, Seg.TR, 0, 0, ATTR_TSS32_BUSY)
    state.gdt_base = state.idt_base = 0
    state.gdt_limit = state.idt_limit = 0xFFFF


def _reset_system(state: State, init_event: bool) -> None:
    kept = state.cr0 & (CR0_NW | CR0_CD) if init_event else CR0_NW | CR0_CD
    state.cr0 = kept | CR0_ET
    state.cr2 = state.cr3 = state.cr4 = state.cr8 = state.efer = 0
    for i in range(4):
        state.dr[i] = 0
        state.pdpte[i] = 0
    state.dr6, state.dr7 = DR6_INIT, DR7_INIT
    state.shadow = state.nmi_blocked = 0


def _reset_units(state: State) -> None:
    """What INIT leaves alone: x87, SSE, and the MSRs that the processor keeps."""
    for i in range(8):
        memset(state.st[i], 0, sizeof(state.st[i]))
    for register in state.xmm:
        memset(register, 0, sizeof(register))
    state.fpu_cw, state.fpu_sw, state.fpu_tag = FCW_INIT, 0, 0xFFFF
    state.fpu_ip = state.fpu_dp = state.fpu_op = 0
    state.mxcsr, state.xcr0, state.pat = MXCSR_INIT, 1, PAT_INIT
    state.star = state.lstar = state.cstar = state.fmask = state.kernel_gs_base = 0
    state.sysenter_cs = state.sysenter_esp = state.sysenter_eip = state.tsc_aux = 0


def reset_cpu(cpu: Cpu, init_event: bool, signature: int) -> None:
    """Power-on, or INIT with `init_event`. `signature` is CPUID 1's EAX, which RDX then holds."""
    state = cpu.state
    for i in range(16):
        state.gpr[i] = 0
    state.gpr[2] = signature
    state.rip = RESET_RIP
    cpu.rflags = 2
    _reset_segments(state)
    _reset_system(state, init_event)
    if not init_event:
        _reset_units(state)
    cpu.svm.reset()
    cpu.debug.drop_trap()
    cpu.debug.changed()
    cpu.mode_changed()
    cpu.flush_tlb()


def start_at_vector(cpu: Cpu, vector: int) -> None:
    """Where a start-up IPI sends a processor that waits for it: real mode, page `vector`."""
    _segment(cpu.state, Seg.CS, vector << 8, vector << 12, ATTR_CODE)
    cpu.state.rip = 0
    cpu.mode_changed()


def kvm_vcpu_reset(vcpu: VcpuX86, init_event: bool) -> None:
    """Power-on, or INIT with `init_event`: the processor, its local APIC and what waits for it."""
    leaf = vcpu.cpuid.find(1)
    vcpu.nmi_pending = 0
    vcpu.injected_vector = None
    vcpu.exception = None
    vcpu.pv_eoi_pending = False
    vcpu.halted_in_guest = False
    reset_smm(vcpu, init_event)
    reset_pv_msrs(vcpu)
    vcpu.requests.discard(Request.TRIPLE_FAULT)
    reset_cpu(vcpu.cpu, init_event, leaf.eax if leaf is not None else SIGNATURE_UNKNOWN)
    if not init_event:
        reset_msrs(vcpu)
    elif vcpu.apic is not None:
        with vcpu.kvm.irqchip.lock:
            vcpu.apic.reset(init=True)
    vcpu.requests.add(Request.EVENT)
