"""Cases of QEMU's devices: disks, network cards, a screen, a balloon, processors and memory."""

from __future__ import annotations

import hashlib
import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from . import qemu
from .disk import BOOT_CODE, SECTOR, TEXT
from .linux import COMMAND_LINE, PROMPT
from .process import Console
from .qemu import Machine
from .qmp import Qmp
from .workshop import Workshop, check, count, load, say

PAGE = bytes(n * n >> 8 & 0xFF for n in range(1 << 20))
"""What the web server has: a megabyte."""
READ_SECOND = "dd if=/dev/{} bs=512 skip=1 count=1 2>/dev/null | head -1"


def ide(workshop: Workshop) -> None:
    """Debian's kernel reads a disk by the IDE controller's DMA."""
    with workshop.boot_linux(Machine(), *qemu.ide_disk(workshop.disk)) as console:
        console.expect(PROMPT)
        load(console, "ide")
        say(console, "while [ ! -b /dev/sda ]; do usleep 100000; done")
        read = say(console, READ_SECOND.format("sda"))
        check(TEXT in read, f"/dev/sda: {read!r}")


def snapshot(workshop: Workshop) -> None:
    """With -snapshot the guest sees what it has written, and the image stays as it was."""
    image = workshop.qcow2()
    before = image.read_bytes()
    disk = qemu.virtio_disk("pc", image, "qcow2")
    with workshop.boot_linux(Machine(), *disk, "-snapshot") as console:
        console.expect(PROMPT)
        load(console, "disk")
        say(console, "echo changed | dd of=/dev/vda bs=512 seek=1 conv=sync,fsync")
        say(console, "echo 3 >/proc/sys/vm/drop_caches")
        read = say(console, READ_SECOND.format("vda"))
        check(read == "changed", f"/dev/vda: {read!r}")
        console.send("poweroff -f\n")
        check(console.ended() == 0, console.report("QEMU's status is not 0"))
    check(image.read_bytes() == before, "the image was written to")


class _Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def _web_server() -> Iterator[int]:
    """Its port on this machine."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:
            server.shutdown()


def network(workshop: Workshop) -> None:
    """A megabyte over virtio-net (MSI-X, irqfds) from a server on the host."""
    card = ("-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net")
    machine = Machine("q35", "split", 2)
    with _web_server() as port, workshop.boot_linux(machine, *card) as console:
        console.expect(PROMPT)
        load(console, "disk")
        load(console, "net")
        say(console, "ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0")
        got = say(console, f"wget -q -O - http://10.0.2.2:{port}/ | md5sum").split()[0]
        check(got == hashlib.md5(PAGE).hexdigest(), f"another page came: {got}")


def e1000(workshop: Workshop) -> None:
    """iPXE, in the card's ROM, gets a boot sector by DHCP and TFTP over an e1000.

    Debian's cloud kernel has no driver for it. The program is run where a disk's would be.
    """
    folder = workshop.folder / "tftp"
    folder.mkdir(exist_ok=True)
    start = BOOT_CODE.index(bytes.fromhex("be007e"))
    says = b"\x31\xc0\x8e\xd8" + BOOT_CODE[start:].replace(b"\x00\x7e", b"\x00\x7d", 1)
    (folder / "boot").write_bytes(says.ljust(SECTOR // 2, b"\0") + TEXT.encode() + b"\n\0")
    net = f"user,id=net,tftp={folder},bootfile=boot"
    card = ("-netdev", net, "-device", "e1000,netdev=net,bootindex=0")
    with workshop.start(Machine(), *card) as console:
        console.expect(TEXT)


def screen(workshop: Workshop) -> None:
    """A VGA card: the kernel's console draws on it, and QEMU has the picture."""
    socket, picture = workshop.socket("qmp"), workshop.folder / "screen.ppm"
    options = ("-vga", "std", *qemu.monitor(socket))
    line = f"console=tty0 {COMMAND_LINE}"
    with workshop.boot_linux(Machine(), *options, line=line) as console:
        console.expect(PROMPT)
        say(console, "for n in $(seq 100); do echo $n: some text for the screen; done >/dev/tty0")
        qmp = Qmp(socket, 60)
        try:
            qmp.command("screendump", filename=str(picture))
        finally:
            qmp.close()
    _, size, _, pixels = picture.read_bytes().split(b"\n", 3)
    check(size == b"720 400", f"size of the screen: {size!r}")
    lit = sum(map(bool, pixels[::3])) / (len(pixels) / 3)
    check(0.02 < lit < 0.5, f"lit pixels: {lit:.3f}")


def balloon(workshop: Workshop) -> None:
    """Memory is taken from the guest and given back."""
    socket = workshop.socket("qmp")
    options = ("-device", "virtio-balloon-pci", *qemu.monitor(socket))
    with workshop.boot_linux(Machine(), *options) as console:
        console.expect(PROMPT)
        load(console, "disk")
        load(console, "balloon")
        qmp = Qmp(socket, 60)
        try:
            before = _total(console)
            _inflate(qmp, 160)
            check(before - _total(console) > 90 << 10, "the guest has as much memory as before")
            _inflate(qmp, qemu.MEMORY)
            check(_total(console) == before, "the guest has not got its memory back")
            say(console, "dd if=/dev/zero bs=1M count=120 of=/tmp; md5sum /modules/*.ko")
        finally:
            qmp.close()


def _total(console: Console) -> int:
    return count(console, "awk '/MemTotal/ {print $2}' /proc/meminfo")


def _inflate(qmp: Qmp, mebibytes: int) -> None:
    """Let the guest have so much, and wait until it is so."""
    qmp.command("balloon", value=mebibytes << 20)
    deadline = time.monotonic() + 60
    while (actual := qmp.command("query-balloon")["actual"]) != mebibytes << 20:
        check(time.monotonic() < deadline, f"the balloon stays at {actual >> 20} MiB")
        time.sleep(0.1)


def four_processors(workshop: Workshop) -> None:
    with workshop.boot_linux(Machine("q35", "on", 4)) as console:
        console.expect(PROMPT)
        check(count(console, "nproc") == 4, "not four processors")
        say(console, "for n in 1 2 3 4; do yes $n | head -2000 | md5sum & done; wait")


def much_memory(workshop: Workshop) -> None:
    """3 GiB, some of it above 4 GiB of the guest's addresses on q35."""
    with workshop.boot_linux(Machine("q35", "on", 1), "-m", "3G") as console:
        console.expect(PROMPT)
        total = _total(console)
        check(2_800_000 < total < 3 << 20, f"MemTotal: {total} KiB")
        check(count(console, "grep -c '^10.*System RAM' /proc/iomem") == 1, "none above 4 GiB")


def no_paravirtualization(workshop: Workshop) -> None:
    """A guest that is not told of KVM: its clock is the TSC, calibrated by QEMU's timers."""
    with workshop.boot_linux(Machine(), "-cpu", "host,-kvm") as console:
        console.expect(PROMPT)
        where = "/sys/devices/system/clocksource/clocksource0/"
        clocks = say(console, f"cat {where}available_clocksource {where}current_clocksource")
        check("kvm-clock" not in clocks, clocks)
        began = time.monotonic()
        say(console, "sleep 5")
        took = time.monotonic() - began
        check(4.5 < took < 8, f"sleep 5 took {took:.1f} s with {clocks}")
