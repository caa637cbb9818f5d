"""The Linux to boot under another VMM: Debian's cloud kernel and busybox as `anykvm boot` has them,
and modules of that kernel for devices, which are not built in.
"""

from __future__ import annotations

import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from anykvm.vmm import images
from anykvm.vmm.apt import Apt, AptError
from anykvm.vmm.cpio import Cpio
from anykvm.vmm.exit_port import EXIT_PORT
from anykvm.vmm.initramfs import Guest, build

from .process import CaseError

MODULES = {
    "disk": (
        "virtio_ring",
        "virtio",
        "virtio_pci_legacy_dev",
        "virtio_pci_modern_dev",
        "virtio_pci",
        "virtio_mmio",
        "virtio_blk",
    ),
    "net": ("failover", "net_failover", "virtio_net"),
    "balloon": ("virtio_balloon",),
    "ide": ("scsi_common", "scsi_mod", "sd_mod", "libata", "ata_piix"),
}
"""By what they are for, in the order in which they can be loaded; all but ide's after disk's."""

COMMAND_LINE = "console=ttyS0 panic=-1 nokaslr quiet"
PROMPT = "# "


@dataclass(frozen=True)
class Linux:
    """Files for -kernel and -initrd."""

    kernel: Path
    initrd: Path
    release: str


def obtain(folder: Path) -> Linux:
    """Kernel, busybox and an initrd with the modules, made in `folder`."""
    found = images.obtain()
    archive = build(found.busybox.read_bytes(), Guest(EXIT_PORT))
    initrd = folder / "initrd"
    initrd.write_bytes(archive + archive_of(module_files(found.release)))
    return Linux(found.kernel, initrd, found.release)


def archive_of(files: dict[str, bytes]) -> bytes:
    """A second archive, which the kernel unpacks over the first."""
    archive = Cpio()
    archive.directory("modules")
    for group, names in MODULES.items():
        archive.file(f"modules/{group}", "".join(f"/modules/{n}.ko " for n in names).encode())
    for name, content in files.items():
        archive.file(f"modules/{name}.ko", content)
    return archive.finish()


def module_files(release: str) -> dict[str, bytes]:
    """MODULES from the kernel's package, kept beside the images."""
    folder = images.cache_folder() / "modules" / release
    paths = {name: folder / f"{name}.ko" for names in MODULES.values() for name in names}
    if not all(path.exists() for path in paths.values()):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            package = download(release, Path(scratch))
            for name, content in unpack(package, set(paths)).items():
                paths[name].write_bytes(content)
    return {name: path.read_bytes() for name, path in paths.items()}


def download(release: str, folder: Path) -> Path:
    apt = Apt(folder)
    record = apt.show(f"linux-image-{release}")
    if record is None:
        raise AptError(f"apt's sources offer no linux-image-{release}")
    into = folder / "package"
    into.mkdir()
    return apt.download(record, into, lambda what, fraction: None)


def unpack(package: Path, names: set[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
            for entry in tar:
                name = Path(entry.name).stem.replace("-", "_")
                if entry.name.endswith(".ko") and name in names:
                    content = tar.extractfile(entry)
                    assert content is not None
                    found[name] = content.read()
    if missing := names - set(found):
        raise CaseError(f"{package.name} has no {', '.join(sorted(missing))}")
    return found
