"""A real Slurm cluster on this one machine: slurmctld, and a slurmd for each node that is to run
jobs. Needs root and Debian's slurmctld, slurmd, slurm-client and munge.

Configured as the cluster that the scripts are for, 32 nodes of 8 GPUs: with `config_overrides`
Slurm believes the configuration, not the machine. The first few of them are real.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

NUM_NODES = 32
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
CONFIG = """\
ClusterName=moetrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ReturnToService=2
SlurmdParameters=config_overrides
SlurmctldTimeout=10
SlurmdTimeout={patience}
KillWait=20
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName={name}[1-{num}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} \
CPUs=96 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=real Nodes={name}[1-{real}] Default=YES MaxTime=INFINITE State=UP
PartitionName=whole Nodes=ALL MaxTime=INFINITE State=UP
"""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return None if os.geteuid() == 0 else "Slurm's daemons on one machine need root"


class Cluster:
    """`num_real` of its nodes run jobs. `env` is what Slurm's commands are run with.

    Args:
        patience: seconds until a node that says nothing is down.
    """

    def __init__(self, folder: Path, *, num_real: int = 2, patience: int = 300):
        self.folder, self.num_real, self.patience = folder, num_real, patience
        self.port = _free_ports(NUM_NODES + 1)
        self.name = f"n{self.port}x"  # no other cluster on this machine has it
        self.host = socket.gethostname().split(".")[0]
        drop = ("SLURM_", "SBATCH_", "MOETRAIN_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        """Start the daemons and wait until the real nodes are idle."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        text = CONFIG.format(
            **vars(self),
            num=NUM_NODES,
            first=self.port + 1,
            last=self.port + NUM_NODES,
            real=self.num_real,
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(8):  # Slurm drops GPUs without a file, whatever the configuration says
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        _start_munge()
        self._name_nodes()
        self.call("slurmctld")
        for number in range(1, self.num_real + 1):
            self.start_node(number)
        nodes = ",".join(map(self.node, range(1, self.num_real + 1)))
        idle = ("sinfo", "-h", "-p", "real", "-n", nodes, "-t", "idle", "-o", "%D")
        self.wait(lambda: self.call(*idle).strip() == str(self.num_real), "the nodes are not idle")

    def node(self, number: int) -> str:
        """The name of a node, from 1."""
        return f"{self.name}{number}"

    def start_node(self, number: int) -> None:
        (self.folder / "spool" / self.node(number)).mkdir(exist_ok=True)
        self.call("slurmd", "-N", self.node(number))

    def daemon(self, number: int) -> int:
        """The process id of a node's slurmd."""
        return int((self.folder / f"slurmd.{self.node(number)}.pid").read_text())

    def stop(self) -> None:
        """End the jobs, then the daemons."""
        self.call("scancel", "--user=root", check=False)
        queue = ("squeue", "-h", "-t", "all", "-o", "%T")
        try:
            self.wait(lambda: not {"RUNNING", "COMPLETING"} & set(self.call(*queue).split()),
                      "jobs do not end", 40)  # fmt: skip
        finally:
            _end([int(path.read_text()) for path in self.folder.glob("*.pid")])
            self._forget_nodes()

    def call(self, *command: str, check: bool = True, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands; its output."""
        done = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, *words: str, env: Mapping[str, str] | None = None) -> int:
        """sbatch; the job's number."""
        return int(self.call("sbatch", "--parsable", *words, env=env).split(";")[0])

    def job(self, number: int | str) -> Mapping[str, str]:
        """What scontrol says of a job."""
        text = self.call("scontrol", "show", "job", "-o", str(number))
        words = (word.partition("=") for word in text.split())
        return {key: value for key, equals, value in words if equals}

    def finished(self, number: int | str, seconds: float = 180) -> Mapping[str, str]:
        """Wait until a job has ended and stays so; what scontrol says of it."""
        self.wait(lambda: self.job(number)["JobState"] in OVER, f"job {number}", seconds)
        return self.job(number)

    def wait(self, happens: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Poll until `happens` gives something true; AssertionError with `what` otherwise."""
        end = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < end, f"{what} within {seconds:.0f} s\n{self.log()}"
            time.sleep(0.3)

    def nudge(self) -> None:
        """Change something. Jobs of several parts are started by backfill alone, which (22.05) goes
        by only when something has changed, and here nobody else is.
        """
        self.call("scontrol", "update", f"NodeName={self.node(1)}", "Comment=.")

    def log(self) -> str:
        """The end of the controller's log."""
        return (self.folder / "slurmctld.log").read_text()[-3000:]

    def _name_nodes(self) -> None:
        """The nodes' names have an address on this machine."""
        with HOSTS.open("a") as file:
            file.writelines(f"127.0.0.1 {self.node(i + 1)}\n" for i in range(self.num_real))

    def _forget_nodes(self) -> None:
        lines = HOSTS.read_text().splitlines(keepends=True)
        HOSTS.write_text("".join(line for line in lines if f" {self.name}" not in line))


HOSTS = Path("/etc/hosts")


def _free_ports(num: int) -> int:
    """The first of `num` neighbouring free ports, below Linux's ephemeral ones."""
    for first in range(17000 + os.getpid() % 100 * 40, 32000, 40):
        try:
            for port in range(first, first + num):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def _start_munge() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    munged = shutil.which("munged") or ""
    subprocess.run(["su", "-s", "/bin/bash", "munge", "-c", munged], check=True)


def _end(pids: list[int]) -> None:
    for signal_number, seconds in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + seconds
        for pid in filter(_lives, pids):
            os.kill(pid, signal_number)
        while any(map(_lives, pids)) and time.monotonic() < end:
            time.sleep(0.1)


def _lives(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
