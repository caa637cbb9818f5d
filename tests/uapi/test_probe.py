"""Everything in kvm.py against what a C compiler makes of the same headers."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from anykvm.uapi import kvm as abi

ROOT = Path(__file__).resolve().parents[2]
HEADERS = [Path("/usr/include/linux/kvm.h"), Path("/usr/include/x86_64-linux-gnu/asm/kvm.h")]
COMPILER = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
needs_headers = pytest.mark.skipif(
    not all(h.is_file() for h in HEADERS), reason="linux-libc-dev is not installed"
)


def tags() -> list[str]:
    """The structs that the headers declare at file level."""
    text = "".join(header.read_text() for header in HEADERS)
    return re.findall(r"^struct (\w+) \{", text, re.M)


def paths(kind: Any, prefix: str = "") -> Iterator[tuple[str, int, int | None]]:
    """Every field that C can name: path, offset, and size unless it is a flexible array."""
    for name, inner, *bits in kind._fields_:
        offset = getattr(kind, name).offset
        anonymous = name in getattr(kind, "_anonymous_", ())
        path = prefix if anonymous else f"{prefix}.{name}" if prefix else name
        if not anonymous and not bits:
            yield path, offset, ctypes.sizeof(inner) or None
        if issubclass(inner, ctypes.Array):
            inner, path = inner._type_, f"{path}[0]"
        if issubclass(inner, ctypes.Structure | ctypes.Union):
            for below, extra, size in paths(inner, path):
                yield below, offset + extra, size


def constants() -> dict[str, int]:
    return {n: v for n, v in vars(abi).items() if isinstance(v, int)}


def expressions() -> Iterator[tuple[str, int]]:
    """C expressions and the value that our module gives them."""
    yield from constants().items()
    for tag in tags():
        kind = getattr(abi, tag)
        yield f"sizeof(struct {tag})", ctypes.sizeof(kind)
        for path, offset, size in paths(kind):
            yield f"offsetof(struct {tag}, {path})", offset
            if size is not None:
                yield f"sizeof(((struct {tag} *)0)->{path})", size


def compiled(expected: dict[str, int], folder: Path) -> dict[str, int]:
    lines = [
        "#include <stddef.h>",
        "#include <stdio.h>",
        "#define PAGE_SIZE 4096",
        "#include <linux/kvm.h>",
        "int main(void) {",
        *(f'printf("%llu\\n", (unsigned long long)({e}));' for e in expected),
        "}",
    ]
    source, program = folder / "probe.c", folder / "probe"
    source.write_text("\n".join(lines))
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O0", "-w", "-o", program, source], check=True)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return dict(zip(expected, map(int, output.split()), strict=True))


@needs_headers
@needs_compiler
def test_everything_is_what_a_compiler_says(tmp_path: Path) -> None:
    expected = dict(expressions())
    assert len(expected) > 2500
    actual = compiled(expected, tmp_path)
    assert {e: v for e, v in actual.items() if v != expected[e]} == {}


@needs_headers
def test_every_define_of_the_headers_is_there() -> None:
    text = "".join(header.read_text() for header in HEADERS)
    names = set(re.findall(r"^\s*#\s*define[ \t]+(KVM_\w+)", text, re.M))
    missing = {n for n in names if not hasattr(abi, n)} - set(abi.ABSENT_ON_X86)
    assert missing == set()


@needs_headers
def test_every_struct_of_the_headers_is_there() -> None:
    assert [t for t in tags() if not hasattr(abi, t)] == []


def generator(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/gen_uapi.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@needs_headers
def test_committed_file_is_what_the_generator_gives() -> None:
    result = generator("--check")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@needs_headers
def test_check_shows_a_difference(tmp_path: Path) -> None:
    stale = tmp_path / "kvm.py"
    text = (ROOT / "src/anykvm/uapi/kvm.py").read_text()
    stale.write_text(text.replace("KVM_API_VERSION = 12", "KVM_API_VERSION = 11"))
    result = generator("--check", "--output", stale)
    assert result.returncode == 1
    assert "-KVM_API_VERSION = 11" in result.stdout
    assert "+KVM_API_VERSION = 12" in result.stdout


def test_missing_headers_say_what_to_install(tmp_path: Path) -> None:
    result = generator(tmp_path, "--output", tmp_path / "kvm.py")
    assert result.returncode == 1
    assert "linux-libc-dev" in result.stderr


def test_a_header_with_something_unknown_is_refused(tmp_path: Path) -> None:
    for name in ("asm", "linux"):
        (tmp_path / name).mkdir()
    (tmp_path / "asm/kvm.h").write_text("struct kvm_a { __u128 x; };\n")
    (tmp_path / "linux/kvm.h").write_text("#define KVMIO 0xAE\n")
    result = generator(tmp_path, "--output", tmp_path / "kvm.py")
    assert result.returncode != 0
    assert "unknown type '__u128'" in result.stderr
