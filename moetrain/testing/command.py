"""The command line for tests, in processes that have imported everything before they start.

A rank that trains spends 6 of its first 7 CPU seconds on importing. Here a command and the ranks
that it starts are forked off one process that has done so (`preload`). `fresh=True` executes a new
interpreter instead, for what depends on one: hash seeds that differ from rank to rank, what a user
waits for.
"""

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

from moetrain.testing.gloo import own_server, share_server

MOETRAIN = (sys.executable, "-m", "moetrain")


class Started:
    """A command that runs: as much of subprocess.Popen as tests need. What it prints goes to files,
    which `communicate` reads.
    """

    def __init__(
        self,
        words: Sequence[str],
        cwd: Path | None,
        env: Mapping[str, str],
        *,
        merged: bool,
        fresh: bool,
    ):
        self.args = [*MOETRAIN, *words]
        self.stdout: IO[bytes] = tempfile.TemporaryFile()
        self.stderr = self.stdout if merged else tempfile.TemporaryFile()
        context = multiprocessing.get_context("forkserver")
        with own_server():
            self._process = context.Process(
                target=_command,
                args=(list(words), str(cwd or Path.cwd()), dict(env), _Fds(self), fresh),
                daemon=True,  # ends with the tests
            )
            self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def __del__(self) -> None:
        self.stdout.close()
        self.stderr.close()

    @property
    def returncode(self) -> int | None:
        """The exit code, or minus the number of the signal that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code if it has ended."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; the exit code."""
        self._process.join(timeout)
        if self.returncode is None:
            assert timeout is not None
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; (stdout, stderr)."""
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        self.stdout.seek(0)
        out = self.stdout.read().decode()
        if self.stderr is self.stdout:
            return out, ""
        self.stderr.seek(0)
        return out, self.stderr.read().decode()

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Tell it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class _Fds:
    """Where a command is to print."""

    def __init__(self, started: Started):
        self.started = started

    def __reduce__(self) -> Any:
        files = self.started.stdout, self.started.stderr
        return _detached, tuple(DupFd(file.fileno()) for file in files)


def _detached(*fds: Any) -> tuple[int, ...]:
    return tuple(fd.detach() for fd in fds)


def start(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    merged: bool = False,
    fresh: bool = False,
) -> Started:
    """Start `moetrain *words`; `merged`: what it says on stderr stands in stdout, too."""
    env = os.environ if env is None else env
    return Started(list(map(str, words)), cwd, env, merged=merged, fresh=fresh)


def run(
    *words: str | Path,
    timeout: float = 240,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `moetrain *words`."""
    started = start(*words, cwd=cwd, env=env, fresh=fresh)
    out, err = started.communicate(timeout)
    return subprocess.CompletedProcess(started.args, started.returncode or 0, out, err)


SCRIPT = """#!/bin/sh
own=$(dirname "$0")
printf '%s\\0' "$PWD" "$@" > "$own/asked"
read -r code < "$own/told"
cat "$own/out"
exit "$code"
"""


@contextmanager
def for_scripts(folder: Path) -> Iterator[Path]:
    """A program in `folder` that shell scripts call as `moetrain`, one call after another."""
    folder.mkdir()
    for name in ("asked", "told"):
        os.mkfifo(folder / name)
    program = folder / "moetrain"
    program.write_text(SCRIPT)
    program.chmod(0o755)

    def serve() -> None:
        while asked := (folder / "asked").read_text():
            cwd, *words = asked.split("\0")[:-1]
            started = start(*words, cwd=Path(cwd), merged=True)
            (folder / "out").write_text(started.communicate()[0])
            (folder / "told").write_text(f"{(started.returncode or 0) % 256}\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield program
    finally:
        (folder / "asked").write_text("")
        thread.join()


# In the process that is the command


def _command(
    words: list[str], cwd: str, env: dict[str, str], fds: tuple[int, int], fresh: bool
) -> NoReturn:
    # Daemonic to the tests, so that it ends with them; but a command may start processes itself.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, fd in enumerate(fds, 1):
        os.dup2(fd, number)
    os.chdir(cwd)
    if fresh:
        os.execve(sys.executable, [*MOETRAIN, *words], env)
    share_server()
    forked: Any = _Forked
    subprocess.Popen = forked
    from moetrain.planner import search

    from_server: Any = SimpleNamespace(get_context=lambda _: get_context("forkserver"))
    search.multiprocessing = from_server  # its tracers come from there too
    _be(words, env)


def _be(words: list[str], env: Mapping[str, str]) -> NoReturn:
    """Be `moetrain *words`, from the first line to the exit code."""
    import torch

    os.environ.clear()
    os.environ.update(env, CUDA_VISIBLE_DEVICES="")  # as it was when torch was imported
    num_threads = os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))
    torch.set_num_threads(int(num_threads))
    sys.argv = ["moetrain", *words]
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    from moetrain import cli

    try:
        code: Any = cli.main(words)
    except SystemExit as error:  # argparse
        code = error.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


class _Forked(subprocess.Popen[Any]):
    """Forks this process where a new interpreter with moetrain's command line is asked for."""

    def _execute_child(
        self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
        env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
        c2pread: int, c2pwrite: int, errread: int, errwrite: int, restore_signals: Any, gid: Any,
        gids: Any, uid: Any, umask: Any, start_new_session: bool, process_group: Any,
    ) -> None:  # fmt: skip
        words = () if isinstance(args, str | bytes | Path) else tuple(args)
        if words[1:3] == ("-W", "ignore"):
            words = words[:1] + words[3:]
        if words[:3] != MOETRAIN:
            super()._execute_child(  # type: ignore[misc]
                args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo,
                creationflags, shell, p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite,
                restore_signals, gid, gids, uid, umask, start_new_session, process_group,
            )  # fmt: skip
            return
        gentle = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, gentle)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                _begin(start_new_session, preexec_fn, pass_fds, (p2cread, c2pwrite, errwrite))
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                _be(list(words[3:]), os.environ.copy() if env is None else env)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._child_created = True
        close: Any = self._close_pipe_fds  # type: ignore[attr-defined]
        close(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _begin(new_session: bool, preexec_fn: Any, pass_fds: Any, std: tuple[int, int, int]) -> None:
    """What happens to a process between fork and exec."""
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, fd in enumerate(std):
        if fd != -1:
            os.dup2(fd, number)
    if new_session:
        os.setsid()
    if preexec_fn is not None:
        preexec_fn()
    tracker: Any = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    stay = {0, 1, 2, tracker._fd, server._forkserver_alive_fd, *pass_fds}
    for fd in map(int, os.listdir("/proc/self/fd")):
        # A module may have a file about this process open (`data/limits.py`): a new program would
        # import it anew.
        if fd not in stay and not _is_about_process(fd):
            try:
                os.close(fd)
            except OSError:  # of the listing itself
                pass


def _is_about_process(fd: int) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("/proc/")
    except OSError:  # that of the listing, closed already
        return False
