"""Runs a program on text where it can reach nothing: no network, no file but its own and the
system's, no process but its own, and little memory, time, output and disk.

By bubblewrap, or by namespaces of our own (jail.py). Whichever it is has to prove itself on this
machine before any program is run; where neither does there is a ConfigError, and no unsafe run.
"""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from moetrain import files
from moetrain.errors import ConfigError
from moetrain.rewards import seccomp

MB = 1 << 20
HOME = "/tmp/home"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": HOME, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
SYSTEM = ("/bin", "/sbin", "/lib", "/lib64", "/lib32", "/usr")
SYSTEM_FILES = ("/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime")
# Root's programs each run as a user of their own, so that the kernel counts their processes apart.
FIRST_UID, NUM_UIDS = 20000, 40000
MAX_TOLD = 1 << 16
END_SECONDS = 10  # for the kernel, which has killed it

File = tuple[bytes, int]  # content, mode


@dataclass(frozen=True)
class Limits:
    """Of one run; sizes in bytes."""

    seconds: float  # by the clock; of CPU as many, rounded up, for each process
    memory: int = 512 * MB  # address space of a process
    file: int = 16 * MB  # a file, the output, and all files together
    processes: int = 4  # and threads


@dataclass(frozen=True)
class Ran:
    """How a run ended. "broken": the sandbox could not start it, which says nothing about it."""

    end: Literal["exit", "timeout", "output", "broken"]
    code: int  # over 128: of the signal that ended it
    out: bytes
    said: str  # the end of its standard error, for people
    seconds: float


