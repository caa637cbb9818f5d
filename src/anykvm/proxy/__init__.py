"""Other programs' /dev/kvm: runs an unmodified VMM and answers its KVM calls from here.

The program runs under a seccomp filter that hands a few system calls to us (seccomp_unotify(2)).
We answer them with the file operations that every other caller gets; what is added here is another
process's address space and descriptors.
"""
