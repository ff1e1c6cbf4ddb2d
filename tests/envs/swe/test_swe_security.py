"""Tries to break out of a cage: each ends as a defined observation, and the next command still runs."""

import dataclasses
import io
import math
import os
import socket
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import empg_envs
from empg_envs.swe.bubblewrap import find_interpreter
from empg_envs.swe.caged import BubblewrapSandbox
from empg_envs.swe.sandbox import FileError, Limits
from empg_envs.swe.tools import FunctionTools, clean, render_call
from empg_envs.swe.tree import ArchiveError, File, read_archive, read_folder
from tests.cages import need_cages

TREE = {"code.py": File(b"x = 1\n"), "sub/other.py": File(b"y = 2\n")}
LIMITS = Limits(memory_mb=256, processes=32, disk_mb=8, files=2000, file_mb=4, output_mb=1)


@pytest.fixture(scope="module")
def shared() -> Iterator[BubblewrapSandbox]:
    need_cages()
    sandbox = BubblewrapSandbox(find_interpreter(), LIMITS)
    yield sandbox
    sandbox.close()


@pytest.fixture
def cage(shared: BubblewrapSandbox) -> Iterator[BubblewrapSandbox]:
    shared.reset(TREE)
    yield shared
    # Whatever a test did, the sandbox still serves.
    assert shared.exec("echo alive", 20).output == "alive\n"


def python(cage: BubblewrapSandbox, script: str, seconds: float = 20) -> str:
    return cage.exec("python -", seconds, stdin=script.encode()).output


