"""Bits of the control registers and of EFER, and which of them this processor has (SDM vol. 3, 2.5
and 2.2.1).
"""

from __future__ import annotations

CR0_PE, CR0_MP, CR0_TS, CR0_ET, CR0_NW, CR0_CD, CR0_PG = (
    1, 2, 8, 16, 1 << 29, 1 << 30, 1 << 31,
)  # fmt: skip
CR0_VALID = 0xE005_003F
CR4_TSD, CR4_DE, CR4_PSE, CR4_PAE = 1 << 2, 1 << 3, 1 << 4, 1 << 5
CR4_PCE, CR4_UMIP = 1 << 8, 1 << 11
CR4_FSGSBASE, CR4_OSXSAVE, CR4_SMEP = 1 << 16, 1 << 18, 1 << 20
# VME, PVI, TSD, DE, PSE, PAE, MCE, PGE, PCE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, OSXSAVE, SMEP
CR4_VALID = 0x7FF | CR4_UMIP | CR4_FSGSBASE | CR4_OSXSAVE | CR4_SMEP
EFER_SCE, EFER_LME, EFER_LMA, EFER_NXE, EFER_SVME = 1, 1 << 8, 1 << 10, 1 << 11, 1 << 12
EFER_VALID = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE | EFER_SVME
