/* A KVM client that times its calls, in nanoseconds: first `calls` times KVM_CHECK_EXTENSION, then as
 * many port writes of its guest, each an exit from KVM_RUN and back. Prints one number a line. */

#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static const unsigned char code[] = {
	0xba, 0x10, 0x00, /* mov dx, 16 */
	0xee, 0xeb, 0xfd, /* 1: out dx, al; jmp 1b */
};

static long now(void)
{
	struct timespec time;
	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void measure(long calls, int fd, unsigned long command, unsigned long argument)
{
	for (long n = 0; n < calls; n++) {
		long start = now();
		if (ioctl(fd, command, argument) < 0) {
			perror("ioctl");
			exit(1);
		}
		printf("%ld\n", now() - start);
	}
}

int main(int argc, char **argv)
{
	long calls = argc > 1 ? atol(argv[1]) : 1000;
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm = ioctl(kvm, KVM_CREATE_VM, 0);
	unsigned char *memory = mmap(NULL, 1 << 20, PROT_READ | PROT_WRITE,
				     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct kvm_userspace_memory_region region = {
		.memory_size = 1 << 20, .userspace_addr = (unsigned long)memory,
	};
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	struct kvm_sregs sregs;

	memcpy(memory + 0x1000, code, sizeof(code));
	if (kvm < 0 || vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region)) {
		perror("/dev/kvm");
		return 1;
	}
	int vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	ioctl(vcpu, KVM_GET_SREGS, &sregs);
	sregs.cs.base = sregs.cs.selector = 0;
	ioctl(vcpu, KVM_SET_SREGS, &sregs);
	ioctl(vcpu, KVM_SET_REGS, &regs);
	measure(calls, kvm, KVM_CHECK_EXTENSION, KVM_CAP_USER_MEMORY);
	measure(calls, vcpu, KVM_RUN, 0);
	return 0;
}
