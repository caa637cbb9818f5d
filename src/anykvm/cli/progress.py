"""One line that says what is being waited for; on a terminal with percentages, in place."""

from __future__ import annotations

from types import TracebackType
from typing import Self, TextIO

CLEAR_LINE = "\r\x1b[K"


class ProgressLine:
    """`show` takes what `anykvm.vmm.apt.Progress` describes."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._in_place = file.isatty()
        self._what = ""
        self._percent = -1

    def show(self, what: str, fraction: float | None) -> None:
        percent = -1 if fraction is None else int(fraction * 100)
        if what == self._what and (percent == self._percent or not self._in_place):
            return
        if what != self._what and self._what and self._in_place:
            self._file.write("\n")
        self._what, self._percent = what, percent
        shown = f" {percent} %" if percent >= 0 and self._in_place else ""
        start, end = (CLEAR_LINE, "") if self._in_place else ("", "\n")
        self._file.write(f"{start}anykvm: {what}{shown}{end}")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._what and self._in_place:
            self._file.write("\n")
            self._file.flush()
