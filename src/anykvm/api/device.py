"""Device attributes, and the devices that KVM_CREATE_DEVICE makes (`kvm/devices` in the manual)."""

from __future__ import annotations

from anykvm.api.descriptor import Descriptor, Set
from anykvm.uapi import kvm as abi


class Attributes(Descriptor):
    """Descriptors that know KVM_{SET,GET,HAS}_DEVICE_ATTR: devices, but vCPUs and /dev/kvm too."""

    set_device_attr = Set(abi.KVM_SET_DEVICE_ATTR, abi.kvm_device_attr)
    get_device_attr = Set(abi.KVM_GET_DEVICE_ATTR, abi.kvm_device_attr)

    def has_device_attr(self, group: int, attr: int) -> bool:
        """Whether there is such an attribute."""
        try:
            self.ioctl(abi.KVM_HAS_DEVICE_ATTR, abi.kvm_device_attr(group=group, attr=attr))
        except OSError:
            return False
        return True


class Device(Attributes):
    """A device inside a VM."""
