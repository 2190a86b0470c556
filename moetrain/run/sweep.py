"""`moetrain sweep`: the product of grids over one recipe, each run in its own process and folder.

Started again it goes on: what is done is skipped, what was interrupted resumes from its checkpoint.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import moetrain
from moetrain import files
from moetrain.config.load import apply_override, load_recipe
from moetrain.config.recipe import Recipe
from moetrain.errors import ConfigError, MoetrainError, plural
from moetrain.observe.curves import numbers
from moetrain.observe.runs import LOG, PLAN, find_runs, last_row, num_steps
from moetrain.observe.terminal import print_runs
from moetrain.run.child import Children
from moetrain.run.dry_run import check, world_size
from moetrain.run.folder import check_recipe
from moetrain.run.starts import saved_step

MAX_NAME = 40  # characters of a value in a folder's name
LINE_SECONDS = 60.0  # between two lines about a run, where there is no terminal
_PAIRS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class Planned:
    """One run of a sweep: `overrides` go to `moetrain train`, `recipe` is what comes of them."""

    name: str
    overrides: tuple[str, ...]
    command: tuple[str, ...]
    recipe: Recipe

    @property
    def line(self) -> dict[str, Any]:
        return {"name": self.name, "overrides": self.overrides, "command": self.command}


@dataclass(frozen=True)
class Sweep:
    """A sweep's runs and the folder that they lie in."""

    folder: Path
    runs: list[Planned]


def split_grid(text: str) -> tuple[str, list[str]]:
    """`key=a,b` -> (key, [a, b]); commas in brackets and quotes do not count. Raises ConfigError
    for what is no grid.
    """
    key, equals, rest = text.partition("=")
    values, open_until = [""], ""
    for char in rest:
        if open_until and char == open_until[-1]:
            open_until = open_until[:-1]
        elif open_until[-1:] in ("'", '"'):
            pass
        elif char in _PAIRS:
            open_until += _PAIRS[char]
        elif char in "'\"" and not values[-1].strip():
            open_until += char
        elif char == "," and not open_until:
            values.append("")
            continue
        values[-1] += char
    values = [value.strip() for value in values]
    if not equals or not key or not all(values):
        raise ConfigError(
            f"--grid {text}: write key=value,value, for example optim.lr=5e-5,2e-5 (null for none)."
        )
    return key, values


def plan_sweep(
    path: Path,
    grids: Sequence[str],
    overrides: Sequence[str] = (),
    num_procs: int | None = None,
    out: Path | None = None,
    num_nodes: int = 1,
    *,
    checks: bool = True,
) -> Sweep:
    """The runs of a sweep, each of them validated. Raises MoetrainError for the first that cannot
    be. `out` is by default the recipe's run_dir with -sweep behind it; `num_procs` ranks are
    started on each of `num_nodes`.
    """
    axes = _axes(grids, overrides)
    base = [word for word in overrides if word.partition("=")[0] != "run_dir"]
    runs: list[Planned] = []
    seen: dict[str, str] = {}
    for values in itertools.product(*axes.values()):
        setting = dict(zip(axes, values, strict=True))
        name = _name(setting)
        words = [*base, *(f"{key}={value}" for key, value in setting.items())]
        # A section before its keys: method=dpo would wipe out a method.beta laid before it.
        words.sort(key=lambda word: word.partition("=")[0].count("."))
        try:
            if out is None:
                first = load_recipe(path, [*words, *overrides])
                out = first.run_dir.with_name(first.run_dir.name + "-sweep")
            words.append(_text_override("run_dir", str(out / name)))
            recipe = load_recipe(path, words)
            if checks:
                check(recipe, num_nodes * num_procs if num_procs else world_size(recipe, None))
        except MoetrainError as error:
            raise ConfigError(f"run {name}: {error}") from None
        same = recipe.model_copy(update={"run_dir": Path()}).model_dump_json()
        if same in seen:
            raise ConfigError(
                f"--grid: {name} is the same run as {seen[same]}. Leave one of the values out."
            )
        seen[same] = name
        ranks = ["--nproc", str(num_procs)] if num_procs else []
        command = [sys.executable, "-m", "moetrain", "train", str(path), *ranks, *words]
        runs.append(Planned(name, tuple(words), tuple(command), recipe))
    assert out is not None, "a product has at least one run"
    return Sweep(out, runs)


