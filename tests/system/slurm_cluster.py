"""A real Slurm cluster on this one machine: slurmctld and a slurmd for each node that is to run
jobs. Needs root, slurm-wlm and munge.

Configured as the cluster the scripts are for, 32 nodes of 8 GPUs (`config_overrides`: Slurm believes
the configuration, not the machine); the first few of them are real.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NUM_NODES = 32
PORTS = 17000
DAEMONS = ("slurmctld", "slurmd", "munged", "sbatch")
CONFIG = """\
ClusterName=moetrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports}
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
SlurmdTimeout=30
KillWait=20
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=5
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
NodeName=n[1-{num}] NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} \
CPUs=96 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN
PartitionName=real Nodes=n[1-{real}] Default=YES MaxTime=INFINITE State=UP
PartitionName=whole Nodes=ALL MaxTime=INFINITE State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in DAEMONS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not on this machine: apt-get install slurm-wlm munge"
    return None if os.geteuid() == 0 else "Slurm's daemons on one machine need root"


@dataclass
class Cluster:
    """Two (`num_real`) of its nodes run jobs. `env` is what Slurm's commands are run with."""

    folder: Path
    num_real: int = 2
    env: dict[str, str] = field(default_factory=dict[str, str])

    def start(self) -> None:
        """Start the daemons and wait until the real nodes are idle."""
        folder, host = self.folder, socket.gethostname().split(".")[0]
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        config = folder / "slurm.conf"
        config.write_text(
            CONFIG.format(
                host=host,
                folder=folder,
                num=NUM_NODES,
                ports=PORTS,
                first=PORTS + 1,
                last=PORTS + NUM_NODES,
                real=self.num_real,
            )
        )
        (folder / "gres.conf").write_text("Name=gpu Count=8\n")
        drop = ("SLURM_", "SBATCH_", "MOETRAIN_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(drop)}
        self.env["SLURM_CONF"] = str(config)
        _start_munge()
        _name_nodes(self.num_real)
        self.call("slurmctld")
        for number in range(1, self.num_real + 1):
            (folder / "spool" / f"n{number}").mkdir(exist_ok=True)
            self.call("slurmd", "-N", f"n{number}")
        nodes = f"n[1-{self.num_real}]"
        self.wait(lambda: self.call("sinfo", "-h", "-n", nodes, "-t", "idle", "-o", "%D").strip(),
                  "the nodes did not come up")  # fmt: skip

    def stop(self) -> None:
        """End the daemons, and with them what they run."""
        self.call("scancel", "--user=root", check=False)
        for path in self.folder.glob("*.pid"):
            try:
                os.kill(int(path.read_text()), signal.SIGTERM)
            except (ValueError, ProcessLookupError):
                pass

    def call(self, *command: str, check: bool = True, **env: str) -> str:
        """Run one of Slurm's commands; its output."""
        done = subprocess.run(
            command,
            env=self.env | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}"
        return done.stdout

    def submit(self, *words: str, **env: str) -> int:
        """sbatch; the job's number."""
        return int(self.call("sbatch", "--parsable", *words, **env).split(";")[0])

    def job(self, number: int) -> Mapping[str, str]:
        """What scontrol says of a job."""
        text = self.call("scontrol", "show", "job", "-o", str(number))
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)

    def finished(self, number: int, seconds: float = 300) -> Mapping[str, str]:
        """Wait until a job has ended and stays so; what scontrol says of it."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        self.wait(lambda: self.job(number)["JobState"] in over, f"job {number}", seconds)
        return self.job(number)

    def wait(self, happens: Callable[[], object], what: str, seconds: float = 60) -> None:
        """Poll until `happens` gives something true; AssertionError with `what` otherwise."""
        end = time.monotonic() + seconds
        while not happens():
            assert time.monotonic() < end, f"{what} within {seconds:.0f} s\n{self.log()}"
            time.sleep(0.3)

    def log(self) -> str:
        """The end of the controller's log."""
        return (self.folder / "slurmctld.log").read_text()[-3000:]


def _start_munge() -> None:
    if subprocess.run(["munge", "-n"], capture_output=True, check=False).returncode == 0:
        return
    Path("/run/munge").mkdir(exist_ok=True)
    shutil.chown("/run/munge", "munge", "munge")
    subprocess.run(
        ["su", "-s", "/bin/bash", "munge", "-c", shutil.which("munged") or ""], check=True
    )


def _name_nodes(num: int) -> None:
    """The nodes' names have an address on this machine."""
    path = Path("/etc/hosts")
    known = path.read_text()
    lines = [f"127.0.0.1 n{i}\n" for i in range(1, num + 1)]
    path.write_text(known + "".join(line for line in lines if line not in known))
