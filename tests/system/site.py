"""A site for the scripts in slurm/: a Slurm cluster of two nodes, a folder that both see, and a
model that two CPU cores can train.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.data_helpers import PAIRS, write_jsonl
from tests.system.images import APPTAINER
from tests.system.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
# What makes of examples/dpo_235b.yaml a run of seconds. The script and its srun line stay.
TINY = (
    "model.path=builtin:qwen3-moe-tiny model.dtype=fp32 parallel.tp=1 parallel.pp=1 parallel.ep=1"
    " data.train=pairs.jsonl data.eval=[] checkpoint.best=null data.seq_len=128 data.cache=cache"
    " train.epochs=null train.global_batch=4 train.recompute=none train.eval_every=null"
    " observe.tensorboard=false method.kl_budget=null cluster.nodes=2 cluster.gpus_per_node=1"
).split()
TWO_NODES = ("--nodes=2", "--gpus-per-node=1")
# What a clock or the machine decides.
MEASURED = {"seconds", "tokens_per_s", "memory_gib"}


@dataclass
class Site:
    """`work` is MOETRAIN_WORK."""

    cluster: Cluster
    work: Path

    def __post_init__(self) -> None:
        self.work.mkdir(exist_ok=True)
        write_jsonl(self.work / "pairs.jsonl", PAIRS)
        self.bin = self.work / "moetrain"
        self.write_bin()

    def write_bin(self, before: str = "") -> None:
        """The moetrain command of the jobs: this repository's, after what is to happen before."""
        self.bin.write_text(
            f"#!/usr/bin/env bash\n{before}\nexport PYTHONPATH={ROOT} OMP_NUM_THREADS=1\n"
            f'exec {sys.executable} -m moetrain "$@"\n'
        )
        self.bin.chmod(0o755)

    def submit(
        self,
        script: str,
        *words: str,
        options: tuple[str, ...] = TWO_NODES,
        doctor: str = "no",
        image: Path | None = None,
        beside: Mapping[str, str] | None = None,
    ) -> int:
        """sbatch of a script in slurm/ with its words, and with variables `beside`; the job's
        number.
        """
        out = ("--chdir", str(ROOT), "--output", str(self.work / "%j.out"))
        env = {"WORK": str(self.work), "BIN": str(self.bin), "PAUSE": "1", "DOCTOR": doctor}
        env = {f"MOETRAIN_{name}": value for name, value in env.items()}
        if image is not None:
            path = f"{APPTAINER.parent}:{os.environ['PATH']}"
            env |= {"MOETRAIN_IMAGE": str(image), "PATH": path, "OMP_NUM_THREADS": "1"}
        env |= beside or {}
        return self.cluster.submit(*out, *options, f"{ROOT}/slurm/{script}", *words, env=env)

    def said(self, job: int) -> str:
        """All that a job has printed."""
        path = self.work / f"{job}.out"
        return path.read_text() if path.exists() else ""

    def done(self, job: int, seconds: float = 240) -> str:
        """Wait until a job has ended well; what it printed."""
        found = self.cluster.finished(job, seconds)
        assert found["JobState"] == "COMPLETED", f"{found['JobState']}\n{self.said(job)}"
        return self.said(job)

    def rows(self, run: str) -> list[Mapping[str, Any]]:
        """A run's ledger, without what the machine decides."""
        path = self.work / "runs" / run / "ledger.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [{k: v for k, v in json.loads(r).items() if k not in MEASURED} for r in lines]

    def starts(self, run: str) -> list[Mapping[str, Any]]:
        """Every start and every end of a run."""
        path = self.work / "runs" / run / "starts.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def began(self, run: str) -> list[Mapping[str, Any]]:
        """Its starts alone."""
        return [row for row in self.starts(run) if "start" in row]

    def adapter(self, run: str) -> bytes:
        return (self.work / "runs" / run / "adapter" / "adapter_model.safetensors").read_bytes()

    def ranks(self, run: str) -> dict[int, int]:
        """rank -> process id of the processes that train a run now."""
        found: dict[int, int] = {}
        for folder in Path("/proc").iterdir():
            if not folder.name.isdecimal():
                continue
            try:
                command = (folder / "cmdline").read_bytes().split(b"\0")
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:  # it has ended
                continue
            env = {key: value for key, _, value in (word.partition(b"=") for word in words)}
            mine = env.get(b"MOETRAIN_WORK") == os.fsencode(self.work) and b"RANK" in env
            if mine and f"run_dir=runs/{run}".encode() in command:
                found[int(env[b"RANK"])] = int(folder.name)
        return found

    @contextmanager
    def stopped(self, run: str) -> Iterator[None]:
        """Meanwhile the ranks of a run stand still, so that it does not end too early."""
        pids = self.ranks(run).values()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
