"""microsandbox's program, from its wheel, and a file system for it that needs no registry."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from anykvm.vmm import images
from anykvm.vmm.initramfs import applets

from .process import CaseError


def msb() -> Path:
    """The program, from the wheel of this Python or from PATH."""
    found = importlib.util.find_spec("microsandbox")
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / "_bundled" / "bin" / "msb"
    program = shutil.which("msb")
    if program is None:
        raise CaseError("msb is not installed (pip install microsandbox)")
    return Path(program)


def make_root(folder: Path) -> None:
    """Busybox, its applets, and the user that msb looks up."""
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var"):
        (folder / name).mkdir(parents=True)
    busybox = images.obtain().busybox
    shutil.copy(busybox, folder / "bin" / "busybox")
    (folder / "bin" / "busybox").chmod(0o755)
    for applet in applets(busybox.read_bytes()):
        (folder / "bin" / applet).symlink_to("busybox")
    (folder / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (folder / "etc" / "group").write_text("root:x:0:\n")
