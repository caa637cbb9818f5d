"""Port 0x80: firmware's progress codes, and the write with which kernels pass a microsecond."""

from __future__ import annotations

from dataclasses import dataclass, replace

from anykvm.vmm.device_table import DeviceRow, Platform, Space, Window, register

POST_PORT = 0x80


@dataclass(slots=True)
class PostState:
    code: int = 0


class PostPort:
    """A latch."""

    def __init__(self) -> None:
        self.state = PostState()

    def read(self, offset: int, size: int) -> int:
        return self.state.code

    def write(self, offset: int, size: int, value: int) -> None:
        self.state.code = value

    def snapshot(self) -> PostState:
        return replace(self.state)

    def restore(self, state: PostState) -> None:
        self.state = replace(state)


def _build(platform: Platform) -> PostPort:
    return PostPort()


register(DeviceRow("post_port", (Window(Space.PORT, POST_PORT, 1),), 1, _build))
