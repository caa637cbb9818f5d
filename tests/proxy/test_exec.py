"""`anykvm exec` with a client that makes its system calls itself (client.py)."""

from __future__ import annotations

import json
import os
import pty
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from errno import EBADF, EBUSY, EEXIST, EFAULT, EINTR, EINVAL, EIO, ENOMEM, ENOSYS, ENOTTY, EPERM
from pathlib import Path

import pytest

from anykvm.cli import main
from anykvm.proxy import abi
from anykvm.proxy.launch import node_is_usable
from anykvm.uapi.kvm import KVM_EXIT_INTR, KVM_EXIT_IO

CLIENT = Path(__file__).with_name("client.py")
ANYKVM = [sys.executable, "-c", "from anykvm.cli.main import main; main()"]
EXEC = [*ANYKVM, "exec", "--backend", "soft"]
MEMFD = "/memfd:{} (deleted)"


def run(*command: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*EXEC, *options, "--", *command], capture_output=True, text=True, timeout=60
    )


def client(*arguments: str, options: tuple[str, ...] = ()) -> dict:
    done = run(sys.executable, str(CLIENT), *arguments, options=options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_client_runs_a_guest():
    said = client("basic", "300")
    assert said["version"] == 12
    assert said["irqfd"] == 1
    assert said["seen"] == [n & 0xFF for n in range(300)]
    assert said["names"] == [MEMFD.format(n) for n in ("kvm", "kvm-vm", "kvm-vcpu:0")]
    assert (said["unknown"], said["bad_pointer"]) == (ENOTTY, EFAULT)
    assert said["not_kvm"] == ENOTTY


def test_descriptors_are_duplicated_passed_and_inherited():
    assert client("descriptors") == {
        "same_page": True,
        "passed": 12,
        "foreign_errno": EIO,
        "relative": 12,
        "helper": "helper\n",
    }


def test_a_call_is_known_only_while_its_descriptor_is():
    assert client("replaced") == [0, EEXIST, 0, EEXIST, EBADF, ENOTTY, EEXIST]


def test_a_result_is_not_taken_for_a_descriptor():
    assert client("versions", "24") == [12]


@pytest.mark.parametrize("restart", ["0", "1"])
def test_no_kick_is_lost(restart):
    assert client("kicks", restart, "300") == {"errors": [], "late": []}


@pytest.mark.parametrize("restart", ["0", "1"])
def test_no_kick_is_lost_where_signals_interrupt_the_wait(restart):
    """As before Linux 5.19."""
    code = (
        "import sys; from anykvm.proxy import abi; from anykvm.proxy.launch import run;"
        "abi.SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV = 0;"
        "sys.exit(run(sys.argv[1:], lambda s: None, lambda s: None))"
    )
    command = [sys.executable, "-c", code, sys.executable, str(CLIENT), "kicks", restart, "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {"errors": [], "late": []}


@pytest.mark.parametrize("restart", ["0", "1"])
def test_a_signal_alone_ends_kvm_run(restart):
    assert client("signals_alone", restart, "20") == {"ended": 20}


def test_no_exit_is_lost_or_seen_twice():
    said = client("nothing_lost", "2")
    assert said["wrong"] == []
    assert said["interrupted"] > 20
    assert said["exits"] > 100


def test_handlers_of_kicks_restart_calls():
    """Only in a client that ends KVM_RUN by immediate_exit."""
    after = [True, True, True, True, False]
    assert client("handler_flags") == {"before": False, "opened": False, "after": after}


def test_signals_end_no_call_but_kvm_run():
    assert client("calls_under_kicks", "500") == [12]


def test_signal_mask():
    assert client("signal_mask") == {"errno": EINTR, "pending": True}


EVENTFDS = {
    "errno": EINTR,
    "rung": True,
    "twice": EBUSY,
    "no_eventfd": EINVAL,
    "resample": 0,
    "poll": 1,
    "more descriptors": 0,
}


def test_eventfds_of_the_client():
    assert client("eventfds") == EVENTFDS


DENY = """
import ctypes, os, struct, sys
number, error = int(sys.argv[1]), int(sys.argv[2])
code = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (6, 0, 0, 0x50000 | error), (6, 0, 0, 0x7FFF0000)]
raw = b"".join(struct.pack("=HBBI", *line) for line in code)
buffer = ctypes.create_string_buffer(raw, len(raw))
program = ctypes.create_string_buffer(struct.pack("@HP", 4, ctypes.addressof(buffer)))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(317, 1, 0, program) == 0
os.execv(sys.argv[3], sys.argv[3:])
"""

PROCESS_VM_READV, PROCESS_VM_WRITEV = 310, 311
DOCKERS = (PROCESS_VM_READV, PROCESS_VM_WRITEV, abi.SYS_PIDFD_GETFD)
"""Forbidden by the seccomp profile that Docker has by default."""


def denied(number: int, error: int) -> list[str]:
    """What runs a command to which one system call is forbidden."""
    return [sys.executable, "-c", DENY, str(number), str(error)]


@pytest.fixture
def as_in_docker(monkeypatch):
    prefix = [word for number in DOCKERS for word in denied(number, EPERM)]
    monkeypatch.setitem(globals(), "EXEC", [*prefix, *EXEC])


@pytest.mark.usefixtures("as_in_docker")
def test_what_dockers_profile_forbids_is_not_needed():
    test_a_client_runs_a_guest()
    test_eventfds_of_the_client()
    test_any_memory_can_be_a_slot()
    test_descriptors_are_duplicated_passed_and_inherited()


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (abi.SYS_SECCOMP, EPERM, "does not allow seccomp filters"),
        (abi.SYS_SECCOMP, ENOSYS, "no seccomp"),
        (101, EPERM, "ptrace is refused: Operation not permitted"),
    ],
)
def test_what_is_forbidden_is_named(number, error, text):
    deny = denied(number, error)
    done = subprocess.run([*deny, *EXEC, "--", "true"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 120
    assert text in done.stderr
    assert "see anykvm doctor" in done.stderr
    done = subprocess.run([*deny, *ANYKVM, "doctor"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 120
    assert "\n! " in done.stdout


def test_any_memory_can_be_a_slot():
    said = client("memory_kinds")
    assert said.pop("in the file") == 0x77
    assert set(said.values()) == {0x77}
    assert len(said) == 5


@pytest.mark.parametrize("address", ["0x40000", "0x7e0000040000"])
def test_executable_memory_can_be_a_slot(address):
    assert client("executable", address) == {"at": address, "byte": 0x77}


def test_slots_are_cut_and_joined():
    assert client("many_slots") == {"copied": [7, 8], "kept": True}


def test_what_is_closed_is_freed():
    said = client("lifetime", "30")
    assert (said["left"], said["by_mapping"]) == ([], 1)
    assert said["threads"] < 10  # receivers, which a slow machine has some more of


def test_a_daemon_keeps_its_supervisor(tmp_path):
    result = tmp_path / "result"
    assert client("daemon", str(result)) == {}
    deadline = time.monotonic() + 20
    while not result.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads(result.read_text()) == {"errno": 0, "reason": KVM_EXIT_IO}


def test_without_supervisor_calls_fail():
    done = run(sys.executable, str(CLIENT), "orphaned")
    assert json.loads(done.stdout) == {"run": ENOSYS, "again": ENOSYS}
    assert done.returncode == 0
    assert "supervisor has died" in done.stderr


def test_a_killed_client_kills_the_command():
    done = run(sys.executable, str(CLIENT), "killed")
    assert done.returncode == -signal.SIGKILL


def test_killed_clients_leave_nothing_behind():
    assert client("nothing_left", "6") <= 1


def test_a_killed_command_kills_the_client():
    process = subprocess.Popen([*EXEC, "--", "sh", "-c", "echo $$; exec sleep 60"], stdout=-1)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.kill()
    process.wait(10)
    assert process.stdout.read() == b""  # the client's end is closed
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not os.path.exists(f"/proc/{pid}")


def test_signals_are_passed_on():
    script = "trap 'echo got; exit 3' USR1; echo ready; while :; do sleep 0.02; done"
    process = subprocess.Popen([*EXEC, "--", "sh", "-c", script], stdout=-1, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=10)[0] == "got\n"
    assert process.returncode == 3


def test_a_signal_before_the_client_is_there_is_passed_on():
    code = """
import os, signal, threading, time
from anykvm.proxy.front import Front, Report
mine, theirs = os.pipe()
before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
front, report = Front(mine, before), Report(theirs)
os.kill(os.getpid(), signal.SIGTERM)
pid = os.fork()
if pid == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    time.sleep(60)
def start():
    time.sleep(0.1)
    report.started(pid)
    report.ended(os.waitpid(pid, 0)[1])
threading.Thread(target=start).start()
front.wait()
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=30)
    assert done.returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "status", "text"),
    [
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -TERM $$"], -signal.SIGTERM, ""),
        (["no-such-program"], 127, "no such program"),
        (["/etc/passwd"], 126, "not executable"),
    ],
)
def test_endings(command, status, text):
    done = run(*command)
    assert done.returncode == status
    assert text in done.stderr


def test_standard_streams_and_environment_are_the_clients():
    done = subprocess.run(
        [*EXEC, "--", "sh", "-c", "cat; echo $WORD >&2; ls /proc/self/fd"],
        input="in\n",
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "WORD": "word"},
    )
    assert done.stdout.split() == ["in", "0", "1", "2", "3"]  # 3 is the listing's own
    assert done.stderr == "word\n"


def test_options(tmp_path):
    trace = tmp_path / "trace"
    options = ("--hide-cap", "IRQFD", "--trace", str(trace), "--stats")
    done = run(sys.executable, str(CLIENT), "basic", "3", options=options)
    assert json.loads(done.stdout)["irqfd"] == 0
    assert "KVM_RUN" in done.stderr
    assert "kvm_vcpu_ioctl(KVM_RUN)" in trace.read_text()
    refused = run("true", options=("--hide-cap", "NONE"))
    assert refused.returncode == 2
    assert "there is no capability" in refused.stderr


def test_a_kvm_that_lacks_and_refuses():
    said = client(
        "lacking",
        options=(
            *("--cpu-model", "x86-64-v1", "--hide-cpuid", "sse2"),
            *("--fail", "KVM_CREATE_VCPU:ENOMEM:call=2", "--fail", "KVM_RUN:EINTR:every=2:times=1"),
        ),
    )
    exit_io, interrupted = [0, KVM_EXIT_IO], [EINTR, KVM_EXIT_INTR]
    assert said == {
        "sse2": 0,
        "sse4_1": 0,
        "xsave": [0, 0, 0],
        "second vcpu": ENOMEM,
        "third vcpu": 0,
        "runs": [exit_io, interrupted, exit_io, exit_io],
        "value": 2,
    }


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (("--cpu-model", "i486"), "known are max, x86-64-v1, x86-64-v2"),
        (("--hide-cpuid", "sse9"), "known are fpu"),
        (("--fail", "KVM_RUN"), "there is no errno"),
        (("--fail", "KVM_RUNS:EIO"), "is it one of KVM_RUN"),
        (("--fail", "KVM_RUN:EIO:call=x"), "'call=x' is no condition"),
        (("--fail", "KVM_RUN:EIO:call=1:every=2"), "not both"),
    ],
)
def test_options_that_make_no_sense(option, text, capsys):
    assert main.run(["exec", "--backend", "soft", *option, "--", "true"]) == 2
    assert text in capsys.readouterr().err


def test_looks_at_a_node_that_is_not_there():
    code = (
        "import sys; from anykvm.proxy.launch import run;"
        "sys.exit(run(sys.argv[1:], lambda s: None, lambda s: None, looks=True))"
    )
    command = [sys.executable, "-c", code, sys.executable, str(CLIENT), "looks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == {
        "mode": "0o20666",
        "device": [10, 232],
        "access": [True, False],
        "readlink": EINVAL,
        "another": True,
        "missing": False,
        "command": "character special file a:e8\n",
    }


def test_whether_a_node_is_usable():
    assert node_is_usable("/dev/null")
    assert not node_is_usable("/dev/no-such-node")
    assert not node_is_usable("/etc/passwd")


def test_ctrl_c_reaches_the_client_once():
    script = "trap 'echo int; exit 5' INT; echo ready; while :; do sleep 0.02; done"
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(EXEC[0], [*EXEC, "--", "sh", "-c", script])
    seen = os.read(terminal, 100)
    assert b"ready" in seen
    os.write(terminal, b"\x03")
    status = os.waitpid(pid, 0)[1]
    seen = os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 5
    assert seen.count(b"int") == 1


def expect(terminal: int, text: bytes, seconds: float = 20) -> None:
    """Read until `text` has come."""
    seen, end = b"", time.monotonic() + seconds
    while text not in seen:
        assert select.select([terminal], [], [], end - time.monotonic())[0], seen
        seen += os.read(terminal, 1000)


def test_job_control_of_a_shell():
    """Ctrl-Z, the foreground again, Ctrl-C."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve("/bin/sh", ["sh", "-i"], {**os.environ, "PS1": "> ", "ENV": ""})
    try:
        script = "echo read''y; read line; echo got $line; read line"
        os.write(terminal, shlex.join([*EXEC, "--", "sh", "-c", script]).encode() + b"\n")
        expect(terminal, b"ready\r\n")
        os.write(terminal, b"\x1a")
        expect(terminal, b"> ")
        os.write(terminal, b"jobs\n")
        expect(terminal, b"Stopped")
        os.write(terminal, b"fg\n")
        expect(terminal, b"read")  # the shell names the job
        os.write(terminal, b"word\n")
        expect(terminal, b"got word")
        os.write(terminal, b"\x03")
        expect(terminal, b"> ")
        os.write(terminal, b"echo status=$?\n")
        expect(terminal, b"status=130\r\n")
    finally:
        os.close(terminal)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_stopped_client_stops_the_command():
    process = subprocess.Popen(
        [*EXEC, "--", "sh", "-c", "echo $$; read line; echo $line"], -1, stdin=-1, stdout=-1
    )
    assert process.stdin is not None
    assert process.stdout is not None
    client_pid = int(process.stdout.readline())
    os.kill(client_pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(b"on\n", timeout=10)[0] == b"on\n"


def test_stopping_takes_vcpus_out_of_the_guest():
    process = subprocess.Popen([*EXEC, "--", sys.executable, str(CLIENT), "stopped"], stdout=-1)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
    os.kill(process.pid, signal.SIGCONT)
    assert json.loads(process.communicate(timeout=20)[0]) == {"left": False}


COMPILER = shutil.which("cc")

if COMPILER is not None:

    @pytest.mark.parametrize("link", ["-static", "-dynamic"])
    def test_clients_in_c(link, tmp_path):
        program = tmp_path / "client"
        options = ["-static"] if link == "-static" else []
        source = CLIENT.with_suffix(".c")
        subprocess.run([COMPILER, *options, "-o", str(program), str(source)], check=True)
        done = run(str(program))
        assert (done.stdout, done.returncode) == ("Hi\n", 0)
