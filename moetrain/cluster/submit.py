"""`moetrain launch`: a recipe as an sbatch script like those in slurm/. No torch."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import moetrain
from moetrain.config.load import load_recipe
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError
from moetrain.planner.fit import check_fits
from moetrain.run.dry_run import check

REPO = Path(moetrain.__file__).resolve().parents[1]
HEAD = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={gpus}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time={time}
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
"""
SERVERS = """\
#SBATCH hetjob
#SBATCH --nodes={nodes}
#SBATCH --gpus-per-node={gpus}
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
"""


NO_SLURM = (
    "Slurm is not on this machine (no sbatch). Run here with `moetrain train RECIPE --nproc N`, or"
    " print the script with --dry-run."
)

# As sbatch reads them: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", re.ASCII)


def script_of(
    path: Path,
    overrides: Sequence[str],
    nodes: int | None,
    time: str,
    *,
    dry_run: bool = True,
) -> str:
    """The script that runs the recipe on `nodes` nodes. Raises MoetrainError for a recipe that
    cannot be, and for nodes that its layout does not fit: before the queue, not after it.
    """
    if not TIME.fullmatch(time):
        raise ConfigError(
            f"--time {time!r} is no time of Slurm's. Give one such as 24:00:00 or 2-0."
        )
    recipe = load_recipe(path, overrides)
    cluster = recipe.cluster
    if nodes is not None and cluster.nodes not in (None, nodes):
        overrides = [*overrides, f"cluster.nodes={nodes}"]
    nodes = nodes or cluster.nodes
    if nodes is None:
        if not dry_run and shutil.which("sbatch") is None:
            raise MoetrainError(NO_SLURM)
        raise ConfigError(f"{path} sets no cluster.nodes. Give --nodes.")
    size = nodes * cluster.gpus_per_node
    line = check_fits(recipe, check(recipe, size, dry=True), size)
    if line is not None and line.startswith("WARNING"):
        print(f"moetrain: {line}", file=sys.stderr)
    common = REPO / "slurm" / "common.sh"
    if not common.is_file():
        raise ConfigError(f"{common} is not there. Install moetrain from its repository.")
    # A name is a line of its own for sbatch, and part of the output file's.
    name = re.sub(r"[^\w.+=-]+", "_", path.stem)
    head = HEAD.format(name=name, nodes=nodes, gpus=cluster.gpus_per_node, time=time)
    verb = "train"
    if _wants_servers(recipe):
        assert recipe.rollout is not None
        head += SERVERS.format(nodes=recipe.rollout.num_servers, gpus=cluster.gpus_per_node)
        verb = "train_beside_servers"
    words = shlex.join([str(path.resolve()), *overrides])
    return f"{head}source {shlex.quote(str(common))}\n{verb} {words}\n"


def _wants_servers(recipe: Recipe) -> bool:
    """Whether rollouts come from servers that nobody has started and that need GPUs of their own:
    a node for each of `rollout.num_servers`, in a second part of the job.
    """
    rollout = recipe.rollout
    if rollout is None or rollout.engine != "vllm" or rollout.replay is not None:
        return False
    return not rollout.address and rollout.push != "ipc"


def submit(script: str) -> int:
    """Hand a script to sbatch; its exit code."""
    if shutil.which("sbatch") is None:
        raise MoetrainError(NO_SLURM)
    return subprocess.run(["sbatch"], input=script, text=True, check=False).returncode