class Sandbox:
    """Ready to run programs; the processes of those that run at a time count together.

    A running program ends with the process that started it. One that bubblewrap (0.8) is just
    setting up when that process is killed may stay: keeper.py ends those of the graders.

    Args:
        kind: "auto" takes bubblewrap where it works, else namespaces.
        read: further folders that programs may read.
        python: the interpreter for programs; None: this one (without the packages of its virtual
            environment), or else the system's.
    """

    def __init__(self, kind: str = "auto", read: Sequence[str] = (), python: str | None = None):
        self.read, self.links = _system(read)
        self._rules = seccomp.program()
        self.uid = FIRST_UID + os.getpid() % NUM_UIDS if _is_real_root() else None
        self.tools = {name: _tool(name) for name in ("prlimit", "setpriv")}
        own = (os.path.realpath(sys.executable), "/usr/bin/python3")
        self._pythons = own if python is None else (os.path.expanduser(python),)
        self.python, self._proc = self._pythons[0], True
        kinds = ("bubblewrap", "namespaces") if kind == "auto" else (kind,)
        found = {one: self._try(one) for one in kinds}
        self.kind = next((one for one, trouble in found.items() if trouble is None), None)
        if self.kind is None:
            troubles = "; ".join(f"{one}: {trouble}" for one, trouble in found.items())
            raise ConfigError(
                f"There is no safe sandbox for code on this machine ({troubles}). Install"
                " bubblewrap or allow user namespaces (sysctl user.max_user_namespaces,"
                " kernel.apparmor_restrict_unprivileged_userns=0; in a container its seccomp"
                " profile), or set sandbox: piston with a url."
            )
        _refuse_hidden_root()

    def run(
        self,
        command: Sequence[str],
        stdin: bytes = b"",
        files: Mapping[str, File] | None = None,
        limits: Limits | None = None,
    ) -> Ran:
        """Run `command` in an empty folder with `files` in it.

        Everything that it started has ended when this returns.
        """
        assert self.kind is not None
        return self._run(self.kind, command, stdin, files or {}, limits or Limits(5.0))

    def _run(
        self,
        kind: str,
        command: Sequence[str],
        stdin: bytes,
        files: Mapping[str, File],
        limits: Limits,
    ) -> Ran:
        streams = [_file(stdin), _file(), _file()]
        status, rules = _file(), _file(self._rules)  # a run's own: several may run at a time
        given = [(_file(data), f"{HOME}/{name}", mode) for name, (data, mode) in files.items()]
        limited = [*self._limit(limits), *command]
        start = self._bubblewrap if kind == "bubblewrap" else self._namespaces
        fds = [status, rules, *(fd for fd, _, _ in given)]
        started = time.monotonic()
        try:
            process = subprocess.Popen(
                start(limited, given, status, rules, limits.file),
                stdin=streams[0],
                stdout=streams[1],
                stderr=streams[2],
                pass_fds=fds,
                env={},
                cwd="/",
                start_new_session=True,
            )
            in_time = _wait(process, limits.seconds)
            seconds = time.monotonic() - started
            status_of = _parse_status(os.pread(status, MAX_TOLD, 0))
            _wait_for_init(status_of.get("child-pid"))
            out = os.pread(streams[1], limits.file, 0)
            sizes = [os.fstat(fd).st_size for fd in streams[1:]]
            message = os.pread(streams[2], 2000, max(0, sizes[1] - 2000)).decode(errors="replace")
        finally:
            for fd in (*streams, *fds):
                os.close(fd)
        code = status_of.get("exit-code", -1)
        if not in_time or code == 128 + 24:  # SIGXCPU
            return Ran("timeout", code, out, message, seconds)
        if code < 0 or "error" in status_of:
            return Ran("broken", code, out, str(status_of.get("error", message)).strip(), seconds)
        end = "output" if max(sizes) >= limits.file else "exit"
        return Ran(end, code, out, message, seconds)

    def _limit(self, limits: Limits) -> list[str]:
        cpu = int(limits.seconds) + 1
        ours = 2 if self.uid is None else 0  # starter and init are the user's processes, too
        words = [
            f"--nproc={limits.processes + ours}",
            f"--as={limits.memory}",
            f"--fsize={limits.file}",
            f"--cpu={cpu}:{cpu + 1}",
            f"--stack={min(limits.memory // 4, 64 * MB)}",
            "--nofile=64",
            "--core=0",
        ]
        return [self.tools["prlimit"], *words]

    def _bubblewrap(
        self,
        command: list[str],
        files: list[tuple[int, str, int]],
        status: int,
        rules: int,
        space: int,
    ) -> list[str]:
        words = [_tool("bwrap"), "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
        words += ["--die-with-parent", "--new-session", "--clearenv"]
        if self.uid is None:
            words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        else:
            words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            who = [f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups"]
            setpriv = [self.tools["setpriv"], *who, "--inh-caps=-all", "--no-new-privs"]
            command = [*setpriv, *command]
        words += ["--perms", "1777", "--size", str(space), "--tmpfs", "/tmp"]
        words += ["--perms", "1777", "--dir", HOME]
        for path in self.read:
            for parent in reversed(Path(path).parents[:-1]):  # else as closed as on the host
                words += ["--perms", "0755", "--dir", str(parent)]
            words += ["--ro-bind", path, path]
        for path, target in self.links:
            words += ["--symlink", target, path]
        if self._proc:  # read-only: a program must not set how soon the kernel takes its memory
            words += ["--proc", "/proc", "--remount-ro", "/proc"]
        words += ["--dev", "/dev", "--remount-ro", "/dev"]
        for fd, path, mode in files:
            words += ["--perms", f"{mode:o}", "--file", str(fd), path]
        for name, value in ENVIRONMENT.items():
            words += ["--setenv", name, value]
        words += ["--seccomp", str(rules), "--json-status-fd", str(status)]
        return [*words, "--chdir", HOME, "--remount-ro", "/", "--", *command]

    def _namespaces(
        self,
        command: list[str],
        files: list[tuple[int, str, int]],
        status: int,
        rules: int,
        space: int,
    ) -> list[str]:
        job = {
            "parent": os.getpid(),
            "uid": self.uid,
            "read": self.read,
            "links": self.links,
            "files": files,
            "filter": rules,
            "status": status,
            "space": space,
            "home": HOME,
            "command": command,
            "environment": ENVIRONMENT,
        }
        return [sys.executable, "-I", "-S", "-c", _JAIL, json.dumps(job)]

    def _try(self, kind: str) -> str | None:
        """What keeps a kind from being used here: a run of probe.py has to find every door shut."""
        if kind == "bubblewrap" and shutil.which("bwrap") is None:
            return "not installed"
        program = {"probe.py": (_PROBE, 0o644)}
        ran = Ran("broken", -1, b"", "", 0.0)
        with files.scratch() as folder:
            folder.chmod(0o755)  # nothing but the sandbox keeps its programs out
            ours = folder / "ours"
            ours.touch(0o644)
            # An interpreter may need what is not visible there (LD_LIBRARY_PATH), and a container
            # that hides parts of its /proc lets no other be mounted.
            for python, proc in product(self._pythons, (True, False)):
                self.python, self._proc = python, proc
                words = [self.python, "-I", "-S", "probe.py", str(os.getpid()), str(ours)]
                ran = self._run(kind, words, b"", program, Limits(20.0))
                if ran.end == "exit" and ran.out == b"shut":
                    return None
        message = (ran.out.decode(errors="replace") + " " + ran.said).strip().splitlines()
        return (message or [f"{ran.end} {ran.code}"])[-1]


_JAIL = Path(__file__).with_name("jail.py").read_text()
_PROBE = Path(__file__).with_name("probe.py").read_bytes()


def _system(read: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """What every program may read, and symbolic links such as /bin."""
    links = [(path, os.readlink(path)) for path in SYSTEM if os.path.islink(path)]
    whole = [path for path in SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
    interpreter = [] if sys.base_prefix.startswith("/usr") else [os.path.realpath(sys.base_prefix)]
    further = [os.path.realpath(os.path.expanduser(path)) for path in read]
    for path in further:
        if not os.path.exists(path):
            raise ConfigError(f"rewards: code: read: {path} does not exist. Check the path.")
    files = [path for path in SYSTEM_FILES if os.path.exists(path)]
    return [*whole, *files, *interpreter, *further], links


def _is_real_root() -> bool:
    """Root, and not only in a namespace of users that holds no others."""
    if os.geteuid() != 0:
        return False
    rows = [
        [int(word) for word in line.split()]
        for line in Path("/proc/self/uid_map").read_text().splitlines()
    ]
    last = FIRST_UID + NUM_UIDS
    return any(first <= FIRST_UID and first + num >= last for first, _, num in rows)


def _refuse_hidden_root() -> None:
    """Refuse a user who is the machine's root under another number, or without the numbers of
    others: the kernel does not count root's processes, so that a program that forks would take the
    machine. Raises ConfigError.
    """
    if _is_real_root():
        return
    rows = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    if [str(os.geteuid()), "0"] in [row[:2] for row in rows]:
        raise ConfigError(
            "There is no safe sandbox for code here: in this namespace of users the machine's root"
            f" is user {os.geteuid()}, and the kernel does not limit root's processes. Start the"
            " run as a user of the machine, or as root outside of it."
        )


def _tool(name: str) -> str:
    program = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    if program is None:
        raise ConfigError(f"The sandbox for code needs {name}: install util-linux.")
    return program


def _file(data: bytes = b"") -> int:
    """A file in memory that holds `data`; what is written to it is bounded by the file limit."""
    fd = os.memfd_create("moetrain")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> bool:
    """Whether it ended by itself; it has ended in any case."""
    handle = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        ended = bool(poll.poll(seconds * 1000))
    finally:
        os.close(handle)
        process.kill()
        process.wait()
    return ended


def _wait_for_init(pid: int | None) -> None:
    """Until the first process of the program's namespace is gone, which takes the others along:
    they would count among those of the next program.
    """
    if pid is None:
        return
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.poll(END_SECONDS * 1000)
    os.close(handle)


def _parse_status(status_lines: bytes) -> dict[str, Any]:
    """What bubblewrap, or jail.py, says of the run."""
    note: dict[str, Any] = {}
    for line in status_lines.decode(errors="replace").splitlines():
        note |= json.loads(line)
    return note
