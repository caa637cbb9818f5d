"""Files, inodes and operations: what stands between a descriptor and the object behind it.

open close dup ioctl compat_ioctl mmap munmap poll read write lseek fsync fdinfo    system calls
anon_inode_getfd register_chrdev misc_register FileOperations File Inode Module     for drivers
current copy_from_user copy_to_user UserMemory                                       user memory
"""

from anykvm.fs.anon_inodes import anon_inode_getfd, anon_inode_getfile
from anykvm.fs.backend import Choice, choose, hardware_virtualization
from anykvm.fs.char_dev import (
    KVM_MINOR,
    MISC_DYNAMIC_MINOR,
    MISC_MAJOR,
    CharDevice,
    MiscDevice,
    misc_deregister,
    misc_register,
    mknod,
    register_chrdev,
    unlink,
    unregister_chrdev,
)
from anykvm.fs.fdtable import FILES, exit_files, fd_install, fget
from anykvm.fs.file import ABSENT, File, FileOperations, Inode, VmArea, fput, get_file
from anykvm.fs.ioctl import compat_ptr, compat_ptr_ioctl
from anykvm.fs.mapping import (
    MAP_ANONYMOUS,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PAGE_SIZE,
    PROT_READ,
    PROT_WRITE,
    Mapping,
    Memfd,
)
from anykvm.fs.module import Module, request_module
from anykvm.fs.syscalls import (
    close,
    compat_ioctl,
    dup,
    fdinfo,
    fsync,
    getfl,
    ioctl,
    lseek,
    mmap,
    munmap,
    open,
    poll,
    read,
    set_flags,
    write,
)
from anykvm.fs.task import Cred, Task, as_current, copy_from_user, copy_to_user, current
from anykvm.fs.uaccess import UserMemory, access_ok
from anykvm.fs.vfs import noop_llseek

__all__ = [
    "ABSENT",
    "FILES",
    "KVM_MINOR",
    "MAP_ANONYMOUS",
    "MAP_NORESERVE",
    "MAP_PRIVATE",
    "MAP_SHARED",
    "MISC_DYNAMIC_MINOR",
    "MISC_MAJOR",
    "PAGE_SIZE",
    "PROT_READ",
    "PROT_WRITE",
    "CharDevice",
    "Choice",
    "Cred",
    "File",
    "FileOperations",
    "Inode",
    "Mapping",
    "Memfd",
    "MiscDevice",
    "Module",
    "Task",
    "UserMemory",
    "VmArea",
    "access_ok",
    "anon_inode_getfd",
    "anon_inode_getfile",
    "as_current",
    "choose",
    "close",
    "compat_ioctl",
    "compat_ptr",
    "compat_ptr_ioctl",
    "copy_from_user",
    "copy_to_user",
    "current",
    "dup",
    "exit_files",
    "fd_install",
    "fdinfo",
    "fget",
    "fput",
    "fsync",
    "get_file",
    "getfl",
    "hardware_virtualization",
    "ioctl",
    "lseek",
    "misc_deregister",
    "misc_register",
    "mknod",
    "mmap",
    "munmap",
    "noop_llseek",
    "open",
    "poll",
    "read",
    "register_chrdev",
    "request_module",
    "set_flags",
    "unlink",
    "unregister_chrdev",
    "write",
]
