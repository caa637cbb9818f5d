"""The pytest plugin: the fixture `kvm_faults`. Found by pytest wherever anykvm is installed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from anykvm.testing.faults import Faults


@pytest.fixture
def kvm_faults() -> Iterator[Faults]:
    """A `Faults` that is in place during the test."""
    from anykvm.testing.faults import Faults  # not before a test asks for it

    with Faults() as faults:
        yield faults
