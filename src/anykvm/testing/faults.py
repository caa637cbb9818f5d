"""`Faults`: the rules of one test, and the record of what was called."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Self

from anykvm.fs.intercept import Interceptor, IoctlCall, Proceed, intercepted, through_all
from anykvm.testing.hiding import (
    CpuidBit,
    HiddenCapability,
    HiddenCpuid,
    cpuid_bit,
    lesser_processor,
)
from anykvm.testing.interrupts import ShortRuns, spurious_interrupt
from anykvm.testing.record import Call, record
from anykvm.testing.rules import Act, Rule, capability_number, ioctl_number

KVMIO = 0xAE

Calls = int | Collection[int] | None


class Faults:
    """A context manager. Rules may be added before and inside of the `with`; all end with it.

    `calls` is every ioctl of KVM since then, in the order in which they returned; without
    `recording`, as befits a long run, it stays empty.
    """

    def __init__(self, recording: bool = True) -> None:
        self.calls: list[Call] = []
        self._recording = recording
        self._interceptors: list[Interceptor] = []
        self._stack = ExitStack()
        self._adding = threading.Lock()

    def __enter__(self) -> Self:
        self._stack.enter_context(intercepted(self._intercept))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()

    def _intercept(self, call: IoctlCall, proceed: Proceed) -> int:
        if call.cmd >> 8 & 0xFF != KVMIO:
            return proceed()
        if not self._recording:
            return through_all(self._interceptors, call, proceed)
        return record(self.calls, call, partial(through_all, self._interceptors, call, proceed))

    def _add(self, interceptor: Interceptor) -> None:
        with self._adding:
            self._interceptors = [*self._interceptors, interceptor]

    # Rules

    def on(
        self,
        ioctl: str,
        act: Act,
        *,
        call: Calls = None,
        every: int | None = None,
        times: int | None = None,
    ) -> Rule:
        """Let `act(call, proceed)` answer calls of `ioctl` (a name of linux/kvm.h).

        Which: every one, or the nth since now (`call=2`, `call=(2, 5)`), or each nth (`every=10`);
        at most `times` of them. The rule tells how many it has `seen` and `applied` to.
        """
        rule = Rule(ioctl_number(ioctl), act, call, every, times)
        self._add(rule)
        return rule

    def fail(
        self,
        ioctl: str,
        error: int,
        *,
        call: Calls = None,
        every: int | None = None,
        times: int | None = None,
    ) -> Rule:
        """Make `ioctl` fail with errno `error` without having done anything."""

        def act(_: IoctlCall, __: Proceed) -> int:
            raise OSError(error, f"{os.strerror(error)}: made to fail")

        return self.on(ioctl, act, call=call, every=every, times=times)

    def delay(
        self,
        ioctl: str,
        seconds: float,
        *,
        call: Calls = None,
        every: int | None = None,
        times: int | None = None,
    ) -> Rule:
        """Make `ioctl` begin `seconds` later."""

        def act(_: IoctlCall, proceed: Proceed) -> int:
            time.sleep(seconds)
            return proceed()

        return self.on(ioctl, act, call=call, every=every, times=times)

    def interrupt(
        self, *, call: Calls = None, every: int | None = None, times: int | None = None
    ) -> Rule:
        """Make KVM_RUN return EINTR with KVM_EXIT_INTR at once, as if a signal had come."""
        return self.on("KVM_RUN", spurious_interrupt, call=call, every=every, times=times)

    def short_runs(self, seconds: float) -> None:
        """End each KVM_RUN after about `seconds` by a real signal; a sleeping guest, too.

        Main thread only. RuntimeError elsewhere.
        """
        runs = ShortRuns(seconds)
        self._stack.callback(runs.close)
        self._add(runs)

    def hide_capability(self, cap: str | int) -> None:
        """A KVM without this capability ("KVM_CAP_IRQFD", or just "IRQFD") and its ioctls."""
        self._add(HiddenCapability(capability_number(cap)))

    def hide_cpuid(self, feature: str | CpuidBit) -> None:
        """A processor without this feature: its name in /proc/cpuinfo, or (leaf, register, bit)."""
        self._add(HiddenCpuid(cpuid_bit(feature) if isinstance(feature, str) else feature))

    def cpu_model(self, name: str) -> None:
        """A processor that has no more than "x86-64-v1" or another model of x86/cpu_models.py."""
        self._add(lesser_processor(name))

    # The record

    def made(self, ioctl: str) -> list[Call]:
        """The calls of one ioctl."""
        ioctl_number(ioctl)
        return [call for call in self.calls if call.name == ioctl]

    def count(self, ioctl: str) -> int:
        """How often an ioctl was called."""
        return len(self.made(ioctl))
