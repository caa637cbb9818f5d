"""What the package logs, as lines on standard error like all else that `anykvm` says."""

from __future__ import annotations

import logging
import sys
import threading


class Remarks(logging.Handler):
    """Every error; of warnings that differ in their arguments only, the first.

    A cache with a thousand damaged files is one remark.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._told: set[str] = set()
        self._guard = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        with self._guard:
            is_known = record.levelno < logging.ERROR and record.msg in self._told
            self._told.add(record.msg)
        if not is_known:
            # A terminal may be raw while a guest has it, where a line feed only goes down.
            end = "\r\n" if sys.stderr.isatty() else "\n"
            sys.stderr.write(f"anykvm: {record.getMessage()}{end}")
            sys.stderr.flush()


def show_remarks() -> None:
    """From now on, and once is enough."""
    log = logging.getLogger("anykvm")
    if not any(isinstance(handler, Remarks) for handler in log.handlers):
        log.addHandler(Remarks())
        log.propagate = False
