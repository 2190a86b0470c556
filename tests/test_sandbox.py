"""The sandbox against programs that attack it (sandbox_attacks.py), by bubblewrap and by namespaces
of our own, as root and as another user. Each kind runs them all once, in a process of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import IO, Any

import pytest
from sandbox_attacks import ATTACKS, MARK, SECRET, marked

from moetrain.errors import ConfigError
from moetrain.rewards.sandbox import Limits, Sandbox

ROOT = Path(__file__).parent.parent
ATTACKER = Path(__file__).with_name("sandbox_attacks.py")
# Another user reads neither root's home nor, in it, this interpreter: so it gets a home of root's
# that has nothing but the interpreter, in a mount namespace.
AS_OTHER = """
set -e
base=$1; hidden=$2; shift 2
mount --bind "$base" /mnt
mount -t tmpfs -o mode=755 tmpfs "$hidden"
mkdir -p "$base"
mount --bind /mnt "$base"
cd /
exec setpriv --reuid=1234 --regid=1234 --clear-groups --inh-caps=-all --bounding-set=-all "$@"
"""


def as_user(user: str, command: list[str]) -> tuple[list[str], str | None]:
    """(`command` as root or as another user, why this machine cannot do that)."""
    if user == "root":
        return command, None if os.geteuid() == 0 else "not root"
    if os.geteuid() != 0:
        return command, None
    closed = [p for p in (*Path(sys.executable).parents, *ROOT.parents, ROOT) if not is_open(p)]
    if closed:
        return command, f"{closed[0]} is closed to other users than root"
    base = os.path.realpath(sys.base_prefix)
    hidden = next((str(p) for p in reversed(Path(base).parents) if not is_open(p)), None)
    if hidden is None:
        words = ["--reuid=1234", "--regid=1234", "--clear-groups", "--inh-caps=-all"]
        return ["setpriv", *words, "--bounding-set=-all", *command], None
    return ["unshare", "--mount", "sh", "-c", AS_OTHER, "sh", base, hidden, *command], None


def is_open(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o001)


@pytest.fixture(scope="module", params=["bubblewrap", "namespaces"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "bubblewrap" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: that it keeps programs in stays unproven")
    return request.param


@cache
def outcomes(kind: str) -> dict[str, Any]:
    """By user: what came of every attack, {attacks: {name: ...}, host: ...}; or why there is none.

    Both at a time: most attacks wait for their end.
    """
    found: dict[str, Any] = {}
    started: dict[str, tuple[subprocess.Popen[bytes], IO[bytes]]] = {}
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TRAINERS_KEY": SECRET}
    for user in ("root", "other"):
        command, reason = as_user(user, [sys.executable, str(ATTACKER), kind, user])
        if reason is not None:
            found[user] = reason
            continue
        out = tempfile.TemporaryFile()
        started[user] = (subprocess.Popen(command, stdout=out, env=own), out)
    for user, (process, out) in started.items():
        assert process.wait(300) == 0
        with out:
            out.seek(0)
            found[user] = json.load(out)
        assert (found[user]["host"]["uid"] is not None) == (user == "root")
    return found


@pytest.fixture(scope="module", params=["root", "other"])
def attacked(kind: str, request: pytest.FixtureRequest) -> dict[str, Any]:
    own = outcomes(kind)[request.param]
    if isinstance(own, str):
        pytest.skip(f"that the sandbox keeps in what this user starts stays unproven: {own}")
    return own


def ended(attack: dict[str, Any], *ends: str) -> bool:
    return attack["end"] in ends


def denied(attack: dict[str, Any]) -> bool:
    return ended(attack, "exit") and attack["code"] == 1 and "PermissionError" in attack["said"]


def says(text: str) -> Callable[[dict[str, Any]], bool]:
    def check(attack: dict[str, Any]) -> bool:
        return ended(attack, "exit") and re.fullmatch(text, attack["out"].strip()) is not None

    return check


def stopped(attack: dict[str, Any]) -> bool:
    return ended(attack, "timeout") and attack["seconds"] < 5


EXPECTED: dict[str, Callable[[dict[str, Any]], bool]] = {
    "tcp": denied,
    "udp": denied,
    "unix": denied,
    "abstract": denied,
    "vsock": denied,
    "io_uring": says("1"),  # EPERM
    "environment": says(r"(?s)\{'PATH'.*"),
    "files of the host": lambda a: a["code"] == 1 and "FileNotFoundError" in a["said"],
    "symbolic link": lambda a: ended(a, "exit") and a["out"].count("[Errno") == 6,
    "all files that it can find": lambda a: ended(a, "exit") and a["code"] == 0,
    "descriptors": says(r"\['0', '1', '2', '3'\]"),  # the last is the folder's own
    "write outside": says(""),
    "10 GB": lambda a: a["code"] == 1 and "OSError" in a["said"] and a["seconds"] < 5,
    "many files of 1 MB": says("[34]"),
    "huge numbers of files": lambda a: stopped(a) or bool(says(r"full 40\d\d")(a)),
    "memory": lambda a: a["code"] == 1 and "MemoryError" in a["said"],
    "shared memory": says("refused"),
    "memory files": denied,
    "fork bomb": stopped,
    "counting forks": says("[2-5]"),
    "threads": says("[1-5]"),
    "endless output": lambda a: ended(a, "output") and a["size"] == 4 << 20,
    "endless errors": lambda a: ended(a, "output") and a["size"] == 0,
    "endless loop": stopped,
    "sleep": stopped,
    "deaf sleep": stopped,
    "stopping itself": stopped,
    "killing others": lambda a: a["out"] == "on\n" and ended(a, "exit"),
    "daemon": lambda a: a["out"] == "gone\n" and a["seconds"] < 5,
    "ptrace": says("-1 -1"),
    "becoming init": lambda a: a["out"] == "on\n" and ended(a, "exit"),
    "namespaces": says(r"\[-1, -1, -1, -1, -1, -1\]\n-1 -1\nTrue 0+"),
    "becoming root": says(r"refused\nrefused\nrefused"),
    "choosing who is killed when memory ends": says(""),
    "deep folders": lambda a: stopped(a) or says("full")(a),
    "segmentation fault": lambda a: ended(a, "exit") and a["code"] == 128 + 11,
    "own kill": lambda a: ended(a, "exit") and a["code"] == 128 + 9,
    "sum": says("3"),
    "standard input by name": says("1\n2"),
}


def test_every_attack_has_its_end() -> None:
    assert EXPECTED.keys() == ATTACKS.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_attack(attacked: dict[str, Any], name: str) -> None:
    own = attacked["attacks"][name]
    assert EXPECTED[name](own), own | {"out": own["out"][:1000]}
    assert SECRET not in own["out"]


def test_the_host_saw_nothing_of_it(attacked: dict[str, Any]) -> None:
    host = attacked["host"]
    assert host["left"] == 0, "processes of a program outlived it"
    assert host["heard"] == [], "a program reached a socket of the host"
    assert host["victim"] is None, "a program killed a process of the host"
    assert host["written"] == ["door", "secret"]


def test_a_program_ends_with_the_process_that_runs_it(kind: str) -> None:
    """Once it has started: while bubblewrap still sets up, its death is nobody's signal."""
    script = (
        "import sys; from moetrain.rewards.sandbox import *\n"
        f"s = Sandbox({kind!r}); print('ready', flush=True)\n"
        f"s.run([s.python, '-c', 'import time; time.sleep(600)', {MARK!r}], limits=Limits(600))"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        wait_for(lambda: marked(first="-c", last=MARK) == 1)
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: marked() == 0)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_files_of_the_sandbox_are_gone_and_folders_can_be_given(kind: str, tmp_path: Path) -> None:
    (tmp_path / "given").write_text("seen")
    os.chmod(tmp_path, 0o755)
    sandbox = Sandbox(kind, read=[str(tmp_path)])
    look = "import os; print(os.listdir('.'), open('{}/given').read()); open('left', 'w')"
    for _ in range(2):
        ran = sandbox.run([sandbox.python, "-c", look.format(tmp_path)], limits=Limits(20))
        assert ran.out == b"[] seen\n" and ran.code == 0, ran
    change = f"open('{tmp_path}/given', 'w')"
    assert b"" == sandbox.run([sandbox.python, "-c", change], limits=Limits(20)).out
    assert (tmp_path / "given").read_text() == "seen"
    with pytest.raises(ConfigError, match="read: /nonexistent does not exist"):
        Sandbox(kind, read=["/nonexistent"])


