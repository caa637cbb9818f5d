"""A debugger's side of the remote serial protocol (gdb manual, appendix E)."""

from __future__ import annotations

from pathlib import Path
from struct import unpack_from

from .process import CaseError
from .qmp import connect

RIP = 16  # of amd64's registers in the `g` packet, 8 bytes each
BREAK = b"\x03"


class Gdb:
    """One session with a stub on a Unix socket."""

    def __init__(self, path: Path, seconds: float) -> None:
        self._socket = connect(path, seconds)
        self._pending = b""
        self.features = self.ask("qSupported:swbreak+;hwbreak+")

    def close(self) -> None:
        self._socket.close()

    def ask(self, packet: str) -> str:
        """The reply to a packet; with `c` and `s`, how it stopped."""
        self.send(packet)
        return self.reply()

    def send(self, packet: str) -> None:
        body = packet.encode()
        self._socket.sendall(b"$" + body + b"#%02x" % (sum(body) & 0xFF))
        if (sign := self._byte()) != b"+":
            raise CaseError(f"the stub did not acknowledge {packet!r}, but sent {sign!r}")

    def interrupt(self) -> str:
        """Stop the guest: how it stopped."""
        self._socket.sendall(BREAK)
        return self.reply()

    def reply(self) -> str:
        while self._byte() != b"$":
            pass
        body = bytearray()
        while (byte := self._byte()) != b"#":
            body += byte
        self._byte()
        self._byte()
        self._socket.sendall(b"+")
        return body.decode()

    def expect_ok(self, packet: str) -> None:
        if (said := self.ask(packet)) != "OK":
            raise CaseError(f"the stub answered {packet!r} with {said!r}")

    def rip(self) -> int:
        raw = bytes.fromhex(self.ask("g")[: 16 * (RIP + 1)])
        (rip,) = unpack_from("<Q", raw, 8 * RIP)
        return int(rip)

    def memory(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self.ask(f"m{address:x},{length:x}"))

    def _byte(self) -> bytes:
        if not self._pending:
            self._pending = self._socket.recv(4096)
            if not self._pending:
                raise CaseError("QEMU closed the debugger's connection")
        byte, self._pending = self._pending[:1], self._pending[1:]
        return byte
