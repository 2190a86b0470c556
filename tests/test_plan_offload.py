"""Plans with an optimizer on the host: bytes against the formula of layouts, seconds by hand, and
when a search takes it.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moetrain.cli import main
from moetrain.config.builtin import MODELS
from moetrain.config.load import load_recipe, recipe_from
from moetrain.config.recipe import Recipe
from moetrain.layout.memory import static_bytes
from moetrain.layout.mesh import plan_mesh
from moetrain.models.lookup import model_of
from moetrain.planner.closed import Closed
from moetrain.planner.extend import trace_fast
from moetrain.planner.gpu import Number, find_gpu, known_gpus
from moetrain.planner.offload import PINNED, STATE, may_offload, offloaded, seconds
from moetrain.planner.search import Goal, Search, tracers
from moetrain.run.plan_text import as_json, as_text

H100 = find_gpu("H100-80GB")
CONTENT: dict[str, Any] = {
    "run_dir": "none",
    "model": {"hf": MODELS["qwen3-moe-tiny"] | {"num_hidden_layers": 8}, "dtype": "bf16"},
    "method": {"name": "pretrain"},
    "data": {"train": ["none"], "seq_len": 512},
    "train": {"steps": 1, "global_batch": 8},
    "parallel": {"pp": 2, "ep": 2},
}
LORA = {"adapter": {"target": "all-linear", "rank": 4}}
SIZE = 4

pytestmark = pytest.mark.usefixtures("forked_tracers")


def recipe(offload: float = 0.0, **sections: Any) -> Recipe:
    return recipe_from(CONTENT | sections | {"optim": {"offload": offload}})


@pytest.fixture
def pool() -> Any:
    with tracers() as run:
        yield run


def test_what_is_on_the_host_is_not_on_the_device(pool: ProcessPoolExecutor) -> None:
    """As much as the formula says; nothing else that a rank holds or sends is other."""
    all_of_it, half = recipe(), recipe(0.5)
    jobs = [pool.submit(trace_fast, r, [0, SIZE - 1], SIZE) for r in (all_of_it, half)]
    plain, halved = (job.result() for job in jobs)
    for before, now in zip(plain, halved, strict=True):
        a, b = before.profile, now.profile
        less = a.at_peak["optimizer"] - b.at_peak["optimizer"]
        assert less == a.reserved - b.reserved > 0 and a.collectives == b.collectives
        assert less == pytest.approx(STATE * b.on_host, rel=2e-3)  # it counts no small ones
        assert less == pytest.approx(a.at_peak["optimizer"] / 2, abs=2 * STATE)
        assert a.at_peak | {"optimizer": 0} == b.at_peak | {"optimizer": 0}
    held = halved[0].profile.at_peak["optimizer"]
    stages = static_bytes(model_of(half), plan_mesh(half.parallel, SIZE), half)
    assert held == pytest.approx(stages[0].optimizer, rel=2e-3)


def test_seconds_by_hand() -> None:
    """10^9 parameters: gradients there, 28 bytes a parameter of memory, weights back."""
    assert H100.host_gbps is not None and H100.host_memory_gbps is not None
    way, memory = H100.host_gbps.value, H100.host_memory_gbps.value
    assert seconds(recipe(1), H100, 1e9) == pytest.approx(6 / way + 28 / memory)
    narrow = recipe_from(CONTENT | {"optim": {"offload": 1, "grad_dtype": "bf16"}})
    assert seconds(narrow, H100, 1e9) == pytest.approx(4 / way + 28 / memory)
    assert seconds(recipe(1), find_gpu("CPU"), 1e9) == 0
    closed = Closed(recipe(), model_of(recipe()), H100)
    plain, away = (closed.rough(r, SIZE) for r in (recipe(), offloaded(recipe())))
    assert away.bytes < plain.bytes and away.seconds > plain.seconds


@pytest.mark.parametrize(
    ("more", "may"),
    [
        ({}, True),
        (LORA, True),
        ({"model": CONTENT["model"] | {"dtype": "fp32"}}, False),
        ({"optim": {"offload": 0.5}}, False),
        ({"optim": {"name": "muon"}}, False),
        ({"optim": {"state_dtype": "bf16"}, "model": CONTENT["model"] | {"backend": "te"}}, False),
    ],
)
def test_where_a_plan_may_put_it_there(more: dict[str, Any], may: bool) -> None:
    assert may_offload(recipe_from(CONTENT | more), H100) == may
    assert not may_offload(recipe_from(CONTENT | more), find_gpu("CPU"))


def test_every_gpu_says_what_its_host_has() -> None:
    for name in known_gpus():
        gpu = find_gpu(name)
        numbers = (gpu.host_gbps, gpu.host_memory_gbps, gpu.host_gib)
        assert all(number and number.source for number in numbers) or not gpu.asynchronous


def small(gib: float, host_gib: float = 100.0) -> Any:
    """A GPU with room for so much, all of it for tensors."""
    none = Number(value=0, source="a test")
    changes = {name: none for name in ("context_mib", "workspace_mib", "group_mib")}
    room = {"memory_gib": gib, "host_gib": host_gib}
    numbers = {name: Number(value=value, source="a test") for name, value in room.items()}
    return H100.model_copy(update=changes | numbers)


def test_a_search_takes_it_where_nothing_else_fits(pool: ProcessPoolExecutor) -> None:
    """On one GPU with room for a little less than the leanest layout; with less on the host none
    fits.
    """
    one = recipe(parallel={}, model=CONTENT["model"] | {"hf": MODELS["qwen3-moe-tiny"]})
    leanest = Search(one, 1, small(100.0), "memory", pool=pool).best(lambda _: None).best
    assert not leanest.recipe.optim.offload and leanest.host_gib == 0
    limit = leanest.peak_gib - 0.3 * leanest.memory["optimizer"]
    goals: tuple[Goal, ...] = ("memory", "speed")
    for goal in goals:
        found = Search(one, 1, small(limit), goal, pool=pool).best(lambda _: None)
        assert found.best.fits and found.best.recipe.optim.offload == 1
        state = found.best.host_gib * STATE / (STATE + PINNED)
        assert state == pytest.approx(leanest.memory["optimizer"], rel=0.01)
        assert found.best.seconds.optimizer > leanest.seconds.optimizer
        (row, *_), told = as_json(found)["layouts"], as_text(found, small(limit), 1)
        assert row["optim"] == {"offload": 1} and row["host_gib"] > 0
        assert "offload=1:" in told and " offload " in told.splitlines()[0]
    near = Search(one, 1, small(limit), pool=pool).nearest()
    assert near is not None and near.fits and near.recipe.optim.offload == 1
    crowded = Search(one, 1, small(limit, found.best.host_gib / 2), pool=pool)
    (planned,) = crowded.traced([found.best.recipe])
    assert not planned.fits and planned.peak_gib < limit


def test_it_is_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    gpu, out = tmp_path / "small.yaml", tmp_path / "best.yaml"
    lines = [f"{n}: {{value: 0, source: a test}}" for n in ("context_mib", "workspace_mib")]
    path = tmp_path / "recipe.yaml"
    content = CONTENT | {
        "parallel": {},
        "model": {"path": "builtin:qwen3-moe-tiny", "dtype": "bf16"},
    }
    path.write_text(json.dumps(content))
    words = ["plan", str(path), "--gpus", "1", "--gpu"]
    assert main([*words, "H100-80GB", "--as-is", "--json", "train.recompute=full"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["layouts"]
    assert "optim" not in row and "host_gib" not in row
    limit = sum(v for k, v in row["memory"].items() if k != "CUDA and NCCL")
    limit -= 0.8 * row["memory"]["optimizer"]
    lines.append(f"memory_gib: {{value: {limit}, source: a test}}")
    gpu.write_text("\n".join(["name: small", "like: H100-80GB", *lines]))
    assert main([*words, str(gpu), "--write", str(out)]) == 0
    assert load_recipe(out).optim.offload == 1
