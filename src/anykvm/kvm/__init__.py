"""Linux's virt/kvm: descriptors, lifetimes, memory slots, eventfds, routing."""
