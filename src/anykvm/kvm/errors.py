"""Errors of the kernel half: OSError with Linux's errno and a sentence that says what was wrong."""

from __future__ import annotations


def fail(errno: int, text: str) -> OSError:
    """The exception for `errno`, to be raised by the caller."""
    return OSError(errno, text)
