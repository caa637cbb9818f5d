"""The first VM of every KVM tutorial: 12 bytes of real-mode code that print 2 + 2 on a port.

python examples/first_vm.py                         whichever /dev/kvm there is
ANYKVM_BACKEND=soft python examples/first_vm.py     this package's
ANYKVM_BACKEND=host python examples/first_vm.py     the host's
"""

from anykvm.api import GuestMemory, Kvm, Vcpu
from anykvm.uapi.kvm import KVM_EXIT_HLT, KVM_EXIT_IO, KVM_EXIT_IO_OUT, kvm_regs

CODE = bytes.fromhex(
    "ba f8 03"  # mov dx, 0x3f8
    "00 d8"  # add al, bl
    "04 30"  # add al, '0'
    "ee"  # out dx, al
    "b0 0a"  # mov al, '\n'
    "ee"  # out dx, al
    "f4"  # hlt
)


def run(vcpu: Vcpu) -> None:
    """Print what the guest writes to 0x3f8 until it halts."""
    while (reason := vcpu.run()) != KVM_EXIT_HLT:
        io = vcpu.kvm_run.io
        if reason != KVM_EXIT_IO or (io.direction, io.port) != (KVM_EXIT_IO_OUT, 0x3F8):
            raise SystemExit(f"first_vm: did not expect exit {reason}")
        print(bytes(vcpu.io_data()).decode(), end="")


with Kvm() as kvm, kvm.create_vm() as vm:
    memory = GuestMemory(0x1000, addr=0x1000)
    memory.write(0x1000, CODE)
    vm.add_memory(0, memory)
    with vm.create_vcpu(0) as vcpu:
        sregs = vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        vcpu.set_sregs(sregs)
        vcpu.set_regs(kvm_regs(rip=0x1000, rax=2, rbx=2, rflags=2))
        run(vcpu)
