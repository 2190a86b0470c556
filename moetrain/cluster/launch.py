"""Local ranks: start them, hand signals on, and let none outlive another.

Under torchrun or srun the ranks are there already and nothing is started.
"""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence

GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def is_rank(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher has made this process a rank: torchrun's variables, or srun's with more
    than one task.
    """
    return ("WORLD_SIZE" in environ and "RANK" in environ) or int(
        environ.get("SLURM_NTASKS", "1")
    ) > 1


def adopt_slurm() -> None:
    """Give this process torchrun's variables from srun's, when only srun's are there."""
    env = os.environ
    if "RANK" in env or int(env.get("SLURM_NTASKS", "1")) <= 1 or "SLURM_PROCID" not in env:
        return
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
    env["LOCAL_RANK"] = env.get("SLURM_LOCALID", "0")
    if "MASTER_ADDR" not in env:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]],
            capture_output=True,
            text=True,
            check=True,
        )
        env["MASTER_ADDR"] = hosts.stdout.split()[0]
    # One port for every rank of a job step, without asking each other.
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))


def run_local(arguments: Sequence[str], num_procs: int) -> int:
    """Run `python -m moetrain ARGUMENTS` as `num_procs` ranks on this machine; returns the first
    failure's exit code or 0.

    The first rank speaks; what another rank wrote to its stderr is shown when that rank fails and
    the first said nothing.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // num_procs)
    logs = [None if rank == 0 else tempfile.TemporaryFile() for rank in range(num_procs)]
    ranks: list[subprocess.Popen[bytes]] = []
    for rank in range(num_procs):
        env = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_procs),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        env.setdefault("OMP_NUM_THREADS", str(threads))
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-m", "moetrain", *arguments],
                env=env,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=logs[rank],
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        )
    return _wait(ranks, logs)


def _die_with_parent() -> None:
    # A killed launcher must not leave ranks holding GPUs.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait(ranks: list[subprocess.Popen[bytes]], logs: Sequence[object]) -> int:
    asked: list[int] = []

    def forward(number: int, frame: object) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                # Ranks treat both alike: finish the step, save, and leave.
                process.send_signal(signal.SIGTERM)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        while True:
            codes = [process.poll() for process in ranks]
            failed = next((i for i, code in enumerate(codes) if code), None)
            if failed is not None:
                return _stop(ranks, logs, failed)
            if all(code == 0 for code in codes):
                return 0
            time.sleep(0.1)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(ranks: list[subprocess.Popen[bytes]], logs: Sequence[object], failed: int) -> int:
    """One rank failed: give the others a moment to fail by themselves, then end them."""
    end = time.monotonic() + 3.0
    while time.monotonic() < end and any(p.poll() is None for p in ranks):
        time.sleep(0.05)
    for how in (signal.SIGTERM, signal.SIGKILL):
        alive = [p for p in ranks if p.poll() is None]
        for process in alive:
            process.send_signal(how)
        end = time.monotonic() + (GRACE_SECONDS if how == signal.SIGTERM else 5.0)
        while time.monotonic() < end and any(p.poll() is None for p in alive):
            time.sleep(0.05)
    code = ranks[failed].returncode
    spoken = (
        ranks[0].returncode not in (0, -signal.SIGTERM, -signal.SIGKILL)
        and ranks[0].returncode is not None
    )
    log = logs[failed]
    if not spoken and log is not None:
        log.seek(0)  # type: ignore[attr-defined]
        text = log.read().decode(errors="replace").strip()  # type: ignore[attr-defined]
        sys.stderr.write(text[-4000:] + "\n")
    if code < 0:
        sys.stderr.write(f"moetrain: rank {failed} was ended by {signal.Signals(-code).name}.\n")
        return 128 - code
    return int(code)
