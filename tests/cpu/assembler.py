"""Instruction text (Intel syntax) to bytes, by LLVM's own assembler."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Sequence

import llvmlite.binding as llvm
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

DIRECTIVE = {16: ".code16", 32: ".code32", 64: ".code64"}


@functools.cache
def _machine() -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    return llvm.Target.from_default_triple().create_target_machine(opt=0)


_known: dict[tuple[int, str], bytes] = {}


def _assemble(lines: Sequence[str], mode: int) -> list[bytes]:
    """One module for all lines; a label before each tells where it begins."""
    text = [".intel_syntax noprefix", DIRECTIVE[mode]]
    for n, line in enumerate(lines):
        text += [f"line{n}:", *line.split(";")]
    text += [f"line{len(lines)}:"]
    quoted = "".join(f'module asm "{line.strip()}"\n' for line in text)
    code = _machine().emit_object(llvm.parse_assembly(quoted))
    elf = ELFFile(io.BytesIO(code))
    if any(s.name.startswith(".rela.text") for s in elf.iter_sections()):
        raise ValueError(f"expected no reference to an outside symbol in {list(lines)}")
    found, table = elf.get_section_by_name(".text"), elf.get_section_by_name(".symtab")
    assert found is not None
    assert isinstance(table, SymbolTableSection)
    data = found.data()
    symbols = {s.name: s["st_value"] for s in table.iter_symbols()}
    marks = [symbols[f"line{n}"] for n in range(len(lines) + 1)]
    return [data[a:b] for a, b in itertools.pairwise(marks)]


def assemble_many(lines: Sequence[str], mode: int = 64) -> list[bytes]:
    """The bytes of each text; several instructions in one are separated by `;`.

    LLVM ends the process on a text that it does not understand, and says which on standard error.
    """
    missing = list(dict.fromkeys(line for line in lines if (mode, line) not in _known))
    if missing:
        for line, code in zip(missing, _assemble(missing, mode), strict=True):
            _known[mode, line] = code
    return [_known[mode, line] for line in lines]


def assemble(line: str, mode: int = 64) -> bytes:
    """The bytes of one text."""
    return assemble_many([line], mode)[0]
