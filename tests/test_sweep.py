"""Sweeps: what is planned and refused, and real runs that fail, are interrupted and go on."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moetrain import cli
from moetrain.config.load import load_recipe
from moetrain.errors import ConfigError
from moetrain.observe.ledger import read_ledger
from moetrain.observe.runs import find_runs
from moetrain.run.child import Children
from moetrain.run.sweep import is_done, plan_sweep, ranges, split_grid, write_plan
from moetrain.testing import command

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "examples" / "sft_tiny.yaml"


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may themselves run in a job."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


# Plans


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1", ["1"]),
        ("a.b=5e-5, 2e-5", ["5e-5", "2e-5"]),
        ("a.b=[x,y],[z]", ["[x,y]", "[z]"]),
        ("a.b={c: [1,2], d: 3},null", ["{c: [1,2], d: 3}", "null"]),
        ("a.b='x,y',\"z]\",it's", ["'x,y'", '"z]"', "it's"]),
        ("a.b=k=v,w", ["k=v", "w"]),
    ],
)
def test_values_of_a_grid(text: str, values: list[str]) -> None:
    assert split_grid(text) == ("a.b", values)


def test_product_names_and_commands(tmp_path: Path) -> None:
    sweep = plan_sweep(
        RECIPE,
        ["optim.lr=5e-5,2e-5", "router.aux_loss=0,0.01"],
        ["train.steps=7", "run_dir=elsewhere/run"],
        num_procs=2,
    )
    assert sweep.folder == Path("elsewhere/run-sweep")
    names = [run.name for run in sweep.runs]
    assert names == [f"lr={lr}_aux_loss={aux}" for lr in ("5e-5", "2e-5") for aux in ("0", "0.01")]
    run = sweep.runs[1]
    recipe = run.recipe
    assert (recipe.optim.lr, recipe.router.aux_loss, recipe.train.steps) == (5e-5, 0.01, 7)
    assert recipe.run_dir == sweep.folder / run.name
    head = [sys.executable, "-m", "moetrain", "train", str(RECIPE), "--nproc", "2"]
    assert list(run.command) == [*head, *run.overrides]
    assert load_recipe(RECIPE, run.overrides) == recipe
    out = plan_sweep(RECIPE, ["seed=1"], out=tmp_path / "x: y")
    assert load_recipe(RECIPE, out.runs[0].overrides).run_dir == tmp_path / "x: y" / "seed=1"


def test_names_tell_keys_and_values_apart() -> None:
    def names(*grids: str) -> list[str]:
        return [run.name for run in plan_sweep(RECIPE, grids).runs]

    assert names("optim.weight_decay=0.1", "optim.lr=1") == ["weight_decay=0.1_lr=1"]
    both = names("train.eval_every=1", "checkpoint.every=2", "data.eval=builtin:checkable-sft-eval")
    assert both[0].startswith("eval_every=1_every=2_eval=builtin-checkable-sft-eval-")
    a, b = names("data.train=/data/a b.jsonl,/data/a-b.jsonl")
    assert a != b and "/" not in a + b and " " not in a
    long = "x" * 300
    assert len(names(f"data.train={long}")[0]) < 80
    # One value keeps its name in a larger sweep, so that the run is found again.
    assert names("data.train=/data/a b.jsonl") == [a]
    # The same last part of two keys.
    twice = names("optim.name=adamw", "method.name=sft")
    assert twice == ["optim.name=adamw_method.name=sft"]


def test_a_section_is_laid_before_its_keys() -> None:
    sweep = plan_sweep(RECIPE, ["checkpoint={keep: 3},{keep: 4}"], ["checkpoint.every=9"])
    kept = [(run.recipe.checkpoint.keep, run.recipe.checkpoint.every) for run in sweep.runs]
    assert kept == [(3, 9), (4, 9)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "optim.lrr=1,2"], "unknown key 'optim.lrr'. Did you mean 'optim.lr'?"),
        (["--grid", "optim.beta=1,2"], "unknown key 'optim.beta'"),
        (["--grid", "lr=1,2"], "unknown key 'lr'. Did you mean 'optim.lr'?"),
        (["--grid", "optim.lr=1e-5,-1"], "run lr=-1: "),
        (["--grid", "optim.lr=1e-5,fast"], "'optim.lr' is 'fast'"),
        (["--grid", "optim.lr=1e-5,"], "write key=value,value"),
        (["--grid", "optim.lr"], "write key=value,value"),
        (["--grid", "seed=1,2", "--grid", "seed=3"], "--grid seed is given twice"),
        (["--grid", "seed=1,2", "seed=3"], "both in --grid and an override"),
        (["--grid", "run_dir=a,b"], "see --out"),
        (["--grid", "optim.lr=1e-5,0.00001"], "lr=0.00001 is the same run as lr=1e-5"),
        (["--grid", "parallel.tp=1,3"], "run tp=3: "),
        (["--grid", "model.path=/none"], "/none: no such folder"),
        (["--grid", "seed=1,2", "--task", "3"], "the sweep has runs 1 to 2"),
        (["--grid", "seed=1,2", "optim.lrr=1"], "Did you mean 'optim.lr'?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """And found before the first run is started."""
    out = tmp_path / "sweep"
    assert cli.main(["sweep", str(RECIPE), "--out", str(out), *words]) == 2
    printed, err = capfd.readouterr()
    assert not printed
    assert err.startswith("moetrain: error: ") and err.count("\n") == 1
    assert said in err
    assert not out.exists()


def test_under_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["sweep", str(RECIPE), "--grid", "seed=1", "--out", str(tmp_path)]) == 2
    assert "give --task" in capsys.readouterr().err


def test_a_folder_of_another_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before the first run, though it is the second run's folder."""
    from moetrain.config.load import dump_recipe

    folder = tmp_path / "seed=2"
    folder.mkdir()
    recipe = load_recipe(RECIPE, ["seed=2", "optim.lr=0.5", f"run_dir={folder}"])
    (folder / "resolved.yaml").write_text(dump_recipe(recipe))
    assert cli.main(["sweep", str(RECIPE), "--grid", "seed=1,2", "--out", str(tmp_path)]) == 2
    assert "was started with optim.lr=0.5" in capsys.readouterr().err
    assert not (tmp_path / "seed=1").exists()


