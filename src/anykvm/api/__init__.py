"""The typed Python API over KVM's descriptors: `Kvm`, `Vm`, `Vcpu`, `Device`, `GuestMemory`.

    with Kvm() as kvm, kvm.create_vm() as vm:
        vm.add_memory(0, GuestMemory(0x10000))
        with vm.create_vcpu(0) as vcpu:
            reason = vcpu.run()

The same on this package's /dev/kvm and on the host's.
"""

from anykvm.api.descriptor import Descriptor
from anykvm.api.device import Device
from anykvm.api.memory import GuestMemory
from anykvm.api.stats import Stat, Stats, StatsFd, StatType, StatUnit
from anykvm.api.system import Kvm
from anykvm.api.vcpu import Vcpu
from anykvm.api.vm import Vm

__all__ = [
    "Descriptor",
    "Device",
    "GuestMemory",
    "Kvm",
    "Stat",
    "StatType",
    "StatUnit",
    "Stats",
    "StatsFd",
    "Vcpu",
    "Vm",
]
