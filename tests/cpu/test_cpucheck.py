"""cpucheck, a firmware image that tries some 45 pieces of the architecture, against what Bochs
prints.

Where a correct processor may differ from Bochs, the expected line is made here: the model in
`cpuid0`; the last bits of FSIN; `msr-bad`, since Bochs was told to ignore unknown MSRs; `avx` where
the model has no XSAVE. All others must be the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

from anykvm.api import Vcpu
from anykvm.vmm.firmware import Firmware, FirmwareError, FirmwareOptions
from anykvm.vmm.outcome import Outcome, OutcomeKind

GUESTS = Path(__file__).resolve().parents[1] / "guests"
SOURCE, IMAGE, EXPECTED = (GUESTS / f"cpucheck.{kind}" for kind in ("asm", "bin", "expected"))
ECX_XSAVE, ECX_AVX = 1 << 26, 1 << 28
# pi, less FLDPI's pi: the sine of the latter. FSIN may take pi for 66 bits long.
SINE = Fraction(-501655761266833202, 10**37)
SINE_TOLERANCE = Fraction(1, 1 << 63)


def lines_by_name(text: str) -> dict[str, str]:
    """A check's line by its name; a line that begins with a number belongs to the one before."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        first = line.split(" ")[0]
        if line in ("2000123 ", "8f000 2b 0 18 ", "ffff4ff1 "):
            found[name] += f"| {line}"
        elif line:
            name = first
            assert name not in found
            found[name] = line
    return found


@dataclass
class Checked:
    """One run: what it printed, how it ended, and the CPUID leaves 0 and 1 that the guest had."""

    lines: dict[str, str]
    outcome: Outcome
    cpuid: list[tuple[int, int, int, int]]


def leaves(vcpu: Vcpu) -> list[tuple[int, int, int, int]]:
    entries = {e.function: e for e in vcpu.get_cpuid2() if e.function < 2}
    return [(e.eax, e.ebx, e.ecx, e.edx) for _, e in sorted(entries.items())]


@pytest.fixture(scope="module")
def checked() -> Checked:
    printed = bytearray()
    firmware = Firmware(FirmwareOptions(IMAGE.read_bytes(), backend="soft"))
    with firmware.machine(lambda data: None, printed.extend) as machine:
        cpuid = leaves(machine.vcpus[0])
        result = machine.run(60)
    return Checked(lines_by_name(printed.decode("ascii")), result.outcome, cpuid)


def bochs() -> Mapping[str, str]:
    return lines_by_name(EXPECTED.read_text())


DIFFERING = ("cpuid0", "x87", "avx", "msr-bad")


def test_all_checks_ran(checked: Checked) -> None:
    assert list(checked.lines) == list(bochs())
    assert (checked.outcome.kind, checked.outcome.status) == (OutcomeKind.EXIT, 0)


@pytest.mark.parametrize("name", [name for name in bochs() if name not in DIFFERING])
def test_as_bochs_has_it(name: str, checked: Checked) -> None:
    assert checked.lines[name] == bochs()[name]


def test_cpuid_is_what_userspace_set(checked: Checked) -> None:
    (maximum, vendor, _, _), (model, _, ecx, edx) = checked.cpuid
    words = (maximum, vendor, model, ecx, edx)
    assert checked.lines["cpuid0"].split() == ["cpuid0", *(f"{word:x}" for word in words)]


def test_x87_has_80_bits_and_the_sine_of_pi(checked: Checked) -> None:
    name, *third, mantissa, exponent, status = checked.lines["x87"].split()
    assert [name, *third, status] == ["x87", "aaaaaaaaaaaaaaab", "3ffd", "20"]
    sign_and_exponent = int(exponent, 16)
    assert sign_and_exponent >> 15 == 1
    sine = -Fraction(int(mantissa, 16)) / 2 ** (63 - ((sign_and_exponent & 0x7FFF) - 0x3FFF))
    assert abs(sine - SINE) <= SINE_TOLERANCE


def test_avx_as_the_model_has_it(checked: Checked) -> None:
    """XSAVE is there and AVX is not: #GP at XSETBV, 12 bytes into it."""
    (_, _, ecx, _) = checked.cpuid[1]
    assert ecx & ECX_XSAVE
    expected = bochs()["avx"] if ecx & ECX_AVX else "avx d 0 c 18 "
    assert checked.lines["avx"] == expected


def test_an_unknown_msr_raises_gp(checked: Checked) -> None:
    assert checked.lines["msr-bad"] == "msr-bad d 0 0 18 "


@pytest.mark.parametrize("size", [0, 100, 1 << 20])
def test_images_that_are_no_firmware(size: int) -> None:
    with pytest.raises(FirmwareError, match="expected whole pages"):
        Firmware(FirmwareOptions(bytes(size)))