def _axes(grids: Sequence[str], overrides: Sequence[str]) -> dict[str, list[str]]:
    axes: dict[str, list[str]] = {}
    fixed = {word.partition("=")[0] for word in overrides}
    for text in grids:
        key, values = split_grid(text)
        if key == "run_dir":
            raise ConfigError("--grid run_dir: every run has a run_dir of its own; see --out.")
        if key in axes:
            raise ConfigError(f"--grid {key} is given twice. Give all its values in one.")
        if key in fixed:
            raise ConfigError(f"{key} is both in --grid and an override. Leave one of them out.")
        axes[key] = values
    if not axes:
        raise ConfigError("A sweep needs a grid: --grid optim.lr=5e-5,2e-5.")
    return axes


def _name(setting: dict[str, str]) -> str:
    """`lr=5e-5_beta=0.1`: the keys' last parts where they tell the keys apart."""
    leaves = [key.rpartition(".")[2] for key in setting]
    parts: list[str] = []
    for leaf, (key, value) in zip(leaves, setting.items(), strict=True):
        shown = re.sub(r"[^\w.+-]+", "-", value)
        if shown != value or len(shown) > MAX_NAME:
            # Two values must not meet in one folder, in this sweep or in a larger one later.
            digest = hashlib.sha256(value.encode()).hexdigest()[:6]
            shown = f"{shown[-MAX_NAME:].strip('-.')}-{digest}"
        parts.append(f"{leaf if leaves.count(leaf) == 1 else key}={shown}")
    return "_".join(parts)


def _text_override(key: str, text: str) -> str:
    """An override that gives `text` as it is, whatever YAML would make of it."""
    content: dict[str, Any] = {}
    try:
        apply_override(content, f"{key}={text}")
    except ConfigError:
        pass
    plain = content.get(key) == text
    return f"{key}={text if plain else json.dumps(text, ensure_ascii=False)}"


def is_done(recipe: Recipe) -> bool:
    """Whether the run of `recipe` has taken its last step, saved it and exported what it should."""
    folder = recipe.run_dir
    total = num_steps(folder)
    if total is None or not (folder / "resolved.yaml").is_file():
        return False
    earlier = load_recipe(folder / "resolved.yaml").train
    if (earlier.steps, earlier.epochs) != (recipe.train.steps, recipe.train.epochs):
        return False
    saved = folder / "checkpoints" / f"step_{total:08d}"
    exported = not recipe.checkpoint.export_hf or (folder / "hf" / "config.json").is_file()
    return last_row(folder).get("step") == total and saved.is_dir() and exported


def write_plan(sweep: Sweep) -> Path:
    """Write `<folder>/sweep.jsonl`, one line a run; replaced whole."""
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / PLAN
    files.write_text(path, "".join(json.dumps(run.line) + "\n" for run in sweep.runs))
    return path


def run_sweep(sweep: Sweep, argv: Sequence[str]) -> int:
    """Run what is not done, one after the other. `argv`: the words after `moetrain`, which go on
    with it.

    Returns 0; 1 when a run failed (the others are run all the same); 130 or 143 when told to stop.
    """
    again = shlex.join(["moetrain", *argv])
    console = Console(highlight=False, soft_wrap=True)
    for run in sweep.runs:
        check_recipe(run.recipe)  # a folder of another recipe shows before the first run
    print(f"{plural(len(sweep.runs), 'run')}, planned in {write_plan(sweep)}")
    num_failed = 0
    with Children() as children:
        for number, run in enumerate(sweep.runs, start=1):
            head = f"[{number}/{len(sweep.runs)}] {run.name}"
            if is_done(run.recipe):
                console.print(f"{head}: done before, skipped", markup=False)
                continue
            code, message = _run(run, head, children, console)
            if children.asked and code:
                progress = "saved" if code == 143 else "at its last checkpoint"
                progress = (
                    progress if saved_step(run.recipe.run_dir) else "without a checkpoint yet"
                )
                print(f"moetrain: interrupted; run {run.name} is {progress}. Go on with:", again)
                return children.exit_code
            num_failed += code != 0
            console.print(f"{head}: {message}", markup=False)
            if children.asked and number < len(sweep.runs):
                print(f"moetrain: interrupted after run {run.name}. Go on with:", again)
                return children.exit_code
    print_runs(find_runs([sweep.folder]), console)
    if num_failed:
        print(f"moetrain: {num_failed} of {len(sweep.runs)} runs failed. Try again with:", again)
    return int(num_failed > 0)


