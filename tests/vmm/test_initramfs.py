"""The archive, entry by entry; the program that leaves; the script, run by a shell of the host."""

from __future__ import annotations

import stat
import subprocess
from dataclasses import dataclass
from importlib.resources import files
from io import BytesIO

import iced_x86
import pytest
from elftools.elf.elffile import ELFFile

from anykvm.vmm.cpio import Cpio
from anykvm.vmm.initramfs import MARKER, BusyboxError, Guest, applets, build, exit_program

from .packages import BUSYBOX


@dataclass
class Entry:
    mode: int
    content: bytes
    fields: tuple[int, ...]


def unpack(archive: bytes) -> dict[str, Entry]:
    """A reader of its own, by the kernel's description of the format."""
    entries: dict[str, Entry] = {}
    offset = 0
    while True:
        assert archive[offset : offset + 6] == b"070701"
        header = archive[offset + 6 : offset + 110]
        fields = tuple(int(header[at : at + 8], 16) for at in range(0, 104, 8))
        name_end = offset + 110 + fields[11]
        assert archive[name_end - 1] == 0
        name = archive[offset + 110 : name_end - 1].decode()
        start = (name_end + 3) & ~3
        content = archive[start : start + fields[6]]
        if name == "TRAILER!!!":
            assert archive[start:].strip(b"\0") == b""
            return entries
        assert name not in entries
        entries[name] = Entry(fields[1], content, fields)
        offset = (start + fields[6] + 3) & ~3


def test_every_kind_of_entry():
    archive = Cpio()
    archive.directory("d")
    archive.file("d/f", b"12345", 0o755)
    archive.symlink("l", "d/f")
    archive.character_device("c", 5, 1)
    entries = unpack(archive.finish())
    assert [(name, e.mode, e.content) for name, e in entries.items()] == [
        ("d", stat.S_IFDIR | 0o755, b""),
        ("d/f", stat.S_IFREG | 0o755, b"12345"),
        ("l", stat.S_IFLNK | 0o777, b"d/f"),
        ("c", stat.S_IFCHR | 0o600, b""),
    ]
    assert entries["c"].fields[9:11] == (5, 1)
    assert all(e.fields[2] == e.fields[3] == e.fields[5] == 0 for e in entries.values())
    assert len({e.fields[0] for e in entries.values()}) == 4


def test_the_root_file_system():
    entries = unpack(build(BUSYBOX, Guest(0xF4)))
    assert entries["bin/busybox"].content == BUSYBOX
    assert entries["bin/busybox"].mode == stat.S_IFREG | 0o755
    assert entries["bin/sh"].content == b"busybox"
    assert entries["sbin"].content == b"bin"
    assert entries["init"].mode == stat.S_IFREG | 0o755
    assert entries["init"].content.startswith(b"#!/bin/sh\n")
    assert entries["dev/console"].fields[9:11] == (5, 1)
    assert entries["dev/null"].fields[9:11] == (1, 3)
    assert "anykvm/command" not in entries


def test_parents_come_before_what_is_in_them():
    entries = unpack(build(BUSYBOX, Guest(0xF4, command="true")))
    seen = {""}
    for name, entry in entries.items():
        assert name.rpartition("/")[0] in seen
        if stat.S_ISDIR(entry.mode):
            seen.add(name)


@pytest.mark.parametrize("text", ["exit 7", "echo 'a\"b' $x\n\n\techo `c`", "é\u2028\\"])
def test_any_command_text_goes_in_unchanged(text):
    entries = unpack(build(BUSYBOX, Guest(0xF4, command=text)))
    assert entries["anykvm/command"].content == text.encode()


def test_the_same_input_makes_the_same_bytes():
    guest = Guest(0xF4, command="true", rows=24, columns=80)
    assert build(BUSYBOX, guest) == build(BUSYBOX, guest)


def test_the_settings_survive_a_shell():
    guest = Guest(0xF4, term='x\'; echo "$(y)"', rows=40, columns=132, translate_newlines=False)
    script = guest.settings() + b'printf "%s|" "$marker" "$TERM" $rows $columns $translate_newlines'
    printed = subprocess.run(["sh"], input=script, capture_output=True, check=True).stdout
    assert printed.decode() == f'{MARKER}|x\'; echo "$(y)"|40|132|no|'


def test_applets_are_the_sorted_table():
    assert applets(BUSYBOX) == ["[", "[[", *(f"a{n:02}" for n in range(30)), "sh", "sleep"]


def test_a_program_that_is_no_busybox():
    with pytest.raises(BusyboxError, match="no table of applets"):
        applets(b"\x7fELF" + bytes(4096))


EXIT_LISTING = """\
mov edi,1
mov esi,5409h
mov edx,1
mov eax,10h
syscall
mov edi,3
mov eax,0ACh
syscall
mov rsi,[rsp+10h]
xor eax,eax
movzx ecx,byte ptr [rsi]
sub ecx,30h
cmp ecx,9
ja short 00000000004000B6h
imul eax,0Ah
add eax,ecx
inc rsi
jmp short 00000000004000A1h
mov edx,4F4h
out dx,al
mov edi,1
mov eax,3Ch
syscall"""


def test_the_exit_program_is_what_its_listing_says():
    program = exit_program(0x4F4)
    decoder = iced_x86.Decoder(64, program[120:], ip=0x400078)
    assert "\n".join(str(instruction) for instruction in decoder) == EXIT_LISTING


def test_the_exit_program_is_a_static_elf_that_starts_at_its_code():
    program = exit_program(0xF4)
    elf = ELFFile(BytesIO(program))
    assert (elf["e_machine"], elf["e_type"], elf["e_entry"]) == ("EM_X86_64", "ET_EXEC", 0x400078)
    (segment,) = elf.iter_segments()
    assert (segment["p_type"], segment["p_flags"]) == ("PT_LOAD", 5)
    assert (segment["p_vaddr"], segment["p_filesz"]) == (0x400000, len(program))


def test_init_is_valid_shell():
    script = files("anykvm.vmm").joinpath("init.sh").read_text()
    checked = subprocess.run(["sh", "-n"], input=script, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
