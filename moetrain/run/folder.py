"""The folder of a run: whether it may be continued by this recipe, and what is written beside the
outputs.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import moetrain
from moetrain import files
from moetrain.config.load import dump_recipe, load_recipe, recipe_hash
from moetrain.config.optim import OptimConfig
from moetrain.config.recipe import Recipe
from moetrain.errors import CheckpointError, ConfigError

# What may differ from one start of a run to the next: it decides where, how fast and how watched,
# not what is learned.
FREE = (
    "run_dir",
    "parallel",
    "cluster",
    "observe",
    "checkpoint",
    "data.cache",
    "data.eval",
    "data.max_rejected",
    "data.num_workers",
    "model.backend",
    "optim.offload",
    "rollout.address",
    "rollout.engine",
    "rollout.engine_args",
    "rollout.eval_prompts",
    "rollout.eval_temperature",
    "rollout.gpu_memory",
    "rollout.host",
    "rollout.max_queue",
    "rollout.num_servers",
    "rollout.push",
    "rollout.python",
    "rollout.reward_seconds",
    "rollout.reward_workers",
    "rollout.start_timeout",
    "rollout.timeout",
    "rollout.token_file",
    "rollout.tolerance",
    "rollout.tensor_parallel",
    "train.deterministic",
    "train.eval_every",
    "train.eval_packs",
    "train.micro_batch",
    "train.overlap",
    "train.recompute",
    "train.sample_prompts",
    "train.sample_tokens",
    # The length matters where learning rates depend on it: `check_schedule`.
    "train.steps",
    "train.epochs",
)
VERSIONS = (
    "torch",
    "megatron-core",
    "transformers",
    "transformer-engine",
    "tokenizers",
    "safetensors",
    "numpy",
)
WAY_OUT = "Give the run the recipe it was started with, or another run_dir."


def check_writable(run_dir: Path) -> None:
    """Make `run_dir` and its checkpoints folder, and write a file there. Raises CheckpointError: a
    run that cannot save shall say so before its first step.
    """
    check_place(run_dir / "checkpoints", "run_dir")


def check_place(folder: Path, option: str) -> None:
    """Make `folder`, which `option` names, and write a file there. Raises CheckpointError."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            probe.write_bytes(b"1")
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written ({error.strerror}). Make it writable and free space,"
            f" or give another {option}."
        ) from None


def check_recipe(recipe: Recipe) -> Recipe | None:
    """The recipe that `run_dir` was started with last, None in a new one.

    Raises ConfigError when it is another recipe; names the first key that differs and matters.
    """
    folder = recipe.run_dir
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run_dir={folder} is a file. Give a folder.")
    if not (folder / "resolved.yaml").is_file():
        if any((folder / name).exists() for name in ("checkpoints", "ledger.jsonl")):
            raise ConfigError(
                f"{folder} holds a run without its resolved.yaml. Give another run_dir."
            )
        return None
    earlier = load_recipe(folder / "resolved.yaml")
    before, now = (dict(_flatten(r.model_dump(mode="json"))) for r in (earlier, recipe))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not _is_free(key):
            old, new = (json.dumps(values.get(key)) for values in (before, now))
            raise ConfigError(
                f"{folder} was started with {key}={old}, this recipe says {key}={new}. {WAY_OUT}"
            )
    return earlier


def check_schedule(
    earlier: Recipe,
    recipe: Recipe,
    step: int,
    length: Callable[[Recipe], int],
    rate: Callable[[int, OptimConfig, int], float],
) -> None:
    """ConfigError when the run's length has changed and with it the learning rate of the `step`
    steps already taken.

    length(recipe) is the number of steps, rate(step, optim, length) the learning rate of a step.
    """
    before, now = length(earlier), length(recipe)
    steps = range(1, step + 1)
    if all(rate(s, earlier.optim, before) == rate(s, recipe.optim, now) for s in steps):
        return
    key = "steps" if recipe.train.steps != earlier.train.steps else "epochs"
    raise ConfigError(
        f"{recipe.run_dir} was started for {before} steps, now train.{key} makes it {now}, which"
        f" changes the {recipe.optim.schedule} schedule of steps already taken. {WAY_OUT}"
        " optim.schedule=constant can be prolonged, and cosine where optim.decay_steps is given"
        " from the start."
    )


def write_run_files(
    recipe: Recipe, ranks: list[dict[str, Any]], parameters: Mapping[str, Any]
) -> None:
    """Write resolved.yaml, environment.json (versions, git commit, hash, command) and ranks.json
    into run_dir.
    """
    recipe.run_dir.mkdir(parents=True, exist_ok=True)
    content = environment() | {"recipe_hash": recipe_hash(recipe), **parameters}
    files.write_text(recipe.run_dir / "ranks.json", json.dumps(ranks, indent=1))
    files.write_text(recipe.run_dir / "environment.json", json.dumps(content, indent=1))
    files.write_text(recipe.run_dir / "resolved.yaml", dump_recipe(recipe))


def environment() -> dict[str, Any]:
    """What an output was made with: versions, git commit, command, machine."""
    return {
        "moetrain": moetrain.__version__,
        "git": _git_commit(),
        "command": sys.argv,
        "host": platform.node(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in VERSIONS},
    }


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield prefix + key, item


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in FREE)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code, with + when files differ from it; None outside a repository."""
    folder = Path(moetrain.__file__).resolve().parent

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return (
        None
        if not commit
        else commit + ("+" if git("status", "--porcelain", "--", str(folder)) else "")
    )
