"""Processors that KVM_GET_SUPPORTED_CPUID can be made to offer: the microarchitecture levels of the
x86-64 psABI, each the one before it with more instructions (its chapter 3.1.1, table 3.1).

A model says what programs may use. What concerns the system (paging, APIC, KVM's own features) is
offered with every model.
"""

from __future__ import annotations

from anykvm.x86.cpuid import FEATURES

MAX = "max"
LEVELS: dict[str, frozenset[str]] = {
    "x86-64-v1": frozenset("fpu cx8 cmov mmx fxsr sse sse2 syscall lm".split()),
    "x86-64-v2": frozenset("sse3 ssse3 sse4_1 sse4_2 cx16 popcnt lahf_lm".split()),
    "x86-64-v3": frozenset("avx avx2 bmi1 bmi2 f16c fma abm movbe xsave".split()),
}
BEYOND = frozenset(
    "pclmulqdq aes rdrand rdseed adx sha_ni clflushopt rdpid rdtscp fsgsbase erms fsrm monitor"
    " 3dnowprefetch".split()
)
"""Instructions of programs that no level has."""

ON = frozenset(feature.name for feature in FEATURES if feature.on)


def _tables_agree() -> bool:
    known = {feature.name for feature in FEATURES}
    return frozenset().union(BEYOND, *LEVELS.values()) <= known


assert _tables_agree()


def models() -> tuple[str, ...]:
    """The names of those that this processor has all instructions of, `max` first."""
    names = [MAX]
    for name, added in LEVELS.items():
        if not added <= ON:
            break
        names.append(name)
    return tuple(names)


def hidden_features(model: str) -> frozenset[str]:
    """The features that a model lacks of those that there are; ValueError for an unknown name."""
    if model == MAX:
        return frozenset()
    if model not in models():
        raise ValueError(f"there is no processor model {model!r}; known are {', '.join(models())}")
    levels = list(LEVELS)
    later = levels[levels.index(model) + 1 :]
    return ON & BEYOND.union(*(LEVELS[level] for level in later))
