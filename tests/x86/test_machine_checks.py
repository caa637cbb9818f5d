"""Machine checks: registers, errors that the VMM reports, and how the guest hears of them."""

from __future__ import annotations

import errno

import pytest

from anykvm.cpu.state import Exit
from anykvm.uapi import kvm as uapi
from anykvm.x86 import mce

from .fake_engine import rdmsr, wrmsr
from .machine import machine

CR4_MCE = 1 << 6
CAP = mce.MCE_CAP_SUPPORTED | 4
VAL, OVER, UC = mce.MCI_STATUS_VAL, mce.MCI_STATUS_OVER, mce.MCI_STATUS_UC
PCC, S = mce.MCI_STATUS_PCC, mce.MCI_STATUS_S
BANK1_STATUS = 0x405
ALL_ONES = (1 << 64) - 1


def refused(function, *args) -> None:
    with pytest.raises(OSError, match=f"Errno {errno.EINVAL}]"):
        function(*args)


def a_vcpu(m, cap: int = CAP, cr4: int = CR4_MCE):
    vcpu = m.add_vcpu()
    vcpu.setup_mce(cap)
    sregs = vcpu.get_sregs()
    sregs.cr4 = cr4
    vcpu.set_sregs(sregs)
    return vcpu


def record(vcpu, bank: int = 1) -> list[int]:
    first = 0x400 + 4 * bank
    return [vcpu.get_msrs([first + n])[first + n] for n in (1, 2, 3)]


def error(status: int, mcg_status: int = 0, bank: int = 1) -> uapi.kvm_x86_mce:
    return uapi.kvm_x86_mce(status=status, addr=0x1234, misc=0x8C, mcg_status=mcg_status, bank=bank)


def test_what_there_is():
    with machine() as m:
        assert m.kvm.mce_cap_supported() == mce.MCE_CAP_SUPPORTED
        vcpu = m.add_vcpu()
        assert vcpu.get_msrs([0x179]) == {0x179: 32}
        vcpu.setup_mce(CAP)
        assert vcpu.get_msrs([0x179, 0x17B, 0x400, 0x404, 0x40C]) == {
            0x179: CAP,
            **dict.fromkeys((0x17B, 0x400, 0x404, 0x40C), ALL_ONES),
        }
        assert vcpu.get_msrs([0x410]) == {}  # the fifth bank
        assert vcpu.set_msrs({0x410: 0}) == 0
        for wrong in (0, 33, CAP | 1 << 40):
            refused(vcpu.setup_mce, wrong)


def test_uncorrected_errors_raise_mc():
    with machine() as m:
        vcpu = a_vcpu(m)
        vcpu.set_mce(error(VAL | UC | PCC, mcg_status=5))
        assert record(vcpu) == [VAL | UC | PCC, 0x1234, 0x8C]
        assert vcpu.get_msrs([0x17A]) == {0x17A: 5}
        m.cpu().script.append(Exit.HLT)
        vcpu.run()
        assert m.cpu().did("exception") == [("exception", 18, None)]
        vcpu.set_msrs({0x17A: 0})
        vcpu.set_mce(error(VAL | UC | S, mcg_status=5))
        assert record(vcpu)[0] == VAL | UC | S | OVER


@pytest.mark.parametrize(("cr4", "status"), [(0, 0), (CR4_MCE, 4)], ids=["cr4.mce", "mcip"])
def test_without_a_way_to_take_it_the_processor_shuts_down(cr4, status):
    with machine() as m:
        vcpu = a_vcpu(m, cr4=cr4)
        vcpu.set_msrs({0x17A: status})
        vcpu.set_mce(error(VAL | UC | PCC, mcg_status=5))
        assert record(vcpu) == [0, 0, 0]
        assert vcpu.run() == uapi.KVM_EXIT_SHUTDOWN


@pytest.mark.parametrize("register", [0x17B, 0x404], ids=["mcg_ctl", "mc1_ctl"])
def test_reporting_can_be_disabled(register):
    with machine() as m:
        vcpu = a_vcpu(m)
        vcpu.set_msrs({register: 0})
        vcpu.set_mce(error(VAL | UC | PCC, mcg_status=5))
        assert record(vcpu) == [0, 0, 0]
        m.cpu().script.append(Exit.HLT)
        vcpu.run()
        assert not m.cpu().did("exception")


def test_corrected_errors_are_only_recorded():
    with machine() as m:
        vcpu = a_vcpu(m)
        vcpu.set_mce(error(VAL | 0x9))
        assert record(vcpu) == [VAL | 0x9, 0x1234, 0x8C]
        vcpu.set_mce(error(VAL | 0xA))
        assert record(vcpu)[0] == VAL | OVER | 0xA
        vcpu.set_msrs({BANK1_STATUS: VAL | UC})
        vcpu.set_mce(error(VAL | 0xB))
        assert record(vcpu)[0] == VAL | UC | OVER


def test_errors_without_need_for_action_interrupt():
    """UCNA: by CMCI, where the guest has enabled it."""
    with machine(irqchip=True) as m:
        vcpu = a_vcpu(m)
        lapic = vcpu.get_lapic()
        assert (lapic.regs[0x32], lapic.regs[0x2F2]) == (6, 1)  # seven entries; masked
        lapic.regs[0x2F0], lapic.regs[0x2F2] = 0x41, 0
        lapic.regs[0xF1] = 1  # the APIC is enabled
        vcpu.set_lapic(lapic)
        vcpu.set_mce(error(VAL | UC))
        assert record(vcpu) == [VAL | UC, 0x1234, 0x8C]
        assert vcpu.get_lapic().regs[0x220] & 2 == 0
        assert vcpu.set_msrs({0x281: 1 << 30}) == 1
        vcpu.set_mce(error(VAL | UC))
        assert vcpu.get_lapic().regs[0x220] & 2


def test_errors_that_cannot_be():
    with machine() as m:
        vcpu = a_vcpu(m)
        refused(vcpu.set_mce, error(VAL, bank=4))
        refused(vcpu.set_mce, error(UC))


@pytest.mark.parametrize(
    ("index", "value", "allowed"),
    [
        (0x404, ALL_ONES, True),
        (0x404, ALL_ONES & ~(1 << 10), True),
        (0x404, 1, False),
        (BANK1_STATUS, 0, True),
        (BANK1_STATUS, 1, False),
        (0x17B, 5, False),
        (0x281, 1 << 30 | 0x7FFF, True),
        (0x281, 1 << 31, False),
        (0x4D0, 1, False),
        (0x3A, 1 << 20 | 1, True),
        (0x3A, 1 << 2, False),
        (0x179, 4, False),
    ],
)
def test_what_a_guest_may_write(index, value, allowed):
    with machine() as m:
        vcpu = a_vcpu(m)
        m.cpu().script += [wrmsr(index, value), Exit.HLT]
        vcpu.run()
        assert m.cpu().did("msr", "exception") == (
            [("msr", None)] if allowed else [("exception", 13, 0)]
        )


def test_local_machine_checks_need_the_firmwares_consent():
    with machine() as m:
        vcpu = a_vcpu(m)
        m.cpu().script += [
            *(rdmsr(0x4D0), wrmsr(0x3A, 1 << 20 | 1), wrmsr(0x3A, 1)),
            *(wrmsr(0x4D0, 1), wrmsr(0x4D0, 2), rdmsr(0x4D0), Exit.HLT),
        ]
        vcpu.run()
        gp, done = ("exception", 13, 0), ("msr", None)
        expected = [gp, done, gp, done, gp, ("msr", 1)]
        assert m.cpu().did("msr", "exception") == expected
