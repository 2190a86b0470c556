"""Plans of methods with a teacher that the trainers hold: its weights and its pass beside the
student's.
"""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from moetrain.config.builtin import MODELS
from moetrain.config.load import recipe_from
from moetrain.config.recipe import Recipe
from moetrain.layout.memory import GIB, static_bytes
from moetrain.layout.mesh import plan_mesh
from moetrain.models import read_model
from moetrain.planner.closed import Closed
from moetrain.planner.gpu import find_gpu
from moetrain.planner.search import Planned, Search, tracers

H100 = find_gpu("H100-80GB")
HF = MODELS["qwen3-moe-tiny"] | {"num_hidden_layers": 2}
LARGER = HF | {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
START = {"path": "start", "system": "You know it."}
SIZE = 2

pytestmark = pytest.mark.usefixtures("forked_tracers")


def recipe(teacher: dict[str, Any], **parallel: int) -> Recipe:
    return recipe_from(
        {
            "run_dir": "none",
            "model": {"hf": HF, "dtype": "bf16"},
            "method": {"name": "on_policy_distill"},
            "teacher": teacher,
            "data": {"train": ["none"], "seq_len": 256},
            "rollout": {"prompts_per_step": 4, "group_size": 2, "max_tokens": 64},
            "train": {"steps": 1},
            "parallel": parallel,
        }
    )


@pytest.fixture
def pool() -> Any:
    with tracers() as run:
        yield run


def larger(folder: Path) -> str:
    folder.joinpath("config.json").write_text(json.dumps(LARGER))
    return str(folder)


def test_its_weights_and_its_pass(pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A served one costs a step nothing here; the student as it was costs its pass; another model
    its weights, too.
    """

    def planned(teacher: dict[str, Any]) -> Planned:
        return Search(recipe(teacher, ep=2), SIZE, H100, pool=pool).as_is().best

    served = planned({"address": ["http://there:8000/v1"]})
    start = planned(START)
    other = planned({"path": larger(tmp_path)})
    assert start.peak_gib == served.peak_gib and "teacher" not in start.memory
    assert start.seconds.before == pytest.approx(2 * served.seconds.before, rel=5e-3)
    assert start.step_s == pytest.approx(served.step_s + served.seconds.before, rel=5e-3)
    own, started = recipe({"path": str(tmp_path)}, ep=2), recipe(START, ep=2)
    weights = static_bytes(read_model(LARGER), plan_mesh(own.parallel, SIZE), own, {})[0].weights
    assert other.memory["teacher"] * GIB == pytest.approx(weights)
    assert other.peak_gib - served.peak_gib == pytest.approx(weights / GIB)
    assert other.step_s - served.step_s > 3 * served.seconds.before  # it is much larger
    rough = [Closed(each, read_model(HF), H100).rough(each, SIZE) for each in (own, started)]
    assert rough[0].bytes - rough[1].bytes == weights


def test_layouts_are_the_teachers_too(tmp_path: Path) -> None:
    """It has six heads, the student eight."""
    own = recipe({"path": larger(tmp_path)})
    found = list(Search(own, 4, H100).candidates(4))
    assert {each.parallel.tp for each in found} == {1, 2}
    alone = list(Search(recipe(START), 4, H100).candidates(4))
    assert {each.parallel.tp for each in alone} == {1, 2, 4}
