"""The host's time-stamp counter: reading it, and its frequency (SDM vol. 3, 18.17).

Python cannot execute RDTSC, so ten bytes of machine code do. The frequency is measured against
CLOCK_MONOTONIC from the import of this module on, for at least `MEASURE_NS`.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from functools import cache

from anykvm.cpu.state import TSC_RATIO_BITS

MEASURE_NS = 20_000_000
_SAMPLES = 5
TSC_TOLERANCE_PPM = 250
MASK64 = (1 << 64) - 1

# rdtsc; shl rdx, 32; or rax, rdx; ret
_CODE = bytes.fromhex("0f31 48c1e220 4809d0 c3".replace(" ", ""))
_page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
_page.write(_CODE)
_view = (ctypes.c_char * len(_CODE)).from_buffer(_page)

# PYFUNCTYPE: giving up the GIL would take longer than the read.
host_tsc = ctypes.PYFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(_view))


def _sample() -> tuple[int, int]:
    """(nanoseconds, TSC) read as nearly together as a few attempts give."""
    best: tuple[int, int, int] | None = None
    for _ in range(_SAMPLES):
        before = time.monotonic_ns()
        tsc: int = host_tsc()
        after = time.monotonic_ns()
        if best is None or after - before < best[0]:
            best = (after - before, (before + after) // 2, tsc)
    assert best is not None
    return best[1], best[2]


_start = _sample()


# A guest's TSC at another rate (SDM vol. 3, 26.6.5: the TSC multiplier).


def scale_tsc(tsc: int, ratio: int) -> int:
    """`kvm_scale_tsc`: host ticks as the guest counts them."""
    return tsc * ratio >> TSC_RATIO_BITS & MASK64


def tsc_ratio(khz: int) -> int | None:
    """The ratio for a guest's rate: exactly one within the tolerance of clocks; None where no
    ratio is large or small enough.
    """
    host = host_tsc_khz()
    if abs(khz - host) * 1_000_000 <= host * TSC_TOLERANCE_PPM:
        return 1 << TSC_RATIO_BITS
    ratio = (khz << TSC_RATIO_BITS) // host
    return ratio if 0 < ratio < MASK64 else None


def max_guest_tsc_khz() -> int:
    """What a guest's rate has to be below."""
    return min(0x7FFFFFFF, scale_tsc(host_tsc_khz(), MASK64))


@cache
def host_tsc_khz() -> int:
    """The frequency in kHz, measured once; the first call may wait for `MEASURE_NS` to be over."""
    missing = _start[0] + MEASURE_NS - time.monotonic_ns()
    if missing > 0:
        time.sleep(missing / 1e9)
    ns, tsc = _sample()
    return (tsc - _start[1]) * 1_000_000 // (ns - _start[0])
