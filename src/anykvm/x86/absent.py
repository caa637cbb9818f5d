"""The ioctls of linux/kvm.h that x86 never had, has no longer, or that are not built in here, each
with the errno that Linux 6.1 gives for it and why. What may still come is marked beside its table.

A VM's descriptor answers ENOTTY, /dev/kvm and a vCPU's EINVAL, for what they do not know.
"""

from __future__ import annotations

from errno import EINVAL, ENOTTY

from anykvm.x86.tables import dev_ioctls, vcpu_ioctls, vm_ioctls

# Of /dev/kvm.
dev_ioctls.mark_absent(EINVAL, "KVM_S390_ENABLE_SIE", why="other architecture: s390")
dev_ioctls.mark_absent(EINVAL, "KVM_PPC_GET_CPU_CHAR", why="other architecture: powerpc")
dev_ioctls.mark_absent(EINVAL, "KVM_ARM_PREFERRED_TARGET", why="other architecture: arm")

# Of a VM.
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_SET_MEMORY_REGION",
    "KVM_SET_MEMORY_ALIAS",
    why="obsolete: KVM_SET_USER_MEMORY_REGION",
)
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_ASSIGN_PCI_DEVICE",
    "KVM_ASSIGN_IRQ",
    "KVM_ASSIGN_DEV_IRQ",
    "KVM_DEASSIGN_PCI_DEVICE",
    "KVM_DEASSIGN_DEV_IRQ",
    "KVM_ASSIGN_SET_MSIX_NR",
    "KVM_ASSIGN_SET_MSIX_ENTRY",
    "KVM_ASSIGN_SET_INTX_MASK",
    why="obsolete: device assignment is VFIO's",
)
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_XEN_HVM_GET_ATTR",
    "KVM_XEN_HVM_SET_ATTR",
    "KVM_XEN_HVM_EVTCHN_SEND",
    why="Xen",
)
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_MEMORY_ENCRYPT_OP",
    "KVM_MEMORY_ENCRYPT_REG_REGION",
    "KVM_MEMORY_ENCRYPT_UNREG_REGION",
    why="memory encryption",
)
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_S390_MEM_OP",
    "KVM_S390_GET_SKEYS",
    "KVM_S390_SET_SKEYS",
    "KVM_S390_GET_CMMA_BITS",
    "KVM_S390_SET_CMMA_BITS",
    "KVM_S390_PV_COMMAND",
    "KVM_S390_ZPCI_OP",
    why="other architecture: s390",
)
vm_ioctls.mark_absent(
    ENOTTY,
    "KVM_CREATE_SPAPR_TCE",
    "KVM_CREATE_SPAPR_TCE_64",
    "KVM_ALLOCATE_RMA",
    "KVM_PPC_GET_PVINFO",
    "KVM_PPC_GET_SMMU_INFO",
    "KVM_PPC_ALLOCATE_HTAB",
    "KVM_PPC_GET_HTAB_FD",
    "KVM_PPC_RTAS_DEFINE_TOKEN",
    "KVM_PPC_RESIZE_HPT_PREPARE",
    "KVM_PPC_RESIZE_HPT_COMMIT",
    "KVM_PPC_CONFIGURE_V3_MMU",
    "KVM_PPC_GET_RMMU_INFO",
    "KVM_PPC_SVM_OFF",
    why="other architecture: powerpc",
)
vm_ioctls.mark_absent(
    ENOTTY, "KVM_ARM_SET_DEVICE_ADDR", "KVM_ARM_MTE_COPY_TAGS", why="other architecture: arm"
)

# Of a vCPU.
vcpu_ioctls.mark_absent(EINVAL, "KVM_DEBUG_GUEST", why="obsolete: KVM_SET_GUEST_DEBUG")
vcpu_ioctls.mark_absent(
    EINVAL,
    "KVM_GET_ONE_REG",
    "KVM_SET_ONE_REG",
    "KVM_GET_REG_LIST",
    why="other architecture: arm, powerpc, riscv, s390, mips",
)
vcpu_ioctls.mark_absent(EINVAL, "KVM_XEN_VCPU_GET_ATTR", "KVM_XEN_VCPU_SET_ATTR", why="Xen")
vcpu_ioctls.mark_absent(
    EINVAL,
    "KVM_S390_UCAS_MAP",
    "KVM_S390_UCAS_UNMAP",
    "KVM_S390_VCPU_FAULT",
    "KVM_S390_INTERRUPT",
    "KVM_S390_STORE_STATUS",
    "KVM_S390_SET_INITIAL_PSW",
    "KVM_S390_INITIAL_RESET",
    "KVM_S390_NORMAL_RESET",
    "KVM_S390_CLEAR_RESET",
    "KVM_S390_IRQ",
    "KVM_S390_SET_IRQ_STATE",
    "KVM_S390_GET_IRQ_STATE",
    "KVM_S390_PV_CPU_COMMAND",
    why="other architecture: s390",
)
vcpu_ioctls.mark_absent(EINVAL, "KVM_DIRTY_TLB", why="other architecture: powerpc")
vcpu_ioctls.mark_absent(
    EINVAL, "KVM_ARM_VCPU_INIT", "KVM_ARM_VCPU_FINALIZE", why="other architecture: arm"
)
