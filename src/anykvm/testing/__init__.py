"""A KVM that fails on purpose: a tool for those who test a VMM.

    from anykvm.testing import Faults

    with Faults() as faults:
        faults.fail("KVM_CREATE_VCPU", errno.ENOMEM, call=2)
        faults.hide_capability("KVM_CAP_IRQFD")
        faults.hide_cpuid("x2apic")
        faults.interrupt(every=10)
        ...
        assert faults.count("KVM_RUN") == 3

Everything works on both backends, in all threads of the process, for as long as the `with` lasts.
With pytest, the fixture `kvm_faults` is such a `Faults` (plugin.py).
"""

from anykvm.testing.faults import Faults
from anykvm.testing.record import Call

__all__ = ["Call", "Faults"]
