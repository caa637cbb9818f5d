"""The ABI of linux/kvm.h, generated from the kernel's headers."""
