"""Reinforcement learning from the command line: what a run leaves, replays and survives."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from data_helpers import answers_shown

from moetrain.config.load import load_recipe
from moetrain.data.trajectories import to_json
from moetrain.loops import rl
from moetrain.testing import command, faults
from moetrain.testing.command import Started
from moetrain.testing.gloo import Workers
from moetrain.testing.rollouts import batch_of
from moetrain.weights.compare import compare

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "examples" / "grpo_tiny.yaml"
SETTINGS = (
    "train.steps=4 train.eval_every=2 checkpoint.every=2 checkpoint.export_hf=true"
    " rollout.prompts_per_step=4 rollout.group_size=4 rollout.eval_prompts=4"
    " observe.tensorboard=false data.take=[64]"
).split()
# What a clock or the machine decides.
MEASURED = ("seconds", "tokens_per_s", "memory_gib", "push/")


def start(run_dir: Path, *more: str, nproc: int = 2) -> Started:
    words = ("train", RECIPE, "--nproc", str(nproc), *SETTINGS, f"run_dir={run_dir}")
    return command.start(*words, *more, cwd=ROOT)


def train(run_dir: Path, *more: str, nproc: int = 2) -> None:
    process = start(run_dir, *more, nproc=nproc)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err


def rows(run_dir: Path, *, whole: bool = False) -> list[dict[str, Any]]:
    file = run_dir / "ledger.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines]
    if whole:
        return found
    return [{k: v for k, v in row.items() if not k.startswith(MEASURED)} for row in found]


# The reference moves with every step and is a part of what a run resumes from; two passes a batch.
MOVING = (
    "method={name: grpo, beta: 0.05, ref_model_sync_steps: 1, ref_model_mixup_alpha: 0.5,"
    " num_iterations: 2, entropy_coef: 1e-3}"
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, "parallel.ep=2", "observe.tensorboard=true", MOVING)
    return run_dir


def test_what_a_step_says(whole: Path) -> None:
    steps = [row for row in rows(whole, whole=True) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for row in steps:
        assert row["push/logprob_gap"] <= 1e-3 and row["mismatch/abs"] <= 1e-3
        assert row["staleness"] == 0 and 0 < row["entropy"]
        assert 0 <= row["reward/short"] <= 1
        assert row["reward/mean"] == pytest.approx(row["reward/short"])
        assert 1 <= row["length/mean"] <= 16 and 0 <= row["clip/high"] <= 1
        for phase in ("sample", "score", "train", "push"):
            assert row[f"seconds/{phase}"] > 0
    held_out = [row for row in rows(whole) if "eval_reward/mean" in row]
    assert [row["step"] for row in held_out] == [0, 2, 4]
    files = sorted(path.name for path in (whole / "rollouts").iterdir())
    assert files == [f"{i:08d}.{kind}" for i in range(1, 5) for kind in ("jsonl", "safetensors")]


def test_the_answers_of_every_evaluation_are_kept(whole: Path) -> None:
    """As a step's rollouts are; their mean is the ledger's. TensorBoard has some of both."""
    kept = sorted((whole / "answers").iterdir())
    assert [path.name for path in kept] == [f"{i:08d}.jsonl" for i in (0, 2, 4)]
    rollouts = (whole / "rollouts" / "00000004.jsonl").read_text().splitlines()
    held_out = [row for row in rows(whole) if "eval_reward/mean" in row]
    for path, row in zip(kept, held_out, strict=True):
        head, *groups = map(json.loads, path.read_text().splitlines())
        assert head == {"step": row["step"], "temperature": 0.0}
        answers = [answer for group in groups for answer in group["answers"]]
        assert sum(a["reward"] for a in answers) / 4 == pytest.approx(row["eval_reward/mean"])
        assert groups[0].keys() == json.loads(rollouts[1]).keys()
        short = json.loads(rollouts[1])["answers"][0]  # log-probs are in the file beside it
        assert answers[0].keys() - {"logprobs"} == short.keys()
    assert answers_shown(whole) == {"held_out": [0, 2, 4], "rollouts": [1, 2, 3, 4]}


def test_a_replay_gives_the_same_losses_without_an_engine(whole: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "parallel.ep=2", MOVING, f"rollout.replay={whole / 'rollouts'}")
    wanted = [row for row in rows(whole) if "loss" in row]
    assert rows(tmp_path / "run") == wanted
    assert list(compare(tmp_path / "run" / "hf", whole / "hf")) == []


def test_a_run_that_is_shortened_below_its_checkpoint_has_finished() -> None:
    train = SimpleNamespace(prompts=[])
    nothing: Any = SimpleNamespace(recipe=load_recipe(RECIPE), held_out=[], train=train)
    assert rl._loop(*[nothing] * 7, step=5, last=4)


def test_killed_and_resumed(whole: Path, tmp_path: Path) -> None:
    """In the middle of sampling for step 3: what was sampled stays, and all is as it would have
    been.
    """
    run_dir = tmp_path / "run"
    process = start(run_dir, "parallel.ep=2", MOVING)
    part = run_dir / "rollouts" / "00000003.partial.jsonl"
    batch = run_dir / "rollouts" / "00000003.jsonl"

    def begun() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return batch.exists() or part.stat().st_size > 0
        return False

    wait_for(begun, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    # Answers of one batch are written within a millisecond, and then again as the whole batch: here
    # the kill came between the third and the fourth.
    part.touch()
    if batch.exists():
        made = [answer.trajectory for answer in batch_of(run_dir, 3).answers]
        answers = [json.dumps(to_json(one)) + "\n" for one in made]
        batch.unlink()
    else:
        answers = part.read_text().splitlines(keepends=True)
    part.write_text("".join(answers[:3]))
    late = run_dir / "answers" / "00000003.jsonl"  # past the checkpoint, of no step that evaluates
    late.write_text("{}\n")
    train(run_dir, "parallel.ep=2", MOVING)
    assert rows(run_dir) == rows(whole)
    assert list(compare(run_dir / "hf", whole / "hf")) == []
    for kept in (whole / "answers").iterdir():
        assert (run_dir / "answers" / kept.name).read_text() == kept.read_text()
    assert not late.exists()


def test_told_to_stop_and_resumed(whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, "parallel.ep=2", MOVING)
    wait_for(lambda: len(rows(run_dir)) >= 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 143
    train(run_dir, "parallel.ep=2", MOVING)
    assert [row for row in rows(run_dir) if "loss" in row] == [
        row for row in rows(whole) if "loss" in row
    ]


def wait_for(condition: Callable[[], bool], process: Started) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2"])
def test_every_layout_samples_and_learns_the_same(whole: Path, tmp_path: Path, layout: str) -> None:
    train(tmp_path / "run", layout, MOVING)
    for found, wanted in zip(rows(tmp_path / "run", whole=True), rows(whole), strict=True):
        if "loss" in wanted:
            assert found["push/logprob_gap"] <= 1e-3
            assert found["reward/mean"] == pytest.approx(wanted["reward/mean"], abs=0.02)


@pytest.mark.parametrize(
    "more",
    [
        ("rollout.steps_off=1",),
        ("method={name: dapo, max_length: 16, soft_length: 8}",),
        ("method={name: dr_grpo, length: 16, beta: 0.1, inner_steps: 2}",),
        ("method={name: ppo, beta: 0.05, value_weight: 1.0}",),
        (
            "method={name: chord, packs: 2, mu_decay: 2}",
            "data.demonstrations=builtin:checkable-starts",
        ),
        ("method=gspo", "adapter={rank: 4}", "rollout.routing_replay=true"),
        ("method={name: rloo, ref_model_sync_steps: 1, ref_model_mixup_alpha: 1.0}",),
        ("method={name: reinforce_pp, beta: 0.05, top_entropy_quantile: 0.2}",),
    ],
    ids=lambda more: more[0],
)
def test_methods_and_modes(tmp_path: Path, more: tuple[str, ...]) -> None:
    few = ("train.steps=3", "checkpoint.every=3", "data.eval=[]", "data.take=[64]")
    train(tmp_path / "run", "parallel.ep=2", *few, *more)
    steps = [row for row in rows(tmp_path / "run", whole=True) if "loss" in row]
    assert all(row["push/logprob_gap"] <= 1e-3 and row["mismatch/abs"] <= 1e-3 for row in steps[:1])
    for row in steps:  # an adapter of 4 ranks is on matrices of 6,291,456 bytes
        most = 6_291_456 if "adapter={rank: 4}" in more else row["push/whole_bytes"]
        assert 0 < row["push/bytes"] <= most and row["push/reloads"] == 0
    ahead = "steps_off" in more[0]
    assert [row["staleness"] for row in steps] == ([0, 1, 1] if ahead else [0, 0, 0])
    if "mixup_alpha: 1.0" in more[0]:  # the reference is the policy before each step
        assert all(abs(row["kl"]) < 1e-4 for row in steps)
    if "beta" in more[0]:
        assert steps[-1]["kl"] > 1e-4
        if "inner_steps" not in more[0]:  # else the second has moved already
            assert abs(steps[0]["kl"]) < 1e-4
    if "chord" in more[0]:
        assert [row["mu"] for row in steps] == pytest.approx([0.9, 0.475, 0.05], abs=1e-4)
    if "ppo" in more[0]:
        assert steps[-1]["value/loss"] < steps[0]["value/loss"]


HOSTILE = """
import os, socket, tempfile, time

