"""`moetrain plan` as a user calls it, on two small GPUs that are not here."""

import json
import os
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from moetrain.cli import main
from moetrain.config.builtin import MODELS
from moetrain.config.load import load_recipe, recipe_from
from moetrain.layout.mesh import plan_mesh
from moetrain.models import read_model
from moetrain.planner.candidates import candidates
from moetrain.planner.closed import Closed
from moetrain.planner.fewer_layers import with_layers
from moetrain.planner.gpu import find_gpu
from moetrain.planner.search import tracers
from moetrain.testing.gloo import FromServer
from moetrain.testing.tiny import CONFIGS as TINY

SFT = "examples/sft_tiny.yaml"
CONTENT: dict[str, Any] = {
    "run_dir": "none",
    "model": {"hf": MODELS["qwen3-moe-tiny"], "dtype": "bf16"},
    "method": {"name": "pretrain"},
    "data": {"train": ["none"], "seq_len": 8192},
    "train": {"steps": 1, "global_batch": 16},
}
DENSE = ("model.path=null", f"model.hf={json.dumps(TINY['llama'])}")
GPUS = ("--gpus", "2", "--gpu", "H100-80GB")

pytestmark = pytest.mark.usefixtures("forked_tracers")


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_plan_is_written_and_loads(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All layouts of two GPUs are considered, the best is first, and its recipe is written."""
    path = tmp_path / "best.yaml"
    code, out, _ = plan(capsys, SFT, *GPUS, "--json", "--write", str(path))
    found: dict[str, Any] = json.loads(out)
    assert code == 0 and found["best"] == 0
    rows = found["layouts"]
    assert found["considered"] >= len(rows) > 1
    assert all(row["traced"] and row["fits"] for row in rows)
    assert [row["step_s"] for row in rows] == sorted(row["step_s"] for row in rows)
    best = rows[0]
    assert sum(best["memory"].values()) == pytest.approx(best["peak_gib"], abs=0.01)
    assert best["memory"]["optimizer"] > 0 and best["tokens_per_s"] > 0
    recipe = load_recipe(path, ())
    parallel = {axis: getattr(recipe.parallel, axis) or 1 for axis in best["parallel"]}
    assert parallel == best["parallel"] and recipe.cluster.world_size == 2
    assert recipe.cluster.gpu == "H100-80GB"
    assert recipe.train.recompute == best["train"]["recompute"]


def test_a_layout_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = plan(capsys, SFT, *GPUS, "--as-is", "parallel.tp=2")
    assert code == 0, err
    assert "Best: tp=2" in out and "Its time: " in out and "1 layout of 2" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((SFT, "--gpu", "H100"), "--gpu H100 is not known. Did you mean 'H100-80GB'"),
        ((SFT, *GPUS, "--routing", "wild"), "give balanced, natural, or"),
        ((SFT, *GPUS, "--sbatch"), "Give --write too"),
        ((SFT, *GPUS, "--sbatch", "--json", "--write", "x.yaml"), "both print"),
        ((SFT, *GPUS, "--as-is", "--goal", "memory"), "Leave one out"),
        ((SFT, *GPUS, "--routing", "2", *DENSE), "this model has no experts"),
        ((SFT, "--gpus", "3", "--as-is", "parallel.tp=2"), "Use 2 or 4 ranks"),
        ((SFT, "--gpus", "7", "train.global_batch=8"), "no layout of 7 GPUs divides"),
        (("none.yaml", *GPUS), "none.yaml"),
    ],
)
def test_mistakes(words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = plan(capsys, *words)
    assert code == 2 and message in err and err.count("\n") == 1


def test_nothing_fits(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu = tmp_path / "small.yaml"
    gpu.write_text("name: small\nlike: H100-80GB\nmemory_gib: {value: 0.1, source: a test}\n")
    code, out, _ = plan(capsys, SFT, "--gpus", "1", "--gpu", str(gpu))
    assert code == 2 and "NOTHING FITS: the leanest layout needs" in out


LAYERS_APART = [
    {"trainable": ["layers.3"]},
    {"adapter": {"target": ["model.layers.3.*"]}},
    {"adapter": {"path": "earlier"}},
    {"optim": {"groups": [{"match": ["layers.3"], "lr_scale": 2}]}},
    {"train": {"steps": 1, "recompute": "full"}, "megatron": {"recompute_num_layers": 1}},
]


@pytest.mark.parametrize("sections", LAYERS_APART)
def test_layers_that_are_treated_apart_are_traced_whole(sections: dict[str, Any]) -> None:
    """What some layers alone have, a model of fewer layers does not say."""
    model = read_model(MODELS["qwen3-moe-tiny"])
    assert with_layers(recipe_from(CONTENT), model, 2) is not None
    assert with_layers(recipe_from(CONTENT | sections), model, 2) is None


def test_no_candidate_that_the_run_refuses() -> None:
    """megatron-core gives wrong gradients with batch_p2p_comm where two stages interleave."""
    sections = {"megatron": {"batch_p2p_comm": True, "overlap_p2p_comm": False}}
    recipe = recipe_from(CONTENT | sections | {"parallel": {"pp": 4, "vpp": 2}})
    model = read_model(MODELS["qwen3-moe-tiny"] | {"num_hidden_layers": 8})
    found = {(c.parallel.pp, c.parallel.vpp or 1) for c in candidates(recipe, model, 8)}
    assert found == {(4, 2)}


def test_candidates_are_what_the_run_takes() -> None:
    """Each has whole micro-batches, and its closed forms are above zero."""
    recipe = recipe_from(CONTENT)
    model = read_model(MODELS["qwen3-moe-tiny"])
    found = list(candidates(recipe, model, 8))
    closed = Closed(recipe, model, find_gpu("H100-80GB"))
    assert len(found) > 100
    assert len({(one.parallel, one.train) for one in found}) == len(found)
    for one in found:
        layout = plan_mesh(one.parallel, 8)
        num = one.train.global_batch / (layout.dp * one.train.micro_batch)
        assert num == int(num) >= 1
        assert layout.vpp == 1 or num % layout.pp == 0
        estimate = closed.rough(one, 8)
        assert estimate.bytes > 0 and estimate.seconds > 0
    axes = {
        axis: {getattr(one.parallel, axis) or 1 for one in found}
        for axis in ("tp", "cp", "pp", "vpp", "ep", "etp")
    }
    powers = {1, 2, 4, 8}
    assert axes == {
        **{"tp": powers, "cp": {1, 2}, "pp": {1, 2, 4}},
        **{"vpp": {1, 2}, "ep": powers, "etp": powers},
    }


def test_a_last_stage_that_is_as_much_shorter_as_its_head_takes() -> None:
    """The formulas find it faster where the head is heavy; where it is light there is none."""
    deep = MODELS["qwen3-moe-tiny"] | {"num_hidden_layers": 24}
    sections = {"train": {"steps": 1, "global_batch": 16}}
    for vocab, last in ((60_000, 10), (64, None)):
        hf = deep | {"vocab_size": vocab}
        recipe = recipe_from(CONTENT | sections | {"model": {"hf": hf, "dtype": "bf16"}})
        model, closed = read_model(hf), Closed(recipe, read_model(hf), find_gpu("H100-80GB"))
        found = [c for c in candidates(recipe, model, 2) if c.parallel.pp == 2]
        assert {c.parallel.last_stage_layers for c in found} == {None, last}
        for one in found:
            if one.parallel.last_stage_layers is None and one.parallel.vpp == 1:
                shorter = one.model_copy(
                    update={"parallel": one.parallel.model_copy(update={"last_stage_layers": last})}
                )
                before, now = (closed.rough(each, 2).seconds for each in (one, shorter))
                assert now < before or last is None


def hold(pipe: Connection) -> None:
    """Send the process id of a tracer, and wait to be killed."""
    with tracers() as pool:
        pipe.send(pool.submit(os.getpid).result())
        time.sleep(600)


def test_tracers_end_with_who_started_them() -> None:
    """A run that does not wait for its prediction kills the process that makes it."""
    context = FromServer()
    ours, theirs = context.Pipe()
    process = context.Process(target=hold, args=(theirs,))
    process.start()
    try:
        tracer = ours.recv()
        assert runs(tracer)
    finally:
        process.kill()
    end = time.monotonic() + 60
    while runs(tracer):
        assert time.monotonic() < end
        time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"  # ended, and nobody has asked how