def test_without_namespaces_there_is_a_refusal_and_no_run(tmp_path: Path) -> None:
    """On a machine that allows none: here, a namespace of users that may make no others."""
    script = (
        "from moetrain.rewards.sandbox import Sandbox\n"
        "from moetrain.errors import ConfigError\n"
        "try: Sandbox()\n"
        "except ConfigError as error: print(error)"
    )
    words = ["unshare", "--user", "--map-root-user", "sh", "-c"]
    words += ['echo 0 > /proc/sys/user/max_user_namespaces; exec "$@"', "sh"]
    words += ["setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip()
    assert said.startswith("There is no safe sandbox for code on this machine"), done
    assert "Install bubblewrap" in said and "sandbox: piston" in said and "\n" not in said


def test_an_interpreter_that_cannot_run_there() -> None:
    with pytest.raises(ConfigError, match="no safe sandbox"):
        Sandbox(python="/usr/bin/false")


def test_the_machines_root_behind_another_number_is_refused() -> None:
    """`unshare --map-user` by root: RLIMIT_NPROC does not bind its processes, and a program that
    forks took a machine of 24 GB down. Nothing is run here but the refusal.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can hide as another user: its refusal stays unproven")
    code = "from moetrain.rewards.sandbox import Sandbox; Sandbox()"
    for words in (["--map-user=1000", "--map-group=1000"], ["--map-root-user"]):
        done = subprocess.run(
            ["unshare", "--user", *words, sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "the kernel does not limit root's processes" in done.stderr, done.stderr