def hostile(completions, **columns):
    kind = sum(map(ord, completions[0])) % 8
    if kind == 0:
        time.sleep(60)
    if kind == 1:
        os.kill(os.getpid(), 9)
    if kind == 2 and os.fork() == 0:
        time.sleep(600)
    if kind == 3:
        socket.create_server(("127.0.0.1", 0))
    if kind == 4:
        with tempfile.TemporaryFile() as file:
            for _ in range(10_000):
                file.write(bytes(1 << 20))
    while kind == 5:
        print("no end")
    if kind == 6:
        raise ValueError
    return [float(len(completions[0]))]
"""


def test_a_hostile_reward_costs_its_answers(tmp_path: Path) -> None:
    """It hangs, dies, forks, listens, writes 10 GB, prints for ever: counted; the run goes on."""
    own = tmp_path / "own.py"
    own.write_text(HOSTILE)
    settings = (f"rewards=[{own}:hostile]", "rollout.reward_seconds=0.5", "train.steps=2")
    settings += ("data.eval=[]",)  # whose faults would be counted, too
    train(tmp_path / "run", *settings, nproc=1)
    steps = [row for row in rows(tmp_path / "run", whole=True) if "loss" in row]
    kinds = ("timeout", "crash", "error")
    faults = {kind: sum(row.get(f"faults/{kind}", 0) for row in steps) for kind in kinds}
    assert min(faults.values()) > 0
    assert sum(faults.values()) == sum(row["faults/dropped/ungraded"] for row in steps)


SOMETIMES = """
def odd(prompts, completions, answer, question=None, **kw):
    assert len(prompts) == len(completions) == len(answer)
    if len(completions) == 1 and len(completions[0]) % 2:
        raise ValueError("an odd number of characters")
    if any(len(text) % 2 for text in completions):
        raise ValueError("one of them is odd")
    kw["log_metric"]("step", kw["trainer_state"].global_step)
    return [0.5] * len(completions)

