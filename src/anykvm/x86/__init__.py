"""Linux's arch/x86/kvm: vCPU state, interrupt controllers, and the loop that drives the processor."""
