"""One run of a guest for the command line: kernel and initramfs, machine, console, and its end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from anykvm import fs
from anykvm.cli.console import Console
from anykvm.cli.errors import CommandError, Status
from anykvm.cli.progress import ProgressLine
from anykvm.vmm.boot import Boot, BootOptions
from anykvm.vmm.bzimage import BootError
from anykvm.vmm.demo import CPUS, Demo, DemoError, DemoOptions
from anykvm.vmm.exit_port import EXIT_PORT
from anykvm.vmm.images import ImageError, Images, obtain
from anykvm.vmm.initramfs import Guest, build
from anykvm.vmm.machine import Machine, MachineError, RunResult
from anykvm.vmm.outcome import Outcome, OutcomeKind
from anykvm.vmm.terminal import (
    EndedBySignal,
    Keyboard,
    ending_signals,
    is_terminal,
    raw_mode,
    size_of,
)

STDIN, STDOUT = 0, 1
MIB = 1 << 20


@dataclass(frozen=True)
class Choices:
    """The command line, as it was given."""

    kernel: Path | None
    initrd: Path | None
    append: str
    memory: int
    cpus: int
    backend: str
    command: str | None
    timeout: float | None
    demo: bool = False

    @property
    def interactive(self) -> bool:
        """Whether what is typed goes to the guest."""
        return self.command is None and not self.demo


@contextmanager
def running(chosen: Choices) -> Iterator[tuple[Machine, RunResult]]:
    """Obtain what is missing, boot, run the guest to its end; yields before all is closed."""
    try:
        with ExitStack() as stack:
            stack.enter_context(ending_signals())
            prepared = _prepare_demo(chosen) if chosen.demo else _prepare(chosen, stack)
            if chosen.command is None:
                _greet(prepared, chosen)
            console = Console(STDOUT)
            machine = stack.enter_context(_build(prepared, console))
            yield machine, _run(machine, console, chosen)
    except EndedBySignal as end:
        raise CommandError(f"ended by {end.name}", end.status) from None


def _greet(prepared: Boot | Demo, chosen: Choices) -> None:
    options = prepared.options
    size = f"{options.cpus} CPU, {options.memory // MIB} MiB"
    leave = "Ctrl-A X" if chosen.interactive else "Ctrl-C"
    say(f"{backend_text(chosen)}; {size}; {leave} leaves")


def default_cpus(demo: bool) -> int:
    """Where the command line does not say."""
    return CPUS if demo else 1


def say(text: str) -> None:
    print("anykvm:", text, file=sys.stderr, flush=True)


def backend_text(chosen: Choices) -> str:
    """Which KVM is taken, and why, in words."""
    try:
        backend, reason = fs.choose(chosen.backend)
    except ValueError as error:
        raise CommandError(str(error)) from error
    return f"KVM: {backend} ({reason})"


def _prepare(chosen: Choices, stack: ExitStack) -> Boot:
    images = None if chosen.kernel and chosen.initrd else _obtain()
    kernel, initrd = chosen.kernel, chosen.initrd
    if images is not None:
        kernel = kernel or images.kernel
        initrd = initrd or stack.enter_context(_initramfs(images, chosen.command))
    assert kernel is not None
    options = BootOptions(
        kernel=kernel,
        initrd=initrd,
        append=chosen.append,
        memory=chosen.memory,
        cpus=chosen.cpus,
        backend=chosen.backend,
        timeout=chosen.timeout,
    )
    try:
        return Boot(options)
    except BootError as error:
        raise CommandError(str(error)) from error


def _prepare_demo(chosen: Choices) -> Demo:
    try:
        return Demo(DemoOptions(chosen.cpus, chosen.memory, chosen.backend, chosen.timeout))
    except DemoError as error:
        raise CommandError(str(error)) from error


def _obtain() -> Images:
    with ProgressLine(sys.stderr) as line:
        try:
            return obtain(line.show)
        except ImageError as error:
            raise CommandError(str(error), Status.UNAVAILABLE) from error


@contextmanager
def _initramfs(images: Images, command: str | None) -> Iterator[Path]:
    """A path to an initramfs of ours, without a file on disk."""
    rows, columns = size_of(STDOUT)
    guest = Guest(
        exit_port=EXIT_PORT,
        command=command,
        translate_newlines=command is None or is_terminal(STDOUT),
        term=os.environ.get("TERM", "linux"),
        rows=rows,
        columns=columns,
    )
    with os.fdopen(os.memfd_create("initramfs"), "wb") as file:
        file.write(build(images.busybox.read_bytes(), guest))
        file.flush()
        yield Path(f"/proc/self/fd/{file.fileno()}")


def _build(prepared: Boot | Demo, console: Console) -> Machine:
    try:
        return prepared.machine(console.write)
    except MachineError as error:
        raise CommandError(str(error)) from error
    except OSError as error:
        raise CommandError(f"cannot use KVM: {error}", Status.UNAVAILABLE) from error


def _run(machine: Machine, console: Console, chosen: Choices) -> RunResult:
    with ExitStack() as stack:
        stack.callback(console.end_line)
        if chosen.interactive:
            stack.enter_context(raw_mode(STDIN))
            stack.enter_context(Keyboard(STDIN, machine.send, machine.stop, console.show))
        return machine.run(chosen.timeout)


def conclude(outcome: Outcome, has_command: bool) -> int:
    """The exit status; a word on standard error where the guest did not end as it should."""
    if outcome.kind is OutcomeKind.EXIT:
        return outcome.status
    if has_command and outcome.kind in (OutcomeKind.POWER_OFF, OutcomeKind.RESET):
        say(f"{outcome.message} before its command had ended")
        return Status.GUEST_FAILED
    if outcome.kind is not OutcomeKind.POWER_OFF:
        say(outcome.message)
    return outcome.status
