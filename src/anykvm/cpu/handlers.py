"""The handlers of the process: each form's number, and its address once it is compiled."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from anykvm.cpu.forms import Form, build
from anykvm.cpu.guest import Handler
from anykvm.cpu.jit import Jit


class Handlers:
    """Forms by number. Numbers are small and never change while the process lives."""

    def __init__(self, jit: Jit) -> None:
        self._jit = jit
        self._lock = threading.RLock()
        self.forms: list[Form] = []
        self.addresses: list[int] = []  # by number; 0 where not compiled yet
        self._numbers: dict[Form, int] = {}

    def number(self, form: Form) -> int:
        known = self._numbers.get(form)
        if known is not None:
            return known
        with self._lock:
            number = self._numbers.get(form)
            if number is None:
                number = len(self.forms)
                self.forms.append(form)
                self.addresses.append(0)
                self._numbers[form] = number
            return number

    def resolve(self, numbers: Sequence[int]) -> list[int]:
        """Their addresses; compiles what has none yet, as one batch."""
        addresses = [self.addresses[n] for n in numbers]
        if 0 in addresses:
            self._compile({n for n in numbers if not self.addresses[n]})
            return [self.addresses[n] for n in numbers]
        return addresses

    def _compile(self, missing: set[int]) -> None:
        by_symbol = {self.forms[n].symbol: n for n in sorted(missing)}

        def make(names: list[str]) -> list[Handler]:
            return [build(self.forms[by_symbol[name]]) for name in names]

        found = self._jit.addresses(by_symbol, make)
        for number, address in zip(by_symbol.values(), found, strict=True):
            self.addresses[number] = address

    def address(self, form: Form) -> int:
        return self.resolve((self.number(form),))[0]
