"""anykvm: KVM in Python, with a software x86-64 processor where the hardware has none."""

__version__ = "0.1.0"
