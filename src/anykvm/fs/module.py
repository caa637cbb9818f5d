"""Modules: use counts, and loading by alias (`kernel/module`, `request_module`).

A module is pinned by every open file whose operations it owns, so it cannot be unloaded under them.
"""

from __future__ import annotations

import errno
import importlib
import threading

# As modules.alias: what the character-device core asks for -> the Python module that registers it.
MODULE_ALIASES: dict[str, str] = {
    "char-major-10-232": "anykvm.x86",
    "devname:kvm": "anykvm.x86",
}


class Module:
    """Owner of file operations; `refcount` is the number of its users."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._users = 0
        self._live = True
        self._lock = threading.Lock()

    @property
    def refcount(self) -> int:
        return self._users

    @property
    def live(self) -> bool:
        return self._live

    def try_get(self) -> bool:
        """Take a use; False where the module is going away (`try_module_get`)."""
        with self._lock:
            if self._live:
                self._users += 1
            return self._live

    def put(self) -> None:
        """Give a use back (`module_put`)."""
        with self._lock:
            if self._users == 0:
                raise RuntimeError(f"module {self.name}: more uses given back than taken")
            self._users -= 1

    def delete(self) -> None:
        """Unload: no new use is granted afterwards. EBUSY while there are users."""
        with self._lock:
            if self._users:
                raise OSError(errno.EBUSY, f"module {self.name} is in use", self.name)
            self._live = False

    def __repr__(self) -> str:
        return f"<Module {self.name} used by {self._users}>"


def request_module(alias: str) -> bool:
    """Load the module that answers to `alias`; False where none does.

    Whether the module then registered anything is for the caller to see, as in the kernel.
    """
    name = MODULE_ALIASES.get(alias)
    if name is None:
        return False
    importlib.import_module(name)
    return True
