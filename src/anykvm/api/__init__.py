"""Kvm, Vm, Vcpu, Device: typed Python over KVM's file descriptors, soft or host."""
