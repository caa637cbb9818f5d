"""A client's handlers of kicks restart the calls that they interrupt (sigaction(2)).

In the kernel only KVM_RUN ends for a signal: no VMM expects EINTR of KVM_SMI or KVM_IRQ_LINE; QEMU
loses an SMI by it, or gives up. Under the filter each call waits until we receive it, and a signal
that comes before is the kernel's alone: only a handler with SA_RESTART has the call made again. So
handlers get that flag where it can lose no kick: in a client that has asked for
KVM_CAP_IMMEDIATE_EXIT, by which the KVM_RUN that is made again returns at once.
"""

from __future__ import annotations

from struct import Struct

from anykvm.fs.uaccess import UserMemory

SA_RESTART = 0x10000000
HANDLER_AND_FLAGS = Struct("=QQ")
"""Where the kernel's struct sigaction begins."""
NO_HANDLERS = (0, 1)  # SIG_DFL, SIG_IGN


def restart_calls(mm: UserMemory, address: int) -> None:
    """Add SA_RESTART to a handler that is being installed. OSError where it is in no memory that
    can be written to.
    """
    handler, flags = HANDLER_AND_FLAGS.unpack(mm.read(address, HANDLER_AND_FLAGS.size))
    if handler not in NO_HANDLERS and not flags & SA_RESTART:
        mm.write(address, HANDLER_AND_FLAGS.pack(handler, flags | SA_RESTART))