def test_files_of_the_machine_are_not_there(cage: BubblewrapSandbox, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("s3cret")
    names = [str(secret), str(Path.home()), "/etc/shadow", "/work", "/var", "/sys", "/boot"]
    found = cage.exec(f"cat {secret} /etc/shadow; for p in {' '.join(names)}; do ls -A $p; done", 20)
    assert "s3cret" not in found.output and "root:$" not in found.output
    shown = {line for line in found.output.splitlines() if "cannot" not in line and "No such" not in line}
    assert shown <= {".pyenv", *Path(sys.prefix).parts}  # the way to the interpreter only
    users = cage.exec("cut -d: -f1 /etc/passwd", 20).output.split()
    assert users == ["root", "agent"]


def test_the_package_with_the_solutions_is_hidden(cage: BubblewrapSandbox) -> None:
    package = Path(empg_envs.__file__).parent
    interpreter = find_interpreter()
    prefixes = (*interpreter.prefixes, str(package.parent))
    installed = BubblewrapSandbox(dataclasses.replace(interpreter, prefixes=prefixes), LIMITS)
    installed.reset(TREE)
    assert installed.exec(f"ls {package}/base.py; ls -A {package}/swe", 20).output == f"{package}/base.py\n"
    installed.close()


def test_nothing_outside_of_the_task_can_be_written(cage: BubblewrapSandbox) -> None:
    places = "/x /usr/x /bin/x /etc/x /dev/x /run/x /proc/sys/kernel/hostname /proc/sys/kernel/core_pattern "
    places += "/proc/sysrq-trigger /proc/1/oom_score_adj /proc/self/uid_map"
    found = cage.exec(f"for p in {places}; do (echo 1 >> $p) 2>/dev/null && echo wrote $p; done; true", 20)
    assert found.output == ""
    assert cage.exec("mount -t tmpfs none /testbed; echo $?", 20).output.splitlines()[-1] != "0"


def test_no_network(cage: BubblewrapSandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        accepted = threading.Thread(target=lambda: _accept(server), daemon=True)
        accepted.start()
        script = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=5)
    print("connected")
except OSError:
    print("refused")
try:
    socket.getaddrinfo("host.invalid", 80)
    print("resolved")
except OSError:
    print("unknown")
print(*[name for _, name in socket.if_nameindex()], len(open("/proc/net/route").readlines()))
"""
        # The loopback is the cage's own, there is no other interface, and no route (one line is the heading).
        assert python(cage, script).split() == ["refused", "unknown", "lo", "1"]


def test_only_sockets_of_listed_families(cage: BubblewrapSandbox) -> None:
    # Creating is all that is tried: an address of AF_VSOCK would be the host of this machine.
    script = """
import errno, socket
for family in (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK):
    socket.socket(family, socket.SOCK_DGRAM).close()
for family in range(1, 64):
    if family not in (1, 2, 10, 16):
        for call in (socket.socket, socket.socketpair):
            try:
                call(family, socket.SOCK_STREAM)
                print("made", family)
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    print(family, error)
left, right = socket.socketpair()
left.sendall(b"pair")
print(right.recv(9).decode(), hasattr(socket, "AF_VSOCK"), hasattr(socket, "AF_PACKET"))
"""
    assert python(cage, script) == "pair True True\n"


def test_a_snapshot_takes_time_in_proportion_to_its_files() -> None:
    need_cages()
    counts = (1000, 10_000)
    cages = {files: BubblewrapSandbox(find_interpreter(), Limits()) for files in counts}
    seconds = dict.fromkeys(counts, math.inf)
    for files, cage in cages.items():
        cage.reset({})
        command = f"[open(f'{{n}}', 'w').close() for n in range({files})]"
        assert cage.exec(f'python -c "{command}"', 60).returncode == 0
    # The best of several in turn: what else the machine does slows one, not all of them.
    for _ in range(4):
        for files, cage in cages.items():
            started = time.perf_counter()
            assert len(cage.snapshot()) == files
            seconds[files] = min(seconds[files], time.perf_counter() - started)
    # Ten times the files: some 0.15 s on an idle machine; with squared time it would be 100 times.
    assert seconds[10_000] < 50 * seconds[1000]
    for cage in cages.values():
        cage.close()


def _accept(server: socket.socket) -> None:
    try:
        server.accept()
    except OSError:
        return


HOARD = "import time; b = bytearray(180 << 20); time.sleep(20)"


@pytest.mark.parametrize(
    ("command", "reasons"),
    [
        ("f() { f | f & }; f; sleep 20", {"processes"}),
        (f"for i in 1 2 3; do python -c '{HOARD}' & done; sleep 20", {"memory"}),
        ("yes", {"output"}),
        ("while :; do :; done", {"timeout"}),
        ("trap '' TERM INT; sleep 20", {"timeout"}),
        ("i=0; while :; do : > /tmp/f$i; i=$((i+1)); done", {"files"}),
    ],
    ids=["fork bomb", "memory of many", "endless output", "busy loop", "deaf", "many files"],
)
def test_bombs_end_with_a_named_limit(cage: BubblewrapSandbox, command: str, reasons: set[str]) -> None:
    result = cage.exec(command, 1 if reasons == {"timeout"} else 20)
    assert result.reason in reasons and result.returncode < 0
    assert len(result.output) < 200_000


def test_an_agent_can_clear_up_after_too_many_files(cage: BubblewrapSandbox) -> None:
    script = "for number in range(5000): open(f'f{number}', 'w').close()"
    assert cage.exec(f'python -c "{script}"', 20).reason == "files"
    assert cage.exec("sleep 0.2; find . -name 'f*' -delete", 20).reason == "exit"
    assert cage.exec("ls | wc -l", 20).output == "2\n"


def test_one_process_gets_no_more_memory_than_its_share(cage: BubblewrapSandbox) -> None:
    assert "MemoryError" in python(cage, "b = bytearray(1 << 30)")


def test_disk_and_file_sizes_end(cage: BubblewrapSandbox) -> None:
    one = cage.exec("head -c 6M /dev/zero > big; ls -l big | cut -d' ' -f5", 20)
    assert int(one.output.split()[-1]) <= 4 << 20
    many = cage.exec("rm big; for i in 1 2 3 4; do head -c 3M /dev/zero > f$i; done; du -sm . | cut -f1", 20)
    assert "No space left" in many.output and int(many.output.split()[-1]) <= 8
    # Memory files, shared memory of System V and /dev are no way around.
    script = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.memfd_create(b"x", 0), libc.shmget(0, 1 << 20, 0o1666))
try:
    open("/dev/x", "w")
except OSError as error:
    print("read-only")
"""
    assert python(cage, script).split() == ["-1", "-1", "read-only"]
    shm = cage.exec(
        "for i in 1 2 3 4 5 6; do head -c 4M /dev/zero > /dev/shm/$i; done; du -sm /dev/shm | cut -f1", 20
    )
    assert int(shm.output.split()[-1]) <= 16


def test_the_guest_cannot_be_signalled_traced_or_spoken_for(cage: BubblewrapSandbox) -> None:
    killed = cage.exec("for s in KILL STOP TERM INT HUP SEGV; do kill -$s 1; done; echo after", 20)
    assert killed.output.endswith("after\n")
    script = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
print(libc.ptrace(16, 1, 0, 0), ctypes.get_errno() == 1)
for name in ("mem", "maps", "environ", "fd/4", "root/etc/passwd"):
    try:
        open(f"/proc/1/{name}", "r+b" if name in ("mem", "fd/4") else "rb")
        print("opened", name)
    except OSError:
        pass
"""
    assert python(cage, script).split() == ["-1", "True"]


def test_processes_of_the_machine_are_not_seen(cage: BubblewrapSandbox) -> None:
    pids = cage.exec("ls /proc | grep -E '^[0-9]+$' | wc -l", 20)
    assert int(pids.output) < 10
    parent = cage.exec(f"kill -0 {os.getpid()} 2>&1; grep -a pytest /proc/[0-9]*/cmdline; true", 20)
    assert "No such process" in parent.output and "matches" not in parent.output


def test_privileges_cannot_be_had_again(cage: BubblewrapSandbox) -> None:
    status = cage.exec("grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status", 20).output.split()
    assert status == ["CapEff:", "0000000000000000", "NoNewPrivs:", "1", "Seccomp:", "2"]
    assert cage.exec("unshare -Ur true", 20).returncode != 0


def test_what_a_command_left_running_is_ended(cage: BubblewrapSandbox) -> None:
    cage.exec("(setsid sleep 300 &) ; nohup sleep 300 >/dev/null 2>&1 & echo started", 20)
    assert cage.exec("pgrep -c sleep", 20).output == "0\n"


def test_the_editor_stays_inside(cage: BubblewrapSandbox) -> None:
    cage.exec("ln -s /etc/passwd link; ln -s / top; mkfifo pipe; ln -s loop loop", 20)
    for path in ("/etc/passwd", "../etc/passwd", "link", "top/etc/hosts", "/proc/1/environ", "pipe", "loop"):
        with pytest.raises(FileError):
            cage.read(path)
    for path in ("/etc/x", "../x", "top/usr/x", "/run/x", "sub"):
        with pytest.raises(FileError):
            cage.write(path, b"x")
    cage.write("/testbed/sub/../fresh.py", b"z = 3\n")
    assert cage.read("fresh.py") == b"z = 3\n"
    edit = FunctionTools(cage).run(render_call("file_editor", command="view", path="top/etc/hosts"), 20)
    assert "ERROR" in edit.text and "127.0.0.1" not in edit.text


def test_odd_names_and_links_do_not_enter_a_snapshot_as_files(cage: BubblewrapSandbox) -> None:
    cage.exec("touch \"$(printf 'a\\nb')\"; ln -s /etc/passwd link; mkfifo pipe; chmod 000 sub code.py", 20)
    tree = cage.snapshot()
    assert set(tree) == {"code.py", "sub/other.py", "link"}
    assert tree["link"] == File(b"/etc/passwd", 0o120000) and tree["code.py"].data == b"x = 1\n"


def test_deep_folders_and_large_trees_are_refused_or_cut(cage: BubblewrapSandbox) -> None:
    cage.exec("for i in $(seq 200); do mkdir d && cd d; done; touch deep", 20)
    assert not any(path.endswith("deep") for path in cage.snapshot())


def test_control_bytes_do_not_reach_the_prompt(cage: BubblewrapSandbox) -> None:
    command = r"printf '\033[2J\033]0;title\007\000\001\377\r\nok\342\200\256'"
    reply = FunctionTools(cage).run(render_call("execute_bash", cmd=command), 20)
    assert reply.text.startswith("Execution output of [execute_bash]:\n")
    assert all(char == "\n" or char.isprintable() for char in reply.text) and "ok" in reply.text
    assert clean("a" * 30, 10) == "aaaaa\n[20 characters left out]\naaaaa"


def _tar(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.size, member.type, member.linkname = len(data), kind, link
        archive.addfile(member, io.BytesIO(data))
        inner = tarfile.TarInfo(f"{name}/inside")
        if link:
            archive.addfile(inner, io.BytesIO(b""))
    return stream.getvalue()


def _zip(name: str, data: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        _tar("../evil.py", b"x"),
        _tar("/evil.py", b"x"),
        _tar("top/a\nb.py", b"x"),
        _tar("top/link", kind=tarfile.SYMTYPE, link="/etc"),
        _tar("top/link", kind=tarfile.SYMTYPE, link="../../etc"),
        _tar("link", kind=tarfile.SYMTYPE, link="sub"),
        _tar("top/dev", kind=tarfile.CHRTYPE),
        _tar("top/hard", kind=tarfile.LNKTYPE, link="/etc/passwd"),
        _zip("../evil.py", b"x"),
        _zip("a/../../evil.py", b"x"),
        _zip("bomb", b"\0" * (64 << 20)),
        b"no archive",
    ],
    # An archive holds the time of its making, so its bytes are no name: processes would disagree about it.
    ids=[
        "above",
        "absolute",
        "newline",
        "link-absolute",
        "link-above",
        "link-within",
        "device",
        "hard",
        "zip-above",
        "zip-around",
        "bomb",
        "none",
    ],
)
def test_archives_cannot_write_outside_or_overflow(archive: bytes) -> None:
    with pytest.raises(ArchiveError):
        read_archive(archive)


def test_folders_with_links_outside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(ArchiveError, match="link"):
        read_folder(tmp_path)
