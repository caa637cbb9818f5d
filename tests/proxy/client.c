/* A KVM client in C, for a static and a dynamic build: its guest writes "Hi" to a port and halts. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

static const unsigned char code[] = {
	0xba, 0x10, 0x00, /* mov dx, 16 */
	0xb0, 'H', 0xee, 0xb0, 'i', 0xee, /* mov al, 'H'; out dx, al; ... */
	0xf4, /* hlt */
};

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	unsigned char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	memcpy(memory + 0x1000, code, sizeof(code));
	struct kvm_userspace_memory_region region = {
		.memory_size = 1 << 20, .userspace_addr = (unsigned long)memory,
	};
	if (ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region)) {
		perror("KVM_SET_USER_MEMORY_REGION");
		return 1;
	}
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	struct kvm_run *run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0),
				   PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	struct kvm_sregs sregs;
	ioctl(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = sregs.cs.selector = 0;
	ioctl(vcpu, KVM_SET_SREGS, &sregs);
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	ioctl(vcpu, KVM_SET_REGS, &regs);
	while (!ioctl(vcpu, KVM_RUN, 0) && run->exit_reason == KVM_EXIT_IO)
		putchar(((char *)run)[run->io.data_offset]);
	putchar('\n');
	return run->exit_reason != KVM_EXIT_HLT;
}