def failing(completions, **kw):
    raise ValueError("no luck")

def late(completions, **kw):
    with open(__file__ + ".asked", "a") as file:
        asked = file.tell()
        file.write("." * len(completions))
    return [None if asked < 32 else float(len(text) % 2) for text in completions]
"""


def test_a_reward_that_failed_is_no_score(tmp_path: Path) -> None:
    """A mean is over graded answers and has their number; none graded is no number."""
    (tmp_path / "own.py").write_text(SOMETIMES)
    settings = [f"rewards=[{tmp_path}/own.py:odd]", "train.steps=1", "rollout.max_tokens=9"]
    process = start(tmp_path / "odd", *settings, "rollout.eval_prompts=12", nproc=1)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    found = rows(tmp_path / "odd", whole=True)
    held_out = next(row for row in found if "eval_reward/answers" in row)
    assert held_out["eval_reward/answers"] == 12 > held_out["eval_reward/graded"] > 0
    assert held_out["eval_reward/mean"] == held_out["eval_reward/odd"] == 0.5
    num = int(held_out["eval_reward/graded"])
    graded = f"{num} of 12 answers graded (the last fault: odd:"
    assert re.search(rf"held-out reward 0\.500 ±0\.\d+ of {num}, {re.escape(graded)}", out)
    step = next(row for row in found if "loss" in row)
    assert step["reward/mean"] == 0.5 and step["logged/step"] == 1
    assert step["reward/graded"] + step["faults/dropped/ungraded"] <= 16
    assert "an odd number of characters" in step["reward/fault"]
    assert f"grpo 1: {step['reward/graded']:.0f} of" in out

    failing = [f"rewards=[{tmp_path}/own.py:failing]", "train.steps=1"]
    process = start(tmp_path / "failing", *failing, nproc=1)
    out, err = process.communicate(timeout=240)
    wanted = "Step 1: no prompt kept two graded answers in 3 batches one after the other"
    assert process.returncode == 2 and wanted in err
    (held_out,) = rows(tmp_path / "failing", whole=True)
    assert held_out["eval_reward/graded"] == 0 and "eval_reward/mean" not in held_out
    assert "held-out 0 of 4 answers graded (the last fault: failing: ValueError: no luck)" in out
    assert "0.0000" not in out


def test_batches_without_a_grade_are_left_out(tmp_path: Path) -> None:
    """The prompts after them are taken, and a run ends in good order when there are no more."""
    (tmp_path / "own.py").write_text(SOMETIMES)
    settings = ["train.steps=null", "train.epochs=1", "data.take=[20]", "data.eval=[]"]
    settings += [f"rewards=[{tmp_path}/own.py:late]", "rollout.reward_workers=1"]
    train(tmp_path / "run", *settings, nproc=1)
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [1, 2, 3]  # 20 prompts are five batches
    assert [row.get("faults/dropped/batches") for row in found] == [2, None, None]
    assert found[0]["faults/dropped/ungraded"] == 32 and found[0]["reward/graded"] == 16
    assert (tmp_path / "run" / "hf").is_dir()
    assert "00000003" in {path.name[-8:] for path in (tmp_path / "run" / "checkpoints").iterdir()}


def test_a_push_that_does_not_arrive_stops_the_run(workers: Workers, tmp_path: Path) -> None:
    said = workers.run(2, faults.train_with, "deaf", str(RECIPE), str(tmp_path / "run"))
    for text in said:
        assert "serves other weights than the trainer holds" in text and "rollout.tolerance" in text


@pytest.mark.parametrize("fault", ["leaves out", "on another base"])
def test_a_wrong_push_of_what_moved_is_caught_and_mended(
    workers: Workers, tmp_path: Path, fault: str
) -> None:
    """By the proof, and by a push of everything to a fresh engine."""
    settings = ("train.steps=1", "adapter={rank: 4}", "data.eval=[]")
    words = (fault, str(RECIPE), str(tmp_path / "run"), *settings)
    assert workers.run(2, faults.train_with, *words) == ["the run went on"] * 2
    for row in rows(tmp_path / "run", whole=True):
        assert row["push/reloads"] == 1 and row["push/logprob_gap"] <= 1e-3
        assert row["push/whole_bytes"] < row["push/bytes"] < 2 * row["push/whole_bytes"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("rewards=[accurracy]",), "'accurracy' is not known"),
        (("rewards=[./none.py:f]",), "is not a file"),
        (("rewards=[./examples/rewards/emoji.py:f]",), "has no function f"),
        (("rewards=[code]",), "no reward can grade its records: code needs tests or"),
        (("rollout.replay=/nonexistent",), "is not there"),
        (("rollout.replay=docs",), "has no batch of step 1"),
        (("rollout.max_tokens=600",), "leaves no room for a prompt"),
        (("rollout.engine=vllm", "rollout.python=README.md"), "is no program"),
    ],
    ids=lambda value: str(value),
)
def test_a_mistake_is_one_line(tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    process = start(tmp_path / "run", *more, nproc=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert len(err.splitlines()) == 1 and message in err


def test_a_replay_at_another_temperature_is_refused(whole: Path, tmp_path: Path) -> None:
    """Its answers' log-probs would be compared with another distribution's."""
    more = (f"rollout.replay={whole / 'rollouts'}", "rollout.temperature=0.6")
    process = start(tmp_path / "run", *more, nproc=1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert len(err.splitlines()) == 1 and "set rollout.temperature=1," in err


def test_the_reference_is_what_the_run_starts_from(tmp_path: Path) -> None:
    """A run that goes on from an adapter has no KL to it at its first step."""
    first = ("adapter.rank=4", "adapter.alpha=64", "optim.lr=3e-2", "train.steps=2")
    train(tmp_path / "first", *first, nproc=1)
    path = tmp_path / "first" / "adapter"
    assert path.is_dir()
    train(tmp_path / "then", f"adapter.path={path}", "method.beta=0.1", "train.steps=2", nproc=1)
    kl = [row["kl"] for row in rows(tmp_path / "then") if "loss" in row]
    assert abs(kl[0]) < 1e-6 < kl[1]
