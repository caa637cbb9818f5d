"""The documents: commands, links and code as they are, and the article's trace lines made anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from anykvm.cli import main

from .vmm.test_bzimage import bzimage

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
TWO_COMMANDS = ["pip install . && anykvm boot", "pip install '.[test]' && pytest"]
ANYKVM = [sys.executable, "-c", "from anykvm.cli.main import main; main()"]
SOFT = {**os.environ, "ANYKVM_BACKEND": "soft"}

LINK = re.compile(r"\]\(([^)#\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TOUR = re.compile(r"^(\d+)\. \[([\w/.]+)\]\((.+?)\): (.+)$", re.M)
TRACED = re.compile(r" *[\d.]+ ms  (.+?)  +\([\d.]+ ms\)$| *[\d.]+ ms  (.+)$")
# A trace line's numbers that differ from run to run, behind what tells them.
VARYING = (
    re.compile(r"(_f?ops\)? = )\d+"),
    re.compile(r"(close\(fd )\d+"),
    re.compile(r"(<Mapping )0x[0-9a-f]+"),
)

SERIAL_PORT_OUT = "66 ba f8 03  b0 5b  ee"  # mov dx, 0x3f8; mov al, '['; out dx, al
EXIT_PORT_OUT = "66 ba f4 00  b0 00  ee"  # mov dx, 0xf4; mov al, 0; out dx, al
COUNT = "b9 00 00 00 04  ff c9  75 fc"  # mov ecx, 1 << 26; dec ecx; jnz: the other CPU gets to run
FOREVER = "eb fe"
ENTRY = 0x200


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = [link for link in LINK.findall(document.read_text()) if "://" not in link]
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_has_the_two_commands_and_ci_runs_the_second():
    commands = [line.strip() for line in read("README.md").splitlines() if "pip install" in line]
    assert commands == TWO_COMMANDS
    found = re.search(r"tests=\$\(sed -n \"s/(.+)/\\1/p\" README.md\)", read(".ci/run"))
    assert found is not None
    pattern = found[1].replace(r"\(", "(").replace(r"\)", ")")
    assert re.findall(pattern, read("README.md"), re.M) == TWO_COMMANDS[1:]


def test_the_readme_names_commands_and_options_that_there_are(capsys):
    used = re.findall(r"^    anykvm (\w+)(.*?)(?:  +.*)?$", read("README.md"), re.M)
    assert {command for command, _ in used} == {row.name for row in main.COMMANDS}
    for command, rest in used:
        assert main.run([command, "--help"]) == 0
        known = capsys.readouterr().out
        options = re.findall(r"--[a-z]+", rest.split(" -- ")[0])
        assert [option for option in options if option not in known] == []


def test_the_readme_shows_the_example():
    (code,) = (code for language, code in BLOCK.findall(read("README.md")) if language == "python")
    assert read("examples/first_vm.py").endswith(code)


def test_the_example_prints_the_sum():
    example = [sys.executable, ROOT / "examples/first_vm.py"]
    ran = subprocess.run(example, env=SOFT, check=True, capture_output=True, text=True, timeout=120)
    assert ran.stdout == "4\n"


def test_the_tour_names_fifteen_files_in_a_sentence_each():
    rows = TOUR.findall(read("docs/tour.md"))
    assert [int(number) for number, *_ in rows] == list(range(1, 16))
    for _, name, link, sentence in rows:
        assert link == f"../{name}"
        assert (ROOT / name).is_file()
        assert re.fullmatch(r"[^.]+\.", sentence)


# The article


def boot(folder: Path, code: str, *wrapper: str) -> list[str]:
    """The command line that boots a kernel whose 64-bit entry is `code`."""
    instructions = bytes(ENTRY) + bytes.fromhex(code)
    kernel, initrd = folder / "kernel", folder / "initrd"
    kernel.write_bytes(bzimage(instructions.ljust(0x1000, b"\xf4")))
    initrd.write_bytes(bytes(512))
    files = ["--kernel", str(kernel), "--initrd", str(initrd)]
    return [*ANYKVM, *wrapper, "boot", *"--backend soft --cpus 2 --memory 64M".split(), *files]


def structure(text: str) -> Iterator[str]:
    """What remains of trace lines: thread, depth and call, without what varies."""
    for line in text.splitlines():
        match = TRACED.fullmatch(line)
        if match:
            call = match[1] or match[2]
            for pattern in VARYING:
                call = pattern.sub(r"\1N", call)
            yield call


def blocks(name: str) -> list[str]:
    return [text for _, text in BLOCK.findall(read(name))]


def test_the_article_shows_lines_of_a_trace(tmp_path):
    output = tmp_path / "trace"
    code = SERIAL_PORT_OUT + COUNT + EXIT_PORT_OUT + FOREVER
    command = boot(tmp_path, code, "trace", "--output", str(output), "--")
    ran = subprocess.run(
        command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=120
    )
    assert ran.stdout.strip() == b"["
    traced = set(structure(output.read_text()))
    shown = [line for block in blocks("docs/article.md") for line in structure(block)]
    assert len(shown) > 20
    assert [line for line in shown if line not in traced] == []


def descriptors(pid: int) -> Counter[str]:
    """The KVM descriptors of a process, by what /proc says of them."""
    links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    return Counter(link for link in links if link.startswith("/memfd:kvm"))


def threads(pid: int) -> set[str]:
    return {path.read_text().strip() for path in Path(f"/proc/{pid}/task").glob("*/comm")}


def test_the_article_shows_descriptors_and_threads(tmp_path):
    (listing,) = (block for block in blocks("docs/article.md") if "ls -l" in block)
    named = Counter(re.findall(r"^\d+ -> (.+)$", listing, re.M))
    comms = set(listing.split("comm\n")[1].splitlines())
    command = boot(tmp_path, SERIAL_PORT_OUT + FOREVER)
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.read(1) == b"["
            assert descriptors(running.pid) == named
            deadline = time.monotonic() + 60
            while not comms <= threads(running.pid) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert comms <= threads(running.pid)
        finally:
            running.kill()
