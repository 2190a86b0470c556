"""One job to a run folder, on one node or on many. No torch.

Two locks, since neither serves everywhere: the kernel's, which every process of this node meets
and which ends with its holder, and a lease, where a file system's locks stay on one node.
"""

import contextlib
import fcntl
import json
import os
import platform
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import IO, Any

from moetrain.errors import ConfigError
from moetrain.files import named

LEASE = ".lease"
Lease = dict[str, Any]


class RunLock:
    """Keeps a second job out of a run_dir; one process of a job (rank 0) holds it until it ends.

    After a kill of the launcher its ranks may live on for some seconds: `take` waits for them. A
    lease is a file with a count that its holder raises; whoever sees no higher count for a while
    takes it for abandoned. So no clock of one node is compared with another's.
    """

    PATIENCE = 30.0  # seconds for this node's lock, and for the count of a lease to stand still
    BEAT = 5.0  # seconds between two counts

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: IO[str] | None = None
        self._has_kernels = False  # the kernel's lock: no process of this node has the lease
        self._lease = -1
        self._me: dict[str, Any] = {
            "token": uuid.uuid4().hex,
            "host": platform.node(),
            "boot": _boot(),
            "process": os.getpid(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "count": 0,
        }
        self._done = threading.Event()

    def take(self) -> None:
        """Take the lock unless it is held or there is no folder yet; ConfigError when another job
        keeps it.
        """
        if self._file is not None or not self.folder.is_dir():
            return
        file = self._lock()
        try:
            self._take_lease()
        except BaseException:
            file.close()
            raise
        self._file = file
        threading.Thread(target=self._keep, daemon=True, name="lease").start()

    def release(self) -> None:
        """Release the folder at a good end. After any other, the lease is found abandoned."""
        if self._file is None:
            return
        self._done.set()
        if self._is_mine(_read(self.folder / LEASE)):
            (self.folder / LEASE).unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _lock(self) -> IO[str]:
        with named(self.folder):
            return self._locked()

    def _locked(self) -> IO[str]:
        file = (self.folder / ".lock").open("a+")
        deadline = time.monotonic() + self.PATIENCE
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._has_kernels = True
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    file.seek(0)
                    message = file.read().strip()
                    file.close()
                    raise self._in_use(message or "another job") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        return file

    def _take_lease(self) -> None:
        path = self.folder / LEASE
        first, since = _read(path), time.monotonic()
        while True:
            try:  # one of several wins, on a network file system too
                self._lease = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
                with named(self.folder):
                    os.write(self._lease, json.dumps(self._me).encode())
                return
            except FileExistsError:
                pass
            now = _read(path)
            if self._is_abandoned(now):
                pass
            elif now and now != first:  # its holder counts on, or has just come
                raise self._in_use(_name(now))
            elif time.monotonic() - since < self.PATIENCE:
                time.sleep(min(0.2, self.BEAT))
                continue
            if self._take_over(path, now):
                return

    def _is_abandoned(self, lease: Lease) -> bool:
        same_node = (lease.get("host"), lease.get("boot")) == (self._me["host"], self._me["boot"])
        earlier = lease.get("job") == self._me["job"] and lease.get("restart", 0) < self._restart
        return (same_node and self._has_kernels) or (self._me["job"] is not None and earlier)

    def _take_over(self, path: Path, abandoned: Lease) -> bool:
        """Put our lease in the place of an abandoned one; False when it is not there any more. Who
        makes the claim file may do so, and nobody else.
        """
        claim = path.with_name(f"{LEASE}.after-{abandoned.get('token')}")
        part = path.with_name(f"{LEASE}.{self._me['token']}")
        try:
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            time.sleep(self.BEAT)
            if _read(path) != abandoned:
                return False
            raise ConfigError(
                f"{self.folder} is being taken over by another job. If there is none, remove"
                f" {claim}."
            ) from None
        try:
            if _read(path) != abandoned:
                return False
            self._lease = os.open(part, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
            os.write(self._lease, json.dumps(self._me).encode())
            os.replace(part, path)
        finally:
            claim.unlink()
        return True

    def _keep(self) -> None:
        """Count on. A lease that somebody has taken meanwhile means that this process stood still
        for so long that it was given up: it must not write into the run any more.
        """
        path = self.folder / LEASE
        while not self._done.wait(self.BEAT):
            holder = _read(path)
            if self._done.is_set():  # released since then, so that the next job may have it
                return
            if holder and not self._is_mine(holder):
                self._stop_writing(holder)
            self._me["count"] += 1
            with contextlib.suppress(OSError):
                os.pwrite(self._lease, json.dumps(self._me).encode(), 0)  # it only grows

    def _stop_writing(self, holder: Lease) -> None:
        """End the process, from a thread beside the one that trains."""
        sys.stderr.write(f"moetrain: error: {self._in_use(_name(holder))}\n")
        sys.stderr.flush()
        os._exit(ConfigError.exit_code)

    def _is_mine(self, lease: Lease) -> bool:
        return lease.get("token") == self._me["token"]

    @property
    def _restart(self) -> int:
        return int(self._me["restart"])

    def _in_use(self, by: str) -> ConfigError:
        return ConfigError(
            f"{self.folder} is in use by {by}. Stop that job, or give another run_dir."
        )


def _read(path: Path) -> Lease:
    """A lease; {} for none, and for one that is being written."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _name(lease: Lease) -> str:
    job = f" of Slurm job {lease['job']}" if lease.get("job") else ""
    return f"process {lease.get('process')} on {lease.get('host')}{job}"


def _boot() -> str:
    """Of this node since it was started: its process numbers mean nothing after that."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