def _run(run: Planned, head: str, children: Children, console: Console) -> tuple[int, str]:
    """Run it in a process; its exit code and what to say of it."""
    folder = run.recipe.run_dir
    folder.mkdir(parents=True, exist_ok=True)
    started = said_at = time.monotonic()

    def tick() -> None:
        nonlocal said_at
        if console.is_terminal:
            stopping = ", saving and leaving" if children.asked else ""
            status.update(f"{head}: {_position(folder)}, {_duration(started)}{stopping}")
        elif time.monotonic() - said_at > LINE_SECONDS:
            said_at = time.monotonic()
            console.print(f"{head}: {_position(folder)}, {_duration(started)}", markup=False)

    path = folder / LOG
    with (
        files.named(path),
        path.open("ab") as log,
        console.status(f"{head}: starting") as status,
    ):
        log.write(f"$ {shlex.join(run.command)}\n".encode())
        log.flush()
        begin = log.tell()
        code = children.run(run.command, log, tick)
    if code == 0:
        return code, f"done, {_position(folder)}, {_duration(started)}"
    with path.open("rb") as log:
        log.seek(begin)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
    errors = [line for line in lines if line.startswith("moetrain: error:")]
    reason = (errors or [line for line in lines if line] or [_silent(folder)])[-1]
    return code, f"FAILED with exit code {code} ({reason}); log: {path}"


def _silent(folder: Path) -> str:
    """Why a run has said nothing."""
    return "no output" if shutil.disk_usage(folder).free else "no output: the disk is full"


def _position(folder: Path) -> str:
    row, total = last_row(folder), num_steps(folder)
    if not row:
        return "starting"
    counts = numbers(row)
    figures = [f"{key} {counts[key]:.4f}" for key in ("loss", "eval_loss") if key in counts]
    return ", ".join([f"step {row['step']}" + (f"/{total}" if total else ""), *figures])


def _duration(started: float) -> str:
    minutes, seconds = divmod(int(time.monotonic() - started), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def run_task(sweep: Sweep, task: int) -> int:
    """Become run `task` (from 1) of the plan; returns 0 at once when it is done."""
    if task > len(sweep.runs):
        raise ConfigError(f"--task {task}, but the sweep has runs 1 to {len(sweep.runs)}.")
    run = sweep.runs[task - 1]
    path = sweep.folder / PLAN
    if path.is_file():
        if _planned(path, task) != list(run.overrides):
            raise ConfigError(
                f"{path} was planned with other settings: its line {task} is not {run.name}."
                " Give --task the arguments of the sweep, or plan it again without --task."
            )
    else:
        write_plan(sweep)
    if is_done(run.recipe):
        print(f"{run.name}: done before, skipped")
        return 0
    sys.stdout.flush()
    # Not a child: Slurm's signals, and srun's variables, are then the run's own.
    os.execv(run.command[0], run.command)


def _planned(path: Path, task: int) -> Any:
    """The overrides of run `task` in a plan; None where its line is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return json.loads(lines[task - 1])["overrides"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None


def submit(sweep: Sweep, argv: Sequence[str]) -> int:
    """Write the plan and hand what is not done to Slurm as an array; prints its command line.
    `argv`: the words after `moetrain`.
    """
    for run in sweep.runs:
        check_recipe(run.recipe)
    print(f"{plural(len(sweep.runs), 'run')}, planned in {write_plan(sweep)}")
    left = [i for i, run in enumerate(sweep.runs, start=1) if not is_done(run.recipe)]
    if not left:
        print("All of them are done; nothing is submitted.")
        return 0
    script = Path(moetrain.__file__).resolve().parents[1] / "slurm" / "sweep.sh"
    # In the script: `moetrain sweep "$@" --task $SLURM_ARRAY_TASK_ID`.
    # It may keep --jobs, which --task overrules.
    command = ["sbatch", f"--array={ranges(left)}", str(script), *argv[1:]]
    print(shlex.join(command))
    if not script.is_file():
        print(f"Nothing is submitted: {script} is not there.")
        return 0
    if shutil.which("sbatch") is None:
        raise MoetrainError("sbatch is not on this machine. Run the line above on a login node.")
    return subprocess.run(command, cwd=script.parents[1], check=False).returncode


def ranges(numbers: Iterable[int]) -> str:
    """[1, 2, 3, 5] -> "1-3,5", as sbatch --array takes it."""
    parts: list[str] = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        parts.append(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}")
    return ",".join(parts)