# Slurm


def test_ranges() -> None:
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3,5,7-8"
    assert ranges([4]) == "4"


def test_slurm_plans_and_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no sbatch there
    words = [str(RECIPE), "--grid", "seed=1,2", "--out", str(tmp_path / "s"), "train.steps=3"]
    assert cli.main(["sweep", *words, "--jobs", "slurm"]) == 2
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if line.startswith("sbatch "))
    assert "--array=1-2" in line and "--grid seed=1,2" in line and "train.steps=3" in line
    plan = [json.loads(line) for line in (tmp_path / "s" / "sweep.jsonl").read_text().splitlines()]
    assert [run["name"] for run in plan] == ["seed=1", "seed=2"]
    assert {"name", "overrides", "command"} == set(plan[0])
    assert plan[1]["command"][-len(plan[1]["overrides"]) :] == plan[1]["overrides"]
    # A task of another sweep than the planned one is refused.
    words[2] = "seed=5,6"
    assert cli.main(["sweep", *words, "--task", "2"]) == 2
    assert "its line 2 is not seed=6" in capsys.readouterr().err


# Children


def wait_for(path: Path) -> None:
    end = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)
def test_signals_reach_the_child(number: int, code: int, tmp_path: Path) -> None:
    """Gently: SIGINT as a SIGTERM, so that the run saves."""
    ready, log = tmp_path / "ready", tmp_path / "log"
    child = (
        "import signal, sys, time, pathlib\n"
        "def leave(n, f): print('got', n, flush=True); sys.exit(7)\n"
        "for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT): signal.signal(n, leave)\n"
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    sent: list[int] = []

    def tick() -> None:
        if ready.exists() and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with Children() as children, log.open("wb") as file:
        assert children.run([sys.executable, "-S", "-c", child], file, tick) == 7
    assert children.asked == [number] and children.exit_code == code
    got = signal.SIGTERM if number == signal.SIGINT else number
    assert log.read_text() == f"got {int(got)}\n"
    assert signal.getsignal(number) is before


def test_second_interrupt_kills(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        f"pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )
    with Children() as children, (tmp_path / "log").open("wb") as file:

        def tick() -> None:
            if ready.exists() and len(children.asked) < 2:
                os.kill(os.getpid(), signal.SIGINT)

        assert children.run([sys.executable, "-S", "-c", child], file, tick) == 128 + 9
    assert children.exit_code == 130


# Real runs

SETTINGS = (
    "data.seq_len=64 train.global_batch=2 train.eval_packs=2 train.steps=400 checkpoint.every=3"
    " optim.schedule=constant optim.min_lr=0 observe.tensorboard=false"
).split()


def start(folder: Path, *more: str) -> command.Started:
    grid = ["--grid", f"data.train={folder / 'none.jsonl'},builtin:checkable-sft"]
    words = [str(RECIPE), *grid, "--out", str(folder / "s"), *SETTINGS, *more]
    return command.start("sweep", *words, cwd=ROOT, merged=True)


@pytest.mark.slow
def test_failed_interrupted_resumed_and_skipped(tmp_path: Path) -> None:
    """The first run has no data and fails, the sweep goes on; a Ctrl-C saves the second, which goes
    on in the next start, and is skipped in the one after.
    """
    process = start(tmp_path)
    folder = tmp_path / "s"

    def steps() -> int:
        return find_runs([folder])[1].step if (folder / "sweep.jsonl").is_file() else 0

    end = time.monotonic() + 240
    while steps() < 4:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "FAILED with exit code 2 (moetrain: error: " in said and "none.jsonl" in said
    assert "is saved. Go on with: moetrain sweep " in said and "Traceback" not in said
    failed, stopped = find_runs([folder])
    assert (failed.status, stopped.status) == ("failed", "stopped")
    assert stopped.name.startswith("train=builtin-checkable-sft-")
    reached = stopped.step
    assert 4 <= reached < 400

    # `train.steps` may change where the schedule is constant: the rest is done in seconds.
    last = f"train.steps={reached + 2}"
    process = start(tmp_path, last)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 1, said
    assert f"done, step {reached + 2}/{reached + 2}" in said and "1 of 2 runs failed" in said
    log = (stopped.path / "train.log").read_text()
    assert f"at step {reached}" in log and log.count("\n$ ") == 1
    failed, done = find_runs([folder])
    assert (failed.status, done.status, done.step) == ("failed", "finished", reached + 2)
    assert [
        row["step"] for row in read_ledger(done.path / "ledger.jsonl") if "loss" in row
    ] == list(range(1, reached + 3))

    sweep = plan_sweep(
        RECIPE,
        [f"data.train={tmp_path / 'none.jsonl'},builtin:checkable-sft"],
        [*SETTINGS, last],
        out=folder,
    )
    assert [is_done(run.recipe) for run in sweep.runs] == [False, True]
    process = start(tmp_path, last, "--task", "2")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "done before, skipped" in said
    process = start(tmp_path, last, "--task", "1")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and said.startswith("moetrain: error: ")
    assert write_plan(sweep).is_file()
    # Longer again: not done.
    longer = plan_sweep(RECIPE, ["data.train=builtin:checkable-sft"], [*SETTINGS], out=folder)
    assert not is_done(longer.runs[0].recipe)


def test_half_done_is_not_done(tmp_path: Path) -> None:
    """A kill between the last step and its checkpoint or its export leaves something to do."""
    from moetrain.config.load import dump_recipe

    recipe = load_recipe(
        RECIPE, [f"run_dir={tmp_path}", "train.steps=5", "checkpoint.export_hf=true"]
    )
    assert not is_done(recipe)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    (tmp_path / "environment.json").write_text('{"num_steps": 5}')
    assert not is_done(recipe)
    (tmp_path / "ledger.jsonl").write_text('{"step": 5, "loss": 1.0}\n')
    assert not is_done(recipe)
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert not is_done(recipe)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    assert is_done(recipe)


def test_unknown_plan_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="needs a grid"):
        plan_sweep(RECIPE, [])
